"""Coefficients of a combination, found by evolution on a metric; LCSC's search (arXiv 2404.02241, section 4).

Points are coefficient vectors with sum 1. A generation is drawn from a normal distribution around a weighted mean of the best
so far; its spread follows theirs (a cross-entropy search with memory, which needs no gradient and some hundred evaluations).
Every evaluation is written down at once, so that an interrupted search goes on where it stopped.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import StrettoError

FORMAT = "stretto-combination-search@1"
Evaluate = Callable[[tuple[float, ...]], float]


@dataclass(frozen=True)
class SearchSettings:
    """How long and how wide a search goes.

    Attributes:
        generations: rounds after the starting points.
        population: points per round.
        elite: best points that the next round is drawn around.
        spread: standard deviation of a coefficient in the first round.
        least_spread: of later ones, at least.
        seed: of the drawing.
    """

    generations: int = 12
    population: int = 12
    elite: int = 6
    spread: float = 0.15
    least_spread: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.generations, self.population) < 1 or not self.elite >= 1 or not self.spread >= self.least_spread > 0:
            raise StrettoError(f"search settings {self}: counts start at 1, and spread is at least least_spread, above 0")


@dataclass
class Search:
    """A search and all it has seen.

    Attributes:
        count: number of checkpoints.
        settings: see there.
        points: (coefficients, metric) in the order of evaluation; lower is better.
        path: file that it is kept in; None for none.
        subject: what is combined and how it is measured, in words; a search goes on with the same only.
    """

    count: int
    settings: SearchSettings
    points: list[tuple[tuple[float, ...], float]]
    path: Path | None = None
    subject: Sequence[str] = ()

    @classmethod
    def open(
        cls, count: int, settings: SearchSettings, path: str | Path | None = None, subject: Sequence[str] = ()
    ) -> "Search":
        """Start a search, or go on with the one in ``path``.

        Raises:
            StrettoError: the file is damaged, or of another search.
        """
        path = None if path is None else Path(path)
        if path is None or not path.exists():
            return cls(count, settings, [], path, subject)
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            told = (document["format"], document["count"], document["settings"])
            about = document.get("subject", [])
            points = [(tuple(map(float, point)), float(metric)) for point, metric in document["points"]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise StrettoError(f"{path}: not a search that can be continued ({str(error)[:80]})") from None
        if told != (FORMAT, count, vars(settings)) or any(len(point) != count for point, _ in points):
            raise StrettoError(f"{path}: another search ({told[1]} checkpoints, {told[2]}); name another file")
        if about != list(subject):
            changed = [word for word in subject if word not in about] or about
            raise StrettoError(f"{path}: a search of other files or another metric ({changed[0]!r:.80}); name another file")
        return cls(count, settings, points, path, subject)

    @property
    def best(self) -> tuple[tuple[float, ...], float]:
        """The best point so far and its metric."""
        return min(self.points, key=lambda item: item[1])

    @property
    def curve(self) -> list[float]:
        """Best metric after each evaluation."""
        return np.minimum.accumulate([metric for _, metric in self.points]).tolist() if self.points else []

    def total(self, start: Sequence[Sequence[float]] = ()) -> int:
        """How many evaluations :meth:`run` makes from the beginning to the end."""
        return self.count + 1 + len(start) + self.settings.generations * self.settings.population

    def run(self, evaluate: Evaluate, start: Sequence[Sequence[float]] = ()) -> tuple[tuple[float, ...], float]:
        """Evaluate the starting points (each checkpoint alone, their mean, and ``start``), then the generations.

        A point whose metric is not finite counts as bad and is passed over.
        """
        place = 0
        known = [tuple(row) for row in np.eye(self.count).tolist()]
        known += [(1 / self.count,) * self.count, *(tuple(map(float, point)) for point in start)]
        for point in known:
            place = self._see(place, point, evaluate)
        for generation in range(self.settings.generations):
            # Drawn from what had been seen at its beginning, so that a continued search draws the same.
            points = self._draw(generation, self.points[:place])
            for point in points:
                place = self._see(place, point, evaluate)
        return self.best

    def _see(self, place: int, point: tuple[float, ...], evaluate: Evaluate) -> int:
        if place >= len(self.points):
            metric = float(evaluate(point))
            self.points.append((point, metric if math.isfinite(metric) else float(np.finfo(np.float32).max)))
            self._save()
        return place + 1

    def _draw(self, generation: int, seen: Sequence[tuple[tuple[float, ...], float]]) -> list[tuple[float, ...]]:
        settings, rng = self.settings, np.random.default_rng((self.settings.seed, generation))
        best = sorted(seen, key=lambda item: item[1])[: settings.elite]
        elite = np.array([point for point, _ in best])
        rank = np.log(len(best) + 0.5) - np.log(np.arange(1, len(best) + 1))  # as evolution strategies weigh parents
        mean = (rank / rank.sum()) @ elite
        # Corners are far apart; only what has been drawn tells how wide to draw on.
        fade = settings.spread * 0.8**generation
        wide = np.maximum(np.minimum(elite.std(axis=0), settings.spread) if generation else fade, settings.least_spread)
        drawn = mean + rng.standard_normal((settings.population, self.count)) * np.minimum(wide, max(fade, settings.least_spread))
        drawn += (1 - drawn.sum(axis=1, keepdims=True)) / self.count
        return [tuple(row) for row in drawn.tolist()]

    def _save(self) -> None:
        if self.path is None:
            return
        document = {"format": FORMAT, "count": self.count, "settings": vars(self.settings), "points": self.points}
        document |= {"subject": list(self.subject), "curve": self.curve}
        temporary = self.path.with_name(f".{self.path.name}.part")
        try:
            temporary.write_text(json.dumps(document), encoding="utf-8")
            os.replace(temporary, self.path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StrettoError(f"{self.path}: cannot be written ({error.strerror})") from None


def usual_starts(count: int) -> list[list[float]]:
    """Return the mean of the later half and a moving average: points worth a look in files that are in order of training."""
    weights = [0.8 ** (count - 1 - index) for index in range(count)]
    return [[0.0] * (count // 2) + [1 / (count - count // 2)] * (count - count // 2), [w / sum(weights) for w in weights]]
