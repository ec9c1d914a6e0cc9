"""One evaluation of the sampler, the batched network calls inside it, and what became of them."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .models import ModulePart, ModuleSite

COMPUTED, FORECAST, REUSED = "computed", "forecast", "reused"


@dataclass(frozen=True)
class Branch:
    """One conditioning entry of a batched network call.

    Attributes:
        name: ``"cond"``, ``"uncond"`` or ``"other"``.
        key: what its stored features belong to: conditioning, context window, foreign
            patches and device. Equal keys may share features, different ones never do.
    """

    name: str
    key: Hashable


@dataclass
class Evaluation:
    """One call of the sampler for a prediction (all guidance branches together).

    Attributes:
        index: running number in this run, for display only.
        sigma: noise level.
        position: continuous step position (:class:`~.sampling.Schedule`).
        step: the step it belongs to.
        network_input: latent as the network sees it [B, C, ...].
        skip: whether the active technique wants the blocks skipped.
        reason: why, in words.
        pending: the decision waits for something that the first network call will show.
        signal: what the indicator said; None without one, or while it knows nothing.
        compared: what the policy held against its threshold: the signal, or what has added up; None without.
        threshold: what it had to stay below; None for policies without one.
        on_rails: whether a rail made this evaluation computed, whatever the policy wanted.
        computed_share: share of the blocks or modules that a table has computed; None where steps are skipped whole.
        attention_kept: share of attention's key blocks that were attended, over all layers and heads that a sparse
            plan covers; None where none does. A tensor, so that nobody waits for the device.
        active_share: share of the image tokens that the blocks computed; None where they computed all.
    """

    index: int
    sigma: float
    position: float
    step: int
    network_input: torch.Tensor
    skip: bool = False
    reason: str = ""
    pending: bool = False
    signal: float | None = None
    compared: float | None = None
    threshold: float | None = None
    on_rails: bool = False
    computed_share: float | None = None
    attention_kept: torch.Tensor | None = None
    active_share: float | None = None


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention that the network is about to compute.

    Attributes:
        q: queries [B, H, N, d], a view, with positions already rotated in.
        k: keys [B, Hk, M, d]; H is a multiple of Hk.
        v: values, like ``k``.
        mask: what the network masks with, as its own attention function takes it; None for nothing.
        scale: factor of the logits.
        exact: whether the network asks for full precision here.
        image_slice: (first, end) of the image tokens where the network tells it, else None.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    scale: float
    exact: bool = False
    image_slice: tuple[int, int] | None = None


@dataclass
class Call:
    """One batched network call inside an evaluation.

    Attributes:
        evaluation: the evaluation it serves.
        branches: guidance branches in row order; rows split evenly among them.
        rows: batch rows of each branch.
        tokens: image tokens of one row.
        network_input: [len(branches) * rows, C, ...], as the network sees it.
        to_prediction: denoised -> raw network output (the host knows the parametrisation).
        to_denoised: raw network output -> denoised.
        skippable: False when features may not be re-injected here (rows do not split
            evenly, or another patch holds the place of ours).
        decisions: what happened to each branch; filled in by the technique.
        blocks_computed: number of blocks that ran.
        text_tokens: text tokens ahead of the image tokens in a joint stream.
        scratch: what a technique keeps between the blocks of this call.
        layout: shapes, without the batch, of everything the network is given. Equal layouts make features of equal shape.
        inside: stands around the parts of modules inside blocks, ``inside(call, part, original)``; None
            where nobody does.
        hollow: outputs of the attention in progress that will be put in, so that the attention itself need not run.
        context_tokens: length of the text that the network is given, 0 where it is given none.
        references: whether the network is given reference pictures, whose tokens may stand beside the target's.
        weights: identity of everything that changes what the network's weights are: LoRAs, hooks, patched modules.
        rehearse: noise levels -> the vectors that the blocks would be modulated with there, the first blocks' inputs at the
            call's own shape; empty where the host cannot tell. None where nobody asks.
        attending: the module whose self-attention comes next, as far as somebody keeps track; None elsewhere.
    """

    evaluation: Evaluation
    branches: tuple[Branch, ...]
    rows: int
    tokens: int
    network_input: torch.Tensor
    to_prediction: Callable[[torch.Tensor], torch.Tensor]
    to_denoised: Callable[[torch.Tensor], torch.Tensor]
    skippable: bool = True
    decisions: tuple[str, ...] = ()
    blocks_computed: int = 0
    text_tokens: int = 0
    scratch: dict[str, Any] = field(default_factory=dict)
    layout: Hashable = ()
    inside: "Callable[[Call, ModulePart, Callable[[], Any]], Any] | None" = None
    hollow: set[str] = field(default_factory=set)
    context_tokens: int = 0
    references: bool = False
    attending: ModuleSite | None = None
    weights: Hashable = ()
    rehearse: Callable[[Sequence[float]], list[torch.Tensor]] | None = None

    def part(self, tensor: torch.Tensor, index: int) -> torch.Tensor:
        """Return the rows of branch ``index`` as a view of ``tensor``."""
        return tensor[index * self.rows : (index + 1) * self.rows]
