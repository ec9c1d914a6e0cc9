"""Torch reference of rotating rows by a block-diagonal Hadamard matrix and rounding them to int8.

The matrix is a *regular* Hadamard matrix: every row has the same sum, so a constant component of the
rows is spread over a block like everything else. It is symmetric and orthogonal, so it undoes itself, and
``rotate(x) @ rotate(w).T == x @ w.T`` for real numbers (QuaRot, arXiv 2404.00456; ConvRot for the block form).
"""

from functools import cache

import torch

#: Sides of the block that the regular construction has: powers of four.
SIZES = (256, 64, 16, 4)
#: Scale of a row of zeros: any positive number gives zeros back.
MIN_SCALE = 1e-30
LIMIT = 127


@cache
def hadamard(size: int, device: str | torch.device = "cpu") -> torch.Tensor:
    """Return the normalised regular Hadamard matrix, fp32 [size, size]: symmetric, orthogonal, row sums 1.

    Raises:
        ValueError: ``size`` is no power of four from 4 to 256.
    """
    if size not in SIZES:
        raise ValueError(f"rotation size {size}: use one of {', '.join(map(str, SIZES))}, or 0 for none")
    corner = torch.ones(4, 4) - 2 * torch.eye(4).flip(1)
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.kron(matrix, corner)
    return (matrix / size**0.5).to(device)


def rotate(x: torch.Tensor, size: int) -> torch.Tensor:
    """Return ``x`` with every block of ``size`` entries of its last axis rotated, in fp32 (fp64 for fp64).

    Args:
        x: floating [..., K].
        size: side of the blocks; 0 rotates nothing.

    Raises:
        ValueError: K is no multiple of ``size``.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x = x.to(wide)
    if size == 0:
        return x
    if x.shape[-1] % size:
        raise ValueError(f"rotation size {size} does not divide the {x.shape[-1]} input channels")
    return (x.reshape(-1, size) @ hadamard(size, x.device).to(wide)).view(x.shape)


def quantize_rows(x: torch.Tensor, generator: torch.Generator | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Round rows to the symmetric int8 grid, one scale each.

    ``s = max(max|x| / 127, 1e-30)``, ``q = round(x / s)``: halves to the even neighbour, -128 never occurs.

    Args:
        x: floating [..., K].
        generator: rounds up with the probability of the fraction instead of to nearest, so that the mean is kept.

    Returns:
        int8 [..., K] and fp32 [..., 1]. A row with a value that is not finite has no defined codes.
    """
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / LIMIT).clamp_(min=MIN_SCALE)
    steps = x / scale
    if generator is None:
        steps.round_()
    else:
        steps.add_(torch.rand(steps.shape, generator=generator, device=steps.device)).floor_()
    return steps.clamp_(-LIMIT, LIMIT).to(torch.int8), scale


def rotate_quantize(
    x: torch.Tensor, size: int = 0, pre_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale the channels, rotate, and round every row to int8: what an activation goes through before the product.

    Args:
        x: floating [..., K].
        size: side of the rotated blocks, or 0.
        pre_scale: factor of every channel, [K] (ViDiT-Q, arXiv 2406.02540, section 3.3), or None.

    Returns:
        int8 [..., K] and fp32 [..., 1].
    """
    if pre_scale is not None:
        x = x.float() * pre_scale.float()
    return quantize_rows(rotate(x, size))
