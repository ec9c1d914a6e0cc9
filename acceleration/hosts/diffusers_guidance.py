"""Guidance saver in pipelines of diffusers: half of a doubled batch is computed, or the second of two calls answered.

Pipelines guide in two ways. Some call the transformer once, on the latent twice; then the conditional rows alone are
computed. Others call it for either branch; then the unconditional call, which comes second, is answered without the network.
Both get two predictions whichever was asked, so whatever the pipeline makes of them goes on as ever.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..evaluation import Branch, Evaluation
from ..guidance.session import GuidanceSession, Guided

if TYPE_CHECKING:
    from .diffusers_run import Answer, Asked, Run

#: Arguments with a row for every item of the batch, or one row for all.
ROWS = (
    "hidden_states",
    "timestep",
    "encoder_hidden_states",
    "encoder_hidden_states_image",
    "encoder_hidden_states_mask",
    "encoder_attention_mask",
    "pooled_projections",
    "class_labels",
    "guidance",
    "timestep_cond",
)
#: Arguments that hold for all items.
SHARED = ("image_rotary_emb", "img_ids", "txt_ids")
#: A dictionary of arguments like :data:`ROWS`.
NESTED = "added_cond_kwargs"
COND, UNCOND = "cond", "uncond"


class Saver:
    """Brings a run's requests for both branches to its guidance session."""

    def __init__(self, session: GuidanceSession, run: "Run") -> None:
        self.session, self.run = session, run
        self._first: tuple[Evaluation, Answer] | None = None
        self._evaluations, self._pairs = 0, 0

    def answer(self, asked: "Asked", branches: tuple[Branch, ...], compute: Callable) -> Any:
        """Return what the network would return for a call, having computed all of it, a half or nothing."""
        reason = self._obstacle(asked)
        if len(branches) == 2:
            return self._plain(asked, branches, compute, reason) if reason else self._halved(asked, branches, compute)
        if self.run.known.batched:
            reason = reason or "a call for one branch alone"
        if reason:
            return self._plain(asked, branches, compute, reason)
        evaluation, name = self.run.state.evaluation, branches[0].name
        if name == COND:
            made = self.run.one(asked, branches, compute)
            self._first, self._evaluations = (evaluation, made), self._evaluations + 1
            return made.out()
        first = self._first
        self._first = None
        if name != UNCOND or first is None or first[0] is not evaluation or self._pairs != self._evaluations - 1:
            return self._plain(asked, branches, compute, "calls that do not come in pairs")
        self._pairs += 1
        return self._second(asked, branches, compute, first[1])

    def close(self) -> None:
        """Let go of the conditional branch's prediction."""
        self._first = None

    def _plain(self, asked: "Asked", branches: tuple[Branch, ...], compute: Callable, reason: str) -> Any:
        self.session.leave(reason)
        return self.run.one(asked, branches, compute).out()

    def _second(self, asked: "Asked", branches: tuple[Branch, ...], compute: Callable, cond: "Answer") -> Any:
        """Return what the call for the unconditional branch gives; the conditional one has been answered."""
        computed: list[Answer] = []

        def both() -> list[torch.Tensor]:
            computed.append(self.run.one(asked, branches, compute))
            return [cond.denoised, computed[0].denoised]

        key = cond.call.branches[0].key, branches[0].key
        uncond = self.session.guide(self._guided(key, asked, both, lambda: cond.denoised))[1]
        if computed and uncond is computed[0].denoised:
            return computed[0].out()
        return self.run.whole(self._prediction(uncond, asked), asked)

    def _halved(self, asked: "Asked", branches: tuple[Branch, ...], compute: Callable) -> Any:
        """Return what one call for both branches gives, of which the conditional rows may be all that is computed."""
        place = [branch.name for branch in branches].index(COND)
        half = _half(asked, place)
        whole: list[Answer] = []
        parts: list[torch.Tensor] = []
        alone: list[Answer] = []

        def both() -> list[torch.Tensor]:
            whole.append(self.run.one(asked, branches, compute))
            found = whole[0].denoised.chunk(2)
            parts[:] = found[place], found[1 - place]
            return parts

        def one() -> torch.Tensor:
            alone.append(self.run.one(half, (branches[place],), compute))
            return alone[0].denoised

        key = tuple(branch.key for branch in branches)
        cond, uncond = self.session.guide(self._guided(key, half, both, one))
        if whole and uncond is parts[1]:
            return whole[0].out()
        made = alone[0].call.to_prediction(cond) if alone else self._prediction(cond, half)
        predictions = [self._prediction(uncond, half).to(made.dtype)] * 2
        predictions[place] = made
        return self.run.whole(torch.cat(predictions), asked)

    def _guided(self, key: Any, asked: "Asked", both: Callable, alone: Callable) -> Guided:
        latent = asked.latent
        unit = [len(latent), *[1] * (latent.ndim - 1)]
        gain = torch.full(unit, self.run.affine()[1], dtype=torch.float32, device=latent.device)
        return Guided((key, tuple(latent.shape)), both, alone, gain, lambda denoised: self._prediction(denoised, asked))

    def _prediction(self, denoised: torch.Tensor, asked: "Asked") -> torch.Tensor:
        """Return the network output that stands for a denoised latent."""
        scale, gain = self.run.affine()
        return (denoised - scale * asked.latent) / gain

    def _obstacle(self, asked: "Asked") -> str:
        """Return why a call is left as it is, "" where it need not be."""
        if asked.arguments.get("skip_layers"):
            return "a call without some of the blocks"
        if self.run.affine()[1] == 0.0:
            return "a noise level of zero"
        unknown = [name for name, value in asked.arguments.items() if not _known(name, value)]
        return f"the argument {unknown[0]}, which may differ from item to item" if unknown else ""


def _known(name: str, value: Any) -> bool:
    """Whether it is known which rows of an argument belong to which branch."""
    if name in ROWS or name in SHARED:
        return True
    if name == NESTED and isinstance(value, Mapping):
        return all(each is None or isinstance(each, torch.Tensor) for each in value.values())
    return not _holds_tensors(value)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_tensors(each) for each in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_tensors(each) for each in value)
    return isinstance(value, torch.Tensor)


def _half(asked: "Asked", place: int) -> "Asked":
    """Return the call for half of its rows: the first ones, or the last."""
    count = len(asked.latent) // 2

    def rows(value: Any) -> Any:
        per_item = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == 2 * count
        return value[place * count : (place + 1) * count] if per_item else value

    arguments = {name: rows(value) if name in ROWS else value for name, value in asked.arguments.items()}
    if isinstance(arguments.get(NESTED), Mapping):
        arguments[NESTED] = {name: rows(value) for name, value in arguments[NESTED].items()}
    return replace(
        asked, hidden_states=arguments["hidden_states"], latent=rows(asked.latent), branches=1, arguments=arguments
    )
