"""What keys and values of inactive tokens take, and how they are kept where that is too much."""

from dataclasses import dataclass

import torch

from ..facts import Facts
from .tokens import STREAMS, sites_of

#: Ways of keeping keys and values, best first: name -> bytes of an element, None for as they are computed.
FORMATS: dict[str, int | None] = {"as computed": None, "bf16": 2, "fp8": 1}
DTYPES = {"as computed": None, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
#: Fewer layers than this share are not worth it: layers without kept keys see the active tokens alone.
LEAST_LAYERS = 0.5


@dataclass(frozen=True)
class Memory:
    """How keys and values are kept.

    Attributes:
        format: key of :data:`FORMATS`.
        layers: blocks whose keys and values are kept, by depth.
        blocks: number of blocks.
        order: 0 for the last keys and values of each token, 1 for the last two.
        needed: bytes they take at most; of a refusal, the least they would take.
        allowed: bytes they may take.
    """

    format: str
    layers: frozenset[int]
    blocks: int
    order: int
    needed: int
    allowed: int

    @property
    def fits(self) -> bool:
        """Whether they may be kept."""
        return self.needed <= self.allowed

    @property
    def reduced(self) -> bool:
        """Whether they are kept worse than they are computed."""
        return self.format != "as computed" or len(self.layers) < self.blocks

    def words(self) -> str:
        """Say what is kept, and how."""
        size = f"keys, values and outputs of every token: {mebibytes(self.needed)}, {mebibytes(self.allowed)} allowed"
        kind = "" if self.format == "as computed" else f", kept as {self.format}"
        kind += ", of two steps" if self.order else ""
        few = "" if len(self.layers) == self.blocks else f", in {len(self.layers)} of {self.blocks} blocks"
        return f"{size}{kind}{few}"

    def refusal(self) -> str:
        """Say why they may not be kept."""
        return (
            f"keys and values of every token would take {mebibytes(self.needed)} as fp8 in half of the blocks; "
            f"{mebibytes(self.allowed)} may be used (memory_share)"
        )


def memory_for(facts: Facts, share: float, order: int = 0, rest: int = 0) -> Memory:
    """Return how keys and values of a run are kept in ``share`` of the free memory.

    As computed, else in 16 bits, else in 8, else in 8 in fewer blocks (at least half of them). With ``order`` 1 of the last
    two steps, while that fits in 16 bits. ``rest`` bytes are taken by what else is kept.
    """
    descriptor, network = facts.descriptor, facts.network
    text = descriptor.text_tokens if descriptor.joint_text(network) else 0
    tokens = descriptor.tokens(network, facts.latent_shape)
    width = 2 * facts.latent_shape[0] * facts.branches * descriptor.hidden_size(network)
    blocks = len(sites_of(descriptor, network))
    further = STREAMS[descriptor.family].further(network)
    allowed = int(facts.free_bytes * share)
    every = frozenset(range(blocks))
    #: Noise levels of keys and of values, two each by token.
    levels = 2 * 2 * 4 * facts.latent_shape[0] * facts.branches * (tokens + text)

    def bytes_of(element: int, count: int) -> int:
        scales = 2 * 4 * facts.latent_shape[0] * facts.branches * (count + further) if element == 1 else 0
        return rest + scales + width * element * ((tokens + text) * count + tokens * min(further, count))

    for kept_order in range(order, -1, -1):
        for name, element in FORMATS.items():
            size = facts.element_bytes if element is None else element
            if (element is not None and size >= facts.element_bytes) or (kept_order and name == "fp8"):
                continue
            needed = bytes_of(size * (1 + kept_order), blocks) + (blocks + further) * levels * kept_order
            if needed <= allowed:
                return Memory(name, every, blocks, kept_order, needed, allowed)
    least = -(-blocks // 2)
    count = next((n for n in range(blocks - 1, least, -1) if bytes_of(1, n) <= allowed), least)
    # Evenly over the depth, the last block among them: it decides what is drawn.
    kept = frozenset(blocks - 1 - index * blocks // count for index in range(count))
    return Memory("fp8", kept, blocks, 0, bytes_of(1, count), allowed)


def mebibytes(size: int) -> str:
    """Return a size in words."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
