"""Sparse attention in ComfyUI: off and complete it changes nothing, elsewhere it knows where the picture stands."""

import gc
import json
import math
import weakref

import comfy.model_management
import jsonschema
import pytest
import torch

from stretto.acceleration.attention import plan_run
from stretto.acceleration.attention.geometry import Geometry
from stretto.acceleration.attention.key_mask import valid_keys
from stretto.acceleration.attention.locate import locate
from stretto.acceleration.attention.methods import METHODS
from stretto.acceleration.attention.session import AttentionSession
from stretto.acceleration.attention.weights.files import save_tensors as save_weights
from stretto.acceleration.errors import ConflictError, StrettoError
from stretto.acceleration.figures import worst_layers
from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.models import describe
from stretto.acceleration.plan import Request
from stretto.acceleration.schemas import schema
from stretto.acceleration.summary import summary

from .test_nodes import nodes  # noqa: F401  (a fixture)
from .tiny_models import CONFIGS, LATENTS, ONE_ROW, sample

#: Families whose attention no override reaches.
DEAF = {"pixart"}
FAMILIES = sorted(set(CONFIGS) - DEAF)
#: Each a way of its own: plain sequence, text first, text last under a mask, references.
FEW = ["wan", "flux", "sd3", "hunyuan_video"]
SMALL = {"min_tokens": 0, "block": 16, "dense_until": 0.0}


#: Families whose references have the size of the clip.
FIXED = {"wan_reference", "wan_phantom", "hunyuan_reference"}


def request(*, force=False, required=True, **settings):
    return Request("attention", {**SMALL, **settings}, force=force, required=required)


def options_of(family):
    return {"batch": 1, "cfg": 1.0} if family in ONE_ROW else {"batch": 2, "cfg": 4.0}


def trace_of():
    return host.TRACES.of_prompt(None)[-1]


def relative(a, b):
    return float((a - b).norm() / b.norm())


def spatial(family):
    """The family's latent, large enough for several blocks of 16 tokens, with sides that are no multiple."""
    return LATENTS[family] if family in FIXED else (*LATENTS[family][:-2], 10, 14)


@pytest.mark.parametrize("family", FAMILIES)
def test_off_is_plain_sampling(tiny, family):
    options = {"steps": 3, **options_of(family)}
    plain = sample(tiny(family), family, **options)
    result = sample(host.request(tiny(family), request(keep=1.0, required=False)), family, **options)
    assert torch.equal(result, plain)
    assert [item["status"] for item in trace_of()["techniques"]] == ["off"]
    assert "attention" not in trace_of()


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_is_plain_attention_within_rounding(tiny, family):
    options = {"steps": 3, "shape": spatial(family), **options_of(family)}
    plain = sample(tiny(family), family, **options)
    result = sample(host.request(tiny(family), request(keep=1.0, force=True)), family, **options)
    found = trace_of()["attention"]
    assert relative(result, plain) < 1e-5
    assert found["layers"], found["dense"]
    assert all(share == 1.0 for item in found["layers"] for share in item["kept"])
    assert len(found["layers"]) == describe(tiny(family).model.diffusion_model).module_blocks(
        tiny(family).model.diffusion_model
    )


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - FIXED))
def test_a_quarter_of_the_blocks_runs_everywhere_and_is_reported(tiny, family):
    options = {"steps": 3, "shape": spatial(family), **options_of(family)}
    plain = sample(tiny(family), family, **options)
    result = sample(host.request(tiny(family), request(keep=0.25)), family, **options)
    trace = trace_of()
    jsonschema.validate(json.loads(json.dumps(trace)), schema("trace"))
    found = trace["attention"]
    assert torch.isfinite(result).all()
    assert not torch.equal(result, plain)
    assert all(0 < share < 1 for item in found["layers"] for share in item["kept"])
    assert all(0 < entry["attention_kept"] < 1 for entry in trace["evaluations"])
    assert {sample["layer"] for sample in found["samples"]} == {item["layer"] for item in found["layers"]}
    assert "of the key blocks kept" in summary(trace)


@pytest.mark.parametrize("family", sorted(DEAF))
def test_what_no_override_reaches_stays_and_says_so(tiny, family):
    plain = sample(tiny(family), family, steps=3)
    result = sample(host.request(tiny(family), request(keep=0.5, required=False)), family, steps=3)
    assert torch.equal(result, plain)
    assert "computes its attention where no other can be put" in trace_of()["techniques"][0]["reason"]


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("family", ["wan", "flux"])
def test_every_method_runs(tiny, family, method):
    options = {"steps": 2, "shape": spatial(family), **options_of(family)}
    plain = sample(tiny(family), family, **options)
    network = tiny(family).model.diffusion_model
    grid = describe(network).grid(network, (1, *spatial(family)))
    misfit = METHODS[method].fits(Geometry(grid, 0, math.prod(grid)))
    model = host.request(tiny(family), request(method=method, keep=0.5, required=not misfit))
    result = sample(model, family, **options)
    if misfit:  # one is for pictures, two are for clips
        assert torch.equal(result, plain)
        assert trace_of()["techniques"][0]["reason"] == misfit
        return
    assert torch.isfinite(result).all()
    assert relative(result, plain) < 1.0
    found = trace_of()["attention"]
    assert found["method"] == method
    assert found["layers"], found["dense"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pictures_tokens_are_found(tiny, family):
    """Tokens whose queries change with the latent alone are the picture's (in the first layer, before they have mixed)."""
    model = tiny(family)
    network = model.model.diffusion_model
    descriptor = describe(network)

    def watched(seed):
        clone = host.request(tiny(family), request(keep=0.5))
        original, found = AttentionSession.attention, []

        def attention(self, call, asked):
            if not found:
                found.append((asked.q[:1].clone(), locate(descriptor, network, call, asked)))
            return original(self, call, asked)

        AttentionSession.attention = attention
        try:
            sample(clone, family, steps=1, cfg=1.0, shape=spatial(family), seed=seed)
        finally:
            AttentionSession.attention = original
        return found[0]

    (first, geometry), (second, _) = watched(1), watched(2)
    assert isinstance(geometry, Geometry), geometry
    changed = (first != second).any(dim=-1).any(dim=1)[0].nonzero().flatten()
    assert geometry.start == int(changed.min())
    # Z-Image fills its picture up with tokens that have met the others before the first of these layers.
    behind = 0 if family != "z_image" else -geometry.visual % 32
    assert int(changed.max()) + 1 == geometry.start + geometry.visual + behind
    assert len(changed) == geometry.visual + behind


@pytest.mark.parametrize("family", FEW)
def test_merged_and_split_guidance_agree(tiny, family, monkeypatch):
    options = {"steps": 3, "cfg": 4.0, "shape": spatial(family)}
    merged = sample(host.request(tiny(family), request(keep=0.5)), family, **options)
    calls = len(trace_of()["evaluations"][0]["branches"])
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_, **__: 0)
    split = sample(host.request(tiny(family), request(keep=0.5)), family, **options)
    assert calls == 2
    assert relative(split, merged) < 1e-5


@pytest.mark.parametrize("family", FEW)
def test_dense_steps_and_layers_are_the_hosts_own(tiny, family):
    layers = describe(tiny(family).model.diffusion_model).module_blocks(tiny(family).model.diffusion_model)
    options = {"steps": 4, "cfg": 1.0, "shape": spatial(family)}
    plain = sample(tiny(family), family, **options)
    wanted = request(keep=0.25, dense_layers=list(range(layers)))
    assert torch.equal(sample(host.request(tiny(family), wanted), family, **options), plain)
    assert set(trace_of()["attention"]["dense"]) == {"layers that stay dense"}
    sample(host.request(tiny(family), request(keep=0.25, dense_until=0.5)), family, **options)
    assert [entry["attention_kept"] is None for entry in trace_of()["evaluations"]] == [True, True, False, False]


@pytest.mark.parametrize("keep", [1.0, 0.4])
def test_masked_text_is_a_shorter_sequence(tiny, monkeypatch, keep):
    """HunyuanVideo masks the end of its text: those keys count for nothing, whatever they hold."""
    from . import tiny_models

    original = tiny_models.conditioning

    def masked(seed, family=""):
        found = original(seed, family)
        found[0][1]["attention_mask"] = torch.tensor([[1, 1, 1, 0, 0]])
        return found

    monkeypatch.setattr(tiny_models, "conditioning", masked)
    options = {"steps": 2, "cfg": 1.0, "shape": spatial("hunyuan_video")}
    plain = sample(tiny("hunyuan_video"), "hunyuan_video", **options)
    wanted = request(keep=keep, force=keep == 1.0)
    result = sample(host.request(tiny("hunyuan_video"), wanted), "hunyuan_video", **options)
    found = trace_of()["attention"]
    assert found["layers"] and not found["dense"]
    assert relative(result, plain) < (1e-5 if keep == 1.0 else 1.0)
    monkeypatch.setattr(tiny_models, "conditioning", original)
    assert relative(sample(tiny("hunyuan_video"), "hunyuan_video", **options), plain) > 1e-4  # the mask matters


def test_the_override_that_was_there_is_asked_for_what_stays(tiny):
    """Cross-attention and dense steps go to the other pack's override, with their arguments as they came."""
    seen = []

    def other(func, q, k, v, heads, *args, **kwargs):
        seen.append((q.shape[1] == k.shape[1], "_inside_attn_wrapper" in kwargs))
        return func(q, k, v, heads, *args, **kwargs)

    model = tiny("wan")
    model.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = other
    sample(host.request(model, request(keep=0.5, dense_until=0.5)), "wan", steps=2, cfg=1.0)
    blocks = 3
    assert seen == [(True, True), (False, True)] * blocks + [(False, True)] * blocks


def test_a_network_that_asks_for_precision_keeps_full_attention(tiny):
    from comfy.ldm.wan import model as wan

    def exactly(original):
        return lambda *args, **kwargs: original(*args, **kwargs, low_precision_attention=False)

    model = host.request(tiny("wan"), request(keep=0.25))
    plain = sample(tiny("wan"), "wan", steps=2, cfg=1.0)
    original = wan.optimized_attention
    options = {}

    def swallow(func):
        def inner(*args, **kwargs):
            kwargs.pop("low_precision_attention", None)
            return func(*args, **kwargs)

        return inner

    def precise(*args, **kwargs):
        override = kwargs["transformer_options"].get("optimized_attention_override")
        if override is None:
            return original(*args, **kwargs)
        options["asked"] = True
        return override(swallow(original.__wrapped__), *args, **kwargs, low_precision_attention=False)

    wan.optimized_attention = precise
    try:
        result = sample(model, "wan", steps=2, cfg=1.0)
    finally:
        wan.optimized_attention = original
    assert options and torch.equal(result, plain)
    assert "the network asks for full precision" in trace_of()["attention"]["dense"]


@pytest.mark.parametrize("method", ["Block mass", "DraftAttention", "Sliding tiles"])
@pytest.mark.parametrize("family", ["wan", "flux"])
def test_heads_one_by_one_are_heads_together(tiny, monkeypatch, family, method):
    """To the same bits, with the same report: groups of heads only save memory."""
    options = {"steps": 2, "cfg": 4.0, "shape": spatial(family)}
    together = sample(host.request(tiny(family), request(method=method, keep=0.4)), family, **options)
    expected = trace_of()["attention"]
    monkeypatch.setattr(plan_run, "COPIES_CPU", 1)
    apart = sample(host.request(tiny(family), request(method=method, keep=0.4)), family, **options)
    assert relative(apart, together) < 1e-6
    assert trace_of()["attention"]["layers"] == expected["layers"]
    assert trace_of()["attention"]["pictures"] == expected["pictures"]


class TestWithTheCache:
    @pytest.mark.parametrize("family", ["wan", "flux"])
    def test_order_of_nodes_does_not_matter(self, tiny, family):
        cache, sparse = Request("cache", {"method": "Taylor", "interval": 2, "warmup": 1, "tail": 1}), request(keep=0.5)
        options = {"steps": 6, "cfg": 3.0, "shape": spatial(family)}
        one = sample(host.request(host.request(tiny(family), cache), sparse), family, **options)
        trace = trace_of()
        two = sample(host.request(host.request(tiny(family), sparse), cache), family, **options)
        assert torch.equal(one, two)
        kept = [(entry["decision"], entry["attention_kept"] is not None) for entry in trace["evaluations"]]
        assert ("computed", True) in kept
        assert all(decision == "computed" for decision, sparse_too in kept if sparse_too)

    def test_a_table_of_modules_skips_attention_that_was_to_be_sparse(self, tiny):
        from stretto.acceleration.caching.masks import Table
        from stretto.acceleration.caching.table import table_settings

        rows = [[[True, True, True]] * 3, [[False, True, True]] * 3, [[True, True, True]] * 3]
        table = Request("table", table_settings(Table(rows, ("attn", "cross_attn", "mlp"))), required=True)
        sample(host.request(host.request(tiny("wan"), table), request(keep=0.5)), "wan", steps=3, cfg=1.0)
        kept = [entry["attention_kept"] for entry in trace_of()["evaluations"]]
        assert [share is None for share in kept] == [False, True, False]


@pytest.mark.parametrize("family", FEW)
def test_nothing_is_left_behind(tiny, family):
    model = tiny(family)
    plain = sample(model, family, steps=2)
    sparse = host.request(model, request(keep=0.5))
    kept = []

    class Interrupt:
        def __call__(self, step, *_):
            kept.append(weakref.ref(session_of()))
            if step == 0:
                raise comfy.model_management.InterruptProcessingException

    def session_of():
        return next(item for item in gc.get_objects() if isinstance(item, AttentionSession))

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(sparse, family, steps=2, callback=Interrupt())
    gc.collect()
    assert kept and all(ref() is None for ref in kept)
    assert trace_of()["outcome"] == "interrupted"
    assert torch.equal(sample(model, family, steps=2), plain)
    first = sample(sparse, family, steps=2)
    sample(sparse, family, steps=2, shape=spatial(family))
    assert torch.equal(sample(sparse, family, steps=2), first)


class TestRefusals:
    @pytest.mark.parametrize(
        "field, value, words",
        [
            ("keep", 0.0, "keep"),
            ("keep", 1.5, "keep"),
            ("dense_until", -0.1, "dense_until"),
            ("block", 48, "block"),
            ("method", "Spars", "method"),
            ("min_tokens", -1, "min_tokens"),
            ("radius", -1, "radius"),
            ("surprise", "surprise", "unknown setting"),
        ],
    )
    def test_names_field_and_value(self, tiny, field, value, words):
        with pytest.raises(StrettoError, match=words) as caught:
            host.request(tiny("wan"), request(**{field: value}))
        assert str(value) in str(caught.value)

    def test_two_on_one_model(self, tiny):
        with pytest.raises(ConflictError, match="Sparse Attention"):
            host.request(host.request(tiny("wan"), request()), request(keep=0.5))

    def test_too_few_tokens_is_a_reason(self, tiny):
        sample(host.request(tiny("wan"), request(min_tokens=4096, required=False)), "wan", steps=2)
        assert "below min_tokens = 4,096" in trace_of()["techniques"][0]["reason"]

    def test_required_raises_instead(self, tiny):
        with pytest.raises(StrettoError, match="min_tokens"):
            sample(host.request(tiny("wan"), request(min_tokens=4096)), "wan", steps=2)


class TestKeyMasks:
    GEOMETRY = Geometry((1, 2, 3), 4, 12)  # four tokens of text, six of the picture, two others

    def additive(self, *left_out):
        mask = torch.zeros(1, 1, 12)
        mask[..., list(left_out)] = -3e38
        return mask

    def test_text_from_the_end_becomes_a_length(self):
        assert valid_keys(self.additive(11), 2, self.GEOMETRY).tolist() == [11, 11]
        assert valid_keys(self.additive(), 1, self.GEOMETRY).tolist() == [12]
        rows = torch.ones(2, 1, 1, 12, dtype=torch.bool)
        rows[1, ..., 10:] = False
        assert valid_keys(rows, 2, self.GEOMETRY).tolist() == [12, 10]

    @pytest.mark.parametrize("left_out", [(5,), (1,), (3, 5)])
    def test_the_picture_or_text_before_other_text_is_none(self, left_out):
        assert valid_keys(self.additive(*left_out), 1, self.GEOMETRY) is None

    def test_weights_heads_and_queries_are_none(self):
        soft = torch.zeros(1, 1, 12)
        soft[..., 11] = -2.0
        assert valid_keys(soft, 1, self.GEOMETRY) is None
        assert valid_keys(torch.zeros(12, 12), 1, self.GEOMETRY) is None
        assert valid_keys(torch.zeros(1, 4, 1, 12), 1, self.GEOMETRY) is None
        assert valid_keys(torch.zeros(3, 1, 1, 12), 2, self.GEOMETRY) is None


@pytest.fixture(scope="module")
def trace(tiny):
    sample(host.request(tiny("wan"), request(keep=0.4, dense_until=0.5)), "wan", steps=4, shape=spatial("wan"))
    return trace_of()


class TestReport:
    def test_the_picture_shows_each_head_as_bright_as_it_kept(self, trace, nodes):  # noqa: F811
        from stretto.nodes.attention_map import CELL_HEIGHT, LABEL, RAMP, TOP, attention_map
        from stretto.nodes.timeline import MARGIN

        changed = json.loads(json.dumps(trace))
        changed["attention"]["layers"][1]["kept"] = [0.0, 1.0]
        picture, y = attention_map(changed), TOP + CELL_HEIGHT + 4
        room = 960 - 2 * MARGIN - LABEL - 190 - 16
        seen = [picture.getpixel((MARGIN + LABEL + place * room // 4, y)) for place in (1, 3)]
        assert ["#" + "".join(f"{value:02x}" for value in pixel) for pixel in seen] == [RAMP[0], RAMP[-1]]
        assert picture.height > attention_map({**changed, "attention": {**changed["attention"], "pictures": []}}).height

    def test_runs_with_full_attention_have_none(self, trace, nodes):  # noqa: F811
        from stretto.nodes.attention_map import attention_map

        assert attention_map({key: value for key, value in trace.items() if key != "attention"}) is None

    def test_layers_come_worst_first_and_one_that_stands_out_is_named(self, trace):
        changed = json.loads(json.dumps(trace))
        changed["attention"]["samples"] = [
            {"step": 2, "layer": layer, "relative_l2": [error, error], "kept_mass": [1.0, 1.0]}
            for layer, error in enumerate((0.01, 0.02, 0.9, 0.03, 0.02))
        ]
        assert [layer for layer, _ in worst_layers(changed)] == [2, 3, 1, 4, 0]
        assert "layer 2 90.0%, layer 3 3.0%" in summary(changed)
        assert "dense_layers = 2" in summary(changed)

    def test_samples_say_how_far_off_a_layer_was(self, tiny, trace):
        """Keeping everything is not off, keeping less is; kept mass is what the softmax says."""
        sample(host.request(tiny("wan"), request(keep=1.0, force=True)), "wan", steps=1, shape=spatial("wan"))
        whole = trace_of()["attention"]["samples"]
        assert all(error < 1e-5 for item in whole for error in item["relative_l2"])
        assert all(abs(mass - 1) < 1e-5 for item in whole for mass in item["kept_mass"])
        assert all(0 < mass < 1 for item in trace["attention"]["samples"] for mass in item["kept_mass"])
        assert all(error > 1e-4 for item in trace["attention"]["samples"] for error in item["relative_l2"])


class TestFitting:
    @pytest.mark.parametrize("fit", ["share", "map"])
    def test_salad_without_weights_learns_in_dense_steps_and_says_so(self, tiny, fit):
        settings = {"method": "SALAD", "keep": 0.2, "dense_until": 0.5, "fit": fit}
        sample(host.request(tiny("wan"), request(**settings)), "wan", steps=8, shape=spatial("wan"))
        fitted = trace_of()["attention"]["fitted"]
        assert {item["layer"] for item in fitted["layers"]} == {0, 1, 2}
        assert all(item["steps"] == 4 for item in fitted["layers"])
        assert fitted["heads"] == 6 and 0 <= fitted["enabled"] <= 6

    def test_other_methods_do_not_fit(self, tiny):
        sample(host.request(tiny("wan"), request(dense_until=0.5)), "wan", steps=4, shape=spatial("wan"))
        assert "fitted" not in trace_of()["attention"]


class TestTrainedWeights:
    """Through the whole path: a file in our format, the node's path in the request, the run."""

    def write(self, path, tiny, value, **metadata):
        network = tiny("wan").model.diffusion_model
        size = network.dim // network.num_heads
        tensors = {}
        for layer in range(len(network.blocks)):
            tensors[f"blocks.{layer}.proj_l.weight"] = torch.full((size, size), value)
            tensors[f"blocks.{layer}.proj_l.bias"] = torch.zeros(size)
        said = {
            "format": "stretto_attention@1", "variant": "all", "feature_map": "softmax", "base_model": "wan",
            "topk": "0.3", "block_q": "16", "block_k": "16", "smooth_k": "true", **metadata,
        }  # fmt: skip
        save_weights(path, tensors, said)
        return str(path)

    def run(self, tiny, **settings):
        return sample(host.request(tiny("wan"), request(keep=0.3, **settings)), "wan", steps=2, shape=spatial("wan"))

    def test_zero_projections_leave_block_sparse_attention_and_others_do_not(self, tiny, tmp_path):
        plain = self.run(tiny, method="SLA", tail="off")
        zero = self.run(tiny, method="SLA", weights=self.write(tmp_path / "zero.safetensors", tiny, 0.0))
        assert torch.equal(zero, plain)
        assert "SLA (all)" in trace_of()["techniques"][0]["reason"]
        some = self.run(tiny, method="SLA", weights=self.write(tmp_path / "some.safetensors", tiny, 0.5))
        assert not torch.equal(some, plain)

    def test_weights_of_another_method_or_model_are_refused(self, tiny, tmp_path):
        path = self.write(tmp_path / "sla.safetensors", tiny, 0.0)
        with pytest.raises(StrettoError, match="method is 'Top-k'.*choose the method SLA"):
            self.run(tiny, method="Top-k", weights=path)
        other = self.write(tmp_path / "flux.safetensors", tiny, 0.0, base_model="flux")
        with pytest.raises(StrettoError, match=r"flux.safetensors: base_model is 'flux', the model is of the family wan"):
            self.run(tiny, method="SLA", weights=other)
