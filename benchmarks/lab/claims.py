"""What the README and the help pages say in prose about measurements, and what their other figures are."""

from . import tables
from .numbers import Claim, Exempt, at
from .readme import own_size_rival

README = "README.md"
HELP = "web/static/docs/"
GUIDANCE = "guidance-resolution"


def _overhead(size: str, kind: str, key: str, pick, leave_out: str = "-") -> float:
    rows = at(f"overhead/sizes/{size}/rows")
    return pick(row[key] for name, row in rows.items() if name.startswith(kind) and leave_out not in name)


def _beyond_fewer_steps() -> float:
    """How far the node's regions lie above fewer steps at equal work, mean of the ratios that lie between two of them."""
    rows = at("region/quality")
    steps = {name: {**row, "calls": row["work"]} for name, row in rows.items() if name.endswith(" steps")}
    ratios = [rows[name] for name in ("ratio 0.5", "ratio 0.25")]
    return sum(row["psnr_mean"] - tables.rival(steps, row["work"], "psnr_mean") for row in ratios) / len(ratios)


def _best_stack(part: str, key: str, ours: bool = True) -> float:
    """Of the fastest arm that stays at 30 dB with every prompt: ours, or plain sampling with fewer steps."""
    good = [
        row for name, row in at(f"stacks/parts/{part}/rows").items()
        if name != "plain" and row["psnr_worst"] >= 30 and ours != name.endswith(" steps")
    ]  # fmt: skip
    return max(good, key=lambda row: row["speedup_processor"])[key]


def _stack_claim(part: str, ours: bool = True) -> tuple:
    return tuple((lambda key=key: _best_stack(part, key, ours)) for key in ("speedup_processor", "psnr_mean", "psnr_worst"))


def _two_threads(pick) -> float:
    rows = at("sparse-kernel-cpu/rows")
    return pick(row["speedup"] for row in rows if row["threads"] == 2 and row["form"] == "gather 25%")


def _found(tokens: int, key: str, pick) -> float:
    return pick(row[key] for row in at(f"attention-search/{tokens} tokens/found").values())


def _seconds(what: str, pick) -> float:
    return pick(at(f"weights/saved/seconds/{what}"))


def _middle(values) -> float:
    return sorted(values)[len(values) // 2]


def _modulations(pick) -> float:
    return pick(row["table_bytes"] for row in at("weights/table") if row["what"] == "modulations") / 1e6


def _predictions() -> list[dict]:
    return [row for part in at("prediction/shapes").values() for row in part["arms"].values()]


def _scaled(path: str, factor: float):
    return lambda: factor * at(path)


def _row(model: str, key: str, what: str) -> float:
    return next(row[key] for row in at("weights/table") if row["model"] == model and row["what"] == what)


CLAIMS = [
    Claim(README, "{:.0f} to {:.0f} microseconds per evaluation with everything off. An engaged method that skips nothing costs "
          "{:.0f} to {:.0f} at demo size (TeaCache {:.0f}), and {:.1f} to {:.1f} % of a step at 1,024 tokens.",
          (lambda: _overhead("demo", "idle", "median_us", min), lambda: _overhead("demo", "idle", "median_us", max),
           lambda: _overhead("demo", "engaged", "median_us", min, "TeaCache"),
           lambda: _overhead("demo", "engaged", "median_us", max, "TeaCache"),
           "overhead/sizes/demo/rows/engaged: TeaCache/median_us",
           lambda: _overhead("large", "engaged", "median_percent", min),
           lambda: _overhead("large", "engaged", "median_percent", max))),
    Claim(README, "{} of {} predictions on the demo models were within {:.0f} % of what was measured, the worst {:.0f} % off", (
        lambda: sum(row["goal_reached"] for row in _predictions()), lambda: len(_predictions()), _scaled("prediction/goal", 100),
        lambda: 100 * max(abs(row["error"]) for row in _predictions()))),
    Claim(README, "at equal work ({:.0f} % of the tokens, {} held-out prompts", (
        _scaled("region/guard/corrected, ratio 0.5/work", 100), "region/guard/corrected, ratio 0.5/prompts")),
    Claim(README, "with a guard that works, give {:.1f} dB to the plain run; the published code's choice, whose guard works "
          "backwards, gives {:.1f} dB.", ("region/guard/corrected, ratio 0.5/psnr_mean",
                                          "region/guard/published, ratio 0.5/psnr_mean")),
    Claim(README, "At equal work that is about {:.0f} dB above leaving steps out.", (_beyond_fewer_steps,)),
    Claim(README, "Following a run takes {:.1f} % of one core", (_scaled("panel-overhead/median_share", 100),)),
    Claim(README, "and the timing nodes {:.1f} % of the demo model's steps or {:.2f} % of a large model's", tuple(
        f"overhead/sizes/{size}/rows/idle: Measure alone/median_percent" for size in ("demo", "large"))),
    Claim(README, "(a plain step of this pipeline takes {:.0f} ms)", ("diffusers_host/overhead/plain/ms_per_step",)),
    Claim(README, "*Fitted 8* on int8 weights, is {:.2f} times faster at {:.1f} dB (worst prompt {:.1f}); fewer plain steps get "
          "{:.2f}x there.", (*_stack_claim("batch"), lambda: _best_stack("batch", "speedup_processor", False))),
    Claim(README, "One picture at a time: {:.2f}x at {:.1f} dB (worst {:.1f}), fewer steps {:.2f}x.", (
        *_stack_claim("image"), lambda: _best_stack("image", "speedup_processor", False))),
    Claim(README, "On the video model {:.2f}x at {:.1f} dB (worst {:.1f}), but fewer steps {:.2f}x at {:.1f} dB (worst {:.1f})", (
        *_stack_claim("video"), *_stack_claim("video", False))),
    Claim(README, "25 % gave {:.1f}x to {:.1f}x.", (lambda: _two_threads(min), lambda: _two_threads(max))),
    Claim(README, "half of them kept gives {:.1f} dB to the plain run", ("sparse-attention/quality/Block mass 50%/psnr_mean",)),
    Claim(README, "plans for {:g} dB, found on one prompt and seed in {:.1f} to {:.1f} minutes each (one core), then run on {} "
          "held-out prompts", ("attention-search/1280 tokens/target", lambda: _found(1280, "seconds_to_find", min) / 60,
                               lambda: _found(1280, "seconds_to_find", max) / 60, "attention-search/1280 tokens/prompts")),
    Claim(README, "A probe took {:.1f} to {:.1f} % of its run.", (
        lambda: 100 * _found(1280, "probe_share", min), lambda: 100 * _found(1280, "probe_share", max))),
    Claim(README, "The probe took {:.1f} % of its run, the search {:.0f} minutes on one core.", (
        lambda: 100 * _found(4205, "probe_share", max), lambda: _found(4205, "seconds_to_find", max) / 60)),
    Claim(README, "On the analytic flow corrected stages to 50 % (work {:.2f}) give {:.1f} dB, 23 of 30 steps {:.1f} dB, coupled "
          "ones {:.1f} dB (work {:.2f}), SPEED {:.1f} dB.", tuple(
              f"{GUIDANCE}/analytic/rows/{row}" for row in (
                  "progressive: Corrected, half size to 50% (15 of 30 steps)/work",
                  "progressive: Corrected, half size to 50% (15 of 30 steps)/psnr_mean", "23 steps/psnr_mean",
                  "progressive: Coupled, half size to 50% (15 of 30 steps)/psnr_mean",
                  "progressive: Coupled, half size to 50% (15 of 30 steps)/work",
                  "progressive: SPEED, half size to 50% (15 of 30 steps)/psnr_mean"))),
    Claim(README, "coupled stages until 20 % of the steps give {:.1f} dB, SPEED's expansion {:.1f} dB, fresh noise {:.1f} dB, as "
          "many fewer steps {:.1f} dB.", (
              *(f"{GUIDANCE}/image, batch 1/rows/progressive: {way}, half size to 20%/psnr_mean"
                for way in ("Coupled", "SPEED", "Fresh noise")), lambda: own_size_rival(20))),
    Claim(README, "smaller stages are no use: corrected to 57 % {:.1f} dB, coupled to 40 % {:.1f} dB, 20 steps {:.1f} dB.", tuple(
        f"{GUIDANCE}/video, batch 1/rows/{row}/psnr_mean" for row in (
            "progressive: Corrected every 4, half size to 57%", "progressive: Coupled, half size to 40%", "20 steps"))),
    Claim(README, "The schedule of {} frames at 480p takes {:.2f} s", (
        "frame-rate/schedule/frames", "frame-rate/schedule/seconds/median")),
    Claim(README, "at {:.0f} % of the latents is {:.2f} times faster in the sampler ({:,} tokens", (
        _scaled("frame-rate/keep", 100), "frame-rate/sampler/sizes/0/sampler_speedup", "frame-rate/sampler/sizes/0/tokens")),
    Claim(README, "A linear layer of {} x {} with {:,} rows takes {:.1f} times less time in int8 than in bf16 "
          "(comfy-kitchen's {:.1f}, torchao's {:.1f} times;", tuple(f"quantization/products/cpu/2/{key}" for key in (
              "k", "n", "m", *(f"times_16_bit/int8, {who}" for who in ("torch._int_mm", "comfy-kitchen", "torchao"))))),
    Claim(README, "{} prompts: {:.1f} MB loaded become {:.1f} MB (pictures) and {:.1f} MB become {:.1f} MB (clips)", (
        "weights/features/0/prompts", *(_scaled(f"weights/features/{place}/{key}", 1e-6)
                                        for place in (0, 1) for key in ("loaded_before", "loaded_after")))),
    Claim(README, "a vocabulary of UMT5-XXL's size ({:.2f} GB) let memory grow by {:.0f} MB.", (
        _scaled("weights/vocabulary/table_bytes", 1e-9), _scaled("weights/vocabulary/grown_bytes", 1e-6))),
    Claim(README, "modulation weights ({:.2f} GB) took {:.1f} s from this disk, checking and reading their table of 20 steps "
          "{:.2f} s", (_scaled("weights/saved/weight_bytes", 1e-9), lambda: _seconds("weights", _middle),
                       lambda: _seconds("table", _middle))),
    Claim(README, "has a flow loss of {:.4f}, the recipe's moving average {:.4f}, the mean {:.4f}, the best single checkpoint "
          "{:.4f}; the search took {} evaluations.", (
              *(f"checkpoint-combination/losses/{name}/test" for name in (
                  "searched combination (LCSC)", "moving average (EMA 0.998, the recipe's)", "mean of all",
                  "best single checkpoint")), "checkpoint-combination/evaluations")),
    Claim(README, "are still a little better ({:.4f})", ("checkpoint-combination/before",)),
    Claim(README, "leaving a block out at every step {:+.2f} ({} blocks) and {:+.2f} ({} blocks), reusing its last residual at "
          "every second step {:+.2f} and {:+.2f}.", tuple(
              f"weights/blocks/{place}" for place in (
                  "0/rank_correlation/drop", "0/blocks", "1/rank_correlation/drop", "1/blocks", "0/rank_correlation/reuse",
                  "1/rank_correlation/reuse"))),
    Claim(HELP + "StrettoProgressiveResolution.md", "half size to 57 % gives {:.1f} dB corrected (one clip), to 40 % {:.1f} dB "
          "coupled, and 20 steps give {:.1f} dB", tuple(
              f"{GUIDANCE}/video, batch 1/rows/{row}/psnr_mean" for row in (
                  "progressive: Corrected every 4, half size to 57%", "progressive: Coupled, half size to 40%", "20 steps"))),
    Claim(HELP + "StrettoLoadTextEncoder.md", "512 rows of UMT5's table took {:.0f} ms.", (
        _scaled("weights/vocabulary/seconds_512_rows", 1e3),)),
    Claim(HELP + "StrettoLoadTextEncoder.md", "whose table takes {:.1f} GB in 16 bit", (
        _scaled("weights/vocabulary/table_bytes", 1e-9),)),
    Claim(HELP + "StrettoTemporalFeatureCache.md", "some {:.1f} GB for Wan 14B", (
        lambda: _row("Wan 2.1/2.2 14B", "table_bytes", "keys and values of the prompt") / 1e9,)),
    Claim(HELP + "StrettoTemporalFeatureCache.md", "({:.0f} to {:.0f} MB per 28 timesteps", (
        lambda: _modulations(min), lambda: _modulations(max))),
    Claim(HELP + "StrettoTemporalFeatureCache.md", "Weights of {:.1f} GB, a fifteenth of Qwen-Image's, took {:.1f} to {:.1f} s "
          "to read from a disk; checking and reading their table of 20 timesteps took {:.1f} s", (
              _scaled("weights/saved/weight_bytes", 1e-9), lambda: _seconds("weights", min), lambda: _seconds("weights", max),
              lambda: _seconds("table", _middle))),
]  # fmt: skip

NAME, SETTING, LIMIT, ARITHMETIC = "a name or version", "a setting", "a limit that the code keeps", "arithmetic"
EXEMPT = [
    Exempt(README, "Python 3.10", NAME),
    Exempt(README, "Wan 2.1 / 2.2", NAME),
    Exempt(README, "Stable Diffusion 3.5 Large", NAME),
    Exempt(README, "Wan 2.1 text to video", NAME),
    Exempt(README, "Wan 2.2 text to video", NAME),
    Exempt(README, "The fastest that stays at 30 dB", SETTING),
    Exempt(README, "HunyuanVideo 1.0 / 1.5 and HunyuanImage 2.1", NAME),
    Exempt(README, "Apache-2.0", NAME),
    Exempt(README, "(about 6 GB, a few minutes)", "the size of a download, and it depends on the machine"),
    Exempt(README, "on a busier machine, 25 % gave", SETTING),
    Exempt(README, "and 30 dB hold for other prompts", "the target, above"),
    Exempt(README, "near 30 dB one small error", "the target, above"),
    Exempt(HELP + "StrettoAttentionPlan.md", "| 25 % of the tokens, full for 20 % of the steps", SETTING),
    Exempt(HELP + "StrettoAttentionPlan.md", "| 3.125 %, 25 %, one step in 5", SETTING),
    Exempt(HELP + "StrettoAttentionPlan.md", "| 25 %, 25 %, one step in 5", SETTING),
    Exempt(HELP + "StrettoAttentionPlan.md", "| 10 %, 25 %, one step in 5", SETTING),
    Exempt(HELP + "StrettoAttentionSearch.md", "Near 30 dB a small error", "an order of size, no figure of a run"),
    Exempt(HELP + "StrettoCache.md", "save less than 0.5 %", LIMIT),
    Exempt(HELP + "StrettoCombineWeights.md", "1.5 times that file", SETTING),
    Exempt(HELP + "StrettoDynamicFrameRate.md", "falls to 60 %", ARITHMETIC),
    Exempt(HELP + "StrettoDynamicFrameRate.md", "to 36 % where attention decides", ARITHMETIC),
    Exempt(HELP + "StrettoLoadDiffusionModel.md", "in less than 1 GB of memory", "a bound that a test holds"),
    Exempt(HELP + "StrettoQuantize.md", "in less than 1 GB of memory", "a bound that a test holds"),
    Exempt(HELP + "StrettoLoadDiffusionModel.md", "up to 1.4 times as far", "arithmetic: two independent roundings"),
    Exempt(HELP + "StrettoLoadTextEncoder.md", "0.2 % of UMT5's 256,384", ARITHMETIC),
    Exempt(HELP + "StrettoProgressiveResolution.md", "the first 20 % or 40 % of the steps", SETTING),
    Exempt(HELP + "StrettoTemporalFeatureCache.md", "at most 512 MB per model", LIMIT),
]  # fmt: skip
