"""The contract between the engine and an architecture family."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BlockSite:
    """One transformer block as the host's replace hooks address it.

    Attributes:
        kind: first half of the hook key, ``"double_block"`` or ``"single_block"``.
        index: second half.
        depth: position in execution order, from 0.
        last: whether the output head follows.
    """

    kind: str
    index: int
    depth: int
    last: bool = False

    @property
    def key(self) -> tuple[str, int]:
        """The hook key."""
        return self.kind, self.index


@dataclass(frozen=True)
class ModelDescriptor:
    """What the engine knows of a family. Adding a family is adding one of these.

    Attributes:
        family: short name used in traces and presets.
        networks: exact class names of the networks it describes.
        block_lists: (hook kind, attribute holding the blocks) in execution order.
        hidden_size: network -> width of the token stream.
        text_in_stream: kinds of block whose ``img`` stream holds text tokens first.
        in_place: whether blocks write into the tensors they are given.
        hooks: names of the hooks the host offers for it, of
            ``{"block_replace", "diffusion_model", "attention_override"}``.
    """

    family: str
    networks: tuple[str, ...]
    block_lists: tuple[tuple[str, str], ...]
    hidden_size: Callable[[Any], int]
    text_in_stream: frozenset[str] = frozenset()
    in_place: bool = False
    hooks: frozenset[str] = frozenset({"block_replace"})

    def sites(self, network: Any) -> tuple[BlockSite, ...]:
        """Return the blocks of ``network`` in execution order."""
        keys = [(kind, i) for kind, name in self.block_lists for i in range(len(getattr(network, name)))]
        return tuple(
            BlockSite(kind, index, depth, last=depth == len(keys) - 1) for depth, (kind, index) in enumerate(keys)
        )

    def grid(self, network: Any, latent_shape: Sequence[int]) -> tuple[int, int, int]:
        """Return the (t, h, w) token grid of a latent [B, C, (T,) H, W]; odd sides are padded up."""
        patch = network.patch_size
        patch = (1, patch, patch) if isinstance(patch, int) else tuple(patch)
        sides = [1, *latent_shape[2:]] if len(latent_shape) == 4 else list(latent_shape[2:])
        return tuple(-(-side // step) for side, step in zip(sides, patch, strict=True))

    def tokens(self, network: Any, latent_shape: Sequence[int]) -> int:
        """Return the number of image tokens of one sample of a latent."""
        t, h, w = self.grid(network, latent_shape)
        return t * h * w
