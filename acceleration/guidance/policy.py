"""When the unconditional branch is asked: one verdict per step, from the settings and from what both branches said."""

from dataclasses import dataclass, field

from ..sampling import Schedule
from .settings import NOTHING, GuidanceSettings

#: Ask both branches; ask the conditional one and put something in for the other; ask it and leave guidance out.
ASK, SAVE, ALONE = "ask", "save", "alone"


@dataclass
class GuidancePolicy:
    """Verdicts of one run.

    Evaluations at noise levels of one step share a verdict, so samplers that evaluate more than once a step need no care.

    Attributes:
        settings: what the user asked for.
        schedule: noise levels of the run.
    """

    settings: GuidanceSettings
    schedule: Schedule
    _first: int | None = None
    _asked: int | None = None
    _asks: int = 0
    _agreed: int = 0
    _dropped: bool = False
    _last_agreed_step: int | None = field(default=None, repr=False)

    def guided(self, position: float, sigma: float) -> bool:
        """Return whether there is guidance at ``position`` (in steps) and ``sigma`` at all."""
        settings = self.settings
        share = position / max(self.schedule.steps, 1)
        if not settings.guide_from - 1e-9 <= share < settings.guide_until - 1e-9:
            return False
        return sigma >= settings.sigma_until and (not settings.sigma_from or sigma <= settings.sigma_from)

    def verdict(self, step: int, position: float, sigma: float, ahead: int = 1) -> str:
        """Return :data:`ASK`, :data:`SAVE` or :data:`ALONE` for an evaluation.

        Args:
            step: the step it belongs to.
            position: its continuous position in the run.
            sigma: its noise level.
            ahead: steps until both branches can be asked next; more than 1 beside a cache that skips steps. Where that
                would be later than the settings allow, they are asked now.
        """
        settings = self.settings
        if not self.guided(position, sigma):
            return ALONE
        self._first = step if self._first is None else self._first
        if step < self._first + settings.warmup or step >= self.schedule.steps - settings.tail:
            return ASK
        since = None if self._asked is None else step - self._asked
        if since is None or since == 0 or self._asks < self._needed:
            return ASK
        if settings.when == "periodic":
            return ASK if since + ahead > settings.interval else self._saved()
        if settings.when == "adaptive" and self._dropped:
            return ASK if settings.recheck and since >= settings.recheck else self._saved()
        return ASK

    def asked(self, step: int) -> None:
        """Both branches were asked, and what they said is not a forecast."""
        self._asks += step != self._asked
        self._asked = step

    def agreement(self, step: int, cosine: float) -> None:
        """Learn how far both branches agree at ``step``: drop guidance, or take it up again."""
        settings = self.settings
        if cosine >= settings.agreement:
            self._agreed += step != self._last_agreed_step
            self._last_agreed_step = step
            self._dropped = self._dropped or self._agreed >= settings.patience
        elif cosine < settings.agreement - settings.hysteresis or not self._dropped:
            self.forget_agreement()

    def forget_agreement(self) -> None:
        """Guide again."""
        self._agreed, self._dropped, self._last_agreed_step = 0, False, None

    def reset(self) -> None:
        """A new trajectory, or a stage of another size, has begun: what was learnt is foreign. The warm-up is not repeated."""
        self._asked, self._asks = None, 0
        self.forget_agreement()

    @property
    def _needed(self) -> int:
        """Times that both branches must have been asked before a stand-in is as good as it gets."""
        return 1 if self.settings.stands_in == NOTHING else self.settings.order + 1

    def _saved(self) -> str:
        return ALONE if self.settings.stands_in == NOTHING else SAVE


def asked_steps(settings: GuidanceSettings, schedule: Schedule) -> tuple[bool, ...]:
    """Return at which steps the unconditional branch is asked, as far as the settings alone decide.

    For the method Adaptive that is every step with guidance: what it saves depends on the run.
    """
    policy, mask = GuidancePolicy(settings, schedule), []
    for step in range(schedule.steps):
        ask = policy.verdict(step, float(step), schedule.sigmas[step]) == ASK
        if ask:
            policy.asked(step)
        mask.append(ask)
    return tuple(mask)
