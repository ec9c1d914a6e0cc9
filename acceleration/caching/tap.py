"""Where features are taken from a computed pass and put back into a skipped one."""

from dataclasses import dataclass

OUTPUT, DELTA, DENOISED, BLOCKS = "output", "delta", "denoised", "blocks"
#: Not a place of its own: a table says which blocks, or modules inside them.
TABLE = "table"


@dataclass(frozen=True)
class Tap:
    """One place of the network.

    Attributes:
        kind: ``"output"`` (the prediction), ``"delta"`` (prediction minus network input), ``"denoised"`` (denoised latent
            minus latent) or ``"blocks"`` (the range ``first`` to ``last`` - 1 of the transformer blocks).
        first: first block of the range, in execution order; the blocks before it always run.
        last: one past the last block of the range; the blocks from it on always run.
        residual: store what the range adds to its input, instead of what it yields.
    """

    kind: str
    first: int = 0
    last: int = 0
    residual: bool = False
