"""Text features kept: the same picture to the bit, and each projection of the prompt run once."""

import gc
import weakref

import comfy.hooks
import comfy.model_base
import comfy.sample
import pytest
import torch

from stretto.acceleration.caching.technique import CacheTechnique
from stretto.acceleration.caching.text_features import TEXT, Kept, TextFeatures, TextPass
from stretto.acceleration.facts import Facts
from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.hosts.comfy_modules import ModulePatch, TextPatch
from stretto.acceleration.models import FAMILIES, TextPart, describe
from stretto.acceleration.plan import Request
from stretto.acceleration.sampling import schedule_of, traits_of

from .tiny_models import CONFIGS, build, conditioning, sample

STEPS = 6
#: Families with keys or values of the prompt alone.
QUALIFY = ["wan", "wan_i2v", "wan2.2_5b", "wan_reference", "wan_vace", "ltxv", "pixart", "cosmos_predict2"]
SAMPLERS = ["euler", "dpmpp_2m", "heun", "euler_ancestral"]


def request(*, force=True, text=True, **settings):
    settings = {"method": "Taylor", "interval": 2, "warmup": 2, "tail": 1, **settings}
    return Request("cache", {**settings, "text_features": text}, force=force)


@pytest.fixture
def projected(monkeypatch):
    """Counts of the projections that ran and that were spared."""
    counts = {"computed": 0, "reused": 0}
    clear = TextFeatures.clear

    def spy(self):
        for name in counts:
            counts[name] += getattr(self, name)
        clear(self)

    monkeypatch.setattr(TextFeatures, "clear", spy)
    return counts


def parts_of(model):
    network = model.model.diffusion_model
    return describe(network).text_parts(network)


def firsts(model):
    return [part for part in parts_of(model) if part.first]


def split_guidance(monkeypatch):
    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *args, **kwargs: 1 << 60)


@pytest.mark.parametrize("split", [False, True], ids=["merged", "split"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("family", QUALIFY)
def test_kept_text_changes_nothing_and_runs_once(tiny, family, sampler, split, monkeypatch, projected):
    if split:
        split_guidance(monkeypatch)
    options = {"sampler": sampler, "steps": STEPS, "batch": 2}
    plain = sample(tiny(family), family, **options)
    engaged = sample(host.request(tiny(family), request(interval=1)), family, **options)
    assert torch.equal(plain, engaged)
    evaluations = host.TRACES.of_prompt(None)[-1]["totals"]["evaluations"]
    count, calls = len(firsts(tiny(family))), 2 if split else 1
    assert projected == {"computed": count * calls, "reused": count * calls * (evaluations - 1)}
    assert torch.equal(
        sample(host.request(tiny(family), request(text=False)), family, **options),
        sample(host.request(tiny(family), request()), family, **options),
    )
    assert torch.equal(plain, sample(tiny(family), family, **options))


@pytest.mark.parametrize("method", ["EasyCache", "TeaCache", "DBCache", "Output", "PAB"])
def test_every_way_of_caching_may_keep_text(tiny, method):
    settings = {"method": method, "threshold": 0.3, "max_skips": 2}
    without = sample(host.request(tiny("wan"), request(text=False, **settings)), "wan", steps=8)
    assert torch.equal(without, sample(host.request(tiny("wan"), request(**settings)), "wan", steps=8))


@pytest.mark.parametrize("family", sorted(set(CONFIGS) - set(QUALIFY)))
def test_no_other_family_is_touched(tiny, family):
    if family not in ("wan2.2_i2v", "wan_phantom"):  # Wan by other names
        assert not parts_of(tiny(family))
        assert not host.request(tiny(family), request()).object_patches


@pytest.mark.parametrize("family", QUALIFY)
def test_what_a_projection_is_given_is_the_same_at_every_step(family):
    """On the network itself, without anything of ours: the reason why a family qualifies."""
    model, given = build(family), {}
    for part in firsts(model):
        seen = given.setdefault(part.path, [])
        model.model.diffusion_model.get_submodule(part.path).register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0].clone())
        )
    sample(model, family, steps=4)
    assert given and all(len(seen) >= 4 and all(torch.equal(seen[0], one) for one in seen) for seen in given.values())


def test_weight_hooks_make_features_of_their_own(tiny, projected):
    """A LoRA that a hook switches on half-way: other weights, other keys."""
    network = tiny("wan").model.diffusion_model
    key, generator = "diffusion_model.blocks.1.cross_attn.k.weight", torch.Generator().manual_seed(5)
    change = torch.randn(network.blocks[1].cross_attn.k.weight.shape, generator=generator)

    def hooked(request_=None):
        hook = comfy.hooks.WeightHook(strength_model=1.0)
        hook.weights, hook.need_weight_init = {key: ("diff", (change,))}, False
        frames = comfy.hooks.HookKeyframeGroup()
        for strength, start in ((0.0, 0.0), (1.0, 0.4)):
            frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
        hook.hook_keyframe = frames
        group = comfy.hooks.HookGroup()
        group.add(hook)
        model = tiny("wan")
        model.register_all_hook_patches(group, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model))
        return (host.request(model, request_) if request_ else model), group

    def run(request_=None):
        model, group = hooked(request_)
        pair = [comfy.hooks.set_hooks_for_conditioning(conditioning(seed, "wan"), group) for seed in (3, 4)]
        latent = torch.zeros(1, 16, 3, 6, 4)
        noise = comfy.sample.prepare_noise(latent, 1)
        return comfy.sample.sample(
            model, noise, STEPS, 5.0, "euler", "simple", *pair, latent, disable_pbar=True, seed=1
        )

    plain = run()
    assert not torch.equal(plain, sample(tiny("wan"), "wan", steps=STEPS))
    assert torch.equal(plain, run(request(interval=1)))
    assert projected["computed"] == 2 * len(firsts(tiny("wan"))) and projected["reused"]


def test_text_that_somebody_changes_on_the_way_is_projected_anew(tiny, projected):
    """Another pack's wrapper turns the prompt at every step; its key stays what it was."""

    def turning(model):
        def wrapper(executor, x, t, context, *args, **kwargs):
            return executor(x, t, context * (1 + t.reshape(-1, 1, 1) / 1000), *args, **kwargs)

        model.add_wrapper_with_key("diffusion_model", "another pack", wrapper)
        return model

    plain = sample(turning(tiny("wan")), "wan", steps=STEPS)
    assert torch.equal(plain, sample(host.request(turning(tiny("wan")), request(interval=1)), "wan", steps=STEPS))
    assert projected["reused"] == 0


def test_patches_leave_the_shared_network_as_it_was(tiny):
    model = host.request(tiny("wan"), request())
    network, paths = model.model.diffusion_model, [part.path for part in parts_of(model)]
    assert len(model.object_patches) == len(paths) == 9
    sample(model, "wan", steps=STEPS)
    assert all(isinstance(network.get_submodule(path).forward, TextPatch) for path in paths)
    sample(tiny("wan"), "wan", steps=STEPS)
    assert not any(isinstance(network.get_submodule(path).forward, TextPatch) for path in paths)


def test_only_what_is_asked_for_is_patched(tiny):
    assert not host.request(tiny("wan"), request(text=False)).object_patches
    kinds = {type(patch) for patch in host.request(tiny("wan"), request()).object_patches.values()}
    assert kinds == {TextPatch}
    both = host.request(tiny("wan"), request(method="PAB"))
    assert {type(patch) for patch in both.object_patches.values()} == {TextPatch, ModulePatch}
    assert host.request(both, Request("measure", {"nonce": 1})).object_patches == both.object_patches


def test_a_projection_that_another_node_patched_is_left_alone(tiny):
    model, name = tiny("wan"), "diffusion_model.blocks.0.cross_attn.v.forward"
    original = model.get_model_object(name)

    def doubled(x):
        return 2 * original(x)

    model.add_object_patch(name, doubled)
    plain = sample(model, "wan", steps=STEPS)
    accelerated = host.request(model, request(interval=1))
    assert accelerated.object_patches[name] is doubled
    assert torch.equal(plain, sample(accelerated, "wan", steps=STEPS))


def test_nothing_survives_its_run(tiny, monkeypatch):
    alive, copy = [], TextFeatures.copy

    def spy(self, tensor):
        kept = copy(self, tensor)
        alive.append(weakref.ref(kept))
        return kept

    monkeypatch.setattr(TextFeatures, "copy", spy)
    sample(host.request(tiny("wan"), request()), "wan", steps=STEPS)
    trace = host.TRACES.of_prompt(None)[-1]
    gc.collect()
    assert alive and not any(reference() is not None for reference in alive)
    assert "6 projections of the text are computed once per prompt and kept" in trace["techniques"][0]["reason"]
    assert trace["memory"]["store_peak_bytes"] > 0


def test_bytes_are_counted_and_bounded(tiny, monkeypatch):
    plain = sample(tiny("wan"), "wan", steps=STEPS)
    seen = []
    begin = TextFeatures.begin

    def tight(self, call):
        self.budget_bytes = 4000
        seen.append(self)
        return begin(self, call)

    monkeypatch.setattr(TextFeatures, "begin", tight)
    assert torch.equal(plain, sample(host.request(tiny("wan"), request(interval=1)), "wan", steps=STEPS))
    assert 0 < seen[-1].peak_bytes <= 4000 and seen[-1].bytes == 0
    assert seen[-1].computed > len(firsts(tiny("wan")))  # what had no room is computed every time


def test_it_is_kept_only_where_that_pays(tiny):
    model = tiny("wan")
    large = (16, 81, 60, 104)

    def reason(text):
        settings = request(text=text, force=False)
        outcome = CacheTechnique().resolve(settings, facts(model, large))
        return outcome.reason, outcome.session

    words, session = reason(True)
    assert session.text is None and "text keys are computed at every step: keeping them would save 0." in words
    assert "text" not in reason(False)[0] and reason(False)[1].text is None
    session = CacheTechnique().resolve(request(force=False), facts(model, (16, 3, 6, 4))).session
    assert session.text is not None


def facts(model, shape):
    network = model.model.diffusion_model
    sigmas = [1.0 - step / 20 for step in range(21)]
    return Facts(network, describe(network), traits_of("euler"), schedule_of(sigmas), (1, *shape))


def test_what_is_handed_out_may_be_written_into():
    features = TextFeatures(1 << 20)
    part, text = TextPart("v", "v"), torch.randn(1, 3, 4)
    kept = Kept()
    for _ in range(3):
        out = TextPass(features, kept)(part, text.clone(), lambda x: x * 2)
        assert torch.equal(out, text * 2)
        out.zero_()
    assert (features.computed, features.reused) == (1, 2)


def test_a_chain_is_kept_at_its_end_and_not_mixed_up_by_somebody_between():
    features, kept, text = TextFeatures(1 << 20), Kept(), torch.arange(12.0).reshape(1, 3, 4)
    first, last = TextPart("k", "norm", last=False), TextPart("norm", "norm", first=False)

    def run(between=lambda x: x):
        projections = TextPass(features, kept)
        return projections(last, between(projections(first, text, lambda x: x + 1)), lambda x: x * 3)

    assert torch.equal(run(), (text + 1) * 3) and torch.equal(run(), (text + 1) * 3)
    assert len(kept.features) == 1 and features.reused == 1
    features, kept = TextFeatures(1 << 20), Kept()
    assert torch.equal(run(lambda x: x - 1), text * 3) and not kept.features


def test_every_descriptor_names_chains_of_blocks_it_has():
    named = {family.family for family in FAMILIES if family.text_projections}
    assert named == {"wan", "wan_vace", "ltxv", "pixart", "cosmos_predict2"} and TEXT
