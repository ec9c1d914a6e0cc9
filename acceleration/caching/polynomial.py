"""TeaCache's rescaling polynomials, kept inside the range they were fitted on."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class ClampedPolynomial:
    """A polynomial from indicator differences to relative changes of the output (TeaCache, arXiv 2411.19108).

    Degree 4 fits explode outside their data: several published ones reach -50 and below for
    arguments that another scheduler or step count produces, after which an accumulated sum
    would stay negative and the model would never be computed again. So the argument is
    clamped to [low, high] and the value to >= 0.

    Attributes:
        coefficients: highest power first.
        low, high: range of the argument that the fit is trusted in, low <= high.
        clamped: calls so far whose argument or value had to be clamped; callers warn by it.

    Raises:
        ValueError: no coefficients, or an empty range.
    """

    coefficients: Sequence[float]
    low: float
    high: float
    clamped: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        self.coefficients = tuple(float(c) for c in self.coefficients)
        if not self.coefficients or not self.low <= self.high:
            raise ValueError(f"a polynomial needs coefficients and low <= high, got [{self.low}, {self.high}]")

    def raw(self, x: float) -> float:
        """Return the polynomial itself at ``x``, unclamped."""
        value = 0.0
        for coefficient in self.coefficients:
            value = value * x + coefficient
        return value

    def __call__(self, x: float) -> float:
        """Return the value at ``x``, with both clamped; counts in :attr:`clamped` when either was."""
        inside = min(max(x, self.low), self.high)
        value = self.raw(inside)
        self.clamped += inside != x or value < 0.0
        return max(value, 0.0)
