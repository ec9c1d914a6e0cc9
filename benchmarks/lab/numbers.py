"""Measured figures in texts, and whether each has a JSON behind it.

A figure is a number with a measuring unit; in the README also any with a decimal point, and a cell of a table that is a number.
It is covered in one of three ways: it stands in a table that :mod:`.readme` makes; a :class:`Claim` gives its words and the
places in the results that they are made of; or an :class:`Exempt` says why it is no measurement of this project's. Whatever
is covered by none of these is reported, so that leaving out a mark or a claim cannot hide a figure.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import ROOT
from .readme import BLOCK, result

NUMBER = r"(?<![\w.,-])[-+]?\d[\d,]*(?:\.\d+)?"
UNIT = (
    r"(?:x\b|×|-fold\b|\s?%|\s(?:(?:to|and|or)\s[\d.,]+\s)?(?:dB|s|ms|us|µs|microseconds?|milliseconds?|seconds?|minutes?|hours?|"
    r"times|[KMGT]i?B(?:/s)?)\b)"
)
WITH_UNIT = re.compile(NUMBER + UNIT)
DECIMAL = re.compile(r"(?<![\w.,])([-+]?\d[\d,]*\.\d+)(?![\w.])")
CELL = re.compile(r"(?<=\|)\s*\**([-+]?\d[\d,.]*)\**\s*(?=\|)")
FIELD = r"[-+]?[\d.,]*\d"
#: What is no text: generated tables, comments, code, addresses.
SILENT = re.compile(BLOCK.pattern + r"|<!--.*?-->|```.*?```|`[^`]*`|(?<=\])\([^)]*\)|https?://\S+", re.DOTALL)


@dataclass(frozen=True)
class Claim:
    """Words of a file with a field in braces for each figure, and what the fields hold.

    Attributes:
        file: path below the root.
        words: as :meth:`str.format` takes them; a break of lines counts as a blank.
        values: "RESULT/KEY/KEY" of a number (keys without slashes, numbers for places in lists), or a function that makes it.
    """

    file: str
    words: str
    values: tuple[str | Callable[[], object], ...]

    def text(self) -> str:
        """Return the words with their figures.

        Raises:
            KeyError: a result or a place in it is missing.
        """
        return self.words.format(*self._found())

    def refreshed(self, text: str) -> str:
        """Return a text in which the figures between these words are those of the results."""
        parts = re.split(r"(\{[^}]*\})", self.words)
        spaced = [re.sub(r"(?:\\?\s)+", r"\\s+", re.escape(part)) for part in parts[::2]]
        pattern = "(" + f"){FIELD}(".join(spaced) + ")"
        figures = [field.format(value) for field, value in zip(parts[1::2], self._found(), strict=True)]
        put = lambda found: "".join(part + figure for part, figure in zip(found.groups(), [*figures, ""], strict=True))  # noqa: E731
        return re.sub(pattern, put, text)

    def _found(self) -> list:
        return [value() if callable(value) else at(value) for value in self.values]


@dataclass(frozen=True)
class Exempt:
    """Words that hold figures which are no measurements of ours, and why."""

    file: str
    words: str
    reason: str


def at(path: str):
    """Return what a result holds at "RESULT/KEY/KEY"."""
    name, *keys = path.split("/")
    found = result(name)
    for key in keys:
        found = found[int(key)] if isinstance(found, list) else found[key]
    return found


def figures(text: str, whole: bool = False) -> list[tuple[int, int]]:
    """Return where figures stand: those with a unit; with ``whole`` also decimals, and cells that are a number."""
    heard = SILENT.sub(lambda found: re.sub(r"\S", " ", found[0]), text)
    spans, place = set(), 0
    for line in heard.splitlines(keepends=True):
        row = line.lstrip().startswith("|")
        units = [found.span() for found in WITH_UNIT.finditer(line)]
        patterns = () if not whole else (DECIMAL, CELL) if row else (DECIMAL,)
        bare = [found.span(1) for pattern in patterns for found in pattern.finditer(line)]
        bare = [span for span in bare if not any(low <= span[0] < high for low, high in units)]
        spans |= {(place + low, place + high) for low, high in units + bare}
        place += len(line)
    return sorted(spans)


def where(text: str, words: str) -> list[tuple[int, int]]:
    """Return every place of some words in a text, whatever blanks stand between them."""
    pattern = r"\s+".join(map(re.escape, words.split()))
    return [found.span() for found in re.finditer(pattern, text)]


def problems(path: Path, text: str, claims: list[Claim], exempt: list[Exempt]) -> list[str]:
    """Return what is wrong with the figures of a file, a line each: none covered, claims and exemptions that do not apply."""
    name, covered, found = path.relative_to(ROOT).as_posix(), [], []
    for claim in claims:
        if claim.file == name:
            spans = where(text, claim.text())
            covered += spans
            found += [] if spans else [f"{name}: the results say {claim.text()!r}, which is not there"]
    for entry in exempt:
        if entry.file == name:
            spans = where(text, entry.words)
            covered += spans
            found += [] if spans else [f"{name}: {entry.words!r} is exempt, but not there"]
    for start, end in figures(text, whole=name == "README.md"):
        if not any(low <= start and end <= high for low, high in covered):
            line = text.count("\n", 0, start) + 1
            found.append(f"{name}:{line}: no JSON behind {text[start:end]!r} in {text[max(start - 50, 0) : end + 30]!r}")
    return found
