"""Vocabulary rows in ComfyUI's own text encoders (T15): the same encoding to the bit, and no table in memory."""

import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.text_encoders.llama as llama
import comfy.text_encoders.t5 as t5
import pytest
import torch
from comfy.model_management import module_size
from comfy.model_patcher import ModelPatcher
from safetensors.torch import save_file

from stretto.acceleration.embeddings.rows import FileRows, MemoryRows
from stretto.acceleration.errors import StrettoError
from stretto.acceleration.hosts import comfy_quantization as host
from stretto.acceleration.hosts.comfy_vocabulary import placeholder, row_operations
from stretto.nodes import StrettoLoadTextEncoder

VOCABULARY, WIDTH = 300, 32
T5_CONFIG = {
    "d_ff": 48, "d_kv": 16, "d_model": WIDTH, "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True,
    "model_type": "t5", "num_heads": 2, "num_layers": 2, "vocab_size": VOCABULARY, "pad_token_id": 0,
}  # fmt: skip
LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
#: Class, configuration, name of the table.
ENCODERS = {
    "t5": (t5.T5, T5_CONFIG, "shared.weight"),
    "umt5": (t5.T5, {**T5_CONFIG, "model_type": "umt5"}, "shared.weight"),
    "llama": (llama.Llama2, LLAMA, "model.embed_tokens.weight"),
    "qwen": (llama.Qwen25_3B, LLAMA, "model.embed_tokens.weight"),
    "gemma": (llama.Gemma2_2B, LLAMA, "model.embed_tokens.weight"),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
TOKENS = [[5, 7, 299, 7, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 0, 0]]


def tensors_of(kind, dtype):
    make, config, name = ENCODERS[kind]
    generator = torch.Generator().manual_seed(1)
    model = make(dict(config), torch.float32, "cpu", comfy.ops.manual_cast)
    found = {}
    for key, value in model.state_dict().items():
        found[key] = (torch.randn(value.shape, generator=generator) * 0.3).to(dtype)
    return found, name


def encoder(kind, dtype, operations):
    make, config, _ = ENCODERS[kind]
    return comfy.sd1_clip.SDClipModel(
        textmodel_json_config=dict(config), model_class=make, dtype=dtype, layer="last", device="cpu", max_length=8,
        special_tokens={"end": 1, "pad": 0}, enable_attention_masks=True, zero_out_masked=True,
        model_options={"custom_operations": operations},
    )  # fmt: skip


def encode(model):
    with torch.no_grad():
        out = model(TOKENS)[0]
    assert torch.isfinite(out).all() and out.abs().sum() > 0
    return out


@pytest.mark.parametrize("where", ["file", "memory"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_are_equal_to_the_bit_and_hold_no_table(tmp_path, kind, dtype, where):
    if kind == "gemma" and dtype == torch.float8_e4m3fn:
        pytest.skip("ComfyUI's own Gemma cannot run in fp8: its norms add to their weight")
    tensors, name = tensors_of(kind, dtype)
    save_file(tensors, tmp_path / "text.safetensors")
    plain = encoder(kind, dtype, host.quantized_operations({}))
    plain.load_sd(dict(tensors))
    rows = FileRows.open(tmp_path / "text.safetensors", name) if where == "file" else MemoryRows(tensors[name])
    operations, taken = row_operations(host.quantized_operations({}), [rows])
    model = encoder(kind, dtype, operations)
    missing, unexpected = model.load_sd({**tensors, name: placeholder(rows)})
    assert not unexpected and name not in missing and taken == [rows]
    assert torch.equal(encode(plain), encode(model))
    assert module_size(plain) - module_size(model) == tensors[name].nbytes
    assert not any(tuple(tensor.shape) == (VOCABULARY, WIDTH) for tensor in (*model.parameters(), *model.buffers()))
    patcher = ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    for memory in (0, 1):  # in full, and as good as nothing of it
        patcher.load(torch.device("cpu"), lowvram_model_memory=memory, full_load=memory == 0)
        assert torch.equal(encode(plain), encode(model))
        patcher.unpatch_model(torch.device("cpu"))


def test_a_model_of_another_dtype_rounds_as_comfyui_does(tmp_path):
    tensors, name = tensors_of("t5", torch.float32)
    plain, rows = encoder("t5", torch.float16, comfy.ops.manual_cast), MemoryRows(tensors[name])
    plain.load_sd(dict(tensors))
    model = encoder("t5", torch.float16, row_operations(comfy.ops.manual_cast, [rows])[0])
    model.load_sd({**tensors, name: placeholder(rows)})
    assert torch.equal(encode(plain), encode(model))


def test_an_embedding_of_the_tables_size_that_is_given_numbers_keeps_them():
    rows = MemoryRows(torch.randn(8, 4))
    operations, taken = row_operations(comfy.ops.manual_cast, [rows])
    embedding, weight = operations.Embedding(8, 4, device="cpu", dtype=torch.float32), torch.randn(8, 4)
    embedding.load_state_dict({"weight": weight})
    assert torch.equal(embedding(torch.arange(8), out_dtype=torch.float32), weight) and not taken


def test_whoever_needs_the_whole_table_is_told_why_it_is_not_there():
    rows = MemoryRows(torch.randn(8, 4))
    embedding = row_operations(comfy.ops.manual_cast, [rows])[0].Embedding(8, 4, dtype=torch.bfloat16)
    embedding.load_state_dict({"weight": placeholder(rows)})
    assert embedding.weight.device.type == "cpu" and embedding.weight.dtype == torch.bfloat16
    with pytest.raises(AttributeError, match="vocabulary 'loaded'"):
        _ = embedding.weight.T
    other = row_operations(comfy.ops.manual_cast, [rows])[0].Embedding(8, 6, dtype=torch.bfloat16)
    with pytest.raises(StrettoError, match=r"the file has \[8, 4\], ComfyUI's model \[8, 6\]"):
        other.load_state_dict({"weight": placeholder(rows)})


@pytest.mark.parametrize("form", ["bf16", "fp8", "gguf-like"])
def test_the_loader_leaves_the_table_where_it_is(tmp_path, monkeypatch, form):
    """Through the node's own path; ComfyUI's detection of sizes is replaced, since only full-size encoders pass it."""
    dtype = torch.float8_e4m3fn if form == "fp8" else torch.bfloat16
    tensors, _ = tensors_of("t5", dtype)
    path = tmp_path / "t5.safetensors"
    save_file(tensors, path)

    def load(dicts, model_options, **options):
        model = encoder("t5", dtype, model_options["custom_operations"])
        model.load_sd(dicts[0])
        return model

    monkeypatch.setattr(comfy.sd, "load_text_encoder_state_dicts", load)
    plain = encoder("t5", dtype, comfy.ops.manual_cast)
    plain.load_sd(dict(tensors))
    mode = host.IN_MEMORY if form == "gguf-like" else host.IN_FILE
    model, (report,) = host.load_text_encoder([str(path)], "sd3", vocabulary=mode)
    assert torch.equal(encode(plain), encode(model)) and report.loader == host.STRETTO
    assert f"vocabulary 300 x 32 stays in {'system memory' if mode == host.IN_MEMORY else 'the file'}" in report.text()
    with pytest.raises(StrettoError, match="loads vocabularies whole"):
        host.load_text_encoder([str(path)], "sd3", loader=host.CORE, vocabulary=mode)
    with pytest.raises(StrettoError, match="vocabulary 'here': known are"):
        host.load_text_encoder([str(path)], "sd3", vocabulary="here")
    if mode == host.IN_FILE:
        save_file({**tensors, "more": torch.zeros(1)}, path)
        with pytest.raises(StrettoError, match=r"t5\.safetensors: was changed"):
            model(TOKENS)
    monkeypatch.setattr(comfy.sd, "load_text_encoder_state_dicts", lambda *args, **options: torch.nn.Module())
    with pytest.raises(StrettoError, match="no place for a vocabulary by rows"):
        host.load_text_encoder([str(path)], "sd3", vocabulary=mode)


def test_the_node_offers_it_last():
    names = list(StrettoLoadTextEncoder.INPUT_TYPES()["optional"])
    assert names[-1] == "vocabulary"
