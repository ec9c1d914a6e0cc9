"""Latents in the frequencies of the orthonormal discrete cosine transform (DCT-II): shrinking, expanding, splitting.

The last two dimensions are the spatial ones, [..., H, W]; frames of a video are treated one by one. White noise has one
variance in every coefficient, at every size, so noise may be cut out of larger noise and put into it again.
"""

import math

import torch

Size = tuple[int, int]


def _matrix(length: int) -> torch.Tensor:
    """Return the orthonormal DCT-II matrix [length, length] in fp64: coefficients = matrix @ samples."""
    place = torch.arange(length, dtype=torch.float64)
    matrix = torch.cos(math.pi / length * (place + 0.5) * place[:, None]) * math.sqrt(2.0 / length)
    matrix[0] /= math.sqrt(2.0)
    return matrix


def _matrices(size: Size, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
    return tuple(_matrix(length).to(like.device, dtype) for length in size)


def dct(tensor: torch.Tensor) -> torch.Tensor:
    """Return the coefficients [..., H, W] of a latent [..., H, W]; half precision is computed in fp32."""
    rows, columns = _matrices(tensor.shape[-2:], tensor)
    return rows @ tensor.to(rows.dtype) @ columns.T


def idct(coefficients: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`dct`."""
    rows, columns = _matrices(coefficients.shape[-2:], coefficients)
    return rows.T @ coefficients.to(rows.dtype) @ columns


def shrink(tensor: torch.Tensor, size: Size) -> torch.Tensor:
    """Return the low frequencies of ``tensor`` [..., H, W] as a latent [..., *size], coefficients unchanged.

    White noise stays white with its variance; a constant grows by :func:`ratio`.
    """
    if tuple(tensor.shape[-2:]) == size:
        return tensor
    return idct(dct(tensor)[..., : size[0], : size[1]])


def expand(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Return a latent [..., H, W] with the frequencies of ``low`` [..., h, w] where it has any, those of ``high`` elsewhere.

    Args:
        low: the smaller latent; its coefficients are taken unchanged.
        high: [..., H, W].
    """
    if low.shape[-2:] == high.shape[-2:]:
        return low
    coefficients = dct(high)
    coefficients[..., : low.shape[-2], : low.shape[-1]] = dct(low)
    return idct(coefficients)


def ratio(full: Size, size: Size) -> float:
    """Return r, what a coefficient of the same picture is larger by at ``full`` than at ``size``.

    The square root of the ratio of areas: with it a constant picture keeps its value at every size, odd ones included.
    """
    return math.sqrt(full[0] * full[1] / (size[0] * size[1]))
