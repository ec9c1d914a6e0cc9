"""Block-sparse attention: lists, identities that hold for every backend, the dispatcher, and what is refused."""

import sys
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.kernels import block_sparse_attention as package
from stretto.kernels.block_sparse_attention import (
    CONSTRAINTS,
    BlockList,
    Predicate,
    Tail,
    block_sparse_attention,
    choose_backend,
    pool_blocks,
    rows,
)


def tensors(batch=2, heads=4, shared=4, queries=150, keys=150, size=32, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, queries), (shared, keys), (shared, keys))
    return [torch.randn((batch, h, n, size), generator=generator, dtype=torch.float64).to(dtype) for h, n in shapes]


def mask_of(*shape, share=0.5, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


masks = st.integers(0, 2**32 - 1).flatmap(
    lambda seed: st.tuples(st.just(seed), *[st.integers(1, n) for n in (2, 3, 5, 7)], st.floats(0, 1))
)


@settings(deadline=None, max_examples=60)
@given(masks)
def test_lists_hold_their_mask(drawn):
    seed, *shape, share = drawn
    mask, full = mask_of(*shape, share=share, seed=seed), mask_of(*shape, share=0.5, seed=seed + 1)
    for blocks in (BlockList.from_mask(mask, 16, 8), BlockList.from_mask(mask, 16, 8, full=full)):
        blocks.validate(16 * shape[2], 8 * shape[3])
        assert blocks.index.dtype == blocks.count.dtype == torch.int32
        assert blocks.index.shape[-1] == max(1, int(mask.sum(-1).max()))
        assert torch.equal(blocks.to_mask(shape[3]), mask)
        assert torch.equal(blocks.complement(shape[3]).to_mask(shape[3]), ~mask)
        assert (blocks.index < shape[3]).all()  # fillers too
    assert torch.equal(blocks.full_mask(shape[3]), mask & full)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 70), st.integers(1, 33), st.integers(0, 80))
def test_pooled_blocks_are_means(tokens, block, valid):
    x = torch.randn(2, 3, tokens, 4, dtype=torch.float64)
    length = torch.tensor([valid, tokens])
    for given_length, wanted in ((None, [tokens, tokens]), (length, [min(valid, tokens), tokens])):
        means, sizes = pool_blocks(x, block, given_length)
        assert sizes.shape == ((-(-tokens // block),) if given_length is None else (2, -(-tokens // block)))
        for b, last in enumerate(wanted):
            for j, part in enumerate(x[b].split(block, 1)):
                size = max(0, min(part.shape[1], last - j * block))
                expected = part[:, :size].mean(1) if size else torch.zeros(3, 4, dtype=x.dtype)
                assert torch.allclose(means[b, :, j], expected, atol=1e-12)
                assert sizes.expand(2, -1)[b, j] == size


def test_pooling_is_made_in_single_precision():
    means, _ = pool_blocks(torch.full((1, 1, 64, 2), 1000.0, dtype=torch.float16), 64)  # the sum overflows fp16
    assert means.dtype == torch.float32 and (means == 1000).all()


@pytest.mark.parametrize("backend", ["gather", "dense", "windows"])
@pytest.mark.parametrize("queries,keys", [(150, 150), (64, 200), (1, 1), (129, 33)])
def test_all_blocks_are_dense_attention(backend, queries, keys):
    q, k, v = tensors(queries=queries, keys=keys)
    blocks = BlockList.from_mask(torch.ones((1, 1, -(-queries // 64), -(-keys // 32)), dtype=torch.bool), 64, 32)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert (block_sparse_attention(q, k, v, blocks, backend=backend)[0] - exact).abs().max() < 2e-6


@pytest.mark.parametrize("backend", ["gather", "dense"])
def test_rows_without_keys_are_zero_and_minus_infinity(backend):
    q, k, v = tensors()
    mask = mask_of(2, 4, 3, 5)
    mask[:, 1] = False
    blocks = BlockList.from_mask(mask, 64, 32)
    for _ in range(2):  # once without and once with a predicate that keeps nothing
        out, lse = block_sparse_attention(q, k, v, blocks, return_lse=True, backend=backend)
        assert not out[:, 1].any() and (lse[:, 1] == -torch.inf).all() and not out.isnan().any()
    place = torch.zeros((150, 3), dtype=torch.int16)
    none = Predicate("radius", place, (0,))
    out, lse = block_sparse_attention(
        q,
        k,
        v,
        BlockList.from_mask(mask, 64, 32, full=torch.zeros_like(mask)),
        predicate=none,
        return_lse=True,
        backend=backend,
    )
    assert not out.any() and (lse == -torch.inf).all()


@pytest.mark.parametrize("backend", ["gather", "dense"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (2, 1)])
def test_broadcast_lists_equal_expanded_ones(backend, shape):
    q, k, v = tensors()
    mask = mask_of(*shape, 3, 5)
    short, long = BlockList.from_mask(mask, 64, 32), BlockList.from_mask(mask.expand(2, 4, 3, 5), 64, 32)
    ours, theirs = (block_sparse_attention(q, k, v, x, backend=backend)[0] for x in (short, long))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", ["gather", "dense"])
def test_grouped_queries_equal_repeated_keys_and_strides_do_not_matter(backend):
    q, k, v = tensors(shared=2)
    blocks = BlockList.from_mask(mask_of(1, 4, 3, 5), 64, 32)
    repeated = [x.repeat_interleave(2, 1) for x in (k, v)]
    ours = block_sparse_attention(q, k, v, blocks, backend=backend)[0]
    assert torch.equal(ours, block_sparse_attention(q, *repeated, blocks, backend=backend)[0])
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    out = block_sparse_attention(*strided, blocks, backend=backend)[0]
    assert out.is_contiguous() and (out - ours).abs().max() < 1e-6


@pytest.mark.parametrize("backend", ["gather", "dense"])
@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 2**31), share=st.floats(0, 1))
def test_a_list_and_its_complement_merge_to_dense_attention(backend, seed, share):
    q, k, v = tensors(batch=1, heads=2, shared=2, seed=seed)
    blocks = BlockList.from_mask(mask_of(1, 2, 3, 5, share=share, seed=seed), 64, 32)
    one, lse = block_sparse_attention(q, k, v, blocks, return_lse=True, backend=backend)
    other, rest = block_sparse_attention(q, k, v, blocks.complement(5), return_lse=True, backend=backend)
    total = torch.logaddexp(lse, rest)
    rho = (lse - total).exp()[..., None]
    merged = rho * one + (1 - rho) * other
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert (merged - exact).abs().max() < 2e-6
    # Both log-sum-exps, about 5 in size, are rounded to fp32: half an ulp, 2.4e-7, each, and the merged output as well.
    assert (merged - exact).norm() < 7e-7 * exact.norm()


def test_refresh_in_the_epilogue_equals_dense_attention():
    """residual + row_scale * sparse, with the residual and the share that the complement gives, is dense attention."""
    q, k, v = tensors(dtype=torch.float64)
    blocks = BlockList.from_mask(mask_of(2, 4, 3, 5), 64, 32)
    _, lse = block_sparse_attention(q, k, v, blocks, return_lse=True)
    other, rest = block_sparse_attention(q, k, v, blocks.complement(5), return_lse=True)
    rho = (lse - torch.logaddexp(lse, rest)).exp()
    out, _ = block_sparse_attention(q, k, v, blocks, row_scale=rho, residual=(1 - rho)[..., None] * other)
    exact = F.scaled_dot_product_attention(q, k, v)
    assert (out - exact).abs().max() < 1e-6  # the log-sum-exp is fp32 by contract


def test_a_tail_of_single_tokens_is_dense_attention():
    q, k, v = tensors(queries=40, keys=40)
    blocks = BlockList.from_mask(mask_of(2, 4, 3, 40), 16, 1)
    mean_k, sizes = pool_blocks(k, 1)
    out, lse = block_sparse_attention(q, k, v, blocks, tail=Tail(mean_k, pool_blocks(v, 1)[0], sizes), return_lse=True)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert (out - exact).abs().max() < 2e-6
    assert torch.allclose(lse, (q @ k.mT * 32**-0.5).logsumexp(-1), atol=2e-6)


@pytest.mark.parametrize("backend", ["gather", "dense"])
def test_results_repeat_bit_by_bit_and_batch_rows_are_independent(backend):
    q, k, v = tensors(batch=3)
    blocks = BlockList.from_mask(mask_of(3, 4, 3, 5), 64, 32)
    first, second = (block_sparse_attention(q, k, v, blocks, return_lse=True, backend=backend) for _ in range(2))
    assert all(map(torch.equal, first, second))
    for b in range(3):
        alone = BlockList(blocks.index[b : b + 1], blocks.count[b : b + 1], None, 64, 32)
        one = block_sparse_attention(*(x[b : b + 1] for x in (q, k, v)), alone, return_lse=True, backend=backend)
        assert torch.equal(one[0][0], first[0][b]) and torch.equal(one[1][0], first[1][b])


def test_long_lists_on_many_panels_are_right_in_either_form(monkeypatch):
    """Sizes at which panels are distributed over threads, and at which several are gathered together."""
    q, k, v = tensors(batch=1, heads=2, shared=1, queries=2048 + 32, keys=2048 + 32, size=64)
    mask = mask_of(1, 2, 33, 33, share=0.6)
    mask[..., 5:9, :] = mask[..., 5:6, :]
    blocks = BlockList.from_mask(mask)
    exact, total = package.reference.block_sparse_attention(q.double(), k.double(), v.double(), blocks)
    threads = torch.get_num_threads()
    for short in (True, False):
        monkeypatch.setattr(rows, "_is_short", lambda *_, short=short: short)
        with torch.inference_mode():
            out, lse = block_sparse_attention(q, k, v, blocks, return_lse=True, backend="gather")
        assert (out - exact).abs().max() < 2e-6 and (lse - total).abs().max() < 4e-6
        assert torch.get_num_threads() == threads
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [threads]  # later threads begin as ever


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda b: BlockList(b.index + 5, b.count, None, 64, 32), "key block . is listed at"),
        (lambda b: BlockList(b.index.flip(-1), b.count, None, 64, 32), "must ascend"),
        (lambda b: BlockList(b.index, b.count + 9, None, 64, 32), "may list 0 to"),
        (lambda b: BlockList(b.index, b.count - 9, None, 64, 32), "may list 0 to"),
        (lambda b: BlockList(b.index, b.count, b.count + 1, 64, 32), "more blocks without predicate than blocks"),
        (lambda b: BlockList(b.index.long(), b.count, None, 64, 32), "ids must be int32"),
        (lambda b: BlockList(b.index[:, :, :2], b.count, None, 64, 32), "3, ids] for 150 queries"),
        (lambda b: BlockList(b.index, b.count[0], None, 64, 32), "count must have shape"),
        (lambda b: BlockList(b.index, b.count, None, 0, 32), "at least one token"),
    ],
)
def test_wrong_lists_are_refused_in_words(change, words):
    blocks = BlockList.from_mask(torch.ones((1, 2, 3, 5), dtype=torch.bool), 64, 32)
    blocks.validate(150, 150)
    with pytest.raises(ValueError, match=words):
        change(blocks).validate(150, 150)


def test_a_block_listed_twice_is_refused():
    index = torch.tensor([[[[0, 2, 2]]]], dtype=torch.int32)
    count = torch.tensor([[[3]]], dtype=torch.int32)
    with pytest.raises(ValueError, match="listed twice"):
        BlockList(index, count, count - 1, 64, 32).validate(64, 96)


@pytest.mark.parametrize(
    "change,words",
    [
        ({"k": torch.zeros(2, 3, 150, 32), "v": torch.zeros(2, 3, 150, 32)}, "4 query heads cannot share 3"),
        ({"v": torch.zeros(2, 4, 150, 16)}, "do not fit each other"),
        ({"q": torch.zeros(4, 150, 32)}, "four dimensions"),
        ({"q": torch.zeros(2, 4, 150, 32, dtype=torch.float16)}, "one floating dtype"),
        ({"q": torch.zeros(2, 4, 300, 32)}, "for 300 queries"),
        ({"kv_length": torch.tensor([3])}, r"kv_length must have shape \[2\]"),
        ({"predicate": Predicate("radius", torch.zeros((9, 3), dtype=torch.int16), (4,))}, "coordinates of 9 tokens"),
        ({"tail": Tail(*[torch.zeros(2, 4, 4, 32)] * 2, torch.zeros(4))}, "tail keys and values must have shape"),
        ({"tail": Tail(*[torch.zeros(2, 4, 5, 32)] * 2, torch.zeros(4))}, "tail sizes"),
        ({"row_scale": torch.zeros(2, 4, 3)}, "row_scale must have shape"),
        ({"residual": torch.zeros(2, 4, 3, 32)}, "residual must have shape"),
        ({"backend": "magic"}, "backend must be auto or one of triton, flex, windows, gather, dense"),
        ({"backend": "triton"}, "triton backend cannot serve: the tensors are not on a GPU"),
        ({"blocks": BlockList.from_mask(torch.ones((3, 1, 3, 5), dtype=torch.bool), 64, 32)}, "batch rows and heads"),
    ],
)
def test_calls_that_do_not_fit_are_refused_in_words(change, words):
    q, k, v = tensors()
    call = {"q": q, "k": k, "v": v, "blocks": BlockList.from_mask(mask_of(1, 1, 3, 5), 64, 32), **change}
    with pytest.raises(ValueError, match=words):
        block_sparse_attention(**call)


def test_predicates_are_refused_in_words():
    place = torch.zeros((4, 3), dtype=torch.int16)
    for arguments, words in [
        (("ring", place, (1,)), "one of radius, band, box"),
        (("box", place, (1,)), "takes 3 limits, got 1"),
        (("band", place[0], (1, 2)), "must have shape"),
        (("band", place.float(), (1, 2)), "int16 or int32"),
    ]:
        with pytest.raises(ValueError, match=words):
            Predicate(*arguments)


def fake_call(**changes):
    """A call as far as the constraints look: on a GPU that this machine need not have."""
    tensor = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16, shape=(1, 2, 64, 64), numel=lambda: 1)
    other = {name: changes.pop(name) for name in list(changes) if name in ("device", "dtype", "shape", "numel")}
    tensor = SimpleNamespace(**{**vars(tensor), **other})
    device = torch.device("cpu") if changes.pop("apart", False) else tensor.device
    lists = SimpleNamespace(
        index=SimpleNamespace(device=device), q_block=changes.pop("q_block", 64), kv_block=64, full=None
    )
    values = {"q": tensor, "k": tensor, "v": tensor, "blocks": lists, "predicate": None, "tail": None, "kv_length": None,
              "return_lse": False, "tensors": lambda: [tensor], "wants_gradient": lambda: False}  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


@pytest.mark.parametrize(
    "backend,changes,reason",
    [
        ("triton", {"device": torch.device("cpu")}, "not on a GPU that Triton knows"),
        ("triton", {"apart": True}, "on different devices"),
        ("triton", {"wants_gradient": lambda: True}, "wants a gradient"),
        ("triton", {"dtype": torch.float64}, "none of fp32, fp16 and bf16"),
        ("triton", {"numel": lambda: 0}, "no tokens"),
        ("triton", {"shape": (1, 2, 64, 512)}, "head size is above 256"),
        ("triton", {"q_block": 48}, "not powers of two from 16 to 256"),
        ("flex", {"device": torch.device("mps")}, "neither on a CUDA device nor"),
        ("flex", {"device": torch.device("cpu")}, "compiling takes a minute"),
        ("flex", {"tail": object()}, "pooled tail keys"),
        ("flex", {"q_block": 32}, "from 64 to 256"),
        ("windows", {"kv_length": object()}, "number of valid keys differs"),
        ("windows", {"return_lse": True}, "which SDPA does not return"),
        ("windows", {"device": torch.device("cpu")}, "without copying"),
        ("gather", {"wants_gradient": lambda: True}, "wants a gradient"),
    ],
)
def test_every_constraint_says_why(backend, changes, reason):
    assert reason in package.why_not(backend, fake_call(**changes))


def test_triton_takes_what_all_constraints_allow(monkeypatch):
    monkeypatch.setattr(package, "find_spec", lambda name: object())
    monkeypatch.setattr(package, "_trial", lambda device: None)
    for dtype in package.DTYPES:
        assert package.why_not("triton", fake_call(dtype=dtype)) is None
    monkeypatch.setattr(package, "_trial", lambda device: "it fails its trial")
    assert package.why_not("triton", fake_call()) == "it fails its trial"
    monkeypatch.setattr(package, "find_spec", lambda name: None)
    assert package.why_not("triton", fake_call()) == CONSTRAINTS["triton"][-1].otherwise == "Triton is not installed"


def test_a_triton_that_cannot_run_is_a_reason_and_no_error():
    assert package._trial(torch.device("cpu")).startswith("Triton does not run here (")


def test_the_cpu_gathers_says_why_and_never_imports_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "stretto.kernels.block_sparse_attention.triton_kernel", None)
    q, k, v = tensors()
    blocks = BlockList.from_mask(mask_of(1, 1, 3, 5), 64, 32)
    name, reasons = choose_backend(q, k, v, blocks, return_lse=True)
    assert name == "gather" and [reason.split(":")[0] for reason in reasons] == ["triton", "flex", "windows"]
    assert block_sparse_attention(q, k, v, blocks)[1] is None


def test_gradients_pass_through_the_dense_form():
    q, k, v = (x.requires_grad_() for x in tensors(1, 2, 1, 10, 10, 3, torch.float64))
    blocks = BlockList.from_mask(mask_of(1, 2, 3, 3), 4, 4)
    assert choose_backend(q, k, v, blocks)[0] == "dense"
    tail = Tail(*(torch.randn(1, 1, 3, 3, dtype=torch.float64) for _ in range(2)), torch.tensor([4, 4, 2]))
    for extra in (None, tail):
        assert torch.autograd.gradcheck(
            lambda *x, extra=extra: block_sparse_attention(*x, blocks, tail=extra)[0], (q, k, v)
        )
    with pytest.raises(ValueError, match="gather backend cannot serve: a tensor wants a gradient"):
        block_sparse_attention(q, k, v, blocks, backend="gather")


@pytest.mark.parametrize("return_lse", [True, False])
def test_the_operator_has_the_shapes_it_promises(return_lse):
    q, k, v = tensors(batch=1, heads=2, shared=1, queries=40, keys=50, size=8, dtype=torch.float16)
    blocks = BlockList.from_mask(mask_of(1, 2, 3, 4), 16, 16)
    place = torch.zeros((50, 3), dtype=torch.int16)
    arguments = (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, blocks.index, blocks.count, blocks.count, 16, 16,
                 0.3, torch.tensor([45]), "box", place, [1, 1, 1], None, None, None, None, None, return_lse, "auto")  # fmt: skip
    torch.library.opcheck(package._operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiled_callers_are_not_broken():
    q, k, v = tensors(shared=2)
    blocks = BlockList.from_mask(mask_of(1, 4, 3, 5), 64, 32)

    def layer(q, k, v):
        out, lse = block_sparse_attention(q * 2, k, v, blocks, return_lse=True)
        return out + 1, lse

    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert all(map(torch.equal, compiled(q, k, v), layer(q, k, v)))
