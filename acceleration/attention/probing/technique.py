"""Probing attention as the resolver sees it."""

from dataclasses import dataclass

from ...errors import StrettoError
from ...facts import ACTIVE, OFF, Facts, Outcome
from ...plan import Request
from ..inside import unreachable
from ..order import OrderSpec
from ..planned.technique import hash_of
from ..search import Pattern, Probe, candidates
from .session import ProbeSession

#: Parts of the run that get a plan of their own, with equally many steps each.
BUCKETS = 4
#: Share of the query blocks that are looked at, one at least: with what it takes to compare, less than 5 % of a generation.
LOOKED_AT = 0.02
#: Orders of tokens by what a user calls them.
ORDERS = {"tiles": OrderSpec("tiles", (1, 8, 8)), "rows": OrderSpec()}
BLOCKS = (16, 32, 64, 128)
FIELDS = {"token", "order", "block"}


@dataclass(frozen=True)
class ProbeTechnique:
    """Look at attention while it is computed as ever; the picture is unchanged to the bit."""

    name: str = "attention_probe"
    exclusive_with: frozenset[str] = frozenset({"attention", "attention_plan", "attention_probe", "cache", "table", "guidance"})

    def label(self, request: Request) -> str:
        """Return what a user calls this request."""
        return "Stretto Attention Probe"

    def validate(self, request: Request) -> None:
        """Raise :class:`~...errors.StrettoError` for settings that cannot work."""
        found = request.settings
        if set(found) != FIELDS or not isinstance(found["token"], str) or not found["token"]:
            raise StrettoError(f"Stretto Attention Probe: settings are {dict(found)}; expected token, order and block")
        if found["order"] not in ORDERS:
            raise StrettoError(f"Stretto Attention Probe: order is {found['order']!r}; it must be one of {', '.join(ORDERS)}")
        if found["block"] not in BLOCKS:
            raise StrettoError(
                f"Stretto Attention Probe: block is {found['block']!r}; it must be one of {', '.join(map(str, BLOCKS))}"
            )

    def inside_blocks(self, request: Request) -> bool:
        """Return True: modules inside blocks tell which layer's attention comes next."""
        return True

    def resolve(self, request: Request, facts: Facts) -> Outcome:
        """Return whether attention can be looked at under ``facts``."""
        reason = facts.obstacle() or unreachable(facts)
        if reason:
            return Outcome(self.name, OFF, reason)
        settings, sigmas = request.settings, facts.schedule.sigmas[:-1]
        grid = facts.descriptor.grid(facts.network, facts.latent_shape)
        raster = settings["order"] == "rows"
        patterns = (Pattern(), *(candidates(grid[0] > 1) if raster else ()))
        blocks = grid[0] * grid[1] * grid[2] // settings["block"]
        probe = Probe(bucket_edges(sigmas), patterns, samples=max(1, round(LOOKED_AT * blocks)))
        about = {
            "family": facts.descriptor.family,
            "variant": facts.variant,
            "hash": hash_of(facts.network),
            "order": settings["order"],
            "block": settings["block"],
            "period": probe.period,
        }
        session = ProbeSession(
            facts.descriptor, facts.network, settings["token"], probe, ORDERS[settings["order"]], settings["block"], sigmas, about
        )
        return Outcome(self.name, ACTIVE, "attention is computed as ever and looked at on the way", session=session)


def bucket_edges(sigmas: tuple[float, ...], buckets: int = BUCKETS) -> tuple[float, ...]:
    """Return ascending noise levels that divide a run's steps into parts of equal length."""
    steps = len(sigmas)
    at = sorted({round(steps * part / buckets) for part in range(1, buckets)} - {0, steps})
    return tuple(sorted((sigmas[step - 1] + sigmas[step]) / 2 for step in at))
