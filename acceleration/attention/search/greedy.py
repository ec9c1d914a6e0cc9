"""DiTFastAttn's own search (arXiv 2406.08552, algorithm 1): step by step, layer by layer, the cheapest method that will do.

It runs the whole network for every layer, step and candidate, which takes hours for a large model; here it is the
yardstick for searches that take minutes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..reuse import Mode, ModeTable


@dataclass(frozen=True)
class Method:
    """One of DiTFastAttn's methods: a mode of all heads of a layer, and whether guidance branches share."""

    name: str
    mode: Mode
    cfg: bool = False


FULL = Method("full_attn", Mode.FULL)
#: From the cheapest to the dearest, as the search tries them; full attention is what remains.
CANDIDATES = (
    Method("output_share", Mode.SHARE),
    Method("residual_window_attn+cfg_attn_share", Mode.RESIDUAL, True),
    Method("residual_window_attn", Mode.RESIDUAL),
    Method("full_attn+cfg_attn_share", Mode.FULL, True),
)
#: evaluate(step, method of every layer, whether this is the step's last one) -> output of the network. Only the last
#: one may change what later steps find.
Evaluate = Callable[[int, tuple[Method, ...], bool], Tensor]


def clipped_relative(a: Tensor, b: Tensor) -> float:
    """Return the mean of |a - b| / (max(|a|, |b|) + 1e-6), clipped to [0, 10]: DiTFastAttn's loss. Waits for the device."""
    a, b = a.float(), b.float()
    return float(((a - b).abs() / (a.abs().maximum(b.abs()) + 1e-6)).clamp(0, 10).mean())


def search(
    evaluate: Evaluate,
    steps: int,
    layers: int,
    theta: float,
    candidates: Sequence[Method] = CANDIDATES,
    loss: Callable[[Tensor, Tensor], float] = clipped_relative,
) -> list[tuple[Method, ...]]:
    """Return the method of every layer at every step.

    A layer takes the first candidate with which the network's output is off by less than theta * (layer + 1) / layers,
    the layers before it having theirs already and those behind it attending in full. The first step is full.

    Args:
        evaluate: runs the network at a step; steps come in order.
        steps: of the run.
        layers: attentions of the network.
        theta: the paper's are .05 (DiT, OpenSora) and .0725 (PixArt).
        candidates: cheapest first.
        loss: (output, full output) -> distance.
    """
    found = []
    for step in range(steps):
        methods = (FULL,) * layers
        if step:
            methods = decide_step(lambda tried, at=step: evaluate(at, tried, False), layers, theta, candidates, loss)
        evaluate(step, methods, True)
        found.append(methods)
    return found


def decide_step(
    evaluate: Callable[[tuple[Method, ...]], Tensor],
    layers: int,
    theta: float,
    candidates: Sequence[Method] = CANDIDATES,
    loss: Callable[[Tensor, Tensor], float] = clipped_relative,
) -> tuple[Method, ...]:
    """Return the method of every layer at one step; arguments as :func:`search`."""
    methods = [FULL] * layers
    reference = evaluate(tuple(methods))
    for layer in range(layers):
        for candidate in candidates:
            methods[layer] = candidate
            if loss(evaluate(tuple(methods)), reference) < theta * (layer + 1) / layers:
                break
        else:
            methods[layer] = FULL
    return tuple(methods)


def as_table(found: Sequence[Sequence[Method]], heads: int) -> ModeTable:
    """Return what a search found as modes of ``heads`` heads."""
    modes, cfg = ([[getattr(m, name) for m in layers] for layers in found] for name in ("mode", "cfg"))
    spread = (np.repeat(np.array(x)[..., None], heads, -1) for x in (modes, cfg))
    return ModeTable(*spread)
