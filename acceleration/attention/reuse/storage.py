"""How outputs and residuals of some heads are kept: as they are, in eight bits, or in system memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

_E4M3 = getattr(torch, "float8_e4m3fn", None)
_SCALE_BYTES = 4


@dataclass(frozen=True)
class Policy:
    """How stored features are kept. They are read back in their dtype and on their device.

    Attributes:
        name: what a user calls it.
        eighth: in fp8 (e4m3) with one fp32 scale per token and head. An element x comes back within
            max(2^-4 |x|, 2^-10 scale), where scale = max|x| / 448 over the token's head.
        in_system_memory: whether values leave the device.
    """

    name: str
    eighth: bool = False
    in_system_memory: bool = False

    def value_bytes(self, rows: int, heads: int, tokens: int, size: int, item: int) -> int:
        """Return what features [rows, heads, tokens, size] of ``item`` bytes each take."""
        each = size + _SCALE_BYTES if self.eighth and item > 1 else size * item
        return rows * heads * tokens * each


AS_COMPUTED = Policy("as computed")
EIGHTH = Policy("eighth", eighth=True)
SYSTEM_MEMORY = Policy("system memory", in_system_memory=True)
EIGHTH_IN_SYSTEM_MEMORY = Policy("eighth in system memory", eighth=True, in_system_memory=True)
#: From the one that costs nothing but memory to the one that costs precision and transfers.
POLICIES = {
    policy.name: policy
    for policy in (AS_COMPUTED, EIGHTH, SYSTEM_MEMORY, EIGHTH_IN_SYSTEM_MEMORY)
    if _E4M3 is not None or not policy.eighth
}


@dataclass(frozen=True, eq=False)
class Packed:
    """Features of some heads as they are stored.

    Attributes:
        heads: which heads, ascending.
        values: [B, len(heads), N, d].
        scale: fp32 [B, len(heads), N, 1] of eight-bit values; None otherwise.
        dtype: that they are read back in.
        device: that they are read back on.
        system: whether they are kept in system memory.
    """

    heads: tuple[int, ...]
    values: Tensor
    scale: Tensor | None
    dtype: torch.dtype
    device: torch.device
    system: bool

    @property
    def bytes(self) -> int:
        """Bytes it takes, wherever it is kept."""
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def read(self) -> Tensor:
        """Return [B, len(heads), N, d] in its dtype and on its device."""
        values = self.values.to(self.device, non_blocking=True)
        if self.scale is None:
            return values
        return (values.float() * self.scale.to(self.device, non_blocking=True)).to(self.dtype)

    def only(self, heads: tuple[int, ...]) -> "Packed":
        """Return the features of some of its heads; itself where these are all."""
        if heads == self.heads:
            return self
        place = [self.heads.index(head) for head in heads]
        values = torch.stack([self.values[:, index] for index in place], 1)  # eight-bit tensors take no index
        scale = None if self.scale is None else self.scale[:, place].contiguous()
        return Packed(heads, values, scale, self.dtype, self.device, self.system)


def pack(tensor: Tensor, heads: tuple[int, ...], dtype: torch.dtype, policy: Policy) -> Packed:
    """Return the features of ``heads`` to be stored; a copy.

    Args:
        tensor: [B, len(heads), N, d], any floating dtype.
        heads: which heads these are.
        dtype: of the network: what is stored, and read back, unless ``policy`` says eighth.
        policy: how.
    """
    scale = None
    if policy.eighth and dtype.itemsize > 1:
        wide = tensor.float()
        scale = (wide.abs().amax(-1, keepdim=True) / torch.finfo(_E4M3).max).clamp_min(torch.finfo(torch.float32).tiny)
        values = (wide / scale).to(_E4M3).contiguous()
    else:
        values = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if policy.in_system_memory:
        values, scale = _in_system_memory(values), None if scale is None else _in_system_memory(scale)
    return Packed(heads, values, scale, dtype, tensor.device, policy.in_system_memory)


def pack_bits(mask: Tensor) -> Tensor:
    """Return bool [..., n] as bits, uint8 [..., ceil(n / 8)]."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8)).to(torch.uint8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, number: int) -> Tensor:
    """Return the bool [..., number] that :func:`pack_bits` packed."""
    shifted = bits[..., None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (shifted & 1).bool().flatten(-2)[..., :number]


def _in_system_memory(values: Tensor) -> Tensor:
    pinned = values.device.type == "cuda"
    copy = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=pinned)
    return copy.copy_(values, non_blocking=pinned)
