"""A schedule of frame rates: how many of a video's latent frames each latent of a shorter one stands for.

Video autoencoders that compress time code the first frame alone and then ``stride`` frames a latent. A latent of
rate r stands for r of those: for ``stride * r`` frames, so for 1/r of the frame rate.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from ..errors import StrettoError
from ..schemas import require

KIND = "frame-rate-schedule"
#: Where in a LATENT the schedule travels, as JSON values.
LATENT_KEY = "frame_rate_schedule"
RATES = (1, 2, 4)
#: How calm parts become fewer latents.
PIXELS, FEATURES = "frames", "features"
CODINGS = {
    PIXELS: "frames are dropped before the encoder and made up after the decoder; every video VAE can do this",
    FEATURES: "the encoder pools its features and the decoder repeats them; for VAEs that have an adapter",
}
REPEAT, LINEAR, FLOW = "repeat", "linear", "motion"
RESTORES = {
    REPEAT: "show each decoded frame as long as it stands",
    LINEAR: "blend neighbouring frames",
    FLOW: "move neighbouring frames along their motion, then blend; where that fails, blend",
}
MAX_FRAMES = 100_000


@dataclass(frozen=True)
class FrameRateSchedule:
    """Frozen; every instance holds the invariants.

    Attributes:
        frames: of the video.
        rates: one for each latent after the first, in order of time; their sum is the number of latents that the video
            has at full rate, without the first.
        stride: frames of one latent at rate 1.
        coding: key of :data:`CODINGS`.
        restore: key of :data:`RESTORES`, for the coding ``"frames"``.
        fps: frames per second of the video, None where nobody told.

    Raises:
        StrettoError: a value is out of range or the rates do not add up.
    """

    frames: int
    rates: tuple[int, ...]
    stride: int = 4
    coding: str = PIXELS
    restore: str = LINEAR
    fps: float | None = None

    def __post_init__(self) -> None:
        for name, low, high in (("frames", 1, MAX_FRAMES), ("stride", 1, 64)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                _refuse(name, value, f"it must be a whole number in [{low}, {high}]")
        if not isinstance(self.rates, list | tuple):
            _refuse("rates", self.rates, "it must be a list of rates")
        object.__setattr__(self, "rates", tuple(self.rates))
        bad = next((rate for rate in self.rates if isinstance(rate, bool) or rate not in RATES), None)
        if bad is not None:
            _refuse("rates", bad, f"each must be one of {', '.join(map(str, RATES))}")
        if sum(self.rates) != self.full_latents - 1:
            _refuse(
                "rates",
                f"{sum(self.rates)} in sum",
                f"{self.frames} frames at {self.stride} a latent need {self.full_latents - 1} in sum",
            )
        for name, known in (("coding", CODINGS), ("restore", RESTORES)):
            if getattr(self, name) not in known:
                _refuse(name, getattr(self, name), f"it must be one of {', '.join(known)}")
        if self.fps is not None and not (isinstance(self.fps, int | float) and 0 < self.fps <= 1000):
            _refuse("fps", self.fps, "it must be a number in (0, 1000], or left out")

    @classmethod
    def full(cls, frames: int, stride: int = 4, **more: Any) -> "FrameRateSchedule":
        """Return the schedule of rate 1 everywhere."""
        return cls(frames, (1,) * (full_latents(frames, stride) - 1), stride, **more)

    @property
    def full_latents(self) -> int:
        """Latents of the video at full rate."""
        return full_latents(self.frames, self.stride)

    @property
    def latents(self) -> int:
        """Latents that are kept."""
        return 1 + len(self.rates)

    @property
    def ratio(self) -> float:
        """Kept latents as a share of all."""
        return self.latents / self.full_latents

    @property
    def trivial(self) -> bool:
        """Whether every rate is 1."""
        return self.latents == self.full_latents

    @property
    def padded_frames(self) -> int:
        """Frames of the video once it fills its last latent."""
        return 1 + self.stride * (self.full_latents - 1)

    @property
    def short_frames(self) -> int:
        """Frames that the latents of this schedule decode to at a constant rate."""
        return 1 + self.stride * len(self.rates)

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """For each kept latent the index at full rate of the first latent that it stands for."""
        return (0, *(1 + start for start in accumulate((0, *self.rates[:-1])))) if self.rates else (0,)

    @cached_property
    def owner(self) -> tuple[int, ...]:
        """For each latent at full rate the index of the kept latent that stands for it."""
        return (0, *(1 + i for i, rate in enumerate(self.rates) for _ in range(rate)))

    @cached_property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """(first frame, frames) of what each of the :attr:`short_frames` stands for, over the padded video."""
        groups = [(0, 1)]
        for rate in self.rates:
            groups += [(groups[-1][0] + groups[-1][1] + rate * i, rate) for i in range(self.stride)]
        return tuple(groups)

    @property
    def kept_frames(self) -> tuple[int, ...]:
        """The frame that stands for each group: its last one, so that both ends of the video are kept."""
        return tuple(start + length - 1 for start, length in self.groups)

    def legal_cuts(self) -> tuple[int, ...]:
        """Return the frames at which the padded video may be cut: between segments, never inside one."""
        return (0, *(1 + self.stride * total for total in accumulate(self.rates, initial=0)))

    def until(self, latents: int) -> int:
        """Return how many frames the first ``latents`` latents stand for; beyond the schedule at rate 1."""
        if latents <= 0:
            return 0
        inside = sum(self.rates[: latents - 1])
        return 1 + self.stride * (inside + max(0, latents - self.latents))

    @property
    def check(self) -> str:
        """What tells one schedule from another at a glance: frames, latents and a hash of the rates."""
        digest = hashlib.sha256(",".join(map(str, (self.stride, *self.rates))).encode()).hexdigest()[:8]
        return f"{self.frames}:{self.latents}:{digest}"

    def words(self) -> str:
        """Return the schedule in a sentence."""
        named = {rate: "full rate" if rate == 1 else f"1/{rate}" for rate in RATES}
        counts = ", ".join(f"{self.rates.count(rate)} at {named[rate]}" for rate in RATES if rate in self.rates)
        share = f"{self.latents} of {self.full_latents} latent frames ({self.ratio:.0%})"
        return f"{share} for {self.frames} frames" + (f"; after the first: {counts}" if counts else "")

    def to_json(self) -> dict[str, Any]:
        """Return the document frame-rate-schedule@1."""
        document = {
            "schema": f"{KIND}@1",
            "frames": self.frames,
            "stride": self.stride,
            "first_alone": True,
            "rates": list(self.rates),
            "kept_latents": list(self.kept),
            "coding": self.coding,
            "restore": self.restore,
            "check": self.check,
        }
        return document | ({"fps": self.fps} if self.fps is not None else {})

    @classmethod
    def from_json(cls, document: Any) -> "FrameRateSchedule":
        """Read a document frame-rate-schedule@1; ``kept_latents`` and ``check`` may be left out of one made by hand.

        Raises:
            StrettoError: it is none, or its parts contradict each other.
        """
        document = require(document, KIND)
        known = {"schema", "frames", "stride", "first_alone", "rates", "kept_latents", "coding", "restore", "check"}
        unknown = sorted(set(document) - known - {"fps"})
        if unknown:
            raise StrettoError(f"Frame schedule: unknown field {unknown[0]!r}")
        if document.get("first_alone", True) is not True:
            _refuse("first_alone", document["first_alone"], "only VAEs that code the first frame alone are supported")
        missing = [name for name in ("frames", "rates") if name not in document]
        if missing:
            raise StrettoError(f"Frame schedule: the field {missing[0]!r} is missing")
        fields = {
            name: document[name]
            for name in ("frames", "rates", "stride", "coding", "restore", "fps")
            if name in document
        }
        schedule = cls(**fields)
        for name, own in (("kept_latents", list(schedule.kept)), ("check", schedule.check)):
            if name in document and document[name] != own:
                _refuse(name, document[name], f"the rates say {own}: the file was changed; leave {name} out")
        return schedule

    def with_options(self, **changes: Any) -> "FrameRateSchedule":
        """Return a copy with other options."""
        return replace(self, **changes)


def full_latents(frames: int, stride: int) -> int:
    """Return the number of latents of ``frames`` frames at full rate; the last one may be partly empty."""
    return 1 + -(-(frames - 1) // stride)


def schedule_of_latent(latent: Mapping[str, Any]) -> FrameRateSchedule | None:
    """Return the schedule that a LATENT carries, None where it carries none.

    Raises:
        StrettoError: the latent has been changed since (its length is not the schedule's), or the schedule is broken.
    """
    if LATENT_KEY not in latent:
        return None
    schedule, samples = FrameRateSchedule.from_json(latent[LATENT_KEY]), latent["samples"]
    found = samples.shape[2] if samples.ndim == 5 else None
    if found != schedule.latents:
        what = f"{found} latent frames" if found is not None else f"the shape {tuple(samples.shape)}"
        raise StrettoError(
            f"The frame-rate schedule of this latent is stale: it describes {schedule.latents} latent frames "
            f"({schedule.check}) and the latent has {what}. A node in between has cut or joined the video: do that "
            "before encoding or after decoding. (VAE Decode reads no schedule and decodes the latent frames that are there.)"
        )
    return schedule


def with_schedule(latent: Mapping[str, Any], schedule: FrameRateSchedule | None) -> dict[str, Any]:
    """Return a copy of a LATENT that carries ``schedule``; None takes it away."""
    found = {name: value for name, value in latent.items() if name != LATENT_KEY}
    return found if schedule is None else {**found, LATENT_KEY: schedule.to_json()}


def _refuse(name: str, value: Any, expected: str) -> None:
    raise StrettoError(f"Frame schedule: {name} is {value!r}; {expected}")
