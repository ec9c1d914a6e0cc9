"""Temporal features as the resolver sees them: which layers depend on the timestep or the prompt alone?"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import StrettoError
from ..facts import ACTIVE, OFF, Facts, Outcome
from ..plan import Request
from .saved import SavedTables
from .session import EXACT, MODES, MODULATION, PROMPT, FeatureSession

NODE = "Stretto Temporal Feature Cache"
#: Share of the free device memory that tables may take.
MEMORY_SHARE = 0.25
#: They may take this much in any case.
LEAST_BYTES = 1 << 20


@dataclass(frozen=True)
class TemporalTechnique:
    """Tables instead of modulations and of the prompt's keys and values. Settings: ``mode``, ``prompt``,
    ``folder`` (where tables are saved)."""

    name: str = "temporal_features"
    exclusive_with: frozenset[str] = frozenset({"temporal_features"})

    def label(self, request: Request) -> str:
        """Return what a user calls this request."""
        return f"{NODE} ({request.settings.get('mode', EXACT)})"

    def validate(self, request: Request) -> None:
        """Raise :class:`~..errors.StrettoError` for settings that cannot work."""
        unknown = sorted(set(request.settings) - {"mode", "prompt", "folder"})
        if unknown:
            raise StrettoError(f"{NODE}: unknown settings {', '.join(unknown)}; known are mode, prompt and folder")
        mode = request.settings.get("mode", EXACT)
        if mode not in MODES:
            raise StrettoError(f"{NODE}: mode is {mode!r}; known modes: {', '.join(MODES)}")

    def inside_blocks(self, request: Request) -> bool:
        """Return False: cacheable modules of blocks are not among its layers."""
        return False

    def resolve(self, request: Request, facts: Facts) -> Outcome:
        """Return whether any layer qualifies under ``facts``. Nothing else can stand in the way: it is a look-up."""
        if facts.descriptor is None or facts.nested:
            return Outcome(self.name, OFF, facts.obstacle() or "several latents are sampled together")
        mode, prompt = request.settings.get("mode", EXACT), bool(request.settings.get("prompt", True))
        modulations = facts.descriptor.modulation_parts(facts.network)
        texts = prompt_paths(facts.descriptor, facts.network) if prompt else ()
        if not modulations and not texts:
            reason = f"no layer of {facts.descriptor.family} depends on the timestep or the prompt alone"
            return Outcome(self.name, OFF, f"{reason}, as far as tables reach: nothing to keep")
        sizes = {MODULATION: _sizes(facts.network, modulations), PROMPT: _sizes(facts.network, texts)}
        levels = tuple(level for level in facts.schedule.sigmas if level > 0)
        folder, saved = request.settings.get("folder"), None
        if folder and modulations:
            layers = {path: facts.network.get_submodule(path) for path in modulations}
            saved = SavedTables(Path(folder), facts.descriptor.family, mode, layers)
        budget = max(int(MEMORY_SHARE * facts.free_bytes), LEAST_BYTES)
        session = FeatureSession(levels, mode, bool(modulations), prompt, budget, sizes, saved)
        rows = facts.latent_shape[0] * facts.branches * facts.element_bytes
        needed = rows * (
            len(levels) * _width(facts.network, modulations)
            + facts.descriptor.text_tokens * _width(facts.network, texts)
        )
        return Outcome(
            self.name, ACTIVE, _headline(mode, sizes), session=session, reserve_bytes=min(needed, session.budget_bytes)
        )


def prompt_paths(descriptor: Any, network: Any) -> tuple[str, ...]:
    """Return the paths of a network's projections of the prompt."""
    return tuple(part.path for part in descriptor.text_parts(network) if part.first)


def _headline(mode: str, sizes: dict[str, tuple[int, int, int]]) -> str:
    words = []
    for name, (layers, weights, loaded) in sizes.items():
        if layers:
            left = f"{weights / 1e6:,.1f} MB of weights" + (", none of it loaded" if not loaded else "")
            words.append(f"{layers} {name} layers ({left})")
    exact = "equal to the bit" if mode == EXACT else "modulations rounded as one product rounds them"
    held = sum(loaded for _, _, loaded in sizes.values())
    hint = "; load the model with Stretto Load Diffusion Model and feature weights from the file to free them" if held else ""
    return f"{mode}: tables stand for {' and '.join(words)}, {exact}{hint}"


def _sizes(network: Any, paths: tuple[str, ...]) -> tuple[int, int, int]:
    """Return the layers, the bytes of their weights, and how many of these are loaded."""
    inside = [module for path in paths for module in network.get_submodule(path).modules()]
    loaded = sum(tensor.nbytes for module in inside for tensor in module._parameters.values() if tensor is not None)
    left = sum(getattr(module, "stretto_file_bytes", 0) for module in inside)
    return len(paths), loaded + left, _weights_loaded(inside)


def _weights_loaded(modules: list[Any]) -> int:
    found = (module._parameters.get("weight") for module in modules)
    return sum(weight.nbytes for weight in found if weight is not None)


def _width(network: Any, paths: tuple[str, ...]) -> int:
    """Return the features that the layers of ``paths`` make together."""
    return sum(getattr(module, "out_features", 0) for path in paths for module in network.get_submodule(path).modules())
