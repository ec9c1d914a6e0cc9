"""What a head of an attention does at a step, and many heads of different modes as one list of key blocks."""

from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from ..builders import Selection


class Mode(IntEnum):
    """What one head does. The numbers stand in plan files and never change.

    FULL attends to everything. LIST attends to listed key blocks (O_s). SHARE returns what the head returned last, at an
    earlier step (AST of DiTFastAttn, arXiv 2406.08552; head share of its V2, arXiv 2503.22796). RESIDUAL adds
    O_f - O_s of the last full step to O_s (WA-RS, arXiv 2406.08552). RHO is rho O_s + R with rho and R = O_f - rho O_s
    of the last full step (Re-ttention, arXiv 2505.22918). MEAN is rho O_s + (1 - rho) times the mean value of the blocks
    left out: no residual is kept. ZERO returns nothing (Sparse-vDiT's skipped head, arXiv 2506.03065). BLEND is
    alpha O_s + (1 - alpha) times that mean, alpha fitted beforehand (SLA2's blend, arXiv 2602.12675, with a share per head):
    nothing is kept from step to step.
    """

    FULL = 0
    LIST = 1
    SHARE = 2
    RESIDUAL = 3
    RHO = 4
    MEAN = 5
    ZERO = 6
    BLEND = 7


#: Modes that attend to listed blocks.
LISTED = (Mode.LIST, Mode.RESIDUAL, Mode.RHO, Mode.MEAN, Mode.BLEND)
#: Modes that need something of the last full step.
CORRECTED = (Mode.RESIDUAL, Mode.RHO, Mode.MEAN)
#: Modes by their name in files and reports.
NAMES = {mode.name.lower(): mode for mode in Mode}


def is_any(modes: np.ndarray, of: tuple[Mode, ...]) -> np.ndarray:
    """Return bool, as ``modes``: where one of the modes ``of`` stands."""
    return np.isin(modes, [int(mode) for mode in of])


def heads_where(flags: np.ndarray) -> tuple[int, ...]:
    """Return the heads whose flag [H] is set, ascending."""
    return tuple(int(head) for head in np.flatnonzero(flags))


def merge_heads(
    modes: np.ndarray, listed: Selection | None, blocks: tuple[int, int], device: torch.device
) -> Selection:
    """Return one selection for heads of any modes, to be launched together.

    A head that attends to everything keeps all blocks, one that attends to lists keeps ``listed``, and all others keep
    none: no backend spends time on them.

    Args:
        modes: [H] of :class:`Mode`.
        listed: bool [B', H', Nq, Nk] with H' 1 or H; None where no head needs it.
        blocks: (Nq, Nk).
        device: of the selection.

    Raises:
        ValueError: a head needs lists and there are none.
    """
    needs = is_any(modes, LISTED)
    if needs.any() and listed is None:
        raise ValueError(f"heads {heads_where(needs)} attend to lists, and none are given")
    everything = torch.from_numpy(modes == int(Mode.FULL)).to(device)[:, None, None]
    if not needs.any():
        return Selection(everything.expand(1, -1, *blocks))
    some = torch.from_numpy(needs).to(device)[:, None, None]
    mask = (listed.mask & some) | everything
    full = None if listed.full is None else listed.full | everything
    return Selection(mask, full, listed.predicate)


def replace_heads(selection: Selection | None, heads: tuple[int, ...], mask: Tensor, count: int) -> Selection:
    """Return ``selection`` with other lists for some of its heads; predicates are kept, their blocks count as full.

    Args:
        selection: of all heads; None for nothing kept elsewhere.
        heads: which are replaced.
        mask: bool [B', len(heads), Nq, Nk].
        count: H.
    """
    if selection is None:
        base = mask.new_zeros((mask.shape[0], count, *mask.shape[2:]))
        full = None
    else:
        batch = max(mask.shape[0], selection.mask.shape[0])
        base = selection.mask.expand(batch, count, -1, -1).clone()
        full = None if selection.full is None else selection.full.expand(batch, count, -1, -1).clone()
    base[:, list(heads)] = mask
    if full is not None:
        full[:, list(heads)] = True
    return Selection(base, full, None if selection is None else selection.predicate)
