"""Scores against their definitions, and what must not change them."""

import dataclasses
import math

import pytest
import torch

from stretto.acceleration.attention import scores as module
from stretto.acceleration.attention.geometry import Geometry, image
from stretto.acceleration.attention.order import OrderSpec, token_order
from stretto.acceleration.attention.plan import View
from stretto.acceleration.attention.scores import antidiagonal, mean_pool, projected, sub_block_lse

TILES = OrderSpec("tiles", (1, 4, 4))
ALL = {"mean": mean_pool(), "lse": sub_block_lse(4, 4), "cells": sub_block_lse(1, 8), "antidiagonal": antidiagonal(4)}


def view_of(geometry, batch=1, heads=2, key_heads=None, size=8, seed=0, dtype=torch.float32, **rest):
    random = torch.Generator().manual_seed(seed)
    q, k = (
        torch.randn(batch, n, geometry.length, size, generator=random).to(dtype) for n in (heads, key_heads or heads)
    )
    order = token_order(TILES, geometry)
    return View(geometry, order, 16, 16, q, k, scale=size**-0.5, heads=heads, **rest)


def test_mean_pool_is_the_product_of_means_with_the_mean_key_taken_away():
    view = view_of(image(8, 8))
    q, k = view.q.unflatten(2, (4, 16)).mean(3), view.k.unflatten(2, (4, 16)).mean(3)
    expected = q @ (k - view.k.mean(2, keepdim=True)).mT * view.scale
    torch.testing.assert_close(mean_pool()(view), expected)


def test_sub_block_lse_sums_exponentials_over_pairs_of_parts():
    view = view_of(image(8, 8))
    q, k = view.q.unflatten(2, (16, 4)).mean(3), (view.k - view.k.mean(2, keepdim=True)).unflatten(2, (16, 4)).mean(3)
    logits = (q @ k.mT * view.scale).double().view(1, 2, 4, 4, 4, 4)
    expected = logits.exp().sum((3, 5)).log().float()
    torch.testing.assert_close(sub_block_lse(4, 4)(view), expected)


def test_one_part_is_mean_pool():
    view = view_of(image(8, 8))
    torch.testing.assert_close(sub_block_lse(1, 1)(view), mean_pool()(view))


def test_sub_block_lse_counts_partly_valid_parts_by_their_tokens_and_empty_ones_not_at_all():
    """38 tokens in blocks of 16: the last block has parts of 4, 2, 0 and 0 tokens."""
    view = view_of(image(2, 19))
    score = sub_block_lse(4, 4)(view)
    assert score.shape == (1, 2, 3, 3)
    k = view.k[0, 0] - view.k[0, 0].mean(0)
    cells = [k[32:36].mean(0), k[36:38].mean(0)]
    q_cells = view.q[0, 0, :16].view(4, 4, -1).mean(1)
    expected = sum(
        weight * math.exp(float(q @ cell) * view.scale) for q in q_cells for cell, weight in zip(cells, (1.0, 0.5))
    )
    assert float(score[0, 0, 0, 2]) == pytest.approx(math.log(expected), abs=1e-5)


def test_antidiagonal_meets_every_row_and_column_of_a_patch_once():
    view = view_of(image(8, 8), heads=1)
    logits = (view.q[0, 0] @ (view.k[0, 0] - view.k[0, 0].mean(0)).T * view.scale).unfold(0, 4, 4).unfold(1, 4, 4)
    patches = logits.flip(-1).diagonal(dim1=-2, dim2=-1).mean(-1)  # [16, 16] patches of 4 x 4
    shares = patches.softmax(-1).view(4, 4, 4, 4).sum((1, 3))
    torch.testing.assert_close(antidiagonal(4)(view)[0, 0], shares.log())


def test_antidiagonal_of_ragged_patches_counts_the_pairs_that_exist():
    view = view_of(image(1, 22), heads=1)  # the last patch has 2 tokens
    logits = view.q[0, 0] @ (view.k[0, 0] - view.k[0, 0].mean(0)).T * view.scale
    patches = torch.full((6, 6), -torch.inf)
    for row in range(6):
        for column in range(6):
            pairs = [(4 * row + a, 4 * column + 3 - a) for a in range(4)]
            values = [float(logits[i, j]) for i, j in pairs if i < 22 and j < 22]
            if values:
                patches[row, column] = sum(values) / len(values) + math.log(len(values) / 4)
    shares = torch.nn.functional.pad(patches.softmax(-1), (0, 2, 0, 2)).view(2, 4, 2, 4).sum((1, 3))
    torch.testing.assert_close(antidiagonal(4)(view)[0, 0], shares.log())


def test_projected_with_identities_is_mean_pool_and_weights_may_differ_by_head():
    view, eye = view_of(image(8, 8)), torch.eye(8)
    torch.testing.assert_close(projected(eye, eye)(view), mean_pool()(view))
    by_head = torch.stack([eye, 2 * eye])
    torch.testing.assert_close(projected(by_head, eye)(view)[:, 1], 2 * mean_pool()(view)[:, 1])


@pytest.mark.parametrize("name", ALL)
def test_a_constant_vector_on_all_keys_changes_nothing(name):
    view = view_of(image(8, 10))
    moved = dataclasses.replace(view, k=view.k + torch.linspace(-3, 3, 8))
    torch.testing.assert_close(ALL[name](moved), ALL[name](view), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_masked_keys_are_as_if_they_were_not_there(name):
    view = view_of(image(8, 10), kv_length=torch.tensor([40], dtype=torch.int32))
    spoiled = view.k.clone()
    spoiled[:, :, 40:] = 1e4
    score = ALL[name](dataclasses.replace(view, k=spoiled))
    torch.testing.assert_close(score, ALL[name](view))
    assert bool((score[..., 3:] == -torch.inf).all())
    assert bool(score[..., :3].isfinite().all())


@pytest.mark.parametrize("name", ALL)
def test_text_never_enters(name):
    """The last visual block is ragged, and shares its block with text; scores are those without text."""
    alone = view_of(image(7, 6))
    beside = Geometry((1, 7, 6), 0, 42 + 9)
    text = torch.full((1, 2, 9, 8), 7.0)
    view = View(beside, token_order(TILES, beside), 16, 16, torch.cat([alone.q, text], 2), torch.cat([alone.k, text], 2),
                scale=alone.scale)  # fmt: skip
    assert torch.equal(ALL[name](view), ALL[name](alone))
    masked = dataclasses.replace(view, kv_length=torch.tensor([46], dtype=torch.int32))  # of the text alone
    torch.testing.assert_close(ALL[name](masked), ALL[name](alone))


@pytest.mark.parametrize("name", ALL)
def test_a_row_of_the_batch_does_not_know_the_others(name):
    both = view_of(image(12, 12), batch=3)
    together = ALL[name](both)
    for row in range(3):
        one = dataclasses.replace(both, q=both.q[row : row + 1].clone(), k=both.k[row : row + 1].clone())
        assert torch.equal(ALL[name](one)[0], together[row])


@pytest.mark.parametrize("name", ALL)
def test_grouped_query_heads_are_scored_one_by_one(name):
    view = view_of(image(8, 8), heads=4, key_heads=2)
    repeated = dataclasses.replace(view, k=view.k.repeat_interleave(2, 1))
    torch.testing.assert_close(ALL[name](view), ALL[name](repeated))


@pytest.mark.parametrize("name", ALL)
def test_pieces_of_rows_are_the_whole(name, monkeypatch):
    view = view_of(image(12, 12))
    whole = ALL[name](view)
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    torch.testing.assert_close(ALL[name](view), whole)


@pytest.mark.parametrize("name", ALL)
def test_scores_of_half_precision_are_fp32(name):
    """bf16 scores would tie, and ties go to early blocks."""
    assert ALL[name](view_of(image(8, 8), dtype=torch.bfloat16)).dtype == torch.float32


def test_parts_that_do_not_divide_a_block_are_refused():
    with pytest.raises(ValueError, match="do not split into 3 and 4 equal parts"):
        sub_block_lse(3, 4)(view_of(image(8, 8)))
    with pytest.raises(ValueError, match="no multiples of stride 5"):
        antidiagonal(5)(view_of(image(8, 8)))


def test_a_score_needs_queries_and_keys():
    view = dataclasses.replace(view_of(image(8, 8)), q=None, k=None)
    with pytest.raises(ValueError, match="looks at queries and keys"):
        mean_pool()(view)
