"""Attention over listed blocks of keys: one operation behind every sparse attention method.

Five backends compute it; :mod:`.reference` is their specification. ``CONSTRAINTS`` says what each needs, and the first
that can serve does: Triton, compiled FlexAttention, dense calls on windows, gathered blocks, dense attention with a mask.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from . import dense, flex, gather, reference, windows
from .lists import BlockList, Predicate, Tail, pool_blocks

__all__ = [
    "BACKENDS",
    "CONSTRAINTS",
    "BlockList",
    "Predicate",
    "Tail",
    "block_sparse_attention",
    "choose_backend",
    "pool_blocks",
    "why_not",
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: From fastest to slowest; the last one serves always.
BACKENDS = ("triton", "flex", "windows", "gather", "dense")


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one call, as the constraints look at them."""

    q: Tensor
    k: Tensor
    v: Tensor
    blocks: BlockList
    kv_length: Tensor | None = None
    predicate: Predicate | None = None
    tail: Tail | None = None
    row_scale: Tensor | None = None
    residual: Tensor | None = None
    return_lse: bool = False

    def tensors(self) -> list[Tensor]:
        """Return every tensor that a gradient could be wanted for."""
        pooled = [] if self.tail is None else [self.tail.keys, self.tail.values]
        return [x for x in (self.q, self.k, self.v, self.row_scale, self.residual, *pooled) if x is not None]

    def wants_gradient(self) -> bool:
        """Return whether autograd is to follow this call."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in self.tensors())


@dataclass(frozen=True)
class Constraint:
    """What a backend needs of a call: a check, and the words for when it fails.

    ``taste``: it could serve nevertheless, and does for whoever names the backend.
    """

    holds: Callable[[Call], bool]
    otherwise: str
    taste: bool = False


_NO_GRADIENT = Constraint(lambda c: not c.wants_gradient(), "a tensor wants a gradient")
_HALF_OR_SINGLE = Constraint(lambda c: c.q.dtype in DTYPES, "the dtype is none of fp32, fp16 and bf16")
_SOME_TOKENS = Constraint(lambda c: c.q.numel() > 0 and c.k.numel() > 0, "there are no tokens")
_ONE_DEVICE = Constraint(
    lambda c: len({x.device for x in c.tensors()} | {c.blocks.index.device}) == 1,
    "the tensors are on different devices",
)
_NO_TAIL = Constraint(lambda c: c.tail is None, "pooled tail keys are wanted")
#: Declared once: the dispatcher, the reasons and the tests read this table. Cheap and telling ones first.
CONSTRAINTS: dict[str, tuple[Constraint, ...]] = {
    "triton": (
        Constraint(lambda c: c.q.device.type in ("cuda", "xpu"), "the tensors are not on a GPU that Triton knows"),
        _ONE_DEVICE,
        _NO_GRADIENT,
        _HALF_OR_SINGLE,
        _SOME_TOKENS,
        Constraint(lambda c: c.q.shape[-1] <= 256, "the head size is above 256"),
        Constraint(
            lambda c: _is_tile(c.blocks.q_block) and _is_tile(c.blocks.kv_block),
            "the block sizes are not powers of two from 16 to 256",
        ),
        Constraint(lambda c: find_spec("triton") is not None, "Triton is not installed"),
    ),
    "flex": (
        Constraint(
            lambda c: c.q.device.type in ("cuda", "cpu"), "the tensors are neither on a CUDA device nor on the CPU"
        ),
        Constraint(lambda c: c.q.device.type != "cpu", "on the CPU, compiling takes a minute", taste=True),
        _ONE_DEVICE,
        _NO_GRADIENT,
        _HALF_OR_SINGLE,
        _SOME_TOKENS,
        _NO_TAIL,
        Constraint(lambda c: c.q.shape[-1] >= 16, "the head size is below 16"),
        Constraint(
            lambda c: _is_tile(c.blocks.q_block, 64) and _is_tile(c.blocks.kv_block, 64),
            "the block sizes are not powers of two from 64 to 256",
        ),
        Constraint(
            lambda c: not c.return_lse or c.predicate is None, "the log-sum-exp of rows with a predicate is wanted"
        ),
        Constraint(
            lambda c: c.q.device.type == "cpu" or find_spec("triton") is not None,
            "Triton is not installed, which torch compiles with",
        ),
    ),
    "windows": (
        Constraint(
            lambda c: c.q.device.type != "cpu",
            "on the CPU, gathering takes contiguous blocks without copying",
            taste=True,
        ),
        _NO_GRADIENT,
        _SOME_TOKENS,
        _NO_TAIL,
        Constraint(lambda c: c.predicate is None or c.blocks.full is None, "token pairs must be tested"),
        Constraint(lambda c: c.kv_length is None, "the number of valid keys differs between batch rows"),
        Constraint(lambda c: not c.return_lse, "the log-sum-exp is wanted, which SDPA does not return"),
        Constraint(
            lambda c: windows.runs(c.blocks, -(-c.k.shape[2] // c.blocks.kv_block)) is not None,
            "a list is no contiguous run of key blocks",
        ),
    ),
    "gather": (_NO_GRADIENT, _SOME_TOKENS),
    "dense": (),
}


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockList,
    *,
    scale: float | None = None,
    kv_length: Tensor | None = None,
    predicate: Predicate | None = None,
    tail: Tail | None = None,
    row_scale: Tensor | None = None,
    residual: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Return ``residual + row_scale * softmax over the listed keys`` and the log-sum-exp.

    Args:
        q: [B, H, N, d], any strides.
        k: [B, Hk, M, d], any strides; H is a multiple of Hk (grouped queries).
        v: [B, Hk, M, d].
        blocks: the key blocks of every query block. Its ids are not checked here: ``blocks.validate`` does.
        scale: factor of the scores; None: 1 / sqrt(d).
        kv_length: int32 [B]: keys from there on are masked.
        predicate: test of the token pairs in partial blocks; needs N = M.
        tail: pooled keys for the blocks that a row does not list.
        row_scale: [B, H, N] (or broadcastable), factor of the output's rows.
        residual: [B, H, N, d], added at the end.
        return_lse: also return the natural log-sum-exp of the sparse scores, tail included.
        backend: one of ``BACKENDS``, or "auto" for the first that can serve.

    Returns:
        Output [B, H, N, d], contiguous, in the dtype of ``q``; and fp32 [B, H, N] or None. Rows without any key and without
        tail hold 0 (before scale and residual) and -inf.

    Raises:
        ValueError: shapes or dtypes do not fit, or the named backend cannot serve.
    """
    call = Call(q, k, v, blocks, kv_length, predicate, tail, row_scale, residual, return_lse)
    _check(call)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be auto or one of {', '.join(BACKENDS)}, not {backend!r}")
    if call.wants_gradient():  # the operator below hides everything from autograd
        if backend not in ("auto", "dense"):
            raise ValueError(f"the {backend} backend cannot serve: {_NO_GRADIENT.otherwise}")
        out, lse = _run(call, scale, "dense")
        return out, lse if return_lse else None
    if not torch.compiler.is_compiling():  # in eager mode an operator's first call would import sympy: 150 MiB, a second
        out, lse = _run(call, scale, _choose(call, backend)[0])
        return out, lse if return_lse else None
    fields = (None,) * 3 if predicate is None else (predicate.kind, predicate.coordinates, list(predicate.limits))
    pooled = (None,) * 3 if tail is None else (tail.keys, tail.values, tail.sizes)
    out, lse = _operator(
        q, k, v, blocks.index, blocks.count, blocks.full, blocks.q_block, blocks.kv_block, scale, kv_length,
        *fields, *pooled, row_scale, residual, return_lse, backend,
    )  # fmt: skip
    return out, lse if return_lse else None


def choose_backend(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, *, scale: float | None = None, backend: str = "auto", **options
) -> tuple[str, tuple[str, ...]]:
    """Return the backend that a call with these arguments would take, and why each better one does not serve.

    Args: as :func:`block_sparse_attention`. May wait for the device where Triton cannot serve.

    Raises:
        ValueError: the named backend cannot serve.
    """
    return _choose(Call(q, k, v, blocks, **options), backend)


def why_not(backend: str, call: Call, named: bool = False) -> str | None:
    """Return why ``backend`` does not serve ``call``, or None. ``named``: the caller insists on this backend."""
    for constraint in CONSTRAINTS[backend]:
        if not (named and constraint.taste) and not constraint.holds(call):
            return constraint.otherwise
    return _trial(call.q.device) if backend == "triton" else None


def _choose(call: Call, backend: str) -> tuple[str, tuple[str, ...]]:
    if backend != "auto":
        reason = why_not(backend, call, named=True)
        if reason is not None:
            raise ValueError(f"the {backend} backend cannot serve: {reason}")
        return backend, ()
    reasons: list[str] = []
    for name in BACKENDS:
        reason = why_not(name, call)
        if reason is None:
            return name, tuple(reasons)
        reasons.append(f"{name}: {reason}")
    raise AssertionError("dense attention takes every call")


def _run(call: Call, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    """Compute with one backend; the log-sum-exp is empty where it is not wanted."""
    common = {"scale": scale, "kv_length": call.kv_length, "predicate": call.predicate}
    if call.predicate is not None and call.blocks.full is None:
        common["predicate"] = None  # no block is partial
    if backend == "triton":
        from . import triton_kernel  # only here: Triton takes its time, and may be missing

        epilogue = {"row_scale": call.row_scale, "residual": call.residual}
        out, lse = triton_kernel.attend(call.q, call.k, call.v, call.blocks, tail=call.tail, **common, **epilogue)
        return out, lse if call.return_lse else lse.new_empty(0)
    inputs = (call.q, call.k, call.v, call.blocks)
    if backend == "flex":
        out, lse = flex.attend(*inputs, **common, return_lse=call.return_lse)
    elif backend == "windows":
        out, lse = windows.attend(*inputs, scale=scale), None
    else:
        module = {"gather": gather, "dense": dense}[backend]
        out, lse = module.attend(*inputs, **common, tail=call.tail, return_lse=call.return_lse)
    if call.row_scale is not None or call.residual is not None:
        out = out.to(torch.promote_types(out.dtype, torch.float32))
    if call.row_scale is not None:
        out = out * call.row_scale.to(out.dtype)[..., None]
    if call.residual is not None:
        out = out + call.residual.to(out.dtype)
    lse = out.new_empty(0, dtype=torch.float32) if lse is None else lse.float()
    return out.to(call.q.dtype).contiguous(), lse.contiguous()


@torch.library.custom_op("stretto::block_sparse_attention", mutates_args=())
def _operator(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, count: Tensor, full: Tensor | None, q_block: int, kv_block: int,
    scale: float, kv_length: Tensor | None, kind: str | None, coordinates: Tensor | None, limits: list[int] | None,
    tail_keys: Tensor | None, tail_values: Tensor | None, tail_sizes: Tensor | None,
    row_scale: Tensor | None, residual: Tensor | None, return_lse: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Choose and run a backend. One operator to torch.compile, which need not look into any of them."""
    predicate = None if kind is None else Predicate(kind, coordinates, tuple(limits))
    tail = None if tail_keys is None else Tail(tail_keys, tail_values, tail_sizes)
    blocks = BlockList(index, count, full, q_block, kv_block)
    call = Call(q, k, v, blocks, kv_length, predicate, tail, row_scale, residual, return_lse)
    return _run(call, scale, _choose(call, backend)[0])


@_operator.register_fake
def _(q, k, v, index, count, full, q_block, kv_block, scale, kv_length, kind, coordinates, limits, tail_keys, tail_values,
      tail_sizes, row_scale, residual, return_lse, backend):  # fmt: skip
    lse = q.new_empty(q.shape[:3] if return_lse else (0,), dtype=torch.float32)
    return q.new_empty(q.shape), lse


def _check(call: Call) -> None:
    """Raise ValueError, in words, where shapes or dtypes do not fit. Looks at no value of a tensor."""
    q, k, v = call.q, call.k, call.v
    if any(x.ndim != 4 for x in (q, k, v)):
        raise ValueError(f"q, k and v must have four dimensions, got {[list(x.shape) for x in (q, k, v)]}")
    batch, heads, queries, size = q.shape
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != size:
        raise ValueError(f"q, k and v do not fit each other: {[list(x.shape) for x in (q, k, v)]}")
    if not k.shape[1] or heads % k.shape[1]:
        raise ValueError(f"{heads} query heads cannot share {k.shape[1]} key heads evenly")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"q, k and v must have one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    error = call.blocks.shape_error(queries)
    if error is not None:
        raise ValueError(error)
    if call.blocks.index.shape[0] not in (1, batch) or call.blocks.index.shape[1] not in (1, heads):
        raise ValueError(
            f"lists for {list(call.blocks.index.shape[:2])} batch rows and heads, tensors for {[batch, heads]}"
        )
    key_blocks = -(-k.shape[2] // call.blocks.kv_block)
    if call.kv_length is not None and call.kv_length.shape != (batch,):
        raise ValueError(f"kv_length must have shape [{batch}], got {list(call.kv_length.shape)}")
    if call.predicate is not None and not call.predicate.coordinates.shape[0] >= max(queries, k.shape[2]):
        raise ValueError(
            f"the predicate has coordinates of {call.predicate.coordinates.shape[0]} tokens, but there are "
            f"{max(queries, k.shape[2])}"
        )
    if call.tail is not None:
        pooled = (*k.shape[:2], key_blocks, size)
        if call.tail.keys.shape != pooled or call.tail.values.shape != pooled:
            raise ValueError(f"tail keys and values must have shape {list(pooled)}, got {list(call.tail.keys.shape)}")
        if call.tail.sizes.shape not in ((key_blocks,), (batch, key_blocks)):
            raise ValueError(f"tail sizes must have shape [{key_blocks}], with or without batch rows in front")
    if call.row_scale is not None and (
        call.row_scale.ndim != 3 or any(a not in (1, b) for a, b in zip(call.row_scale.shape, q.shape[:3], strict=True))
    ):
        raise ValueError(f"row_scale must have shape {list(q.shape[:3])}, got {list(call.row_scale.shape)}")
    if call.residual is not None and call.residual.shape != q.shape:
        raise ValueError(f"residual must have shape {list(q.shape)}, got {list(call.residual.shape)}")


def _is_tile(block: int, least: int = 16) -> bool:
    return least <= block <= 256 and block & (block - 1) == 0


@cache
def _trial(device: torch.device) -> str | None:
    """Run the Triton kernel once on ``device`` against the reference and return why it cannot be used there, or None."""
    try:
        from . import triton_kernel

        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn((1, 2, 200, 72), generator=generator).to(device) for _ in range(3))
        mask = torch.rand((1, 2, 4, 4), generator=generator) < 0.6
        mask[:, :, 0] = False
        blocks = BlockList.from_mask(mask.to(device))
        ours, _ = triton_kernel.attend(q, k, v, blocks, scale=0.1, tuned=False)
        expected, _ = reference.attend(q.cpu(), k.cpu(), v.cpu(), BlockList.from_mask(mask), scale=0.1)
        gap = float((ours.cpu() - expected).abs().max())
    except Exception as error:  # a missing compiler, driver or architecture shows as almost any error
        return f"Triton does not run here ({type(error).__name__}: {str(error).strip().splitlines()[:1]})"
    return None if gap < 1e-4 else f"Triton's result is off by {gap:.2g} in a trial"
