"""Every backend of block-sparse attention against one specification, through one table of cases."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stretto.kernels import block_sparse_attention as package
from stretto.kernels.block_sparse_attention import (
    BlockList,
    Predicate,
    Tail,
    block_sparse_attention,
    gather,
    pool_blocks,
    reference,
    rows,
)

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: shapes, lists and extras. ``lists`` holds the leading sizes of the list, ``kind`` a predicate's name."""

    name: str
    queries: int = 130
    keys: int | None = None
    head: int = 64
    batch: int = 1
    heads: int = 2
    shared: int = 2
    lists: tuple[int, int] = (1, 2)
    blocks: tuple[int, int] = (64, 32)
    share: float = 0.5
    empty: bool = False
    lengths: tuple[int, ...] | None = None
    kind: str | None = None
    tail: bool = False
    epilogue: bool = False
    strided: bool = False

    def arguments(self, dtype: torch.dtype) -> tuple[tuple, dict]:
        """Return the call's arguments, the same in every process."""
        generator = torch.Generator().manual_seed(7)
        keys = self.keys or self.queries

        def tensor(heads: int, tokens: int) -> torch.Tensor:
            if self.strided:  # [B, N, H * d], as models hold them
                flat = torch.randn((self.batch, tokens, heads * self.head), generator=generator).to(dtype)
                return flat.view(self.batch, tokens, heads, self.head).transpose(1, 2)
            return torch.randn((self.batch, heads, tokens, self.head), generator=generator).to(dtype)

        q, k, v = tensor(self.heads, self.queries), tensor(self.shared, keys), tensor(self.shared, keys)
        shape = (*self.lists, -(-self.queries // self.blocks[0]), -(-keys // self.blocks[1]))
        mask = torch.rand(shape, generator=generator) < self.share
        if self.empty:
            mask[:, 0, 0] = False
        full = torch.rand(shape, generator=generator) < 0.4 if self.kind else None
        blocks = BlockList.from_mask(mask, *self.blocks, full=full)
        blocks.validate(self.queries, keys)
        options: dict = {"scale": 1.1 * self.head**-0.5}
        if self.lengths is not None:
            options["kv_length"] = torch.tensor(self.lengths, dtype=torch.int32)
        if self.kind is not None:
            token = torch.arange(max(self.queries, keys))
            place = torch.stack((token // 60, token % 60 // 8, token % 8), 1)
            if self.kind == "band":
                place[:, 2] = token.flip(0)  # a permuted sequence: positions run backwards
            place[-5:] = -1
            limits = {"radius": (6,), "band": (-9, 14), "box": (1, 2, 3)}[self.kind]
            options["predicate"] = Predicate(self.kind, place.int() if self.kind == "box" else place.short(), limits)
        if self.tail:
            pooled_k, sizes = pool_blocks(k, self.blocks[1], options.get("kv_length"))
            options["tail"] = Tail(pooled_k, pool_blocks(v, self.blocks[1], options.get("kv_length"))[0], sizes)
        if self.epilogue:
            options["row_scale"] = torch.rand((self.batch, self.heads, self.queries), generator=generator)
            options["residual"] = torch.randn(q.shape, generator=generator).to(dtype)
        return (q, k, v, blocks), options


#: Small, because Triton's interpreter runs them too, one program after the other.
CASES = [
    Case("one token", queries=1, head=16, blocks=(16, 16), share=1.1),
    Case("63 tokens", queries=63, head=16),
    Case("64 tokens", queries=64, blocks=(64, 64), share=1.1),
    Case("65 tokens", queries=65, head=72, blocks=(64, 64), share=0.8),
    Case("127 tokens", queries=127, head=80, blocks=(128, 32)),
    Case("more keys than queries", queries=70, keys=257, head=32),
    Case("fewer keys than queries", queries=200, keys=33, head=32, share=0.9),
    Case("head 96", head=96),
    Case("head 128", queries=100, head=128, heads=1, shared=1, lists=(1, 1)),
    Case("head 160", queries=100, head=160, heads=1, shared=1, lists=(1, 1)),
    Case("odd head", queries=100, head=20),
    Case("empty rows", share=0.3, empty=True, head=32),
    Case("all empty", share=-1.0, head=32),
    Case("lists of both", batch=2, lists=(2, 2), head=32, empty=True),
    Case("lists of batch rows", batch=2, lists=(2, 1), head=32),
    Case("one list", batch=2, lists=(1, 1), head=32),
    Case("grouped queries", heads=4, lists=(1, 4), head=32, queries=100),
    Case("one key head", heads=4, shared=1, lists=(1, 4), head=32, queries=100),
    Case("strided", batch=2, lists=(2, 1), head=32, strided=True, epilogue=True),
    Case("lengths", batch=3, lists=(1, 2), head=32, lengths=(1, 70, 130), queries=130),
    Case("lengths and no key", batch=2, lists=(2, 2), head=32, lengths=(0, 96)),
    Case("radius", kind="radius", head=32, share=0.7),
    Case("band", kind="band", head=32, share=0.7),
    Case("box and lengths", kind="box", head=32, share=0.7, batch=2, lengths=(77, 130)),
    Case("tail", tail=True, head=32, empty=True, share=0.3),
    Case("tail and lengths", tail=True, head=72, batch=2, lengths=(41, 130), share=0.3),
    Case("tail and radius", tail=True, kind="radius", head=32, heads=4, lists=(1, 4), queries=100),
    Case("epilogue", epilogue=True, head=72, empty=True),
    Case("everything", batch=2, lists=(2, 1), kind="box", tail=True, epilogue=True, lengths=(90, 129), strided=True,
         head=40, heads=2, shared=1),
]  # fmt: skip
BACKENDS = {
    "rows": lambda *a, **o: _epilogue(rows.attend, *a, **o),
    "batched": lambda *a, **o: _epilogue(gather.batched, *a, **o),
    "batched, without log-sum-exp": lambda *a, **o: _epilogue(gather.batched, *a, **o, return_lse=False),
    "rows, without log-sum-exp": lambda *a, **o: _epilogue(rows.attend, *a, **o, return_lse=False),
    "gather": lambda *a, **o: block_sparse_attention(*a, **o, return_lse=True, backend="gather"),
    "dense": lambda *a, **o: block_sparse_attention(*a, **o, return_lse=True, backend="dense"),
    "dense, without log-sum-exp": lambda *a, **o: block_sparse_attention(*a, **o, backend="dense"),
}


def _epilogue(attend, *arguments, row_scale=None, residual=None, **options):
    out, lse = attend(*arguments, **options)
    out = out if row_scale is None else out * row_scale[..., None]
    return out if residual is None else out + residual, lse


def check(case: Case, dtype: torch.dtype, compute) -> None:
    """Hold a backend's result against the specification in fp64.

    fp32: 2e-6 absolute, the log-sum-exp relative to its size where that is above 1. fp16: relative L2 norm of 1.5e-3, and
    1e-4 for the log-sum-exp, because the kernel rounds pooled keys to the dtype of the queries.
    """
    arguments, options = case.arguments(dtype)
    before = [x.clone() for x in arguments[:3]]
    out, lse = compute(*arguments, **options)
    assert all(map(torch.equal, before, arguments[:3]))
    exact, total = reference.block_sparse_attention(*(x.double() for x in arguments[:3]), arguments[3], **options)
    assert out.shape == exact.shape and not out.isnan().any(), case
    gap = (out.double() - exact).abs()
    if dtype == torch.float32:
        assert gap.max() < 2e-6, (case, gap.max())
    else:
        assert gap.norm() <= 1.5e-3 * exact.norm(), (case, gap.norm() / exact.norm())
    if lse is not None:
        empty = total == -torch.inf
        assert torch.equal(lse == -torch.inf, empty), case
        gap = ((lse.double() - total).masked_fill(empty, 0) / total.masked_fill(empty, 1).abs().clamp_min(1)).abs()
        assert gap.max() < (2e-6 if dtype == torch.float32 else 1e-4), (case, gap.max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_backends_equal_the_specification(case, backend):
    check(case, torch.float32, BACKENDS[backend])


def test_specification_equals_the_formula_pair_by_pair():
    """The reference itself, against sums over single pairs of tokens in fp64."""
    case = Case("all", queries=21, head=4, batch=2, heads=2, shared=1, lists=(2, 1), blocks=(8, 4), kind="radius",
                tail=True, epilogue=True, lengths=(14, 21), share=0.6)  # fmt: skip
    (q, k, v, blocks), options = case.arguments(torch.float64)
    out, lse = reference.block_sparse_attention(q, k, v, blocks, **options)
    place, tail = options["predicate"].coordinates.tolist(), options["tail"]
    for b in range(2):
        for h in range(2):
            for i in range(21):
                row = i // 8
                ids = blocks.index[b, 0, row, : blocks.count[b, 0, row]].tolist()
                number = int(blocks.full[b, 0, row])
                terms = []
                for j in range(options["kv_length"][b]):
                    (t, y, x), (s, w, u) = place[i], place[j]
                    near = t < 0 or s < 0 or (t == s and (y - w) ** 2 + (x - u) ** 2 < 6)
                    if j // 4 in ids[:number] or (j // 4 in ids[number:] and near):
                        terms.append((float(q[b, h, i] @ k[b, 0, j]) * options["scale"], v[b, 0, j]))
                for j in set(range(6)) - set(ids):
                    size = max(0, min(4, int(options["kv_length"][b]) - 4 * j))
                    if size:
                        mean_k, mean_v = k[b, 0, 4 * j : 4 * j + size].mean(0), v[b, 0, 4 * j : 4 * j + size].mean(0)
                        terms.append(
                            (
                                float(q[b, h, i] @ mean_k) * options["scale"] + torch.tensor(float(size)).log().item(),
                                mean_v,
                            )
                        )
                        assert torch.allclose(tail.keys[b, 0, j], mean_k)
                weights = torch.tensor([s for s, _ in terms], dtype=torch.float64).exp()
                expected = sum(w * x for w, (_, x) in zip(weights, terms, strict=True)) / weights.sum()
                expected = expected * options["row_scale"][b, h, i] + options["residual"][b, h, i]
                assert (out[b, h, i] - expected).abs().max() < 1e-6  # log of sizes above is fp32's
                assert abs(float(lse[b, h, i] - weights.sum().log())) < 1e-6


@pytest.mark.parametrize("lists", [(1, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("shared", [1, 2])
def test_windows_equal_the_specification(lists, shared):
    generator = torch.Generator().manual_seed(3)
    q = torch.randn((2, 2, 150, 32), generator=generator)
    k, v = (torch.randn((2, shared, 190, 32), generator=generator) for _ in range(2))
    mask = torch.zeros((*lists, 5, 6), dtype=torch.bool)
    for row, (start, stop) in enumerate([(0, 3), (0, 3), (2, 6), (0, 0), (0, 6)]):
        mask[:, :, row, start:stop] = True
    mask[-1, -1, 0] = torch.tensor([0, 0, 0, 1, 1, 0])
    blocks = BlockList.from_mask(mask, 32, 32)
    exact, _ = reference.block_sparse_attention(q.double(), k.double(), v.double(), blocks)
    for backend in ("windows", "gather", "auto"):
        assert (block_sparse_attention(q, k, v, blocks, backend=backend)[0] - exact).abs().max() < 2e-6
    mask[-1, 0, 1, 5] = True
    with pytest.raises(ValueError, match="windows backend cannot serve: a list is no contiguous run"):
        block_sparse_attention(q, k, v, BlockList.from_mask(mask, 32, 32), backend="windows")


@pytest.mark.parametrize("dtype,bound", [(torch.float16, 1.5e-3), (torch.bfloat16, None)])
@pytest.mark.parametrize("backend", ["gather", "dense", "windows"])
@pytest.mark.parametrize("peak", [1.0, 6.0])
def test_half_precision_is_as_exact_as_sdpa(dtype, bound, backend, peak):
    """bf16: at most twice the error of dense SDPA in bf16, also where the softmax is peaked."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn((1, 2, 300, 64), generator=generator).to(dtype) for _ in range(3))
    q = q * peak
    mask = torch.ones((1, 1, 5, 5), dtype=torch.bool)
    blocks = BlockList.from_mask(mask)
    exact, _ = reference.block_sparse_attention(q.double(), k.double(), v.double(), blocks)
    out, _ = block_sparse_attention(q, k, v, blocks, backend=backend)
    assert out.dtype == dtype
    sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    error, theirs = ((x.double() - exact).norm() / exact.norm() for x in (out, sdpa))
    assert error <= (bound or 2 * theirs)


def test_rows_need_no_onednn(monkeypatch):
    monkeypatch.setattr(rows, "_onednn", lambda: "not here")
    for case in CASES:
        check(case, torch.float32, BACKENDS["rows"])


def test_equal_neighbours_share_a_panel_and_runs_are_views():
    mask = torch.zeros((1, 1, 6, 8), dtype=torch.bool)
    mask[..., :3, 2:5] = True
    mask[..., 3, ::2] = True
    mask[..., 4:, 6:] = True
    panels = rows._panels(BlockList.from_mask(mask, 16, 16), 0, 0, 90, 125, False)
    assert [(p.start, p.stop, p.run, p.ragged) for p in panels] == [
        (0, 48, True, 0), (48, 64, False, 0), (64, 90, True, 1)
    ]  # fmt: skip


def test_long_rows_are_cut_when_panels_would_outgrow_the_cache(monkeypatch):
    monkeypatch.setattr(rows, "_SCORES", 16 * 130)
    mask = torch.ones((1, 1, 6, 8), dtype=torch.bool)
    assert len(rows._panels(BlockList.from_mask(mask, 16, 16), 0, 0, 90, 125, False)) == 6
    check(Case("all", share=1.1), torch.float32, BACKENDS["rows"])


INTERPRETED = """
import sys
sys.path.insert(0, {root!r})
from load_pack import load_pack
load_pack()
sys.path.remove({root!r})
sys.path.insert(0, {here!r})
import torch
import triton.runtime.interpreter as interpreter

# NumPy 2.4 no longer makes an integer of an array with one element, which Triton's interpreter relies on for ranges.
original = interpreter._patch_lang_tensor

def patched(tensor, scope):
    original(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

interpreter._patch_lang_tensor = patched
torch.set_num_threads(1)
import test_block_sparse_backends as table
from stretto.kernels.block_sparse_attention import triton_kernel

checked = 0
for place, case in enumerate(table.CASES):
    for dtype in (torch.float32, torch.float16) if place % 3 == 0 else (torch.float32,):
        table.check(case, dtype, triton_kernel.attend)
        checked += 1
# Twice the same: bit by bit. A batch row by itself: bit by bit.
(q, k, v, blocks), options = table.CASES[13].arguments(torch.float32)
first, second = (triton_kernel.attend(q, k, v, blocks, **options) for _ in range(2))
assert all(map(torch.equal, first, second))
alone = table.BlockList(blocks.index[1:], blocks.count[1:], None, *table.CASES[13].blocks)
assert torch.equal(triton_kernel.attend(q[1:], k[1:], v[1:], alone, **options)[0], first[0][1:])
print("checked", checked)
"""

#: Compiled for GPUs that need not be there: Triton brings its own assembler.
COMPILED = """
import sys
sys.path.insert(0, {root!r})
from load_pack import load_pack
load_pack()
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from stretto.kernels.block_sparse_attention import triton_kernel

kernel = triton_kernel._forward
floats, words = ("lse", "row_scale", "tail_weight"), ("order", "index", "count", "full", "lengths", "coordinates")

def kind(name, dtype):
    if name.isupper() or name in ("D1", "D2"):
        return "constexpr"
    if name in words or name in floats or name == "listed":
        return "*i32" if name in words else "*i8" if name == "listed" else "*fp32"
    if name in ("q", "k", "v", "out", "residual", "tail_k", "tail_v"):
        return "*" + dtype
    return "fp32" if name == "scale" else "i64" if name.startswith("stride") else "i32"

for dtype, head, rows, extras in (("bf16", 128, 128, False), ("fp16", 72, 64, True)):
    types = {{name: kind(name, dtype) for name in kernel.arg_names}}
    first, second = triton_kernel.split_head(head)
    constants = dict(
        HEAD=head, D1=first, D2=second, Q_BLOCK=rows, KV_BLOCK=64, KIND=1 if extras else 0, HAS_LENGTH=extras,
        HAS_TAIL=extras, HAS_SCALE=extras, HAS_RESIDUAL=extras, PRECISION="tf32", M=rows, N=64,
    )
    aligned = {{
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names) if types[name][0] == "*" or types[name] == "i64"
    }}
    source = ASTSource(kernel, types, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={{"num_warps": 4 if extras else 8}})
    ptx = compiled.asm["ptx"]
    assert "wgmma.mma_async" in ptx and "cp.async" in ptx  # tensor cores, fed by prefetched tiles
    assert "local_depot" not in ptx  # no registers spilled by the compiler's front end
    assert "atom." not in ptx and "\\tred." not in ptx  # reproducible
    assert compiled.metadata.shared <= 227 * 1024
print("compiled")
"""


def run(code: str, **environment: str) -> str:
    code = code.format(root=str(ROOT), here=str(Path(__file__).parent))
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton for this platform")
def test_triton_kernel_equals_the_specification_in_the_interpreter():
    """A process of its own, because Triton reads TRITON_INTERPRET when it is imported. One thread: the tiles are tiny."""
    printed = run(INTERPRETED, TRITON_INTERPRET="1", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    assert printed == f"checked {len(CASES) + -(-len(CASES) // 3)}"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton for this platform")
def test_triton_kernel_compiles_to_tensor_cores_without_spills(tmp_path):
    assert run(COMPILED, TRITON_CACHE_DIR=str(tmp_path)) == "compiled"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton for this platform")
def test_head_sizes_are_split_rather_than_padded():
    from stretto.kernels.block_sparse_attention.triton_kernel import split_head

    expected = {8: (16, 0), 32: (32, 0), 64: (64, 0), 72: (64, 16), 80: (64, 16), 96: (64, 32), 112: (128, 0),
                128: (128, 0), 160: (128, 32), 256: (256, 0)}  # fmt: skip
    assert {head: split_head(head) for head in expected} == expected
    assert all(head <= sum(split_head(head)) < 2 * max(head, 16) for head in range(1, 257))


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("lists of both", "lengths", "radius")])
def test_compiled_flex_attention_equals_the_specification(case):
    """A minute of compiling on the CPU."""
    case = dataclasses.replace(case, blocks=(64, 64))
    check(case, torch.float32, lambda *a, **o: block_sparse_attention(*a, **o, backend="flex"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_triton_kernel_equals_the_specification_on_the_device(case):
    def compute(*arguments, **options):
        def move(x):
            if isinstance(x, torch.Tensor):
                return x.cuda()
            if not dataclasses.is_dataclass(x):
                return x
            return type(x)(*(move(getattr(x, field.name)) for field in dataclasses.fields(x)))

        moved = [move(x) for x in arguments]
        options = {name: move(x) for name, x in options.items()}
        assert package.choose_backend(*moved, **options) == ("triton", ())
        return tuple(x.cpu() for x in block_sparse_attention(*moved, **options, return_lse=True, backend="triton"))

    for dtype in (torch.float32, torch.float16):
        check(case, dtype, compute)
