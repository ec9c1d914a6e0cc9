"""The guidance saver on tiny transformers of diffusers: half of a doubled batch, or the second of two calls, is left out."""

from dataclasses import replace

import pytest
import torch

from stretto.acceleration.hosts.diffusers import accelerate
from stretto.acceleration.models.diffusers import transformer_of
from stretto.acceleration.plan import Request

from .tiny import FAMILIES, loop, network_of

EVERY = Request("guidance", {"method": "Periodic", "interval": 1}, force=True)
PERIODIC = Request("guidance", {"method": "Periodic", "interval": 2, "warmup": 2, "tail": 1})
REPEAT = Request("guidance", {"method": "Periodic", "interval": 3, "forecast": "repeat", "warmup": 1, "tail": 1})
HALF = Request("guidance", {"method": "Interval", "guide_until": 0.5})
TWO_CALLS = [
    "FluxTransformer2DModel",
    "WanTransformer3DModel",
    "QwenImageTransformer2DModel",
    "Lumina2Transformer2DModel",
]

every_family = pytest.mark.parametrize("name", FAMILIES)


def rows_of(pipe):
    """Count the rows that the last block is given."""
    rows, kind = [], transformer_of(pipe.transformer).descriptor.block_lists[-1][1]
    last = getattr(pipe.transformer, kind)[-1]
    inner = next(module for module in last.modules() if isinstance(module, torch.nn.Linear))
    inner.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    return rows


@every_family
@pytest.mark.parametrize("batch", [1, 2])
def test_where_both_branches_are_asked_nothing_changes(name, batch):
    pipe = loop(name)
    plain = pipe(steps=5, batch=batch)
    with accelerate(pipe, EVERY) as run:
        assert torch.equal(plain, pipe(steps=5, batch=batch))
    assert (run.trace["guidance"]["asked"], run.trace["guidance"]["saved"]) == (5, 0)
    with accelerate(pipe, replace(EVERY, force=False)) as run:
        assert torch.equal(plain, pipe(steps=5, batch=batch))
    assert run.trace["techniques"][0]["status"] == "off"


@every_family
@pytest.mark.parametrize("wanted", [PERIODIC, REPEAT, HALF], ids=["line", "repeat", "interval"])
@pytest.mark.parametrize("batch", [1, 2])
def test_saved_branches_are_not_computed(name, wanted, batch):
    pipe = loop(name)
    rows = rows_of(pipe)
    plain = pipe(batch=batch)
    full = sum(rows)
    rows.clear()
    with accelerate(pipe, wanted) as run:
        result = pipe(batch=batch)
        computed = sum(rows)
        assert torch.equal(result, pipe(batch=batch))
    told = run.trace["guidance"]
    assert told["asked"] + told["saved"] == 8 and told["saved"] >= 2 and not told["left"]
    assert computed * 16 == full * (16 - told["saved"])
    assert bool(result.isfinite().all()) and not torch.equal(plain, result)
    assert f"saved at {told['saved']}" in run.trace["notes"][-1]
    names = ["+".join(b["branch"] for b in entry["branches"]) for entry in run.trace["evaluations"]]
    assert sum("uncond" not in name for name in names) == told["saved"] and run.trace["outcome"] == "completed"
    assert torch.equal(plain, pipe(batch=batch))


@pytest.mark.parametrize("name", TWO_CALLS)
def test_without_a_stand_in_it_is_the_conditional_branch_alone(name):
    pipe = loop(name)

    def leave_guidance(step):
        pipe.guidance_scale = 1.0 if step >= 3 else 4.0

    expected = pipe(callback=leave_guidance)
    pipe.guidance_scale = 4.0
    with accelerate(pipe, HALF):
        result = pipe()
    assert float((result - expected).norm() / expected.norm()) < 1e-5


def test_one_call_and_two_calls_agree():
    """SD3 guided by two calls must come out as its pipeline's doubled batch does."""
    pipe = loop("SD3Transformer2DModel")
    with accelerate(pipe, PERIODIC):
        batched = pipe()
    family = FAMILIES[pipe.name]
    network = pipe.transformer
    x = torch.randn(1, *family.latent, generator=torch.Generator().manual_seed(1))
    kept: list[torch.Tensor] = []
    pipe.scheduler.set_timesteps(8)
    pipe.scheduler.set_begin_index(0)
    asked = "##.#.#.#"  # warm-up 2, every second step, tail 1

    def out(row, t):
        text = pipe.embeddings[row : row + 1]
        return network(hidden_states=x, timestep=t.expand(1), **family.arguments(network, x, text)).sample

    with torch.no_grad():
        for step, t in enumerate(pipe.scheduler.timesteps):
            cond = out(0, t)
            if asked[step] == "#":
                difference = out(1, t) - cond
                kept.insert(0, (step, difference))
            else:
                (now, newest), (before, older) = kept[:2]
                difference = newest + (step - now) / (now - before) * (newest - older)
            guided = cond + difference + pipe.guidance_scale * -difference
            x = pipe.scheduler.step(guided, t, x, return_dict=False)[0]
    assert float((batched - x).norm() / x.norm()) < 1e-5


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "WanTransformer3DModel"])
def test_beside_a_cache(name):
    pipe = loop(name)
    taylor = Request("cache", {"method": "Taylor", "interval": 2, "warmup": 2, "tail": 1})
    with accelerate(pipe, [taylor, REPEAT]) as run:
        first = pipe()
        assert torch.equal(first, pipe())
    totals, told = run.trace["totals"], run.trace["guidance"]
    assert bool(first.isfinite().all()) and totals["forecast"] + totals["mixed"] >= 2 and told["saved"] >= 1


def test_half_precision_stays_close():
    """A stand-in is made from denoised latents, which low noise levels would round away in 16 bits."""
    pipe = loop("WanTransformer3DModel")
    with accelerate(pipe, PERIODIC):
        exact = pipe()
    network = pipe.transformer.to(torch.bfloat16)
    pipe.embeddings = pipe.embeddings.to(torch.bfloat16)
    forward = network.forward

    def rounded(hidden_states, timestep, **kwargs):
        return forward(hidden_states=hidden_states.to(torch.bfloat16), timestep=timestep, **kwargs)

    network.forward = rounded
    plain = pipe()
    with accelerate(pipe, PERIODIC):
        result = pipe()
    assert float((result - plain).norm() / plain.norm()) < 0.5 and float((result - exact).norm() / exact.norm()) < 0.1


# What is left alone


def reason_of(pipe, request=PERIODIC):
    plain = pipe()
    with accelerate(pipe, request) as run:
        assert torch.equal(plain, pipe())
    return run.trace


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "WanTransformer3DModel"])
def test_without_guidance_it_is_off(name):
    trace = reason_of(loop(name, guidance_scale=1.0))
    assert "no unconditional branch" in trace["techniques"][0]["reason"]


def test_pipelines_that_do_not_say_whether_they_guide():
    """FLUX's pipelines keep that to themselves: the saver waits, and without a second call there is nothing to do."""
    pipe = loop("FluxTransformer2DModel")

    class Silent:
        scheduler, transformer = pipe.scheduler, pipe.transformer

    with accelerate(Silent(), PERIODIC) as run:
        guided = pipe()
    assert run.trace["guidance"]["saved"] >= 2
    with accelerate(pipe, PERIODIC):
        assert torch.equal(guided, pipe())
    pipe.guidance_scale = 1.0
    plain = pipe()
    with accelerate(Silent(), PERIODIC) as run:
        assert torch.equal(plain, pipe())
    assert run.trace["guidance"]["saved"] == run.trace["guidance"]["asked"] == 0


def test_arguments_of_unknown_rows_are_left_alone(monkeypatch):
    pipe = loop("SD3Transformer2DModel")
    family = FAMILIES[pipe.name]

    def controlled(network, latent, text):
        extra = [torch.randn(len(latent), 12, 24, generator=torch.Generator().manual_seed(2))] * 4
        return {**family.arguments(network, latent, text), "block_controlnet_hidden_states": extra}

    monkeypatch.setitem(FAMILIES, pipe.name, replace(family, arguments=controlled))
    trace = reason_of(pipe)
    assert trace["guidance"]["left"] == {
        "the argument block_controlnet_hidden_states, which may differ from item to item": 8
    }


def test_another_pipeline_on_the_same_transformer_is_not_answered_for():
    """B's prompt at A's own timestep is a third conditioning: it is computed."""
    one = loop("WanTransformer3DModel")
    text = one.embeddings[:1] + 1
    seen = []

    def intrude(step):
        t = one.scheduler.timesteps[step + 1 : step + 2]
        if len(t):
            with torch.no_grad():
                seen.append(one.transformer(torch.ones(1, 4, 3, 8, 6), t, text).sample)

    plain = one(callback=intrude)
    expected = seen[:]
    seen.clear()
    with accelerate(one, PERIODIC):
        alone = one()
        between = one(callback=intrude)
    assert not torch.equal(alone, plain)
    assert all(torch.equal(a, b) for a, b in zip(expected, seen, strict=True))
    assert float((alone - between).norm()) < 10 * float(plain.norm())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupts_leave_nothing_behind(error):
    pipe = loop("SD3Transformer2DModel")
    plain = pipe()

    def stop(step):
        if step == 4:
            raise error("stop")

    with pytest.raises(error), accelerate(pipe, PERIODIC) as run:
        pipe(callback=stop)
    assert run.trace["outcome"] == ("interrupted" if error is KeyboardInterrupt else "failed")
    assert all("forward" not in module.__dict__ for module in pipe.transformer.modules())
    assert torch.equal(plain, pipe())


def test_two_experts_have_differences_of_their_own():
    pipe = loop("WanTransformer3DModel")
    first, second = pipe.transformer, network_of("WanTransformer3DModel", seed=8)
    pipe.transformer_2 = second

    def run():
        pipe.transformer = first
        return pipe(callback=lambda step: setattr(pipe, "transformer", second) if step == 3 else None)

    plain = run()
    pipe.transformer = first
    with accelerate(pipe, EVERY):
        assert torch.equal(plain, run())
