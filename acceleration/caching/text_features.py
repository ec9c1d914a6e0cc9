"""Keys and values that depend on the prompt alone, computed once: cross-attention's projections of the text.

Exact by construction: what a projection made is used again only for the same branches in the same rows under the same
weight hooks (the keys of a call's branches hold both), and only where what it is given equals, element by element, what it
was given then. Nothing has to be known of other packs: whoever changes the text on its way to a block changes that.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..evaluation import Call
from ..facts import Facts
from ..models import TextPart

#: Where a call's scratch holds its :class:`TextPass`.
TEXT = "text features"
#: Least share of a step's multiplications that is worth the memory.
LEAST_SHARE = 0.005
#: Different texts per composition of a batch. Wan's image-to-video projects two, text and picture.
MOST_TEXTS = 4

Project = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Kept:
    """What belongs to one composition of a batch: the texts it was given, and what was made of them."""

    texts: list[torch.Tensor] = field(default_factory=list)
    features: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)


@dataclass
class TextFeatures:
    """Text features of one run.

    Args:
        budget_bytes: most bytes that they may take; over it projections are computed every time.
    """

    budget_bytes: int
    kept: dict[Hashable, Kept] = field(default_factory=dict)
    bytes: int = 0
    peak_bytes: int = 0
    computed: int = 0
    reused: int = 0

    def begin(self, call: Call) -> None:
        """Let the projections of a network call find what is kept for its branches."""
        composition = tuple(branch.key for branch in call.branches), call.rows
        call.scratch[TEXT] = TextPass(self, self.kept.setdefault(composition, Kept()))

    def copy(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return a copy to keep, None where there is no room."""
        if self.bytes + tensor.nbytes > self.budget_bytes:
            return None
        self.bytes += tensor.nbytes
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        return tensor.clone()

    def clear(self) -> None:
        """Forget everything."""
        self.kept.clear()
        self.bytes = 0


@dataclass
class TextPass:
    """One network call. What it hands out are copies: the network may write into them.

    Attributes:
        features: of the run.
        kept: of this call's composition.
        seen: what projections were given in this call, and which text that is. Held, so that no other tensor can come to
            lie in the same memory.
        open: by chain, what its first part returned: the text's index where the rest is still to be made, or None where
            it is finished.
    """

    features: TextFeatures
    kept: Kept
    seen: list[tuple[torch.Tensor, int | None]] = field(default_factory=list)
    open: dict[str, tuple[torch.Tensor, int | None]] = field(default_factory=dict)

    def __call__(self, part: TextPart, given: Any, project: Project) -> Any:
        """Return ``project(given)``, or what it returned before."""
        if not isinstance(given, torch.Tensor):
            return project(given)
        return self._start(part, given, project) if part.first else self._go_on(part, given, project)

    def _start(self, part: TextPart, given: torch.Tensor, project: Project) -> torch.Tensor:
        index = self._text(given)
        if index is None:
            return project(given)
        known = self.kept.features.get((index, part.chain))
        if known is None:
            self.features.computed += 1
            out = project(given)
            if part.last:
                self._keep(index, part.chain, out)
        else:
            self.features.reused += 1
            out = known.clone()
        if not part.last:
            self.open[part.chain] = out, index if known is None else None
        return out

    def _go_on(self, part: TextPart, given: torch.Tensor, project: Project) -> torch.Tensor:
        before, index = self.open.pop(part.chain, (None, None))
        if before is not given:
            return project(given)  # somebody stands between the parts
        if index is None:
            return given
        out = project(given)
        self._keep(index, part.chain, out)
        return out

    def _keep(self, index: int, chain: str, out: Any) -> None:
        copy = self.features.copy(out) if isinstance(out, torch.Tensor) else None
        if copy is not None:
            self.kept.features[index, chain] = copy

    def _text(self, given: torch.Tensor) -> int | None:
        """Return which of the kept texts this is; None where it is another and there is no room."""
        for tensor, index in self.seen:
            if tensor is given or _same_memory(tensor, given):
                return index
        index = self._recognised(given)
        self.seen.append((given, index))
        return index

    def _recognised(self, given: torch.Tensor) -> int | None:
        """Compare with the kept texts (one host synchronisation each), or keep a new one."""
        for index, text in enumerate(self.kept.texts):
            alike = text.shape == given.shape and text.dtype == given.dtype and text.device == given.device
            if alike and torch.equal(text, given):
                return index
        copy = self.features.copy(given) if len(self.kept.texts) < MOST_TEXTS else None
        if copy is None:
            return None
        self.kept.texts.append(copy)
        return len(self.kept.texts) - 1


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same view of the same memory."""
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
        and one.device == other.device
    )


def text_features(facts: Facts, budget_bytes: int, force: bool, notes: list[str]) -> tuple[TextFeatures | None, int]:
    """Return what keeps the text features of a run, None where that would not pay, and the bytes they may take.

    Args:
        facts: of the run.
        budget_bytes: bytes that are left for them.
        force: keep them even where that does not pay.
        notes: gets a sentence about it.
    """
    parts = [part for part in facts.descriptor.text_parts(facts.network) if part.first]
    if not parts:
        return None, 0
    # Text and network alike multiply once per weight and token; attention's own products make the share smaller still.
    weights = [facts.network.get_submodule(part.path).weight for part in parts]
    tokens = facts.descriptor.tokens(facts.network, facts.latent_shape)
    everything = sum(parameter.numel() for parameter in facts.network.parameters())
    own = sum(weight.numel() for weight in weights)
    length = facts.descriptor.text_tokens
    share = own * length / max((everything - own) * tokens + own * length, 1)
    if share < LEAST_SHARE and not force:
        notes.append(f"text keys are computed at every step: keeping them would save {share:.1%} of it at most")
        return None, 0
    rows = facts.latent_shape[0] * facts.branches
    widths = sum(weight.shape[0] for weight in weights)
    needed = rows * length * widths * facts.element_bytes
    if needed > budget_bytes and not force:
        notes.append(f"text keys are computed at every step: keeping them would take {needed / 2**20:.0f} MiB")
        return None, 0
    notes.append(f"{len(parts)} projections of the text are computed once per prompt and kept, to the bit")
    return TextFeatures(budget_bytes if force else needed), needed
