"""Which rates a video gets: the best ones for a number of latents, or as few latents as a quality allows."""

import math
from collections.abc import Collection, Sequence

import torch

from ..errors import StrettoError
from .schedule import RATES
from .similarity import Loss

Costs = dict[int, list[float]]


def fit_ratio(loss: Loss, ratio: float, *, rates: Collection[int] = RATES, pinned: Collection[int] = ()) -> tuple:
    """Return the rates that lose least in sum at about ``ratio`` of the latents.

    Exact, by dynamic programming over (latents covered, latents kept): what is most similar merges first, wherever in
    the video it stands. The number kept is the nearest that can be had; a tie goes to more.

    Args:
        loss: of every latent after the first.
        ratio: kept share of all latents, in (0, 1].
        rates: allowed ones; 1 always is.
        pinned: latents (the first is 0) that must keep rate 1.
    """
    if not 0 < ratio <= 1:
        raise StrettoError(f"Frame schedule: ratio is {ratio!r}; it must be a number in (0, 1]")
    count = loss.latents
    segments = _segments(loss, rates, pinned)
    best = [[math.inf] * (count + 1) for _ in range(count + 1)]
    step = [[0] * (count + 1) for _ in range(count + 1)]
    best[0][0] = 0.0
    for end in range(1, count + 1):
        for rate, cost in segments[end]:
            row, start = best[end], best[end - rate]
            for kept in range(1, end + 1):
                value = start[kept - 1] + cost
                if value < row[kept]:
                    row[kept], step[end][kept] = value, rate
    wanted = ratio * (count + 1) - 1
    reachable = [kept for kept in range(count + 1) if best[count][kept] < math.inf]
    kept = min(reachable, key=lambda k: (abs(k - wanted), -k))
    return _walk_back(count, lambda end, left: step[end][left], kept)


def fit_threshold(
    loss: Loss,
    half: float,
    quarter: float,
    *,
    rates: Collection[int] = RATES,
    pinned: Collection[int] = (),
) -> tuple:
    """Return the rates with the fewest latents whose every frame loses at most a given 1 - SSIM.

    Args:
        loss: of every latent after the first.
        half: the most that a frame may lose at half the rate.
        quarter: and at a quarter.
        rates: allowed ones.
        pinned: latents (the first is 0) that must keep rate 1.
    """
    limits = {2: half, 4: quarter}
    for rate, limit in limits.items():
        if not 0 <= limit <= 1:
            raise StrettoError(f"Frame schedule: the threshold of rate {rate} is {limit!r}; it must be in [0, 1]")
    count = loss.latents
    segments = _segments(loss, rates, pinned)
    best: list[tuple[int, float, int]] = [(0, 0.0, 0)]
    for end in range(1, count + 1):
        found = []
        for rate, cost in segments[end]:
            if rate > 1 and float(loss.worst[rate][end - rate : end].max()) > limits[rate]:
                continue
            kept, total, _ = best[end - rate]
            found.append((kept + 1, total + cost, rate))
        best.append(min(found))
    return _walk_back(count, lambda end, left: best[end][2], best[count][0])


def published_rates(lags: Sequence[Sequence[float]], frames: int, threshold: float, quads: bool) -> tuple:
    """Return the rates that VGDFR (arXiv 2504.12259) chooses, greedily from the left, for 4 frames a latent.

    Args:
        lags: SSIM of frame j and frame j + 1, j + 2, j + 3: three sequences over j.
        frames: of the video, 1 + 4 n.
        threshold: similarity above which frames merge.
        quads: whether windows of 16 frames may become one latent.
    """
    one, two, three = lags
    rates: list[int] = []
    i = 1
    while i < frames - 9:
        starts = [i + 4 * g for g in range(4)]
        if (
            quads
            and i < frames - 17
            and all(min(*one[s : s + 3], two[s], two[s + 1], three[s]) > threshold for s in starts)
        ):
            rates.append(4)
            i += 16
            continue
        rates += [2] if all(one[i + 2 * g] > threshold for g in range(4)) else [1, 1]
        i += 8
    return (*rates, *[1] * ((frames - i) // 4))


def uniform_rates(count: int, kept: int) -> tuple:
    """Return ``kept`` rates for ``count`` latents, as even as they can be, spread evenly: what to beat.

    Raises:
        StrettoError: ``kept`` latents cannot cover ``count``.
    """
    for quarters in range(kept + 1):  # as few unequal ones as possible
        halves = count - kept - 3 * quarters
        left = {1: kept - halves - quarters, 2: halves, 4: quarters}
        if min(left.values()) >= 0:
            break
    else:
        raise StrettoError(f"Frame schedule: {kept} latents of rates 1, 2 and 4 cannot stand for {count}")
    chosen: list[int] = []
    for place in range(1, kept + 1):
        behind = count * place / kept - sum(chosen)
        chosen.append(min((rate for rate in RATES if left[rate]), key=lambda rate: abs(rate - behind)))
        left[chosen[-1]] -= 1
    return tuple(chosen)


def pinned_rates(rates: Sequence[int], pinned: Collection[int]) -> tuple:
    """Return ``rates`` with every segment that holds a pinned latent cut into rate 1."""
    result: list[int] = []
    at = 1
    for rate in rates:
        result += [1] * rate if any(place in pinned for place in range(at, at + rate)) else [rate]
        at += rate
    return tuple(result)


def _segments(loss: Loss, rates: Collection[int], pinned: Collection[int]) -> list[list[tuple[int, float]]]:
    """Return for every end in 1..L-1 the segments (rate, cost) that may end there."""
    unknown = [rate for rate in rates if rate not in RATES]
    if unknown:
        raise StrettoError(f"Frame schedule: the rate {unknown[0]!r} is not one of {', '.join(map(str, RATES))}")
    sums = {rate: [0.0, *torch.cumsum(loss.total[rate].double(), 0).tolist()] for rate in RATES}
    found: list[list[tuple[int, float]]] = [[]]
    for end in range(1, loss.latents + 1):
        allowed = [(1, 0.0)]
        for rate in sorted(set(rates) - {1}):
            start = end - rate
            if start >= 0 and not any(start < place <= end for place in pinned):
                allowed.append((rate, sums[rate][end] - sums[rate][start]))
        found.append(allowed)
    return found


def _walk_back(count: int, step, kept: int) -> tuple:
    rates: list[int] = []
    end, left = count, kept
    while end:
        rates.append(step(end, left))
        end, left = end - rates[-1], left - 1
    return tuple(reversed(rates))
