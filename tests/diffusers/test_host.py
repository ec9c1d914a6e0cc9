"""Off and engaged exactness, isolation and refusals of the diffusers host, on tiny transformers of every family."""

import functools
import gc
import subprocess
import sys
import weakref
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch

from stretto.acceleration.caching import store as store_module
from stretto.acceleration.caching.methods import METHODS
from stretto.acceleration.errors import ConflictError, StrettoError
from stretto.acceleration.hosts.diffusers import accelerate
from stretto.acceleration.models.diffusers import TRANSFORMERS, transformer_of
from stretto.acceleration.plan import Plan, Request

from .tiny import FAMILIES, loop, network_of

TAYLOR = Request("cache", {"method": "Taylor", "interval": 2, "warmup": 2, "tail": 1})
EASY = Request("cache", {"method": "EasyCache", "threshold": 1.0, "warmup": 2, "tail": 1})
#: Settings that compute everything, by policy.
NEVER = {
    "interval": {"interval": 1},
    "growing": {"window": 1.0, "growth": 0.0, "warmup": 100},
    "mask": {"mask": "#" * 8, "warmup": 100},
    "accumulate": {"threshold": 0.0},
    "threshold": {"threshold": 0.0},
    "decaying": {"threshold": 0.0},
    "codebook": {"interval": 1},
}
NEEDED = {"Fitted": {"mask": "##.#", "weights": "2: 2 -1", "sigmas": "1 0.7 0.5 0.2 0"}}
ENGAGED = {
    name: Request("cache", {"method": name, **NEVER[method.policy], **NEEDED.get(name, {})}, force=True)
    for name, method in METHODS.items()
    if method.policy != "magnitude" and name not in ("PAB", "FORA modules", "TaylorSeer modules")
}
WAYS = ("Taylor", "EasyCache", "DBCache-Taylor", "LazyCache")

every_family = pytest.mark.parametrize("name", FAMILIES)


def test_every_described_transformer_is_tested():
    assert {name for known in TRANSFORMERS for name in known.descriptor.networks} == set(FAMILIES)


@every_family
@pytest.mark.parametrize(("guidance", "batch"), [(4.0, 1), (4.0, 2), (1.0, 2)])
def test_off_and_engaged_are_bit_exact(name, guidance, batch):
    pipe = loop(name, guidance_scale=guidance)
    plain = pipe(steps=4, batch=batch)
    off = replace(ENGAGED["Taylor"], force=False)
    for request in (off, Request("measure", {"nonce": 1}), *(ENGAGED[way] for way in WAYS)):
        with accelerate(pipe, request) as run:
            assert torch.equal(plain, pipe(steps=4, batch=batch)), request
        trace = run.trace
        assert trace["outcome"] == "completed"
        assert trace["totals"]["evaluations"] == trace["totals"]["computed"] == 4
        assert (trace["techniques"][0]["status"] == "off") == (request is off)
        assert (trace["memory"]["store_peak_bytes"] > 0) == request.force
        names = {branch["branch"] for branch in trace["evaluations"][0]["branches"]}
        assert names == ({"cond", "uncond"} if guidance > 1 else {"cond"}) or request is off
    assert "forward" not in pipe.transformer.__dict__
    assert torch.equal(plain, pipe(steps=4, batch=batch))


@pytest.mark.parametrize("method", [name for name in ENGAGED if name not in WAYS])
@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "FluxTransformer2DModel", "WanTransformer3DModel"])
def test_every_method_engaged_is_bit_exact(name, method):
    pipe = loop(name)
    plain = pipe(steps=4)
    with accelerate(pipe, ENGAGED[method]) as run:
        assert torch.equal(plain, pipe(steps=4))
    assert run.trace["techniques"][0]["status"] != "off", run.trace["techniques"][0]["reason"]
    assert run.trace["memory"]["store_peak_bytes"] > 0


@every_family
@pytest.mark.parametrize("request_", [TAYLOR, EASY], ids=["taylor", "easycache"])
def test_skipped_steps_run_no_block(name, request_):
    pipe, ran = loop(name), []
    descriptor = transformer_of(pipe.transformer).descriptor
    last = getattr(pipe.transformer, descriptor.block_lists[-1][1])[-1]
    inner = next(module for module in last.modules() if isinstance(module, torch.nn.Linear))
    handle = inner.register_forward_hook(lambda *_: ran.append(1))
    plain = pipe()
    full = len(ran)
    ran.clear()
    with accelerate(pipe, request_) as run:
        got = pipe()
    handle.remove()
    totals = run.trace["totals"]
    assert 2 <= totals["computed"] <= 6 and len(ran) * 8 == full * totals["computed"]
    assert not torch.equal(plain, got) and bool(got.isfinite().all())
    skipped = [e for e in run.trace["evaluations"] if e["decision"] != "computed"]
    assert all(branch["blocks_computed"] == 0 for entry in skipped for branch in entry["branches"])


@every_family
def test_two_runs_in_one_context_are_equal_and_both_traced(name):
    pipe = loop(name)
    with accelerate(pipe, TAYLOR) as run:
        first = pipe()
        assert len(run.traces) == 1  # a run ends with its last call, not with the context
        pipe(seed=2, batch=2)
        assert torch.equal(first, pipe())
    assert [trace["outcome"] for trace in run.traces] == ["completed"] * 3
    assert [trace["latent_shape"][0] for trace in run.traces] == [1, 2, 1]


def test_outputs_come_as_they_are_asked_for():
    pipe = loop("WanTransformer3DModel")
    with accelerate(pipe, EASY):
        assert torch.equal(pipe(), pipe(return_dict=True))


def test_positional_arguments_are_understood():
    pipe = loop("WanTransformer3DModel", guidance_scale=1.0)
    network, scheduler = pipe.transformer, pipe.scheduler
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(0)
    x, text = torch.randn(1, 4, 3, 8, 6), pipe.embeddings[:1]
    with torch.no_grad(), accelerate(pipe, TAYLOR) as run:
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t.expand(1), text).sample, t, x, return_dict=False)[0]
    assert run.trace["totals"]["forecast"] == 3


def test_a_transformer_alone_runs_over_given_noise_levels():
    pipe = loop("SD3Transformer2DModel")
    sigmas = torch.linspace(1, 0, 9)
    arguments = FAMILIES["SD3Transformer2DModel"].arguments(pipe.transformer, None, pipe.embeddings[:1])
    x = torch.randn(1, 4, 8, 6)
    with torch.no_grad(), accelerate(pipe.transformer, TAYLOR, sigmas=sigmas.tolist()) as run:
        for now, after in pairwise(sigmas):
            x = x + (after - now) * pipe.transformer(x, timestep=1000 * now[None], **arguments).sample
    assert run.trace["totals"]["forecast"] == 3 and run.trace["outcome"] == "completed"


@pytest.mark.parametrize(
    ("error", "outcome"), [(KeyboardInterrupt, "interrupted"), (RuntimeError, "failed")], ids=["interrupt", "failure"]
)
@pytest.mark.parametrize("inside", [True, False], ids=["in a block", "between steps"])
def test_interrupts_and_failures_leave_nothing_behind(error, outcome, inside):
    pipe = loop("FluxTransformer2DModel")
    plain = pipe()
    with accelerate(pipe, TAYLOR):
        cached = pipe()
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) == 4:
            raise error("stop")

    handle = pipe.transformer.transformer_blocks[1].attn.register_forward_hook(stop) if inside else None
    with pytest.raises(error), accelerate(pipe, TAYLOR) as run:
        pipe(callback=None if inside else stop)
    if inside:
        handle.remove()
    assert run.trace["outcome"] == outcome
    assert all("forward" not in module.__dict__ for module in pipe.transformer.modules())
    assert torch.equal(plain, pipe())
    with accelerate(pipe, TAYLOR):
        assert torch.equal(cached, pipe())


def test_an_error_that_is_caught_inside_ends_the_run_only():
    pipe = loop("WanTransformer3DModel")

    def stop(step):
        if step == 4:
            raise RuntimeError("stop")

    with accelerate(pipe, TAYLOR) as run:
        with pytest.raises(RuntimeError):
            pipe(callback=stop)
        first = pipe()
    assert [trace["outcome"] for trace in run.traces] == ["interrupted", "completed"]
    with accelerate(pipe, TAYLOR):
        assert torch.equal(first, pipe())


def test_another_pipeline_on_the_same_transformer_is_left_alone():
    """B has a scheduler and a prompt of its own, so its calls do not agree with A's: before, after and between A's steps."""
    one = loop("SD3Transformer2DModel")
    other = replace(one, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    other.embeddings = other.embeddings + 1
    plain, seen = other(seed=3), []
    with accelerate(one, TAYLOR) as run:
        one.scheduler.set_timesteps(8)
        seen.append(other(seed=3))
        alone = one()
        seen.append(other(seed=3))
        between = one(callback=lambda step: seen.append(other(seed=3)) if step == 3 else None)
        assert torch.equal(alone, between)
    assert len(seen) == 3 and all(torch.equal(plain, got) for got in seen)
    totals = run.traces[-1]["totals"]
    assert totals["forecast"] + totals["mixed"] == 3  # one evaluation of A's also saw a call of B's


def test_one_transformer_is_accelerated_once_at_a_time():
    one = loop("SD3Transformer2DModel")
    other = replace(one, scheduler=FAMILIES["SD3Transformer2DModel"].scheduler())
    with accelerate(one, TAYLOR):
        with pytest.raises(ConflictError, match="already accelerated"), accelerate(other, EASY):
            pass
        one()
    with accelerate(other, EASY) as run:
        other()
    assert run.trace["techniques"][0]["technique"] == "cache"


def test_two_experts_share_the_noise_levels():
    """Wan 2.2: the second transformer takes over at a boundary; each is a model of its own."""
    pipe = loop("WanTransformer3DModel")
    first, second = pipe.transformer, network_of("WanTransformer3DModel", seed=8)
    pipe.transformer_2 = second

    def run():
        pipe.transformer = first
        return pipe(callback=lambda step: setattr(pipe, "transformer", second) if step == 3 else None)

    plain = run()
    pipe.transformer = first
    with accelerate(pipe, ENGAGED["Taylor"]):
        assert torch.equal(plain, run())
    pipe.transformer = first
    with accelerate(pipe, TAYLOR) as accelerated:
        run()
    strips = ["".join(e["decision"][0] for e in trace["evaluations"]) for trace in accelerated.traces]
    assert strips == ["ccfc", "ccfc"]
    assert [trace["outcome"] for trace in accelerated.traces] == ["completed"] * 2


def test_forwards_of_others_stay_in_place():
    """What already wraps a forward (offloading does) is run and given back; what wraps ours later is not cut off."""
    pipe, seen = loop("WanTransformer3DModel"), []
    original = pipe.transformer.forward

    @functools.wraps(original)
    def before(*args, **kwargs):
        seen.append("before")
        return original(*args, **kwargs)

    pipe.transformer.forward = before
    with accelerate(pipe, TAYLOR):
        pipe()
        assert len(seen) == 16  # block level: the network itself always runs
    assert pipe.transformer.__dict__["forward"] is before
    with accelerate(pipe, TAYLOR) as run:
        ours = pipe.transformer.forward
        pipe.transformer.forward = lambda *args, **kwargs: ours(*args, **kwargs)
        after = pipe.transformer.forward
        pipe()
    assert pipe.transformer.forward is after
    count = len(run.traces)
    pipe()
    assert len(run.traces) == count == 1


def test_no_tensor_survives_its_run(monkeypatch):
    alive: list[weakref.ref] = []
    push = store_module.SnapshotStore.push

    def spy(self, key, position, tensor, **options):
        kept = push(self, key, position, tensor, **options)
        alive.append(weakref.ref(self.histories[key].tensors[0]))
        return kept

    monkeypatch.setattr(store_module.SnapshotStore, "push", spy)
    pipe = loop("FluxTransformer2DModel")
    with accelerate(pipe, TAYLOR):
        pipe()
        gc.collect()
        assert alive and not any(reference() is not None for reference in alive)  # before decoding would begin


@every_family
def test_inputs_are_never_written_to(name):
    pipe, kept = loop(name), []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: kept.append([(v, v.clone()) for v in kwargs.values() if isinstance(v, torch.Tensor)]),
        with_kwargs=True,
    )
    with accelerate(pipe, EASY):
        pipe(steps=6)
    assert len(kept) >= 6 and all(torch.equal(now, before) for call in kept for now, before in call)


def test_skipped_layers_are_features_of_another_network():
    """SD3's skip-layer guidance calls the network a third time, without some blocks: computed, and stored by nobody."""
    pipe = loop("SD3Transformer2DModel", guidance_scale=1.0)
    network, scheduler, text = pipe.transformer, pipe.scheduler, pipe.embeddings[:1]

    @torch.no_grad()
    def sample(extra):
        scheduler.set_timesteps(8)
        scheduler.set_begin_index(0)
        x, third = torch.randn(1, 4, 8, 6, generator=torch.Generator().manual_seed(1)), []
        for t in scheduler.timesteps:
            arguments = {"timestep": t.expand(1), "encoder_hidden_states": text, "pooled_projections": text[:, 0]}
            out = network(x, **arguments).sample
            third.append(network(x, **arguments, skip_layers=[1, 3]).sample if extra else None)
            x = scheduler.step(out, t, x, return_dict=False)[0]
        return x

    with accelerate(pipe, TAYLOR):
        alone = sample(False)
        assert torch.equal(alone, sample(True))


# Refusals


class Unknown(torch.nn.Linear):
    """A transformer that nobody has described."""

    def forward(self, hidden_states, timestep, return_dict=False):
        return (super().forward(hidden_states),)


def off_reason(pipe, request=TAYLOR):
    """Run and return the reason for which the request was off; the picture must be the plain one."""
    plain = pipe()
    with accelerate(pipe, request) as run:
        assert torch.equal(plain, pipe())
    outcome = run.trace["techniques"][0]
    assert outcome["status"] == "off"
    return outcome["reason"]


def test_unknown_transformers_run_plainly_with_the_reason():
    network, sigmas = Unknown(4, 4), [1.0, 0.5, 0.0]
    with torch.no_grad(), accelerate(network, TAYLOR, sigmas=sigmas) as run:
        for sigma in sigmas[:2]:
            network(torch.zeros(1, 4), torch.tensor([1000 * sigma]))
    assert "Unknown is not supported" in run.trace["techniques"][0]["reason"]
    required = replace(TAYLOR, required=True)
    with pytest.raises(StrettoError, match="marked as required"), torch.no_grad(), accelerate(network, required, sigmas=sigmas):
        network(torch.zeros(1, 4), torch.tensor([1000.0]))
    assert "forward" not in network.__dict__


def test_other_techniques_and_modules_are_off_with_the_reason():
    pipe = loop("SD3Transformer2DModel")
    assert "works in ComfyUI only: which tokens" in off_reason(pipe, Request("region", {}))
    assert "module level is out of reach" in off_reason(pipe, Request("cache", {"method": "PAB"}))


def test_unknown_schedulers_are_off():
    pipe = loop("WanTransformer3DModel")

    class Mine(diffusers.FlowMatchEulerDiscreteScheduler):
        pass

    pipe.scheduler = Mine()
    assert "Mine is not known" in off_reason(pipe)


def test_compiled_blocks_leave_the_networks_output():
    pipe = loop("WanTransformer3DModel")
    for block in pipe.transformer.blocks:
        block._compiled_call_impl = block._call_impl  # what block.compile() sets, without a compiler
    with accelerate(pipe, TAYLOR) as run:
        pipe()
    outcome = run.trace["techniques"][0]
    assert outcome["status"] == "reduced" and "compiled" in outcome["reason"]
    assert run.trace["totals"]["forecast"] == 3
    pipe.transformer._compiled_call_impl = pipe.transformer._call_impl
    assert "compiled as a whole" in off_reason(pipe)


def test_a_transformer_compiled_as_a_whole_stays_one_graph():
    pipe, graphs = loop("WanTransformer3DModel"), []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    pipe.transformer.compile(backend=backend)
    compiled = pipe.transformer._compiled_call_impl
    pipe()
    made = len(graphs)
    assert "compiled as a whole" in off_reason(pipe)
    assert len(graphs) == made > 0 and pipe.transformer._compiled_call_impl is compiled
    torch._dynamo.reset()


def test_caches_of_diffusers_are_refused():
    pipe = loop("WanTransformer3DModel")
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(0.1))
    for wanted in (TAYLOR, Request("table", {"rows": "####/#..."}), Request("guidance", {})):
        with pytest.raises(ConflictError, match="disable_cache"), accelerate(pipe, wanted):
            pass
    pipe.transformer.disable_cache()
    with accelerate(pipe, TAYLOR):
        pipe()


def test_hooks_on_transformers_without_enable_cache_are_refused_too():
    pipe = loop("SD3Transformer2DModel")
    diffusers.hooks.apply_first_block_cache(pipe.transformer, diffusers.FirstBlockCacheConfig(0.1))
    with pytest.raises(ConflictError, match="fbc_leader_block_hook"), accelerate(pipe, TAYLOR):
        pass


@pytest.mark.parametrize(
    ("pipeline", "plan", "message"),
    [
        (SimpleNamespace(unet=torch.nn.Linear(1, 1), scheduler=1), TAYLOR, "U-Net"),
        (object(), TAYLOR, "no transformer"),
        (torch.nn.Linear(1, 1), TAYLOR, "no scheduler"),
        (None, [TAYLOR, TAYLOR], "cannot share"),
        (None, [3], "made of requests"),
        (None, {"schema": "plan@9", "requests": []}, "plan@9"),
        (None, Request("cache", {"method": "none"}), "method"),
    ],
)
def test_mistakes_are_told_at_once(pipeline, plan, message):
    with pytest.raises(StrettoError, match=message):
        accelerate(loop("SD3Transformer2DModel") if pipeline is None else pipeline, plan)


def test_a_plan_may_be_given_in_any_form():
    pipe = loop("WanTransformer3DModel")
    plan = Plan((TAYLOR,))
    made = []
    for form in (plan, TAYLOR, [TAYLOR], plan.to_json()):
        with accelerate(pipe, form):
            made.append(pipe())
    assert all(torch.equal(made[0], other) for other in made)


def test_with_gradients_nothing_is_skipped():
    network = network_of("SD3Transformer2DModel")
    arguments = {"encoder_hidden_states": torch.zeros(1, 6, 16), "pooled_projections": torch.zeros(1, 16)}
    with accelerate(network, TAYLOR, sigmas=[1.0, 0.5, 0.0]) as run:
        out = network(torch.zeros(1, 4, 8, 6), timestep=torch.tensor([1000.0]), **arguments).sample
    assert out.requires_grad and not run.traces
    with pytest.raises(StrettoError, match="no run has ended"):
        run.trace  # noqa: B018


def test_the_host_imports_without_comfyui_diffusers_or_psutil():
    root = str(Path(__file__).resolve().parents[2])
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("comfy", "comfy_api", "folder_paths", "nodes", "server", "PIL", "psutil", "diffusers"):
            raise ImportError(f"{{name}} must not be imported here")
sys.meta_path.insert(0, Block())
sys.path.insert(0, {root!r})
from load_pack import load_pack
load_pack()
import stretto
assert "torch" not in sys.modules
from stretto.acceleration.hosts.diffusers import accelerate
assert stretto.accelerate is accelerate
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
