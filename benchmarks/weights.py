"""Weights that need not be there: bytes per model, computed from ComfyUI's own classes, and measured on the demo models.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/weights.py             all parts, about 4 minutes on one core
    .venv/bin/python benchmarks/weights.py --parts table                 the table alone, seconds

Parts: *table* builds published architectures on the meta device and counts what feature tables, vocabulary rows and published
depth pruning leave out (16 bit a weight); *features* runs the demo models from the file and compares bytes and pictures;
*saved* reads weights from a file and, in their place, a saved table, both after the file was dropped from memory;
*vocabulary* looks rows up in a table of UMT5-XXL's size in a sparse file; *blocks* compares the probe's ranking of blocks with
the damage of real runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import struct
import tempfile
import time
from functools import partial
from pathlib import Path

from overhead import ROOT, prepare

RESULT = ROOT / "benchmarks" / "results" / "weights.json"
PARTS = ("table", "features", "saved", "vocabulary", "blocks")
GB = 1e9
_FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 768, "context_in_dim": 4096,
    "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38, "axes_dim": [16, 56, 56],
    "theta": 10000, "qkv_bias": True, "guidance_embed": True,
}  # fmt: skip
_WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 5120, "num_heads": 40, "ffn_dim": 13824, "num_layers": 40,
    "patch_size": (1, 2, 2), "freq_dim": 256, "text_dim": 4096, "window_size": (-1, -1), "qk_norm": True,
    "cross_attn_norm": True, "eps": 1e-6, "in_dim": 16, "out_dim": 16,
}  # fmt: skip
#: Model -> (class of supported_models, configuration as ComfyUI detects it).
MODELS = {
    "FLUX.1-dev": ("Flux", _FLUX),
    "Qwen-Image": ("QwenImage", {
        "image_model": "qwen_image", "in_channels": 64, "num_layers": 60, "attention_head_dim": 128, "num_attention_heads": 24,
        "joint_attention_dim": 3584, "axes_dims_rope": (16, 56, 56),
    }),
    "SD3.5 large": ("SD3", {
        "in_channels": 16, "patch_size": 2, "out_channels": 16, "input_size": None, "adm_in_channels": 2048, "depth": 38,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 2432}},
        "num_patches": 36864, "pos_embed_max_size": 192, "context_processor_layers": None, "qk_norm": "rms",
    }),
    "HunyuanVideo": ("HunyuanVideo", {
        **_FLUX, "image_model": "hunyuan_video", "patch_size": [1, 2, 2], "depth": 20, "depth_single_blocks": 40, "theta": 256,
        "byt5": False, "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None,
    }),
    "AuraFlow": ("AuraFlow", {
        "in_channels": 4, "dim": 3072, "n_layers": 36, "n_double_layers": 4, "n_heads": 12, "global_conddim": 3072,
        "cond_seq_dim": 2048, "max_seq": 9216,
    }),
    "Wan 2.1/2.2 14B": ("WAN21_T2V", _WAN),
    "Wan 2.2 5B": ("WAN22_T2V", {
        **_WAN, "dim": 3072, "num_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_dim": 48, "out_dim": 48,
    }),
    "LTX-Video 2B": ("LTXV", {
        "image_model": "ltxv", "in_channels": 128, "cross_attention_dim": 2048, "attention_head_dim": 64,
        "num_attention_heads": 32, "caption_channels": 4096, "num_layers": 28,
    }),
}  # fmt: skip
#: Text encoder -> ComfyUI's class or configuration.
VOCABULARIES = {
    "T5-XXL (FLUX, SD3.5)": "t5xxl",
    "UMT5-XXL (Wan)": "umt5xxl",
    "Qwen2.5-VL 7B (Qwen-Image)": "Qwen25_7BVLI",
    "Llama 3 8B (HunyuanVideo, HiDream)": "Llama2",
    "Gemma 2 2B (Lumina 2)": "Gemma2_2B",
    "Qwen3 4B (Z-Image)": "Qwen3_4B",
}
STEPS = 28


def say(line: str) -> None:
    """A line of progress."""
    print(line, flush=True)


def network_of(name: str):
    """A published network on the meta device."""
    import comfy.model_base
    import comfy.ops
    import comfy.supported_models
    import torch

    kind, config = MODELS[name]
    model_config = getattr(comfy.supported_models, kind)(dict(config))
    model_config.set_inference_dtype(torch.bfloat16, None)
    return model_config.get_model({}, "", device=torch.device("meta")).diffusion_model


def table() -> list[dict]:
    """Bytes that need not be loaded, per model."""
    import comfy.text_encoders.llama as llama
    import comfy.text_encoders.t5 as t5
    import torch
    from comfy.ops import manual_cast

    from stretto.acceleration.models import describe
    from stretto.acceleration.temporal_features.technique import _width, prompt_paths

    rows = []
    for name in MODELS:
        network = network_of(name)
        descriptor = describe(network)
        total = 2 * sum(parameter.numel() for parameter in network.parameters())
        modulations = descriptor.modulation_parts(network)
        prompts = prompt_paths(descriptor, network)
        paths = modulations or prompts
        left = sum(2 * weight.numel() for path in paths for key, weight in network.get_submodule(path).named_parameters()
                   if key.endswith("weight"))  # fmt: skip
        per = STEPS if modulations else descriptor.text_tokens
        rows.append({
            "model": name, "what": "modulations" if modulations else "keys and values of the prompt", "total_bytes": total,
            "saved_bytes": left, "table_bytes": 2 * per * _width(network, paths),
            "table_for": f"{STEPS} steps, one row" if modulations else f"a prompt of {per} tokens", "exact": "to the bit",
        })  # fmt: skip
        say(f"{name:20s} {total / GB:6.1f} GB, {left / GB:5.2f} GB ({left / total:4.0%}) need not be loaded; "
            f"table {rows[-1]['table_bytes'] / 1e6:,.0f} MB for {rows[-1]['table_for']}")  # fmt: skip
    folder = Path(t5.__file__).parent
    for name, kind in VOCABULARIES.items():
        with torch.device("meta"):
            if hasattr(llama, kind):
                model = getattr(llama, kind)({}, torch.bfloat16, "meta", manual_cast)
                embedding = model.get_input_embeddings().weight
            else:
                file = {"t5xxl": "t5_config_xxl.json", "umt5xxl": "umt5_config_xxl.json"}[kind]
                model = t5.T5(json.loads((folder / file).read_text()), torch.bfloat16, "meta", manual_cast)
                embedding = model.shared.weight
        total, left = 2 * sum(parameter.numel() for parameter in model.parameters()), 2 * embedding.numel()
        rows.append({
            "model": name, "what": "vocabulary", "total_bytes": total, "saved_bytes": left,
            "table_bytes": 512 * 2 * embedding.shape[1], "table_for": "512 tokens", "exact": "to the bit",
        })  # fmt: skip
        say(f"{name:36s} {total / GB:6.1f} GB, vocabulary {left / GB:5.2f} GB ({left / total:4.0%})")
    from stretto.acceleration.weights.depth import preset_drop

    network, (dropped, _) = network_of("Qwen-Image"), preset_drop("ppcl-qwen-image")
    blocks = [sum(2 * p.numel() for p in block.parameters()) for block in network.transformer_blocks]
    total = 2 * sum(parameter.numel() for parameter in network.parameters())
    left = sum(blocks[index] for index in dropped["transformer_blocks"])
    rows.append({
        "model": "Qwen-Image, PPCL's list", "what": f"{len(dropped['transformer_blocks'])} of {len(blocks)} blocks",
        "total_bytes": total, "saved_bytes": left, "table_bytes": 0, "table_for": "",
        "exact": "no: needs distillation; published, not measured here",
    })  # fmt: skip
    say(f"{'Qwen-Image, PPCL':36s} {total / GB:6.1f} GB, {left / GB:5.2f} GB ({left / total:4.0%}), not exact")
    return rows


def resident() -> int:
    """Resident bytes of this process."""
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def features() -> list[dict]:
    """The demo models with their feature weights in memory and in the file."""
    import torch
    from caching import Bench
    from module_table import sample

    from stretto.acceleration.hosts import comfy as host
    from stretto.acceleration.hosts import comfy_quantization as loading
    from stretto.acceleration.plan import Request

    rows = []
    for which, steps in (("image", 28), ("video", 10)):
        bench = Bench(which)
        prompts = ["fluent red apple", "noto cat face", "flat blue heart"]
        path = ROOT / "demo" / "models" / "diffusion_models" / f"stretto-demo-{which}.safetensors"
        bare, _ = loading.load_diffusion_model(str(path), features=loading.FEATURE_WEIGHTS[1])
        wanted = Request("temporal_features", {"mode": "exact", "prompt": True}, required=True)
        model = host.request(_sampling_like(bench.model, bare), wanted)
        equal, seconds = True, {"plain": [], "first": [], "again": []}
        for prompt in prompts:
            made = {}
            for arm, used in (("plain", bench.model), ("first", model), ("again", model)):
                begun = time.process_time()
                made[arm] = sample(bench, used, prompt, steps, 1)
                seconds[arm].append(time.process_time() - begun)
            equal = equal and torch.equal(made["plain"], made["first"]) and torch.equal(made["plain"], made["again"])
        section = host.TRACES.of_prompt(None)[-1]["features"]
        before, after = bench.model.model_size(), model.model_size()
        rows.append({
            "model": f"demo {which}", "loaded_before": before, "loaded_after": after, "table_bytes": section["table_bytes"],
            "equal": equal, "prompts": len(prompts), "steps": steps,
            "seconds": {arm: statistics.median(values) for arm, values in seconds.items()}, "components": section["components"],
        })  # fmt: skip
        say(f"demo {which}: loaded {before / 1e6:.1f} MB -> {after / 1e6:.1f} MB, tables {section['table_bytes'] / 1e6:.2f} MB, "
            f"equal to the bit: {equal}; seconds {rows[-1]['seconds']}")  # fmt: skip
    return rows


def saved() -> dict:
    """What the first run after a restart reads: eight of Qwen-Image's 120 modulations (0.9 GB), or their table of 20 steps."""
    import torch
    from safetensors.torch import save_file

    from stretto.acceleration.embeddings.rows import FileRows
    from stretto.acceleration.temporal_features.saved import UNCHANGED, identity, read_tables, write_tables
    from stretto.acceleration.temporal_features.tables import FeatureTables

    device, layers, tables = torch.device("cpu"), {}, FeatureTables()
    seconds: dict[str, list[float]] = {"weights": [], "table": []}
    with tempfile.TemporaryDirectory(dir=ROOT / ".cache" if (ROOT / ".cache").is_dir() else None) as folder:
        path, saved_path = Path(folder) / "weights.safetensors", Path(folder) / "table.safetensors"
        save_file({f"{i}.weight": torch.randn(18432, 3072).bfloat16() for i in range(8)}, path)
        for i in range(8):
            layers[str(i)] = layer = torch.nn.Linear(1, 1)
            layer.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
            layer.stretto_source = FileRows.open(path, f"{i}.weight")
            for step in range(20):
                tables.keep((UNCHANGED, bytes([step]) * 32), str(i), torch.randn(2, 1, 18432).bfloat16())
        write_tables(saved_path, identity("", "exact", layers, device), layers, tables)
        for _ in range(5):
            _drop(path)
            begun = time.perf_counter()
            for layer in layers.values():
                layer.stretto_source.whole()
            seconds["weights"].append(time.perf_counter() - begun)
            _drop(path, saved_path)
            begun = time.perf_counter()
            read_tables(saved_path, identity("", "exact", layers, device), layers)
            seconds["table"].append(time.perf_counter() - begun)
        found = {"weight_bytes": path.stat().st_size, "table_bytes": saved_path.stat().st_size, "seconds": seconds}
    weights, table_ = (statistics.median(seconds[name]) for name in ("weights", "table"))
    say(f"after a restart: {found['weight_bytes'] / GB:.2f} GB of weights in {weights:.2f} s, their table in {table_:.2f} s")
    return found


def _drop(*paths: Path) -> None:
    """Drop files from the memory of the operating system."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def _sampling_like(model, other):
    """Give ``other`` the noise schedule that ``model`` carries as a patch."""
    for name, patch in model.object_patches.items():
        other.add_object_patch(name, patch)
    return other


def vocabulary() -> dict:
    """UMT5-XXL's table, 256,384 x 4,096 in 16 bit, as a sparse file: memory and time of looking rows up."""
    import torch

    from stretto.acceleration.embeddings.rows import FileRows, embed

    rows, width = 256384, 4096
    with tempfile.TemporaryDirectory(dir=ROOT / ".cache" if (ROOT / ".cache").is_dir() else None) as folder:
        path, size = Path(folder) / "umt5.safetensors", rows * width * 2
        header = json.dumps({"shared.weight": {"dtype": "BF16", "shape": [rows, width], "data_offsets": [0, size]}}).encode()
        header += b" " * (-len(header) % 8)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + size)
        before = resident()
        table_ = FileRows.open(path, "shared.weight")
        seconds, peak = [], before
        for seed in range(20):
            ids = torch.randint(0, rows, (1, 512), generator=torch.Generator().manual_seed(seed))
            begun = time.process_time()
            embed(table_, ids)
            seconds.append(time.process_time() - begun)
            peak = max(peak, resident())
    found = {"table_bytes": size, "grown_bytes": peak - before, "seconds_512_rows": statistics.median(seconds)}
    say(f"vocabulary of {size / GB:.2f} GB: memory grew by {found['grown_bytes'] / 1e6:.1f} MB, "
        f"512 rows in {1000 * found['seconds_512_rows']:.1f} ms")  # fmt: skip
    return found


def blocks() -> list[dict]:
    """The probe's ranking beside what dropping or reusing each block does to the result of real runs."""
    import torch
    from caching import Bench
    from module_table import sample

    from stretto.acceleration.caching.masks import Table
    from stretto.acceleration.caching.table import table_settings
    from stretto.acceleration.hosts import comfy as host
    from stretto.acceleration.hosts.comfy_block_probe import probe_blocks
    from stretto.acceleration.models import describe
    from stretto.acceleration.plan import Request
    from stretto.acceleration.weights.block_probe import DROP, REUSE, rank_correlation

    rows = []
    prompts = ["fluent blue heart", "noto cat face"]
    for which, steps in (("video", 12), ("image", 20)):
        bench = Bench(which)
        sites = describe(bench.model.model.diffusion_model).sites(bench.model.model.diffusion_model)
        told = {kind: [0.0] * len(sites) for kind in (DROP, REUSE)}
        real = {kind: [0.0] * len(sites) for kind in (DROP, REUSE)}
        for prompt in prompts:
            ranking, plain = probe_blocks(bench.model, partial(_sampled, bench, prompt, steps), 4)
            for depth, site in enumerate(sites):
                clone = bench.model.clone()
                clone.set_model_patch_replace(_identity, "dit", site.kind, site.index)
                table_ = [[True] * len(sites) for _ in range(steps)]
                for step in range(2, steps - 1, 2):
                    table_[step][depth] = False
                drawn = ["".join("#" if one else "." for one in row) for row in table_]
                settings = table_settings(Table.from_json(drawn, "probe"))
                other = {DROP: clone, REUSE: host.request(bench.model, Request("table", settings, required=True))}
                for kind, model in other.items():
                    away = torch.linalg.vector_norm(sample(bench, model, prompt, steps, 7) - plain)
                    real[kind][depth] += float(away / torch.linalg.vector_norm(plain)) / len(prompts)
                    told[kind][depth] += ranking.damage[kind][depth] / len(prompts)
        row = {"model": f"demo {which}", "blocks": len(sites), "prompts": len(prompts), "steps": steps}
        row |= {"told": told, "real": real}
        row["rank_correlation"] = {kind: rank_correlation(told[kind], real[kind]) for kind in told}
        rows.append(row)
        for kind in (DROP, REUSE):
            say(f"demo {which}, {kind}: rank correlation {row['rank_correlation'][kind]:+.2f}; "
                f"probe {[round(v, 3) for v in told[kind]]}, runs {[round(v, 3) for v in real[kind]]}")  # fmt: skip
    return rows


def _sampled(bench, prompt, steps, model):
    from module_table import sample

    return sample(bench, model, prompt, steps, 7)


def _identity(args, extra):
    return {name: args[name] for name in ("img", "txt") if name in args}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--comfyui", type=Path, default=ROOT / ".comfyui")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    prepare(args.comfyui)
    import torch

    found = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    with torch.inference_mode():
        for part in args.parts:
            say(f"== {part}")
            found[part] = globals()[part]()
            args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
