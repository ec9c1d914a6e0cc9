"""Where the visual tokens stand in the sequence of a self-attention, and on which grid."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """One sequence: a raster of visual tokens in one piece, and any other tokens before and behind it.

    Attributes:
        grid: (T, Y, X) of the visual tokens, which come in raster order: t slowest, x fastest.
        start: index of the first visual token in the sequence.
        length: tokens of the sequence. Those that are not visual are text, references, sound.

    Raises:
        ValueError: an axis has no token, or the raster does not fit into the sequence.
    """

    grid: tuple[int, int, int]
    start: int
    length: int

    def __post_init__(self) -> None:
        if len(self.grid) != 3 or min(self.grid) < 1:
            raise ValueError(f"a grid needs three axes of at least one token, got {self.grid}")
        if self.start < 0 or self.start + self.visual > self.length:
            raise ValueError(
                f"{self.visual} visual tokens from {self.start} on do not fit into a sequence of {self.length}"
            )

    @property
    def visual(self) -> int:
        """Number of visual tokens."""
        frames, rows, columns = self.grid
        return frames * rows * columns

    @property
    def other(self) -> int:
        """Number of tokens that are not visual."""
        return self.length - self.visual

    @property
    def frame(self) -> int:
        """Tokens of one frame."""
        return self.grid[1] * self.grid[2]

    @property
    def video(self) -> bool:
        """Whether there is more than one frame."""
        return self.grid[0] > 1


def image(rows: int, columns: int, text: int = 0, text_first: bool = False) -> Geometry:
    """Return the geometry of one picture of ``rows`` x ``columns`` tokens beside ``text`` other tokens."""
    return Geometry((1, rows, columns), text if text_first else 0, rows * columns + text)


def clip(frames: int, rows: int, columns: int, text: int = 0, text_first: bool = False) -> Geometry:
    """Return the geometry of a clip of ``frames`` x ``rows`` x ``columns`` tokens beside ``text`` other tokens."""
    visual = frames * rows * columns
    return Geometry((frames, rows, columns), text if text_first else 0, visual + text)
