"""How snapshots are kept: what that costs in precision and in bytes, and what fits."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stretto.acceleration.caching.budget import budget_for
from stretto.acceleration.caching.store import AS_COMPUTED, POLICIES, STORES, SnapshotStore
from stretto.acceleration.caching.technique import CacheTechnique
from stretto.acceleration.errors import StrettoError
from stretto.acceleration.facts import Facts
from stretto.acceleration.models import describe
from stretto.acceleration.plan import Request
from stretto.acceleration.sampling import SamplerTraits, schedule_of

#: Unit roundoff, and half the spacing of subnormal numbers: 10 and 3 stored bits, smallest exponents -14 and -6.
PRECISION = {"half": (2.0**-11, 2.0**-25), "eighth": (2.0**-4, 2.0**-10)}
#: fp32 rounds the quotient, the scale and the product.
ROOM = 1 + 2.0**-21
MIB = 2**20
NARROW = sorted(PRECISION)


def spread(seed, amplitude, decades=6.0):
    """Values of both signs over many magnitudes, a zero among them; fp32 [2, 3, 40]."""
    generator = torch.Generator().manual_seed(seed)
    size = 10.0 ** (-decades * torch.rand(2, 3, 40, generator=generator))
    values = amplitude * size * torch.randn(2, 3, 40, generator=generator).sign()
    values[0, 0, 0] = 0.0
    return values


def test_every_policy_is_there():
    assert tuple(POLICIES) == STORES and next(iter(POLICIES.values())) is AS_COMPUTED


@pytest.mark.parametrize("name", NARROW)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-30, 30))
def test_narrow_snapshots_stay_within_their_rounding(name, seed, exponent):
    values = spread(seed, 2.0**exponent)
    snapshot = POLICIES[name].keep(values)
    relative, absolute = PRECISION[name]
    bound = torch.maximum(relative * values.double().abs(), absolute * snapshot.scale.double())
    assert ((snapshot.read().double() - values.double()).abs() <= bound * ROOM).all()


@pytest.mark.parametrize("name", NARROW)
def test_the_bound_is_the_best_there_is(name):
    """A number just off the middle between two representable ones loses nearly all that it may."""
    relative, _ = PRECISION[name]
    values = torch.tensor([torch.finfo(POLICIES[name].dtype).max, 1.0 + relative * (1 - 2.0**-8)])
    error = (POLICIES[name].keep(values).read() - values).abs()
    assert error[0] == 0.0 and error[1] > 0.99 * relative


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 1e38), (torch.bfloat16, 1e38), (torch.float16, 65504.0)])
def test_large_values_survive_in_every_dtype(name, dtype, largest):
    values = torch.tensor([largest, -largest, 0.0], dtype=dtype)
    found = POLICIES[name].keep(values).read()
    assert found.dtype == dtype and torch.isfinite(found).all()
    assert torch.allclose(found, values, rtol=2.0**-22)


@pytest.mark.parametrize("name", STORES)
def test_zeros_stay_zeros(name):
    assert torch.equal(POLICIES[name].keep(torch.zeros(3, 4)).read(), torch.zeros(3, 4))


@pytest.mark.parametrize("name", ["as computed", "system memory"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exact_policies_are_exact_copies(name, dtype):
    values = spread(1, 1.0).to(dtype)
    snapshot = POLICIES[name].keep(values)
    wanted = values.clone()
    values.zero_()
    assert torch.equal(snapshot.read(), wanted) and snapshot.read().dtype == dtype


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
@pytest.mark.parametrize("name", STORES)
def test_snapshots_of_a_graphics_card_come_back_to_it(name):
    values = spread(3, 1.0).cuda()
    snapshot = POLICIES[name].keep(values)
    wanted = values.clone()
    values.zero_()
    away = POLICIES[name].in_system_memory
    assert snapshot.values.is_cuda != away and snapshot.values.is_pinned() == away
    assert snapshot.read().device == wanted.device
    assert torch.allclose(snapshot.read(), wanted, rtol=PRECISION.get(name, (0.0, 0.0))[0], atol=1e-4)


def test_half_leaves_half_precision_alone():
    values = spread(2, 1.0).bfloat16()
    assert torch.equal(POLICIES["half"].keep(values).read(), values)


@pytest.mark.parametrize(("name", "size"), [("as computed", 4), ("half", 2), ("eighth", 1), ("system memory", 4)])
def test_bytes_are_those_that_are_stored(name, size):
    store = SnapshotStore(2, 10_000, POLICIES[name])
    scale = 4 if name in PRECISION else 0
    batch = torch.ones(6, 100)
    for position in range(3):
        assert store.push("a", float(position), batch[2:4])
    snapshots = store.get("a").snapshots
    assert store.bytes == 2 * (200 * size + scale) == sum(snapshot.bytes for snapshot in snapshots)
    assert all(snapshot.values.untyped_storage().nbytes() == 200 * size for snapshot in snapshots)
    store.drop("a")
    assert store.bytes == 0 and store.peak_bytes == 2 * (200 * size + scale)


@pytest.mark.parametrize("name", STORES)
def test_histories_mean_the_same_under_every_policy(name):
    store = SnapshotStore(3, 10_000, POLICIES[name])
    for position, value in ((0.0, 1.0), (1.0, 2.0), (1.0, 3.0), (2.0, 4.0), (3.0, 5.0)):
        store.push("a", position, torch.full((2, 2), value))
    history = store.get("a")
    assert list(history.positions) == [3.0, 2.0, 1.0]
    assert [tensor[0, 0].item() for tensor in history.tensors] == pytest.approx([5.0, 4.0, 3.0], rel=1e-6)
    store.push("a", 4.0, torch.ones(3))
    assert list(store.get("a").positions) == [4.0]


def test_a_budget_too_small_for_one_policy_may_do_for_another():
    values = torch.ones(100)
    for name, kept in (("as computed", False), ("half", True), ("eighth", True)):
        assert SnapshotStore(1, 250, POLICIES[name]).push("a", 0.0, values) == kept




class WanModel:
    """Sizes of a network: 256 tokens a frame of 32 x 32, 1024 channels."""

    dim, ffn_dim, in_dim, out_dim, patch_size = 1024, 4096, 16, 16, (1, 2, 2)
    blocks, model_type, ref_conv = (None,) * 4, "t2v", None


def facts(free, system=None, element_bytes=4):
    network = WanModel()
    return Facts(
        network, describe(network), SamplerTraits("euler"), schedule_of([1.0, 0.5, 0.0]), (1, 16, 4, 32, 32),
        element_bytes=element_bytes, free_bytes=free, free_system_bytes=system,
    )  # fmt: skip


def test_what_is_needed_follows_the_policy():
    """4 frames of 256 tokens, 1024 channels, 2 branches: 8 MiB in fp32."""
    for name, size in (("as computed", 8), ("half", 4), ("eighth", 2), ("system memory", 8)):
        assert budget_for(facts(100 * MIB), "blocks", 3, name, 0.5).needed == 3 * size * MIB
    half = facts(100 * MIB, element_bytes=2)
    for name, size in (("as computed", 4), ("half", 4), ("eighth", 2)):
        assert budget_for(half, "blocks", 1, name, 0.5).needed == size * MIB


def test_a_refusal_names_the_most_exact_policy_that_fits():
    def refusal(free, system=None, store="as computed"):
        budget = budget_for(facts(free * MIB, system and system * MIB), "blocks", 2, store, 0.5)
        return None if budget.fits else budget.refusal()

    assert refusal(32) is None
    assert refusal(20) == "stored features would take 16 MiB, 10 MiB may be used; store = half would fit"
    assert refusal(10) == "stored features would take 16 MiB, 5 MiB may be used; store = eighth would fit"
    assert refusal(4) == "stored features would take 16 MiB, 2 MiB may be used"
    assert refusal(4, 64).endswith("store = system memory would fit")
    assert refusal(4, 20, "system memory") == "stored features would take 16 MiB, 10 MiB of system memory may be used"
    assert refusal(64, 20, "system memory").endswith("store = as computed would fit")


def test_reserved_is_what_lies_on_the_device_and_what_is_read_back():
    def reserved(store):
        return budget_for(facts(100 * MIB, 100 * MIB), "blocks", 2, store, 0.5).reserve / MIB

    assert [reserved(store) for store in STORES] == [16, 8 + 8, 4 + 8, 8]


def resolved(free, **settings):
    request = Request("cache", {"warmup": 1, "tail": 1, "interval": 2, **settings})
    steps = schedule_of([1 - i / 12 for i in range(13)])
    return CacheTechnique().resolve(request, replace(facts(free), schedule=steps))


def test_the_cache_says_what_it_needs_and_what_would_fit():
    outcome = resolved(20 * MIB)
    assert outcome.status == "off" and outcome.reason.endswith("store = half would fit")
    assert outcome.to_json()["store_bytes"] == 16 * MIB and outcome.to_json()["budget_bytes"] == 10 * MIB
    outcome = resolved(20 * MIB, store="half")
    assert outcome.status == "active" and outcome.session.store.policy is POLICIES["half"]
    assert outcome.store_bytes == 8 * MIB and outcome.reserve_bytes == 16 * MIB
    assert resolved(100 * MIB).session.store.policy is AS_COMPUTED


def test_an_unknown_store_is_refused_by_name():
    with pytest.raises(StrettoError, match="store is 'tape'; known stores: as computed, half, eighth, system memory"):
        CacheTechnique().validate(Request("cache", {"store": "tape"}))


def test_an_old_torch_says_what_it_lacks(monkeypatch):
    monkeypatch.delitem(POLICIES, "eighth")
    outcome = resolved(100 * MIB, store="eighth")
    assert outcome.status == "off" and "torch has no numbers for store = eighth" in outcome.reason
