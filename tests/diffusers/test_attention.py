"""Sparse attention on tiny transformers of diffusers: off and complete it changes nothing, elsewhere it knows the tokens."""

from dataclasses import replace

import pytest
import torch

from stretto.acceleration.attention.geometry import Geometry
from stretto.acceleration.attention.locate import locate
from stretto.acceleration.attention.planned.schedules import SCHEDULES
from stretto.acceleration.attention.session import AttentionSession
from stretto.acceleration.errors import ConflictError, StrettoError
from stretto.acceleration.hosts.diffusers import accelerate
from stretto.acceleration.models.diffusers import transformer_of
from stretto.acceleration.plan import Request

from .tiny import FAMILIES, TEXT, loop

SMALL = {"min_tokens": 0, "block": 16, "dense_until": 0.0}
#: Latents of several blocks of 16 tokens, most with a last one that is not full.
LATENTS = {
    "SD3Transformer2DModel": (4, 14, 12),
    "FluxTransformer2DModel": (42, 8),
    "WanTransformer3DModel": (4, 3, 8, 8),
    "QwenImageTransformer2DModel": (42, 16),
    "HunyuanVideoTransformer3DModel": (4, 3, 8, 8),
    "LTXVideoTransformer3DModel": (42, 8),
    "CogVideoXTransformer3DModel": (3, 4, 8, 8),
    "PixArtTransformer2DModel": (4, 14, 12),
    "DiTTransformer2DModel": (4, 12, 12),
    "Lumina2Transformer2DModel": (4, 14, 12),
}
#: Where the picture's tokens begin.
FIRST = {
    "FluxTransformer2DModel",
    "QwenImageTransformer2DModel",
    "CogVideoXTransformer3DModel",
    "Lumina2Transformer2DModel",
}

every_family = pytest.mark.parametrize("name", FAMILIES)


def sparse(force=False, technique="attention", **settings):
    return Request(technique, {**SMALL, **settings} if technique == "attention" else settings, force=force)


def relative(a, b):
    return float((a - b).norm() / b.norm())


@every_family
@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_off_is_bit_exact_and_complete_within_rounding(name, guidance):
    pipe = loop(name, guidance_scale=guidance)
    options = {"steps": 3, "batch": 2, "latent": LATENTS[name]}
    plain = pipe(**options)
    with accelerate(pipe, sparse(keep=1.0)) as run:
        assert torch.equal(plain, pipe(**options))
    assert run.trace["techniques"][0]["status"] == "off" and "attention" not in run.trace
    with accelerate(pipe, replace(sparse(keep=1.0, force=True), required=True)) as run:
        result = pipe(**options)
    found, network = run.trace["attention"], pipe.transformer
    assert relative(result, plain) < 1e-5
    assert len(found["layers"]) == transformer_of(network).descriptor.module_blocks(network), found["dense"]
    assert all(share == 1.0 for item in found["layers"] for share in item["kept"])
    assert all("forward" not in module.__dict__ for module in network.modules())
    assert torch.equal(plain, pipe(**options))


@every_family
def test_a_part_of_the_blocks_runs_everywhere_and_is_reported(name):
    pipe, options = loop(name), {"steps": 3, "latent": LATENTS[name]}
    plain = pipe(**options)
    with accelerate(pipe, sparse(keep=0.4)) as run:
        first = pipe(**options)
        assert torch.equal(first, pipe(**options))
    trace = run.trace
    assert bool(first.isfinite().all()) and 0 < relative(first, plain) < 1
    assert all(0 < share < 1 for item in trace["attention"]["layers"] for share in item["kept"])
    assert all(0 < entry["attention_kept"] < 1 for entry in trace["evaluations"])
    assert not trace["attention"]["dense"]


@every_family
def test_the_pictures_tokens_are_found(name, monkeypatch):
    """Tokens whose queries change with the latent alone are the picture's (in the first layer, before they have mixed)."""
    pipe, original = loop(name, guidance_scale=1.0), AttentionSession.attention

    def watched(seed):
        found = []

        def attention(self, call, asked):
            if not found:
                found.append((asked.q[:1].clone(), locate(self.descriptor, self.network, call, asked)))
            return original(self, call, asked)

        monkeypatch.setattr(AttentionSession, "attention", attention)
        with accelerate(pipe, sparse(keep=0.5)):
            pipe(steps=1, seed=seed, latent=LATENTS[name])
        return found[0]

    (first, geometry), (second, _) = watched(1), watched(2)
    assert isinstance(geometry, Geometry), geometry
    assert geometry.start == (TEXT if name in FIRST else 0) and min(geometry.grid[1:]) > 1
    changed = (first != second).any(dim=-1).any(dim=1)[0].nonzero().flatten()
    assert geometry.start == int(changed.min()) and geometry.start + geometry.visual == int(changed.max()) + 1


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "HunyuanVideoTransformer3DModel", "FluxTransformer2DModel"])
def test_dense_steps_and_layers_are_the_networks_own(name):
    pipe, options = loop(name), {"steps": 4, "latent": LATENTS[name]}
    plain, layers = pipe(**options), transformer_of(pipe.transformer).descriptor.module_blocks(pipe.transformer)
    with accelerate(pipe, sparse(keep=0.4, dense_layers=list(range(layers)))) as run:
        assert torch.equal(plain, pipe(**options))
    assert set(run.trace["attention"]["dense"]) == {"layers that stay dense"}
    with accelerate(pipe, sparse(keep=0.4, dense_until=0.5)) as run:
        pipe(**options)
    assert [entry["attention_kept"] is None for entry in run.trace["evaluations"]] == [True, True, False, False]


def test_a_batch_is_its_items():
    pipe, options = loop("SD3Transformer2DModel"), {"steps": 3, "latent": LATENTS["SD3Transformer2DModel"]}
    with accelerate(pipe, sparse(keep=0.5, method="Sliding tiles")):
        both, one = pipe(batch=2, **options), pipe(batch=1, **options)
    assert relative(both[:1], one) < 1e-5


def test_beside_a_cache_skipped_steps_attend_to_nothing():
    pipe = loop("WanTransformer3DModel")
    taylor = Request("cache", {"method": "Taylor", "interval": 2, "warmup": 2, "tail": 1})
    with accelerate(pipe, [taylor, sparse(keep=0.5)]) as run:
        pipe(latent=LATENTS["WanTransformer3DModel"])
    entries = run.trace["evaluations"]
    assert run.trace["totals"]["forecast"] == 3
    assert all((entry["attention_kept"] is None) == (entry["decision"] != "computed") for entry in entries)


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "SD3Transformer2DModel"])
@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_every_schedule_of_reuse_runs(name, schedule):
    pipe, options = loop(name), {"steps": 6, "latent": (*LATENTS[name][:-2], 16, 16)}
    plain = pipe(**options)
    plan = Request("attention_plan", {"schedule": schedule, "min_tokens": 0, "full_until": 0.2}, required=True)
    with accelerate(pipe, plan) as run:
        result = pipe(**options)
        assert torch.equal(result, pipe(**options))
    assert run.trace["techniques"][0]["status"] == "active"
    assert bool(result.isfinite().all()) and not torch.equal(result, plain)
    assert torch.equal(plain, pipe(**options))


def test_masked_text_is_a_shorter_sequence():
    """HunyuanVideo masks the end of its text: those keys count for nothing in sparse attention either."""
    pipe = loop("HunyuanVideoTransformer3DModel", guidance_scale=1.0)
    family, original = FAMILIES[pipe.name], FAMILIES[pipe.name].arguments

    def masked(network, latent, text):
        arguments = original(network, latent, text)
        arguments["encoder_attention_mask"][:, TEXT - 2 :] = False
        return arguments

    FAMILIES[pipe.name] = replace(family, arguments=masked)
    try:
        options = {"steps": 3, "latent": LATENTS[pipe.name]}
        plain = pipe(**options)
        with accelerate(pipe, sparse(keep=1.0, force=True)) as run:
            assert relative(pipe(**options), plain) < 1e-5
        assert not run.trace["attention"]["dense"]
    finally:
        FAMILIES[pipe.name] = family


def test_other_functions_and_masks_stay_as_they_are():
    pipe, options = loop("FluxTransformer2DModel"), {"steps": 2, "latent": LATENTS["FluxTransformer2DModel"]}
    plain = pipe(**options)

    def dense(run):
        (reason,) = run.trace["attention"]["dense"]
        return reason

    def by_hand(attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        return hidden_states if encoder_hidden_states is None else (hidden_states, encoder_hidden_states)

    processors = pipe.transformer.attn_processors
    pipe.transformer.set_attn_processor(by_hand)
    try:
        with accelerate(pipe, sparse(keep=0.4)) as run:
            pipe(**options)
        assert "not computed by torch" in dense(run)
    finally:
        pipe.transformer.set_attn_processor(processors)
    assert torch.equal(plain, pipe(**options))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupts_leave_nothing_behind(error):
    pipe, options = loop("SD3Transformer2DModel"), {"steps": 4, "latent": LATENTS["SD3Transformer2DModel"]}
    plain, calls = pipe(**options), []

    def stop(*_):
        calls.append(1)
        if len(calls) == 3:
            raise error("stop")

    handle = pipe.transformer.transformer_blocks[1].attn.to_q.register_forward_hook(stop)
    with pytest.raises(error), accelerate(pipe, sparse(keep=0.4)):
        pipe(**options)
    handle.remove()
    assert all("forward" not in module.__dict__ for module in pipe.transformer.modules())
    assert torch.equal(plain, pipe(**options))


def test_another_pipeline_on_the_same_transformer_attends_as_ever():
    one = loop("SD3Transformer2DModel")
    other = replace(one, scheduler=type(one.scheduler)(shift=1.0))
    other.embeddings = other.embeddings + 1
    options = {"steps": 4, "latent": LATENTS["SD3Transformer2DModel"]}
    plain, seen = other(seed=3, **options), []
    with accelerate(one, sparse(keep=0.4)):
        alone = one(**options)
        between = one(callback=lambda step: seen.append(other(seed=3, **options)) if step == 1 else None, **options)
    assert torch.equal(alone, between) and torch.equal(plain, seen[0])


# Refusals


def off_reason(pipe, request, **options):
    plain = pipe(steps=2, **options)
    with accelerate(pipe, request) as run:
        assert torch.equal(plain, pipe(steps=2, **options))
    outcome = run.trace["techniques"][0]
    assert outcome["status"] == "off"
    return outcome["reason"]


def test_short_runs_and_packed_tokens_of_unknown_sides_are_left_alone(monkeypatch):
    pipe = loop("FluxTransformer2DModel")
    assert "below min_tokens" in off_reason(pipe, sparse(min_tokens=100))
    family = FAMILIES[pipe.name]

    def of_references(network, latent, text):
        arguments = family.arguments(network, latent, text)
        arguments["img_ids"][6:, 0] = 1
        return arguments

    monkeypatch.setitem(FAMILIES, pipe.name, replace(family, arguments=of_references))
    assert "sides of the picture are not known" in off_reason(pipe, sparse())


def test_compiled_blocks_keep_their_attention():
    pipe = loop("WanTransformer3DModel")
    for block in pipe.transformer.blocks:
        block._compiled_call_impl = block._call_impl  # what block.compile() sets, without a compiler
    assert "compiled one by one, and with them their attention" in off_reason(pipe, sparse())


def test_one_technique_of_attention_at_a_time_and_known_methods_only():
    pipe = loop("SD3Transformer2DModel")
    with pytest.raises(ConflictError, match="cannot share"):
        accelerate(pipe, [sparse(), Request("attention_plan", {"schedule": sorted(SCHEDULES)[0]})])
    with pytest.raises(StrettoError, match="known methods"):
        accelerate(pipe, sparse(method="Flash"))
    with (
        pytest.raises(StrettoError, match="marked as required"),
        accelerate(pipe, replace(sparse(min_tokens=999), required=True)),
    ):
        pipe(steps=2)
