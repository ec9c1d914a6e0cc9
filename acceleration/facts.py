"""What is known when sampling starts, and what a technique answers to it."""

import math
from dataclasses import dataclass
from typing import Any

from .models import FAMILIES, ModelDescriptor
from .run import Session
from .sampling import SamplerTraits, Schedule

ACTIVE, REDUCED, OFF = "active", "reduced", "off"


@dataclass(frozen=True)
class Facts:
    """What is known when sampling starts, before the first evaluation.

    Attributes:
        network: the network itself (only its sizes are read).
        descriptor: its family, None when no family claims it.
        sampler: how the sampler calls the model.
        schedule: noise levels.
        latent_shape: [B, C, (T,) H, W].
        branches: guidance branches per evaluation (1 without CFG, else 2).
        element_bytes: bytes per element of the features.
        free_bytes: free memory on the device.
        nested: several latents are sampled together (audio and video).
        free_system_bytes: free system memory, None where that is not known.
        modules_in_place: whether the host reaches the modules inside blocks that the descriptor names.
        stage_obstacle: why the host cannot change the latent's size during the run, None where it can.
        worked_on: inpainting mask [..., H, W] of the part that is sampled, above 0; None for everything.
    """

    network: Any
    descriptor: ModelDescriptor | None
    sampler: SamplerTraits
    schedule: Schedule
    latent_shape: tuple[int, ...]
    branches: int = 2
    element_bytes: int = 4
    free_bytes: int = 1 << 40
    nested: bool = False
    free_system_bytes: int | None = None
    modules_in_place: bool = True
    stage_obstacle: str | None = None
    worked_on: Any = None

    def obstacle(self) -> str | None:
        """Return why no technique that skips work may act here, or None. Unknown things fail closed."""
        if self.descriptor is None:
            known = ", ".join(family.family for family in FAMILIES)
            return f"the network {type(self.network).__name__} is not supported (supported families: {known})"
        if self.nested:
            return "audio and video latents sampled together are not supported"
        if not self.sampler.known:
            return f"the sampler {self.sampler.name} is not known: plain sampling"
        if self.sampler.adaptive:
            return f"the sampler {self.sampler.name} picks its own noise levels: plain sampling"
        if not self.schedule.falling:
            return "the noise levels of this run do not fall steadily: plain sampling"
        return None

    @property
    def variant(self) -> str:
        """Which published model of its family the network is, ``""`` when it is none."""
        return self.descriptor.variant(self.network) if self.descriptor else ""

    def snapshot_bytes(self, granularity: str, at_most: int | None = None) -> int:
        """Return the bytes of one snapshot of all branches.

        Args:
            granularity: the tap: ``"blocks"``, ``"delta"`` or ``"output"``.
            at_most: bytes that a stored element may have; None for as many as it is computed with.
        """
        batch = self.latent_shape[0] * self.branches
        if granularity != "blocks":
            elements, size = math.prod(self.latent_shape[1:]), 4
        else:
            tokens = self.descriptor.tokens(self.network, self.latent_shape)
            elements, size = tokens * self.descriptor.hidden_size(self.network), self.element_bytes
        return batch * elements * (size if at_most is None else min(size, at_most))


@dataclass(frozen=True)
class Outcome:
    """What became of one request.

    Attributes:
        technique: its name.
        status: ``"active"``, ``"reduced"`` or ``"off"``.
        reason: a sentence for the user.
        session: what does the work; None when off.
        needs_blocks: whether block hooks must be installed.
        reserve_bytes: memory to reserve on the device.
        store_bytes: bytes that stored features take at most, where the technique says so; 0 otherwise.
        budget_bytes: bytes that they may take.
        needs_modules: whether the session acts on modules inside blocks.
    """

    technique: str
    status: str
    reason: str
    session: Session | None = None
    needs_blocks: bool = False
    reserve_bytes: int = 0
    store_bytes: int = 0
    budget_bytes: int = 0
    needs_modules: bool = False

    def to_json(self) -> dict[str, str | int]:
        """Return the part that goes into a trace."""
        found: dict[str, str | int] = {"technique": self.technique, "status": self.status, "reason": self.reason}
        if self.store_bytes:
            found |= {"store_bytes": self.store_bytes, "budget_bytes": self.budget_bytes}
        return found
