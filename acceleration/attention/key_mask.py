"""Masks that only leave out keys become lengths; anything else is not for sparse attention."""

import torch

from .geometry import Geometry

#: Additive masks below this leave a key out, above its negative they do nothing.
LEFT_OUT = -1e4


def valid_keys(mask: torch.Tensor, batch: int, geometry: Geometry) -> torch.Tensor | None:
    """Return how many keys of each row are valid, int32 [batch], once the picture's tokens stand before all others.

    Args:
        mask: bool (True: keep) or additive, of a shape that broadcasts to [B, H, N, M] or is [B, N, M]; the same for all
            heads and queries.
        batch: B.
        geometry: of the sequence.

    Returns:
        None where the mask tells heads or queries apart, weighs keys, leaves out tokens of the picture, or others that
        valid ones follow.
    """
    if mask.shape[-1] != geometry.length or mask.ndim > 4 or any(size != 1 for size in mask.shape[1:-1]):
        return None
    keys = mask.reshape(-1, geometry.length)
    if keys.shape[0] not in (1, batch):
        return None
    keep = keys if keys.dtype == torch.bool else keys > LEFT_OUT
    if keys.dtype != torch.bool and not bool(((keys == 0) | ~keep).all()):
        return None
    end = geometry.start + geometry.visual
    others = torch.cat([keep[:, : geometry.start], keep[:, end:]], dim=1)
    falling = bool((others[:, 1:] <= others[:, :-1]).all()) if others.shape[1] > 1 else True
    if not falling or not bool(keep[:, geometry.start : end].all()):
        return None
    return (geometry.visual + others.sum(dim=1)).to(torch.int32).expand(batch).contiguous()
