"""Plan files: what is written is read, what is damaged is refused in words, and a plan fits runs of other lengths and sizes."""

import json
import struct

import numpy as np
import pytest
import torch

from stretto.acceleration.attention.geometry import Geometry, clip, image
from stretto.acceleration.attention.order import OrderSpec, token_order
from stretto.acceleration.attention.plan import View
from stretto.acceleration.attention.reuse import AttentionMemory, Mode, uniform
from stretto.acceleration.attention.search import (
    ModelTag,
    Pattern,
    PlanFile,
    from_steps,
    load_plan,
    save_plan,
    structure_hash,
)
from stretto.acceleration.attention.weights.files import save_tensors
from stretto.acceleration.errors import SchemaError, StrettoError
from stretto.acceleration.evaluation import Branch
from stretto.acceleration.safetensors_header import read_header
from stretto.acceleration.schemas import schema

SHAPE = 3, 2, 4
HASH = structure_hash({"a": (3, 4), "b": (5,)})


def plan(**changes):
    make = np.random.default_rng(0)
    mode = make.choice([0, 1, 2, 4], SHAPE).astype(np.uint8)
    fields = {
        "model": ModelTag("wan", "t2v-1.3b", HASH),
        "mode": mode,
        "cfg": make.random(SHAPE) < 0.5,
        "pattern": np.where(mode == 1, make.integers(0, 2, SHAPE), 0).astype(np.uint8),
        "budget": make.random(SHAPE).astype(np.float32),
        "alpha": make.random(SHAPE).astype(np.float16).astype(np.float32),
        "patterns": (Pattern(), Pattern("arrow", 1 / 16)),
        "sigma_edges": (0.3, 0.7),
        "refresh": (4, 4, 0),
        "steps": 20,
        "grid": (1, 16, 16),
        "tokens": 272,
        "block": (16, 16),
        "order": OrderSpec("tiles", (1, 4, 4)),
        "rho_step": 0.04,
        "curve": ((0.2, 0.3), (0.5, 0.1)),
        "achieved": {"predicted_cost": 0.4, "psnr": 31.5},
        "provenance": {"source": "measured here", "prompts": 2},
    }
    return PlanFile(**{**fields, **changes})


def test_what_is_written_is_read(tmp_path):
    made = plan()
    save_plan(tmp_path / "plan.safetensors", made)
    back = load_plan(tmp_path / "plan.safetensors")
    for name in ("mode", "cfg", "pattern", "budget", "alpha"):
        assert np.array_equal(getattr(made, name), getattr(back, name))
    assert made.to_json() == back.to_json() and back.model == made.model and back.order == made.order
    assert (tmp_path / "plan.safetensors").stat().st_size < 4096
    with pytest.raises(StrettoError, match="exists already"):
        save_plan(tmp_path / "plan.safetensors", made)
    save_plan(tmp_path / "other.safetensors", plan(alpha=None))
    assert load_plan(tmp_path / "other.safetensors").alpha is None


def test_a_real_model_fits_into_a_hundred_kilobytes(tmp_path):
    shape = 4, 60, 56
    zeros = np.zeros(shape, np.uint8)
    big = plan(mode=zeros, cfg=zeros > 0, pattern=zeros, budget=zeros.astype(np.float32), alpha=None,
               sigma_edges=(0.1, 0.2, 0.3), refresh=(4,) * 4)  # fmt: skip
    save_plan(tmp_path / "big.safetensors", big)
    assert (tmp_path / "big.safetensors").stat().st_size < 150_000


def test_the_document_is_what_the_schema_says():
    jsonschema = pytest.importorskip("jsonschema")
    found = schema("attention_plan")
    jsonschema.Draft202012Validator.check_schema(found)
    jsonschema.validate(plan().to_json(), found)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**plan().to_json(), "extra": 1}, found)


def written(tmp_path, change=None, tensors=None, text=None):
    save_plan(tmp_path / "good.safetensors", plan())
    document = json.loads(read_header(tmp_path / "good.safetensors").metadata["attention_plan"])
    whole = torch.zeros(SHAPE)
    found = {name: whole.half() for name in ("mode", "cfg", "pattern")} | {"budget": whole.clone()}
    found.update(tensors or {})
    found = {name: value for name, value in found.items() if value is not None}
    document.update(change or {})
    document = {name: value for name, value in document.items() if value != "absent"}
    path = tmp_path / "bad.safetensors"
    save_tensors(path, found, {"attention_plan": json.dumps(document) if text is None else text})
    return path


@pytest.mark.parametrize(
    "change, words",
    [
        ({"layers": 0}, "layers is 0; expected a whole number from 1 to 1024"),
        ({"heads": True}, "heads is True; expected"),
        ({"layers": 3}, r"budget is F32 \[3, 2, 4\]; expected|mode is F16 \[3, 2, 4\]; expected F16 \[3, 3, 4\]"),
        ({"sigma_edges": [0.7, 0.3]}, "sigma_edges is .*; expected ascending"),
        ({"sigma_edges": [0.3, float("nan")]}, "sigma_edges is"),
        ({"refresh": [4]}, "refresh has 1 entries; expected 3"),
        ({"block": [16, 48]}, "block is .*; expected two of 16, 32, 64, 128"),
        ({"order": {"name": "spiral", "tile": [1, 1, 1]}}, "order is .*; expected name and tile"),
        ({"patterns": [{"kind": "magic", "size": 1}]}, r"patterns\[0\] is .*a pattern is one of"),
        ({"patterns": [{"kind": "band"}, {"sizes": 1}]}, r"patterns\[1\]"),
        ({"patterns": []}, "patterns is"),
        ({"model": {"family": " ", "variant": "", "hash": ""}}, "model is .*; expected family, variant and hash"),
        ({"rho_step": -1}, "rho_step is -1; expected a number from 0 to 1"),
        ({"curve": [[1]]}, "curve is"),
        ({"steps": "absent"}, "attention_plan has no steps"),
        ({"grid": [1, 2]}, "grid is .*three whole numbers"),
    ],
)
def test_a_damaged_document_is_refused(tmp_path, change, words):
    path = written(tmp_path, change)
    with pytest.raises(StrettoError, match=words) as caught:
        load_plan(path)
    assert "bad.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    "tensors, words",
    [
        ({"mode": torch.full(SHAPE, 9.0).half()}, "mode has values that are no whole numbers from 0 to 7"),
        ({"mode": torch.full(SHAPE, 0.5).half()}, "mode has values"),
        ({"pattern": torch.full(SHAPE, 2.0).half()}, "pattern has values that are no whole numbers from 0 to 1"),
        ({"budget": torch.full(SHAPE, 1.5)}, "budget has values outside of 0 to 1"),
        ({"budget": torch.full(SHAPE, torch.nan)}, "budget has values that are not finite"),
        ({"mode": torch.zeros(SHAPE)}, r"mode is F32 \[3, 2, 4\]; expected F16"),
        ({"cfg": torch.zeros(3, 2).half()}, r"cfg is F16 \[3, 2\]; expected F16 \[3, 2, 4\]"),
        ({"cfg": None}, "has no tensor cfg"),
        ({"extra": torch.zeros(1)}, "has a tensor 'extra'"),
    ],
)
def test_damaged_tensors_are_refused(tmp_path, tensors, words):
    with pytest.raises(StrettoError, match=words):
        load_plan(written(tmp_path, tensors=tensors))


def test_files_of_other_kinds_are_refused(tmp_path):
    with pytest.raises(SchemaError, match="bad.safetensors.*reads attention_plan@1"):
        load_plan(written(tmp_path, {"schema": "attention_plan@2"}))
    (tmp_path / "bad.safetensors").unlink()
    (tmp_path / "x").mkdir()
    with pytest.raises(StrettoError, match="is no JSON"):
        load_plan(written(tmp_path / "x", text="{"))
    save_tensors(tmp_path / "other.safetensors", {"a": torch.zeros(1)}, {})
    with pytest.raises(StrettoError, match="no attention plan"):
        load_plan(tmp_path / "other.safetensors")
    (tmp_path / "huge.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(StrettoError, match="its header claims 1,152,921,504,606,846,976 bytes"):
        load_plan(tmp_path / "huge.safetensors")
    cut = (tmp_path / "good.safetensors").read_bytes()[:-5]
    (tmp_path / "cut.safetensors").write_bytes(cut)
    with pytest.raises(StrettoError, match="truncated"):
        load_plan(tmp_path / "cut.safetensors")
    with pytest.raises(StrettoError, match="cannot be read"):
        load_plan(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"sigma_edges": (0.3,)}, "3 buckets need 2"),
        ({"refresh": (4,)}, "as many refresh periods"),
        ({"budget": np.ones((1, 2, 4), np.float32)}, "budget must have shape"),
        ({"patterns": ()}, "pattern"),
    ],
)
def test_a_plan_that_does_not_fit_itself_is_a_programming_error(change, words):
    with pytest.raises(ValueError, match=words):
        plan(**change)


def test_a_plan_belongs_to_a_model():
    made = plan()
    assert made.require("wan", 2, 4, HASH) == "" and "another model" in made.require("wan", 2, 4, "0" * 64)
    with pytest.raises(StrettoError, match="made for wan, this model is flux"):
        made.require("flux", 2, 4)
    with pytest.raises(StrettoError, match="2 layers of 4 heads, this model 30 of 12"):
        made.require("wan", 30, 12)
    assert structure_hash({"b": (5,), "a": (3, 4)}) == HASH != structure_hash({"a": (3, 4)})


def flow(steps):
    return [1 - step / steps for step in range(steps)]


def test_a_plan_of_twenty_steps_serves_thirty():
    wanted = np.full(SHAPE, int(Mode.RHO), np.uint8)
    wanted[2] = int(Mode.FULL)  # the bucket with the most noise stays full
    made = plan(mode=wanted, refresh=(4, 4, 0), alpha=None)
    for steps in (10, 20, 30, 50):
        modes = made.table(flow(steps)).modes[:, 0, 0]
        full = np.flatnonzero(modes == int(Mode.FULL))
        early = sum(sigma >= 0.7 for sigma in flow(steps))
        assert list(full[:early]) == list(range(early))
        gaps = set(np.diff(full[early - 1 :]).tolist())
        assert gaps <= {round(4 * steps / 20)}
        share = float((modes != int(Mode.FULL)).mean())
        assert 0.45 <= share <= 0.65 or steps == 10  # every other one is full there


def test_a_plan_by_steps_takes_the_nearest_step():
    table = uniform(5, 2, 4, [Mode.FULL, Mode.FULL, Mode.RESIDUAL, Mode.SHARE, Mode.FULL])
    made = from_steps(
        table,
        flow(5),
        model=ModelTag("toy"),
        patterns=(Pattern("arrow", 0.1),),
        grid=(1, 16, 16),
        tokens=256,
        block=(16, 16),
    )
    assert np.array_equal(made.table(flow(5)).modes, table.modes)
    assert made.static()
    longer = made.table(flow(10)).modes[:, 0, 0].tolist()
    assert longer == [0, 0, 0, 0, 3, 3, 2, 2, 0, 0]
    partial = made.table([0.45, 0.2, 0.1]).modes[:, 0, 0]
    assert partial[0] == int(Mode.FULL)  # what would be shared or corrected is computed first
    with pytest.raises(ValueError, match="strictly falling"):
        from_steps(table, [1.0] * 5, model=ModelTag("toy"), patterns=(Pattern(),), grid=(1, 1, 1), tokens=1)


@pytest.mark.parametrize(
    "geometry", [image(16, 16, 16), image(24, 32), image(13, 7, 5, text_first=True), clip(3, 8, 8, 9)]
)
def test_a_plan_fits_other_resolutions(geometry):
    made = plan()
    view, _ = view_of(geometry, made)
    for sigma in (0.9, 0.5, 0.1):
        chosen = made.select(view, sigma)
        for head in range(4):
            at = made.bucket(sigma), 0, head
            rows = chosen.mask[0, head, : geometry.visual // 16]
            free = geometry.visual // 16
            share = float(rows[:, :free].float().mean())
            if made.pattern[at] == 0:
                assert share == pytest.approx(made.budget[at], abs=1.5 / free)
            else:
                assert 0 < share < 0.75
        assert chosen.mask.any(-1).all()


def view_of(geometry, made, seed=0):
    random = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 4, geometry.length, 16, generator=random) for _ in range(3))
    order = token_order(made.order, geometry)
    return View(geometry, order, *made.block, q, k, None, 0.25, 0, 2, 4), v


def test_a_run_follows_a_plan_from_its_file(tmp_path):
    save_plan(tmp_path / "plan.safetensors", plan())
    made = load_plan(tmp_path / "plan.safetensors")
    memory = AttentionMemory(made.table(flow(30)), rho_step=made.rho_step)
    view, v = view_of(Geometry((1, 16, 16), 0, 272), made)
    for step, sigma in enumerate(flow(30)):
        memory.begin(sigma, step)
        branches = [Branch("cond", 1), Branch("uncond", 2)]
        q, k, both = (torch.cat([x, x]) for x in (view.q, view.k, v))
        decision = memory.decide(0, branches, q.shape, q)
        if not decision.plain:
            out = memory.compute(
                decision, q, k, both, lambda sigma=sigma: made.select(view, sigma), made.block, scale=view.scale
            )
            assert torch.isfinite(out).all() and decision.missed == 0
    assert memory.peak_bytes > 0 and sum(memory.counts.values()) > 0
