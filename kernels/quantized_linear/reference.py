"""Torch references of linear layers with quantized weights. They run everywhere and are the specification."""

import torch

from ..rotate_quantize.reference import rotate_quantize


def int8_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the exact int32 [M, N] product of int8 [M, K] and int8 [N, K] transposed.

    Doubles hold every partial sum: K * 127^2 stays below 2^53 for any K, and below 2^31 up to K = 133,144.
    """
    return (x.double() @ weight.double().T).to(torch.int32)


def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    rotation: int = 0,
    pre_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``x @ W.T + bias`` with both factors on the int8 grid; the activation is rounded token by token.

    ``y = (q_x q_w^T) s_x s_w + b``: int32 sums, fp32 scales, one rounding to the dtype of ``x``.

    Args:
        x: floating [..., K].
        weight: int8 [N, K], rotated by ``rotation`` already.
        scale: fp32 of N numbers, or one.
        bias: [N] or None.
        rotation: side of the Hadamard blocks, or 0.
        pre_scale: [K] factors of the channels of x, or None.

    Raises:
        ValueError: the shapes do not belong together.
    """
    check(x, weight, scale, bias)
    codes, rows = rotate_quantize(x, rotation, pre_scale)
    flat = codes.reshape(-1, codes.shape[-1])
    y = int8_product(flat, weight).float() * rows.reshape(-1, 1) * scale.float().reshape(1, -1)
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def dequantized_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``x @ W.T + bias`` in the dtype of ``x`` with a weight that has been dequantized (floating [N, K])."""
    bias = None if bias is None else bias.to(x.dtype)
    return torch.nn.functional.linear(x, weight.to(x.dtype), bias)


def check(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Refuse operands that do not belong together (ValueError)."""
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"the input has {x.shape[-1]} channels, the weight is {list(weight.shape)}")
    if scale.numel() not in (1, weight.shape[0]):
        raise ValueError(f"{scale.numel()} scales for {weight.shape[0]} rows; one per row, or one for all, is right")
    if bias is not None and bias.numel() != weight.shape[0]:
        raise ValueError(f"the bias has {bias.numel()} entries, the weight {weight.shape[0]} rows")
