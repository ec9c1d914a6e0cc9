"""Caching inside blocks: modules run as often as the table says, and what is put in is what was kept."""

import gc
import random
import weakref
from contextlib import contextmanager

import comfy.model_base
import comfy.model_management
import pytest
import torch

from stretto.acceleration.caching.masks import Table
from stretto.acceleration.caching.policy import Rails
from stretto.acceleration.caching.store import SnapshotStore
from stretto.acceleration.caching.table import table_settings
from stretto.acceleration.caching.table_search import choose_table
from stretto.acceleration.errors import ConflictError, StrettoError
from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.hosts.comfy_module_profile import profile_modules
from stretto.acceleration.hosts.comfy_modules import ModulePatch
from stretto.acceleration.models import describe
from stretto.acceleration.plan import Request

from .tiny_models import CONFIGS, ONE_ROW, sample

STEPS = 5
#: A look at every family takes long: one of each way of reaching an attention.
FEW = ["wan", "sd3.5", "flux", "qwen_image"]


def shape_of(model):
    """Blocks, and names of their modules."""
    network = model.model.diffusion_model
    family = describe(network)
    return family.module_blocks(network), family.module_names


def request(table, *, force=False, required=True, **settings):
    return Request("table", {**table_settings(table), **settings}, force=force, required=required)


def full(model, steps=STEPS):
    blocks, names = shape_of(model)
    return Table((((True,) * len(names),) * blocks,) * steps, names)


def scattered(model, steps=STEPS, seed=0):
    """A table with each cell skipped by a coin, the first step computed."""
    rng, (blocks, names) = random.Random(seed), shape_of(model)
    rows = [[[step == 0 or rng.random() < 0.5 for _ in names] for _ in range(blocks)] for step in range(steps)]
    return Table(rows, names)


class Count:
    """A MODEL whose cacheable parts, and attention, are counted underneath our patches, as another pack would."""

    def __init__(self, model):
        self.model, self.calls, self.attention = model.clone(), {}, 0
        self.network = model.model.diffusion_model
        self.sites = describe(self.network).module_sites(self.network)
        for path in (path for site in self.sites for path in site.paths):
            name = f"diffusion_model.{path}.forward"
            self.model.add_object_patch(name, self._counted(path, self.model.get_model_object(name)))
        options = self.model.model_options.setdefault("transformer_options", {})
        options["optimized_attention_override"] = self._attention()

    def _counted(self, path, original):
        def forward(*args, **kwargs):
            self.calls[path] = self.calls.get(path, 0) + 1
            return original(*args, **kwargs)

        return forward

    def _attention(self):
        def override(func, *args, **kwargs):  # not a method: ComfyUI would copy what it belongs to with the MODEL
            self.attention += 1
            return func(*args, **kwargs)

        return override


def computed(table, site):
    """At which steps a module is computed."""
    return [any(table.computed(step, site.depth, name) for name in site.names) for step in range(table.steps)]


@contextmanager
def interpreted(model, table):
    """Run everything, and put in what the table says behind each output: no part is left out, no hook of ours is used."""
    network, kept, handles = model.model.diffusion_model, {}, []
    step = [-1]

    def hook_of(path, site):
        wanted = computed(table, site)

        def hook(module, args, out):
            if wanted[step[0]]:
                kept[path] = tuple(t.clone() for t in out) if isinstance(out, tuple) else out.clone()
                return None
            return tuple(t.clone() for t in kept[path]) if isinstance(out, tuple) else kept[path].clone()

        return hook

    for site in describe(network).module_sites(network):
        for path in site.outputs:
            handles.append(network.get_submodule(path).register_forward_hook(hook_of(path, site)))
    handles.append(network.register_forward_pre_hook(lambda *args: step.__setitem__(0, step[0] + 1)))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_family_equals_its_interpreter(tiny, family):
    """Off and engaged to the bit; a random table to the bit what an interpreter of it makes; parts run as it says."""
    options = {"steps": STEPS, "cfg": 1.0 if family in ONE_ROW else 5.0, "batch": 1 if family in ONE_ROW else 2}
    plain = sample(tiny(family), family, **options)
    for force in (False, True):
        asked = request(full(tiny(family)), force=force, required=False)
        assert torch.equal(plain, sample(host.request(tiny(family), asked), family, **options))
        trace = host.TRACES.of_prompt(None)[-1]
        assert (trace["techniques"][0]["status"] == "active") == (trace["memory"]["store_peak_bytes"] > 0) == force
    count = Count(tiny(family))
    blocks, names = shape_of(count.model)
    assert {site.depth for site in count.sites} == set(range(blocks))
    assert names[0] == "attn" and names[-1] == "mlp"
    table = scattered(count.model)
    with interpreted(tiny(family), table) as model:
        expected = sample(model, family, **options)
    assert not torch.equal(plain, expected)
    assert torch.equal(expected, sample(host.request(count.model, request(table)), family, **options))
    assert count.calls == {path: sum(computed(table, site)) for site in count.sites for path in site.paths}
    assert torch.equal(plain, sample(tiny(family), family, **options))


@pytest.mark.parametrize("family", ["flux", "sd3", "sd3.5", "hunyuan_video_1.5"])
def test_attention_spread_over_a_block_does_not_run_where_its_outputs_are_put_in(tiny, family):
    count = Count(tiny(family))
    sample(count.model, family, steps=1)
    total, spread = count.attention, [site for site in count.sites if site.inner]
    seconds = sum(any("attn2" in path for path in site.paths) for site in spread)
    table, count.attention = scattered(count.model), 0
    sample(host.request(count.model, request(table)), family, steps=STEPS)
    functions = {site: 2 if any("attn2" in path for path in site.paths) else 1 for site in spread}
    elsewhere = total - len(spread) - seconds  # refiners of the text
    assert count.attention == sum(n * sum(computed(table, site)) for site, n in functions.items()) + elsewhere * STEPS


def test_a_module_that_is_linear_in_the_step_is_forecast_exactly(tiny):
    model, slope = tiny("wan"), torch.randn(24, generator=torch.Generator().manual_seed(2))
    name = "diffusion_model.blocks.1.ffn.forward"
    model.add_object_patch(name, lambda x: torch.ones_like(x) + host._CALL.get().evaluation.position * slope)
    names, computes = ("attn", "cross_attn", "mlp"), {0, 1, 4}
    cells = [[(True, True, block != 1 or step in computes) for block in range(3)] for step in range(8)]
    table = Table(cells, names)
    exact = sample(host.request(model, request(full(model, 8), force=True)), "wan", steps=8)
    line = sample(host.request(model, request(table, forecaster="newton", order=1)), "wan", steps=8)
    assert torch.allclose(exact, line, rtol=1e-4, atol=1e-5)
    decisions = [entry["decision"] for entry in host.TRACES.of_prompt(None)[-1]["evaluations"]]
    assert decisions == ["computed" if step in computes else "forecast" for step in range(8)]
    reused = sample(host.request(model, request(table)), "wan", steps=8)
    assert not torch.allclose(exact, reused, rtol=1e-4, atol=1e-5)
    seer = sample(host.request(model, request(table, forecaster="taylor", order=1)), "wan", steps=8)
    assert torch.allclose(seer, line, rtol=1e-4, atol=1e-5)


def test_samplers_that_add_noise_reuse(tiny):
    table = scattered(tiny("wan"), 6)
    forecast = request(table, forecaster="newton", order=2)
    options = {"sampler": "euler_ancestral", "steps": 6}
    result = sample(host.request(tiny("wan"), forecast), "wan", **options)
    outcome = host.TRACES.of_prompt(None)[-1]["techniques"][0]
    assert outcome["status"] == "reduced" and "forecasting falls back to reuse" in outcome["reason"]
    assert torch.equal(result, sample(host.request(tiny("wan"), request(table)), "wan", **options))


@pytest.mark.parametrize("family", FEW)
def test_merged_and_split_guidance_skip_the_same_modules(tiny, family, monkeypatch):
    def run():
        count = Count(tiny(family))
        asked = request(scattered(count.model), forecaster="newton", order=1)
        return sample(host.request(count.model, asked), family, steps=STEPS, batch=2), count.calls

    merged, calls = run()
    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *args, **kwargs: 1 << 60)
    split, split_calls = run()
    assert split_calls == {path: 2 * number for path, number in calls.items()}
    assert (merged - split).norm() < 1e-3 * merged.norm()


def test_samplers_with_two_evaluations_a_step_share_a_decision(tiny):
    count = Count(tiny("wan"))
    table = scattered(count.model)
    sample(host.request(count.model, request(table)), "wan", steps=STEPS, sampler="heun", cfg=1.0)
    steps = [min(round(entry["position"]), STEPS - 1) for entry in host.TRACES.of_prompt(None)[-1]["evaluations"]]
    assert len(steps) > STEPS
    for site in count.sites:
        wanted = sum(computed(table, site)[step] for step in steps)
        assert all(count.calls[path] == wanted for path in site.paths)


@pytest.fixture
def cached(tiny):
    return host.request(tiny("flux"), request(scattered(tiny("flux"), 8)))


def forwards(network):
    sites = describe(network).module_sites(network)
    return [network.get_submodule(path).forward for site in sites for path in site.paths]


def test_patches_leave_the_shared_network_as_it_was(tiny, cached):
    network = cached.model.diffusion_model
    keys = list(network.state_dict())
    sample(cached, "flux")
    assert all(isinstance(forward, ModulePatch) for forward in forwards(network))
    assert list(network.state_dict()) == keys
    assert set(cached.model_state_dict()) == set(tiny("flux").model_state_dict())
    sample(tiny("flux"), "flux")
    assert not any(isinstance(forward, ModulePatch) for forward in forwards(network))
    cached.unpatch_model()
    assert all(forward.__self__ is not None for forward in forwards(network))


def test_only_requests_that_need_modules_are_given_patches(tiny):
    plain = {"method": "Taylor"}, {"method": "DeltaDiT"}
    inside = {"method": "PAB"}, {"method": "FORA modules"}, {"method": "TaylorSeer modules"}
    for settings in (*plain, *inside):
        model = host.request(tiny("flux"), Request("cache", settings))
        assert bool(model.object_patches) == (settings in inside)
    # Another Stretto node behind it patches nothing twice.
    again = host.request(model, Request("measure", {"nonce": 1}))
    assert again.object_patches == model.object_patches
    assert not any(isinstance(patch.original, ModulePatch) for patch in again.object_patches.values())


def test_runs_share_nothing(cached):
    first = sample(cached, "flux")
    sample(cached, "flux", shape=(16, 4, 4), seed=5)
    sample(cached, "flux", batch=3, seed=9)
    assert torch.equal(first, sample(cached, "flux"))
    assert torch.equal(first, sample(host.request(cached, Request("measure", {"nonce": 1})), "flux"))


@pytest.mark.parametrize("error", [comfy.model_management.InterruptProcessingException, RuntimeError])
def test_interrupts_and_failures(cached, error):
    first = sample(cached, "flux")

    def stop(step, *args):
        if step == 4:
            raise error("stop")

    with pytest.raises(error):
        sample(cached, "flux", callback=stop)
    assert host._CALL.get() is None
    assert torch.equal(first, sample(cached, "flux"))


def test_an_exception_inside_a_module(tiny, cached):
    first, calls, broken = sample(cached, "flux"), [], tiny("flux")

    def explode(x):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("module")
        return broken.model.diffusion_model.double_blocks[1].img_mlp.__class__.forward(
            broken.model.diffusion_model.double_blocks[1].img_mlp, x
        )

    broken.add_object_patch("diffusion_model.double_blocks.1.img_mlp.forward", explode)
    with pytest.raises(RuntimeError, match="module"):
        sample(host.request(broken, request(full(broken, 8), force=True)), "flux")
    assert host._CALL.get() is None
    assert torch.equal(first, sample(cached, "flux"))


def test_no_tensor_and_no_session_survives_its_run(cached, monkeypatch):
    alive = []
    push = SnapshotStore.push

    def spy(self, key, position, tensor):
        kept = push(self, key, position, tensor)
        alive.extend((weakref.ref(self), weakref.ref(self.histories[key].tensors[0])))
        return kept

    monkeypatch.setattr(SnapshotStore, "push", spy)
    sample(cached, "flux")
    gc.collect()
    assert alive and not any(reference() is not None for reference in alive)


def test_only_what_a_later_step_uses_is_kept(tiny, monkeypatch):
    pushed = []
    push = SnapshotStore.push

    def spy(self, key, position, tensor):
        pushed.append((key[2], round(position)))
        return push(self, key, position, tensor)

    monkeypatch.setattr(SnapshotStore, "push", spy)
    mask = "###.##.#"
    rows = [[(True, mask[step] == "#") for _ in range(3)] for step in range(8)]
    table = Table(rows, ("attn", "mlp"))
    sample(host.request(tiny("wan"), request(table)), "wan", cfg=1.0)
    assert {step for _, step in pushed} == {2, 5} and {path for path, _ in pushed} == {f"blocks.{i}.ffn" for i in range(3)}
    pushed.clear()
    sample(host.request(tiny("wan"), request(table, forecaster="newton", order=1)), "wan", cfg=1.0)
    assert {step for _, step in pushed} == {1, 2, 4, 5}


def test_a_part_that_somebody_replaced_later_switches_it_off(tiny, cached):
    plain = sample(tiny("flux"), "flux")
    model = host.request(tiny("flux"), request(scattered(tiny("flux"), 8), required=False))
    name = "diffusion_model.double_blocks.0.img_attn.proj.forward"
    original = tiny("flux").get_model_object(name)
    model.add_object_patch(name, lambda *args: original(*args))
    assert torch.equal(plain, sample(model, "flux"))
    outcome = host.TRACES.of_prompt(None)[-1]["techniques"][0]
    assert outcome["status"] == "off" and "another node has replaced parts" in outcome["reason"]


def test_without_room_it_stays_off_and_says_how_much_it_needs(tiny, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *args, **kwargs: 1 << 10)
    with pytest.raises(StrettoError, match=r"stored features would take \d+ MiB, 0 MiB may be used"):
        sample(host.request(tiny("flux"), request(scattered(tiny("flux")))), "flux", steps=STEPS)


@pytest.mark.parametrize(
    ("family", "modules", "shape", "words"),
    [
        ("flux", ("attn", "cross_attn"), (8, 4), "names the module cross_attn; blocks of flux have attn, mlp"),
        ("wan", ("attn", "mlp"), (8, 4), "it is for 4 blocks, this model has 3"),
        ("wan", ("attn", "mlp"), (5, 3), "it is for 5 steps, this run has 8"),
    ],
)
def test_a_table_for_another_model_or_run_stays_off(tiny, family, modules, shape, words):
    steps, blocks = shape
    table = Table([[[step == 0] * len(modules)] * blocks for step in range(steps)], modules)
    plain = sample(tiny(family), family)
    assert torch.equal(plain, sample(host.request(tiny(family), request(table, required=False)), family))
    assert words in host.TRACES.of_prompt(None)[-1]["techniques"][0]["reason"]
    with pytest.raises(StrettoError, match=words):
        sample(host.request(tiny(family), request(table)), family)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rows": "##,##/..,##", "modules": "attn,ffn"}, "modules has 'ffn'; known modules: attn, cross_attn, mlp"),
        ({"rows": "##,#/..,##", "modules": "attn,mlp"}, "has 1 entries; expected 2, one per module"),
        ({"rows": "##,##", "modules": "attn,mlp", "forecaster": "magic"}, "known forecasters: reuse, newton, taylor"),
        ({"rows": "##,##", "modules": "attn,mlp", "order": 9}, "order is 9; it must be a whole number in"),
        ({"rows": "##/..", "order": 1}, "expected rows as text"),
    ],
)
def test_bad_settings_are_refused_at_the_node(tiny, settings, words):
    with pytest.raises(StrettoError, match=words):
        host.request(tiny("wan"), Request("table", settings))


@pytest.mark.parametrize("family", ["wan", "sd3", "flux", "pixart"])
def test_a_recorded_run_is_the_plain_one_and_tells_what_changed(tiny, family):
    model, outputs = tiny(family), {}
    network = model.model.diffusion_model
    sites = describe(network).module_sites(network)
    plain = sample(tiny(family), family, steps=STEPS, cfg=1.0)
    handles = []
    for path in (path for site in sites for path in site.outputs):

        def hook(module, args, out, path=path):
            outputs.setdefault(path, []).append([t.clone() for t in (out if isinstance(out, tuple) else (out,))])

        handles.append(network.get_submodule(path).register_forward_hook(hook))
    try:
        units, latent = profile_modules(model, lambda made: sample(made, family, steps=STEPS, cfg=1.0))
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(latent, plain) and len(units) == len(sites)
    for unit, site in zip(units, sites, strict=True):
        assert (unit.block, unit.names) == (site.depth, site.names) and unit.cost > 0 and unit.changes[0] == 0
        for step in range(1, STEPS):
            pairs = [
                (new, old)
                for path in site.outputs
                for new, old in zip(outputs[path][step], outputs[path][step - 1], strict=True)
            ]
            moved = sum(float((new - old).double().square().sum()) for new, old in pairs)
            size = sum(float(old.double().square().sum()) for _, old in pairs)
            assert unit.changes[step] == pytest.approx((moved / size) ** 0.5, rel=1e-3)
    choice = choose_table(units, 0.7, Rails(1, 0))
    sample(host.request(tiny(family), request(choice.table)), family, steps=STEPS, cfg=1.0)
    assert host.TRACES.of_prompt(None)[-1]["techniques"][0]["status"] == "active"


def test_beside_a_cache_nothing_is_recorded(tiny):
    cached = host.request(tiny("wan"), Request("cache", {"method": "Taylor"}))
    with pytest.raises(ConflictError, match="Stretto module profile cannot share a model with Stretto Cache"):
        profile_modules(cached, lambda made: sample(made, "wan"))


@pytest.mark.parametrize("family", FEW)
def test_loras_and_weights_streamed_from_elsewhere(tiny, family):
    """Weight patches find their keys under our patches, and layers that cast their weights on the way still do."""
    model = tiny(family)
    network = model.model.diffusion_model
    path = describe(network).module_sites(network)[-1].outputs[0]
    key = next(key for key in model.model_state_dict() if path in key and key.endswith(".weight"))
    shape = model.model_state_dict()[key].shape
    change = {key: (0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(0)),)}
    patched, asked = model.clone(), request(full(model), force=True)
    assert patched.add_patches(change) == [key]
    plain = sample(patched, family, steps=STEPS)
    assert not torch.equal(plain, sample(tiny(family), family, steps=STEPS))
    behind, before = host.request(patched, asked), host.request(tiny(family), asked)
    assert before.add_patches(change) == [key]
    layers = [layer for layer in network.modules() if hasattr(layer, "comfy_cast_weights")]
    usual = [layer.comfy_cast_weights for layer in layers]
    for cast in (False, True):
        for layer in layers:
            layer.comfy_cast_weights = cast
        try:
            assert torch.equal(plain, sample(behind, family, steps=STEPS))
            assert torch.equal(plain, sample(before, family, steps=STEPS))
        finally:
            for layer, value in zip(layers, usual, strict=True):
                layer.comfy_cast_weights = value
