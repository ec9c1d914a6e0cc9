"""The second pass of VGDFR as the resolver sees it: a short video, some layers of which see original positions."""

from dataclasses import dataclass
from typing import Any

from ..errors import StrettoError
from ..facts import ACTIVE, OFF, REDUCED, Facts, Outcome
from ..plan import Request
from .positions import PUBLISHED, embedder_of
from .schedule import FrameRateSchedule
from .session import FrameRateSession

NODE = "Stretto Dynamic Frame Rate"
AUTO = "auto"


@dataclass(frozen=True)
class FrameRateTechnique:
    """Settings: ``schedule`` (frame-rate-schedule@1) and ``layers``: ``"auto"`` or a list of global layers.

    ``seconds`` of the work between both passes, by name, change nothing: the report tells them.
    """

    name: str = "frame_rate"
    exclusive_with: frozenset[str] = frozenset({"frame_rate", "resolution", "profile", "module_profile"})

    def label(self, request: Request) -> str:
        """Return what a user calls this request."""
        return NODE

    def validate(self, request: Request) -> None:
        """Raise :class:`~..errors.StrettoError` for settings that cannot work."""
        _read(request)

    def inside_blocks(self, request: Request) -> bool:
        """Return False: blocks are replaced, nothing inside them."""
        return False

    def resolve(self, request: Request, facts: Facts) -> Outcome:
        """Return which layers see original positions under ``facts``."""
        schedule, layers, seconds = _read(request)
        if len(facts.latent_shape) != 5 or facts.latent_shape[2] != schedule.latents:
            raise StrettoError(
                f"{NODE}: the model was prepared for {schedule.latents} latent frames ({schedule.check}) and is given a "
                f"latent of the shape {tuple(facts.latent_shape)}. Give both outputs of one node to the sampler."
            )
        if schedule.trivial:
            return Outcome(self.name, OFF, "every latent frame is kept")
        reason = facts.obstacle()
        depths = [] if reason else sorted(site.depth for site in facts.descriptor.sites(facts.network))
        if reason is None and not depths:
            reason = facts.descriptor.no_blocks or "the blocks of this network cannot be reached"
        if reason is None and embedder_of(facts.network) is None:
            reason = f"{type(facts.network).__name__} has no rotary positions that can be replaced"
        if reason is not None:  # still a valid pass: the latents follow each other closely
            return Outcome(self.name, REDUCED, f"{schedule.words()}; all layers see near positions: {reason}",
                           session=FrameRateSession(schedule, frozenset(), facts.network, seconds))  # fmt: skip
        if layers == AUTO:
            layers = PUBLISHED.get((type(facts.network).__name__, len(depths)), ())
        missing = [layer for layer in layers if layer not in depths]
        if missing:
            raise StrettoError(f"{NODE}: layers holds {missing[0]}; this model has layers 0 to {len(depths) - 1}")
        where = f"layers {', '.join(map(str, layers))} see original positions" if layers else "all layers see near positions"
        session = FrameRateSession(schedule, frozenset(layers), facts.network, seconds)
        return Outcome(self.name, ACTIVE, f"{schedule.words()}; {where}", session=session, needs_blocks=bool(layers))


def _read(request: Request) -> tuple[FrameRateSchedule, Any, dict[str, float]]:
    unknown = sorted(set(request.settings) - {"schedule", "layers", "seconds"})
    if unknown:
        raise StrettoError(f"{NODE}: unknown setting {unknown[0]!r}")
    layers = request.settings.get("layers", AUTO)
    whole = isinstance(layers, list | tuple) and all(
        isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in layers
    )
    if layers != AUTO and not whole:
        raise StrettoError(f"{NODE}: layers is {layers!r}; it must be auto, or whole numbers from 0")
    schedule = request.settings.get("schedule")
    seconds = dict(request.settings.get("seconds", {}))
    return FrameRateSchedule.from_json(dict(schedule) if schedule is not None else None), layers, seconds


def parse_layers(text: str) -> str | list[int]:
    """Read ``auto``, ``none`` or numbers such as ``1, 4``; raises :class:`StrettoError`."""
    word = text.strip().lower()
    if word in (AUTO, "none", ""):
        return [] if word == "none" else AUTO
    try:
        return [int(part) for part in word.replace(",", " ").split()]
    except ValueError:
        raise StrettoError(f"{NODE}: layers is {text!r}; it must be auto, none, or numbers such as 1, 4") from None
