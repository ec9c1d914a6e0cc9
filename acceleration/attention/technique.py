"""Sparse attention as the resolver sees it: can it run here, and from which step on?"""

import math
from dataclasses import dataclass, replace

from ..errors import StrettoError
from ..facts import ACTIVE, OFF, Facts, Outcome
from ..plan import Request
from .geometry import Geometry
from .inside import too_short, unreachable
from .methods import METHODS
from .session import AttentionSession
from .settings import AttentionSettings
from .weights import AttentionWeights, load_weights


@dataclass(frozen=True)
class AttentionTechnique:
    """Sparse attention."""

    name: str = "attention"
    exclusive_with: frozenset[str] = frozenset({"attention", "attention_plan", "attention_probe"})

    def label(self, request: Request) -> str:
        """Return what a user calls this request."""
        return f"Stretto Sparse Attention ({request.settings.get('method', AttentionSettings().method)})"

    def validate(self, request: Request) -> None:
        """Raise :class:`~..errors.StrettoError` for settings that cannot work."""
        AttentionSettings.from_mapping(request.settings)

    def inside_blocks(self, request: Request) -> bool:
        """Return True: modules inside blocks tell which layer's attention comes next."""
        return True

    def resolve(self, request: Request, facts: Facts) -> Outcome:
        """Return whether and how attention is sparse under ``facts``."""
        settings = AttentionSettings.from_mapping(request.settings)
        reason = facts.obstacle() or self._obstacle(settings, facts, request.force)
        if reason:
            return Outcome(self.name, OFF, reason)
        steps, first = facts.schedule.steps, first_sparse_step(settings.dense_until, facts.schedule.steps)
        settings, weights = _trained(settings, facts)
        session = AttentionSession(facts.descriptor, facts.network, settings, steps, first, request.interval, weights)
        words = [_headline(settings, facts, first, steps), *([weights.words()] if weights else [])]
        return Outcome(self.name, ACTIVE, "; ".join(words), session=session)

    def _obstacle(self, settings: AttentionSettings, facts: Facts, force: bool) -> str | None:
        """Return why attention stays as it is, or None."""
        blocked = unreachable(facts) or (None if force else too_short(facts, settings.min_tokens))
        if blocked or force:
            return blocked
        descriptor = facts.descriptor
        tokens = descriptor.tokens(facts.network, facts.latent_shape)
        misfit = METHODS[settings.method].fits(Geometry(descriptor.grid(facts.network, facts.latent_shape), 0, tokens))
        if misfit:
            return misfit
        if settings.keep >= 1.0:
            return "keep is 100 %: nothing would be left out"
        if first_sparse_step(settings.dense_until, facts.schedule.steps) >= facts.schedule.steps:
            return f"dense_until = {settings.dense_until:g} leaves no step of {facts.schedule.steps} to be sparse"
        return None


def _trained(settings: AttentionSettings, facts: Facts) -> tuple[AttentionSettings, AttentionWeights | None]:
    """Return the trained parts that the settings name, and the settings as those parts want them.

    Raises:
        StrettoError: the file cannot be used, or belongs to another method or model.
    """
    if not settings.weights:
        return settings, None
    weights = load_weights(settings.weights, facts)
    if weights.kind != settings.method:
        raise StrettoError(
            f"Stretto Sparse Attention: method is {settings.method!r}, {weights.file} holds weights of {weights.kind}; "
            f"choose the method {weights.kind}, or unplug the weights"
        )
    if weights.branch is None:  # CLEAR
        pool = weights.down_factor if weights.down_factor > 1 else 0
        return replace(settings, radius=weights.radius, exact="on", pool=pool), weights
    if weights.window is not None:
        return replace(settings, pattern="window"), weights
    return settings, weights


def first_sparse_step(dense_until: float, steps: int) -> int:
    """Return the first step whose attention may be sparse; a share that falls inside a step keeps that step dense."""
    return math.ceil(dense_until * steps - 1e-9)


def _headline(settings: AttentionSettings, facts: Facts, first: int, steps: int) -> str:
    tokens = facts.descriptor.tokens(facts.network, facts.latent_shape)
    method = METHODS[settings.method]
    when = "from the first step on" if first == 0 else f"from step {first + 1} of {steps} on, all before it as ever"
    how = f"keeps {settings.keep:.0%} of the key blocks" if method.knob == "keep" else method.summary
    dense = f"; layers {', '.join(map(str, settings.dense_layers))} as ever" if settings.dense_layers else ""
    return f"{settings.method} {how}, {when}{dense}; {tokens:,} image tokens in blocks of {settings.block}"
