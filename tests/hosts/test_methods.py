"""Every method against its formula, on real tiny networks whose blocks are watched from outside."""

import comfy.samplers
import pytest
import torch

from stretto.acceleration.caching import technique as technique_module
from stretto.acceleration.caching.magnitude import MagnitudeCurve, flow_sigmas
from stretto.acceleration.caching.methods import METHODS
from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.plan import Request

from .tiny_models import sample

#: Settings that make every method skip some, not all, of 12 steps on random networks.
LIVELY = {
    "Taylor": {"interval": 2},
    "EasyCache": {"threshold": 0.6},
    "Adaptive": {"threshold": 0.6},
    "TaylorSeer": {"interval": 3, "order": 2},
    "CG-Taylor": {"threshold": 1.0, "order": 0},
    "HiCache": {"interval": 2},
    "Spectrum": {},
    "TeaCache": {"threshold": 0.95, "max_skips": 3},
    "MagCache": {"threshold": 0.2},
    "FBCache": {"threshold": 1.0, "max_skips": 3},
    "DBCache": {"threshold": 1.0, "max_skips": 3, "first_blocks": 1, "last_blocks": 1},
    "DBCache-Taylor": {"threshold": 1.0, "max_skips": 3, "first_blocks": 1, "last_blocks": 1},
    "SpeCa": {"threshold": 9.0, "max_skips": 3},
    "DiCache": {"threshold": 0.95, "max_skips": 3},
    "AdaCache": {"threshold": 0.6, "interval": 4},
    "LazyCache": {"threshold": 0.6},
    "FORA": {"interval": 2},
    "SCM": {"level": "fast"},
    "Schedule": {"mask": "###.#.##.#.#"},
    "Output": {"interval": 2},
    "Fitted": {"mask": "####.##.##.#", "weights": "4: 2 -1; 7: 3 -3 1; 10: 1"},
    "PAB": {"interval": 2},
    "DeltaDiT": {"interval": 2},
    "FORA modules": {"interval": 2},
    "TaylorSeer modules": {"interval": 3, "order": 2},
}


def run(tiny, family, name, *, steps=12, **options):
    """Sample with a method; returns latent and trace."""
    settings = {"method": name, "warmup": 2, "tail": 1, **LIVELY[name], **options.pop("settings", {})}
    if name == "Fitted":
        settings["sigmas"] = " ".join(f"{level:.7g}" for level in noise_levels(tiny(family), steps))
    result = sample(host.request(tiny(family), Request("cache", settings)), family, steps=steps, **options)
    return result, host.TRACES.of_prompt(None)[-1]


def noise_levels(model, steps):
    """The levels that the tests' scheduler gives a model."""
    return comfy.samplers.KSampler(model, steps, model.load_device, "euler", "simple").sigmas.tolist()


@pytest.fixture(autouse=True)
def a_curve(monkeypatch):
    """Random networks have no published curve: give them one."""
    curve = MagnitudeCurve.from_ratios([1.0] + [1.03] * 19, flow_sigmas(20, 3.0)[:20])
    monkeypatch.setattr(technique_module, "magnitude_curve", lambda *model: curve)


def strip(trace):
    return "".join("#" if e["decision"] == "computed" else "." for e in trace["evaluations"])


def test_the_table_is_covered():
    assert set(LIVELY) == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["sd3", "wan", "flux"])
def test_every_method_skips_and_stays_finite(tiny, family, name):
    result, trace = run(tiny, family, name)
    assert trace["techniques"][0]["status"] == "active", trace["techniques"]
    assert 0 < strip(trace).count(".") < 10
    assert strip(trace)[:2] == "##" and strip(trace)[-1] == "#"
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("family", ["sd3", "wan", "flux"])
def test_magcache_off_and_engaged_is_bit_exact(tiny, family):
    plain = sample(tiny(family), family, batch=2, steps=4)
    for force in (False, True):
        request = Request("cache", {"method": "MagCache", "warmup": 100}, force=force)
        assert torch.equal(plain, sample(host.request(tiny(family), request), family, batch=2, steps=4))
        trace = host.TRACES.of_prompt(None)[-1]
        assert (trace["techniques"][0]["status"] != "off") == force
        assert (trace["memory"]["store_peak_bytes"] > 0) == force


class Watch:
    """Records what goes into and comes out of every block, as another pack's replacement would see it."""

    def __init__(self):
        self.calls = []

    def on(self, model, keys):
        for key in keys:
            model.set_model_patch_replace(self._patch(key), "dit", *key)
        return model

    def _patch(self, key):
        def patch(args, extra):
            before = args["img"].clone()  # some blocks write into their input
            out = extra["original_block"](args)
            self.calls.append((key, before, out["img"].clone()))
            return out

        return patch


def test_first_block_runs_once_per_evaluation_and_the_others_when_computed(tiny):
    for name in ("FBCache", "CG-Taylor"):
        watch = Watch()
        keys = [("double_block", i) for i in range(3)]
        model = watch.on(tiny("wan"), keys)
        settings = {"method": name, "warmup": 2, "tail": 1, **LIVELY[name]}
        sample(host.request(model, Request("cache", settings)), "wan", steps=12)
        trace = host.TRACES.of_prompt(None)[-1]
        computed = strip(trace).count("#")
        counts = [sum(key == wanted for key, *_ in watch.calls) for wanted in keys]
        assert counts == [12, computed, computed] and computed < 12, name
        assert [
            b["blocks_computed"] for e in trace["evaluations"] for b in e["branches"] if b["decision"] != "computed"
        ] == [1] * (2 * (12 - computed))


def test_first_block_cache_formula(tiny):
    """On a skip the head sees h_1 + R, with R = h_L - h_1 of the last computed evaluation, per branch."""
    watch, heads = Watch(), []
    model = watch.on(tiny("wan"), [("double_block", i) for i in range(3)])
    network = model.model.diffusion_model
    handle = network.head.register_forward_pre_hook(lambda module, args: heads.append(args[0].clone()))
    try:
        settings = {"method": "FBCache", "warmup": 2, "tail": 1, **LIVELY["FBCache"]}
        sample(host.request(model, Request("cache", settings)), "wan", steps=12)
    finally:
        handle.remove()
    trace = host.TRACES.of_prompt(None)[-1]
    residual, calls = None, iter(watch.calls)
    for decision, head in zip(strip(trace), heads, strict=True):
        _, _, first = next(calls)
        if decision == "#":
            next(calls)
            _, _, last = next(calls)
            residual = last - first
            assert torch.equal(head, last)
        else:
            assert torch.allclose(head, first + residual, atol=1e-5)


def test_dicache_formula(tiny):
    """On a skip the head sees h_0 + R_1 + g (R_0 - R_1); g is how far block 0's addition has come, against R_0's."""
    watch, heads = Watch(), []
    model = watch.on(tiny("wan"), [("double_block", i) for i in range(3)])
    handle = model.model.diffusion_model.head.register_forward_pre_hook(lambda m, args: heads.append(args[0].clone()))
    try:
        settings = {"method": "DiCache", "warmup": 3, "tail": 1, **LIVELY["DiCache"]}
        sample(host.request(model, Request("cache", settings)), "wan", steps=12, cfg=1.0)
    finally:
        handle.remove()
    stack, front, gains, calls = [], [], [], iter(watch.calls)
    for decision, head in zip(strip(host.TRACES.of_prompt(None)[-1]), heads, strict=True):
        _, entry, first = next(calls)
        if decision == "#":
            next(calls)
            _, _, last = next(calls)
            stack, front = [last - entry, *stack][:2], [first - entry, *front][:2]
            assert torch.equal(head, last)
        else:
            distance, last_distance = ((now - front[1]).abs().mean() for now in (first - entry, front[0]))
            gains.append(float((distance / last_distance).clip(1.0, 1.5)))
            assert torch.allclose(head, entry + stack[1] + gains[-1] * (stack[0] - stack[1]), atol=1e-5)
    assert any(gain > 1.0 for gain in gains)
    assert next(calls, None) is None  # block 0 ran once an evaluation, the others when computed


@pytest.mark.parametrize("name", ["AdaCache", "LazyCache", "SpeCa", "DiCache"])
@pytest.mark.parametrize("family", ["lumina2", "pixart"])
def test_where_blocks_are_out_of_reach(tiny, family, name):
    """What decides from outside the blocks goes on deciding there; the others are off and say why."""
    plain = sample(tiny(family), family, steps=12)
    result, trace = run(tiny, family, name)
    told = trace["techniques"][0]
    if name in ("SpeCa", "DiCache"):
        assert told["status"] == "off" and f"{name} cannot look inside" in told["reason"]
        assert torch.equal(result, plain)
    else:
        assert told["status"] == {"AdaCache": "reduced", "LazyCache": "active"}[name]
        assert "." in strip(trace) and torch.isfinite(result).all()


def test_double_block_cache_runs_its_tail_at_the_current_step(tiny):
    watch = Watch()
    model = watch.on(tiny("flux"), [("double_block", 0), ("double_block", 1), ("single_block", 0), ("single_block", 1)])
    settings = {"method": "DBCache", "warmup": 2, "tail": 1, **LIVELY["DBCache"]}
    sample(host.request(model, Request("cache", settings)), "flux", steps=12)
    trace = host.TRACES.of_prompt(None)[-1]
    computed, at = strip(trace).count("#"), 0
    counts = {}
    for key, *_ in watch.calls:
        counts[key] = counts.get(key, 0) + 1
    assert counts[("double_block", 0)] == counts[("single_block", 1)] == 12
    assert counts[("double_block", 1)] == counts[("single_block", 0)] == computed < 12
    # What the tail block is given on a skip: block 0's output plus the stored change, text and image alike.
    residual, calls = None, list(watch.calls)
    for decision in strip(trace):
        span = calls[at : at + (4 if decision == "#" else 2)]
        at += len(span)
        first, last = span[0][2], span[-1][1]
        text = last.shape[1] - first.shape[1]
        if decision == "#":
            residual = last[:, text:] - first
        else:
            assert torch.allclose(last[:, text:], first + residual, atol=1e-5)
    assert at == len(calls)


@pytest.mark.parametrize(
    ("settings", "gone"),
    [({"first_blocks": 4, "last_blocks": 0}, "4 [+] 0"), ({"first_blocks": 2, "last_blocks": 2}, "2 [+] 2")],
)
def test_all_blocks_in_front_leave_nothing_to_skip(tiny, settings, gone):
    plain = sample(tiny("flux"), "flux")
    result, trace = run(tiny, "flux", "DBCache", steps=8, settings=settings)
    assert torch.equal(result, plain)
    assert trace["techniques"][0]["status"] == "off"
    assert trace["techniques"][0]["reason"].startswith(gone.replace("[+]", "+"))


def test_most_skips_in_a_row(tiny):
    _, trace = run(tiny, "wan", "FBCache", settings={"threshold": 1.0, "max_skips": 2})
    assert strip(trace) == "##..#..#..##"


def test_a_static_method_announces_the_mask_it_runs(tiny):
    for name in (name for name, method in METHODS.items() if method.static):
        _, trace = run(tiny, "sd3", name)
        assert strip(trace) in trace["techniques"][0]["reason"], name


def test_residual_of_the_whole_stack_by_hand(tiny):
    """FORA over the stack: on a skip the head sees h_0(now) + R."""
    watch, heads = Watch(), []
    model = tiny("wan")
    network = model.model.diffusion_model
    entries = []
    handles = [
        network.head.register_forward_pre_hook(lambda module, args: heads.append(args[0].clone())),
        network.patch_embedding.register_forward_hook(lambda m, a, out: entries.append(out.flatten(2).transpose(1, 2))),
    ]
    try:
        settings = {"method": "FORA", "warmup": 2, "tail": 1, "interval": 2}
        sample(host.request(watch.on(model, []), Request("cache", settings)), "wan", steps=12)
    finally:
        for handle in handles:
            handle.remove()
    residual = None
    for decision, entry, head in zip(strip(host.TRACES.of_prompt(None)[-1]), entries, heads, strict=True):
        if decision == "#":
            residual = head - entry
        else:
            assert torch.allclose(head, entry + residual, atol=1e-5)


def test_controlnet_adds_count_once_with_residuals(tiny, monkeypatch):
    """Skipping must add a ControlNet's output once: the residual holds what came before the last block's."""
    from . import test_neighbours, tiny_models

    original = tiny_models.conditioning

    def with_control(*args, **kwargs):
        ((tokens, options),) = original(*args, **kwargs)
        control = test_neighbours.Control()
        return [[tokens, {**options, "control": control, "control_apply_to_uncond": True}]]

    monkeypatch.setattr(tiny_models, "conditioning", with_control)
    add = test_neighbours.Control().add
    heads, entries = [], []
    model = tiny("sd3")
    network = model.model.diffusion_model
    handles = [
        network.final_layer.register_forward_pre_hook(lambda module, args: heads.append(args[0].clone())),
        network.x_embedder.register_forward_hook(lambda m, a, out: entries.append(out.clone())),
    ]
    try:
        settings = {"method": "FORA", "warmup": 2, "tail": 1, "interval": 2}
        # Without guidance: branches with ControlNets of their own are separate calls.
        sample(host.request(model, Request("cache", settings)), "sd3", steps=8, cfg=1.0)
    finally:
        for handle in handles:
            handle.remove()
    trace = host.TRACES.of_prompt(None)[-1]
    residual, skipped = None, 0
    for decision, head, entry in zip(strip(trace), heads, entries, strict=True):
        entry = entry + network.cropped_pos_embed((6, 8), device=entry.device) if entry.ndim == 3 else entry
        if decision == "#":
            residual = head - add - entry
        else:
            skipped += 1
            assert torch.allclose(head, entry + residual + add, atol=1e-4)
    assert skipped
