"""Balancing, folds, mixed precision and the tables of architectures."""

import itertools
import math
from contextlib import contextmanager

import pytest
import torch

from stretto.acceleration.errors import SchemaError, StrettoError
from stretto.acceleration.quantization.allocation import Option, allocate
from stretto.acceleration.quantization.architectures import (
    ARCHITECTURES,
    FREE,
    STAYS,
    WEIGHT_ONLY,
    architecture,
    find_architecture,
)
from stretto.acceleration.quantization.balancing import Edit, factors, fold_edits
from stretto.acceleration.quantization.layouts import Int8Rows
from stretto.acceleration.quantization.recipes import Recipe
from stretto.acceleration.quantization.sensitivity import Cell, combined, load_cells, measure, mixed_recipe, save_cells
from stretto.kernels.quantized_linear import int8_linear


def seeded(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def snr(got, right):
    return 10 * math.log10(float(right.double().square().sum() / (got.double() - right.double()).square().sum()))


# T4: scaling and folding


def test_t4_scaling_and_rotation_beat_rotation_under_outliers():
    """ViDiT-Q's balancing: 8 dB over rotation alone where ten channels are fifty times as large."""
    x = seeded(256, 3072) * torch.exp(0.5 * seeded(256, 1, seed=1))
    x[:, torch.randperm(3072, generator=torch.Generator().manual_seed(2))[:10]] *= 50
    weight = seeded(512, 3072, seed=3) / 3072**0.5
    m = factors(weight.abs().amax(0), x.abs().amax(0), alpha=0.5)
    assert m.log().mean().abs() < 0.05
    right = x @ weight.T
    rotated = Int8Rows(256).quantize(weight)
    alone = snr(int8_linear(x, rotated.parts["weight"], rotated.parts["weight_scale"], rotation=256), right)
    balanced = Int8Rows(256).quantize(weight / m)
    both = snr(
        int8_linear(x, balanced.parts["weight"], balanced.parts["weight_scale"], rotation=256, pre_scale=m), right
    )
    assert alone == pytest.approx(38.8, abs=0.5) and both > alone + 6


def test_t4_factors_are_tame():
    m = factors(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([1e9, 1.0, 0.0, 1e-9]))
    assert torch.isfinite(m).all() and (m >= 2.0**-8).all() and (m <= 2.0**8).all() and m[1] == 1 and m[2] == 1
    with pytest.raises(StrettoError, match=r"alpha is 1.5"):
        factors(torch.ones(2), torch.ones(2), 1.5)
    with pytest.raises(StrettoError, match="not finite"):
        factors(torch.ones(2), torch.tensor([1.0, math.nan]))


def test_t4_a_folded_modulation_yields_the_scaled_activation():
    """m (1 + scale) LN(x) + m shift is what rows and bias edited give."""
    h, m = 64, seeded(64).abs() + 0.5
    shapes = {"double_blocks.0.img_mod.lin.weight": (6 * h, h), "double_blocks.0.img_mod.lin.bias": (6 * h,),
              "double_blocks.0.img_attn.qkv.weight": (3 * h, h)}  # fmt: skip
    weights, bias, vector, x = seeded(6 * h, h), seeded(6 * h, seed=1), seeded(h, seed=2), seeded(5, h, seed=3)
    maxima = {"double_blocks.0.img_attn.qkv": torch.ones(h)}
    activations = {"double_blocks.0.img_attn.qkv": 1 / m / m}
    edits = fold_edits(architecture("flux"), shapes, maxima, activations, alpha=0.5)
    folded = (edits["double_blocks.0.img_mod.lin.weight"].apply(weights, 0, 6 * h) @ vector
              + edits["double_blocks.0.img_mod.lin.bias"].apply(bias, 0, 6 * h))  # fmt: skip
    columns = edits["double_blocks.0.img_attn.qkv.weight"].columns
    shift, scale = (weights @ vector + bias)[:h], (weights @ vector + bias)[h : 2 * h]
    assert torch.allclose(x * (1 + folded[h : 2 * h]) + folded[:h], (x * (1 + scale) + shift) * columns, atol=1e-4)
    assert torch.allclose(folded[2 * h :], (weights @ vector + bias)[2 * h :], atol=1e-5)  # nothing else moves
    block = edits["double_blocks.0.img_mod.lin.weight"].apply(weights[10:20], 10, 20)
    assert torch.allclose(block, edits["double_blocks.0.img_mod.lin.weight"].apply(weights, 0, 6 * h)[10:20])


def test_edits_follow_each_other():
    first = Edit(rows=torch.tensor([2.0, 1.0]), offset=torch.tensor([1.0, 0.0]))
    second = Edit(rows=torch.tensor([3.0, 5.0]), offset=torch.tensor([0.0, 7.0]))
    x = torch.tensor([10.0, 20.0])
    assert torch.equal(first.then(second).apply(x, 0, 2), second.apply(first.apply(x, 0, 2), 0, 2))
    columns = Edit(columns=torch.tensor([2.0, 4.0]))
    assert torch.equal(columns.then(columns).apply(torch.ones(1, 2), 0, 1), torch.tensor([[0.25, 0.0625]]))


# mixed precision


def brute(options, budget):
    layers = list(options)
    best = (math.inf, None)
    for picked in itertools.product(*(options[layer] for layer in layers)):
        if sum(option.nbytes for option in picked) <= budget:
            loss = sum(option.loss for option in picked)
            best = min(best, (loss, tuple(option.format for option in picked)), key=lambda item: item[0])
    return best


@pytest.mark.parametrize("seed", range(12))
def test_the_knapsack_is_near_the_best_of_all(seed):
    generator = torch.Generator().manual_seed(seed)
    options = {}
    for index in range(6):
        size, loss = torch.rand(2, generator=generator).tolist()
        size = 100 + int(900 * size)
        options[f"layer{index}"] = [
            Option("w4", size * 4, loss), Option("w6", size * 6, loss * 0.2), Option("w8", size * 8, loss * 0.02)
        ]  # fmt: skip
    smallest = sum(choices[0].nbytes for choices in options.values())
    largest = sum(choices[-1].nbytes for choices in options.values())
    for share in (0.0, 0.2, 0.5, 0.9, 1.0):
        budget = int(smallest + share * (largest - smallest))
        chosen = allocate(options, budget)
        picked = {layer: next(o for o in options[layer] if o.format == form) for layer, form in chosen.items()}
        assert sum(option.nbytes for option in picked.values()) <= budget
        assert sum(option.loss for option in picked.values()) <= brute(options, budget)[0] * 1.15 + 1e-12
    with pytest.raises(StrettoError, match="the smallest formats of all layers take"):
        allocate(options, smallest - 1)


def test_groups_are_put_on_scales_of_their_own():
    """A group whose losses are a thousand times as large does not take all the bytes."""
    options = {
        name: [Option("w4", 4, loss), Option("w8", 8, 0.0)]
        for name, loss in (("a1", 1000.0), ("a2", 900.0), ("b1", 1.0), ("b2", 0.1))
    }  # fmt: skip
    groups = {name: name[0] for name in options}
    assert allocate(options, 24) == {"a1": "w8", "a2": "w8", "b1": "w4", "b2": "w4"}
    assert allocate(options, 24, groups) == {"a1": "w8", "a2": "w4", "b1": "w8", "b2": "w4"}
    assert allocate(options, 24, groups, {"a": 10.0})["a2"] == "w8"


def test_sensitivity_is_measured_by_layer_format_and_range():
    state = {"layer": None}
    noise = {("a", "w4"): 0.1, ("a", "w6"): 0.01, ("b", "w4"): 0.4, ("b", "w6"): 0.02}

    @contextmanager
    def swapped(layer, form):
        state["layer"] = (layer, form)
        yield
        state["layer"] = None

    def call(index):
        late = 1.0 + index  # later calls mind more
        return torch.ones(10) * (1 + noise.get(state["layer"], 0.0) * late)

    cells = measure(call, [0.0, 0.3, 0.6, 0.99], {"a": ["w4", "w6"], "b": ["w4", "w6"]}, swapped)
    assert len(cells) == 2 * 2 * 4 and {cell.range for cell in cells} == {0, 1, 2, 3}
    by_range = {cell.range: cell.loss for cell in cells if (cell.layer, cell.format) == ("a", "w4")}
    assert by_range[3] == pytest.approx(16 * by_range[0], rel=1e-4)
    losses = combined(cells)
    assert losses["b"]["w4"] > losses["a"]["w4"] > losses["b"]["w6"] > losses["a"]["w6"]


def test_a_mixed_recipe_spends_the_budget_where_it_matters(tmp_path):
    shapes = {f"joint_blocks.{i}.x_block.mlp.fc1": (256, 256) for i in range(4)}
    cells = [Cell(name, form, -1, loss * (i + 1) ** 3)
             for i, name in enumerate(shapes) for form, loss in (("w4a8", 1.0), ("w6a8", 0.1), ("int8", 0.01))]  # fmt: skip
    save_cells(tmp_path / "cells.json", cells, "made up")
    assert load_cells(tmp_path / "cells.json") == cells
    recipe = mixed_recipe(Recipe(), architecture("sd3"), shapes, cells, 200_000)
    formats = [recipe.layers[name] for name in shapes]
    assert formats[-1] == "int8" and formats[0] == "w4a8" and "mixed to" in recipe.name
    (tmp_path / "bad.json").write_text('{"sensitivity": 2}')
    with pytest.raises(SchemaError, match="reads 1"):
        load_cells(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text('{"sensitivity": 1, "cells": [["a", "w4", 0, -1]]}')
    with pytest.raises(StrettoError, match="a cell is"):
        load_cells(tmp_path / "bad.json")


# the tables of architectures


@pytest.mark.parametrize(
    ("name", "layer", "role"),
    [
        ("flux", "double_blocks.3.img_attn.qkv", FREE),
        ("flux", "single_blocks.37.linear2", FREE),
        ("flux", "double_blocks.3.txt_mod.lin", WEIGHT_ONLY),
        ("flux", "img_in", STAYS),
        ("flux", "final_layer.linear", STAYS),
        ("chroma", "distilled_guidance_layer.layers.0.in_layer", STAYS),
        ("flux2", "double_stream_modulation_img.lin", STAYS),
        ("qwen_image", "transformer_blocks.5.attn.add_k_proj", FREE),
        ("qwen_image", "transformer_blocks.5.img_mod.1", WEIGHT_ONLY),
        ("wan", "blocks.7.self_attn.q", FREE),
        ("wan", "blocks.7.cross_attn.k", WEIGHT_ONLY),
        ("wan", "blocks.7.cross_attn.q", FREE),
        ("wan", "text_embedding.0", STAYS),
        ("wan", "head.head", STAYS),
        ("sd3", "joint_blocks.1.context_block.adaLN_modulation.1", WEIGHT_ONLY),
        ("z_image", "context_refiner.0.feed_forward.w2", FREE),
        ("ltxv", "transformer_blocks.0.attn2.to_k", WEIGHT_ONLY),
        ("ltxv", "transformer_blocks.0.ff.net.0.proj", FREE),
        ("hidream", "single_stream_blocks.0.block.ff_i.experts.3.w1", FREE),
        ("hidream", "double_stream_blocks.0.block.ff_i.gate", STAYS),
        ("t5", "encoder.block.0.layer.1.DenseReluDense.wi_0", WEIGHT_ONLY),
        ("t5", "shared", STAYS),
        ("llama", "model.layers.0.mlp.gate_proj", WEIGHT_ONLY),
    ],
)
def test_every_layer_has_one_role(name, layer, role):
    assert architecture(name).role(layer) == role


def test_architectures_are_told_by_names():
    for each in ARCHITECTURES:
        assert find_architecture(each.present) in (each, *[a for a in ARCHITECTURES if a.matches(each.present)])
    names = {"double_blocks.0.img_attn.norm.key_norm.scale", "img_in.weight"}
    assert find_architecture(names).name == "flux"
    assert find_architecture(names | {"double_stream_modulation_img.lin.weight"}).name == "flux2"
    assert find_architecture(names | {"distilled_guidance_layer.in_proj.weight"}).name == "chroma"
    assert find_architecture({"something"}) is None
    with pytest.raises(StrettoError, match="known are"):
        architecture("nothing")
