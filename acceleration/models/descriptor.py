"""The contract between the engine and an architecture family."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .modules import MODULE_NAMES, Layout, ModuleSite, TextPart, present


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


#: Names under which modules keep their number of heads.
_HEADS = ("num_heads", "heads", "n_heads", "n_local_heads", "num_attention_heads")


def _patch_size(network: Any) -> int | Sequence[int]:
    return network.patch_size


def _out_channels(network: Any) -> int | None:
    return network.out_channels


def _no_variant(network: Any) -> str:
    return ""


def _never(network: Any) -> bool:
    return False


def _nowhere(network: Any) -> str:
    return ""


def _as_given(network: Any, tokens: int) -> int:
    return tokens


@dataclass(frozen=True)
class ModelDescriptor:
    """What the engine knows of a family. Adding a family is adding one of these.

    Streams. A block of most families gets its image tokens as ``args["img"]`` [B, N, hidden_size]. Text tokens may
    stand before them (``text_in_stream``) or behind them (``text_after_image``) in the same tensor, and the tokens of
    reference pictures beside the ones that are decoded; :meth:`image_slice` and :meth:`target_slice` find the parts.

    Attributes:
        family: short name used in traces and presets.
        networks: exact class names of the networks it describes.
        block_lists: (hook kind, attribute holding the blocks) in execution order; empty when blocks cannot be
            skipped through the host's hooks, and then ``no_blocks`` says why.
        hidden_size: network -> width of the token stream.
        text_in_stream: kinds of block whose ``img`` stream holds text tokens first.
        text_after_image: kinds of block whose ``img`` stream holds text tokens last.
        txt_out: kinds of block that take ``txt`` and return it changed, beside ``img``. Blocks of other kinds may
            be given ``txt`` to attend to, but return ``img`` alone.
        in_place: whether blocks write into the tensors they are given.
        hooks: names of the hooks the host offers for it, of
            ``{"block_replace", "diffusion_model", "attention_override"}``.
        no_blocks: why there are no block sites, in a user's words; empty when there are.
        skip_lists: (hook kind, attribute holding indices of blocks that the network itself leaves out).
        patch_size: network -> side of a patch, or (height, width), or (time, height, width).
        output_channels: network -> channels of its prediction; its input has more where conditions are
            concatenated to the latent.
        reference_first: network -> whether reference tokens stand before the target's in the image part; otherwise
            they follow it.
        tea_input: (network, arguments of the first block's hook) -> TeaCache's indicator tensor, without running
            the block. For most families what the block's first norm and the modulation make of the whole ``img``
            stream, [B, N, hidden_size], references included; each family's module names it. None where no hook
            gives access to it.
        module_lists: (kind, attribute holding the blocks, their cacheable modules) in execution order: the blocks of
            ``block_lists``, or blocks that no hook of their own leads to.
        joint_text: network -> where text stands in its self-attention: ``"first"``, ``"last"``, or ``""`` where it
            takes no part. Reference pictures then stand at the far end of the image tokens, or with
            ``reference_first`` at the near one.
        joint_text_tokens: (network, length of the text it is given) -> text tokens in its self-attention, 0 where
            that is not known.
        text_projections: (attribute holding blocks, chains of paths in each of them). The first part of a chain is given
            text, or a picture that is a condition, which is the same at every step; every further part is given what the
            part before it returned. Absent parts are left out.
        text_tokens: length of the text that these are given, as far as it is known beforehand.
        modulations: (attribute holding blocks, paths in each of them) of modules that are given the vector which hooks of
            blocks get as ``args["vec"]`` and nothing else: timestep, and with some families guidance and pooled text.
        variant: network -> name, within the family, of the published model that has exactly these sizes, as presets
            spell it; "" for others. Models that differ in weights alone share a name.
    """

    family: str
    networks: tuple[str, ...]
    block_lists: tuple[tuple[str, str], ...]
    hidden_size: Callable[[Any], int]
    text_in_stream: frozenset[str] = frozenset()
    in_place: bool = False
    hooks: frozenset[str] = frozenset({"block_replace"})
    text_after_image: frozenset[str] = frozenset()
    txt_out: frozenset[str] = frozenset()
    no_blocks: str = ""
    skip_lists: tuple[tuple[str, str], ...] = ()
    patch_size: Callable[[Any], int | Sequence[int]] = _patch_size
    output_channels: Callable[[Any], int | None] = _out_channels
    reference_first: Callable[[Any], bool] = _never
    tea_input: Callable[[Any, dict[str, Any]], torch.Tensor] | None = None
    module_lists: tuple[tuple[str, str, tuple[Layout, ...]], ...] = ()
    joint_text: Callable[[Any], str] = _nowhere
    joint_text_tokens: Callable[[Any, int], int] = _as_given
    text_projections: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = ()
    text_tokens: int = 512
    modulations: tuple[tuple[str, tuple[str, ...]], ...] = ()
    variant: Callable[[Any], str] = _no_variant

    @property
    def has_blocks(self) -> bool:
        """Whether single blocks can be watched and skipped."""
        return bool(self.block_lists)

    def sites(self, network: Any) -> tuple[BlockSite, ...]:
        """Return the blocks of ``network`` in execution order; indices start again with every list."""
        keys = self._keys(network, self.block_lists)
        return tuple(
            BlockSite(kind, index, depth, last=depth == len(keys) - 1) for depth, (kind, index) in enumerate(keys)
        )

    @property
    def module_names(self) -> tuple[str, ...]:
        """Names of the modules inside blocks that can be cached, in the order in which a block runs them."""
        known = {name for _, _, layouts in self.module_lists for layout in layouts for name in layout.names}
        return tuple(name for name in MODULE_NAMES if name in known)

    def module_sites(self, network: Any) -> tuple[ModuleSite, ...]:
        """Return the cacheable modules of ``network``; depths count the blocks in execution order, as in :meth:`sites`."""
        lists = {kind: (name, layouts) for kind, name, layouts in self.module_lists}
        keys = self._keys(network, tuple((kind, name) for kind, (name, _) in lists.items()))
        made = []
        for depth, (kind, index) in enumerate(keys):
            name, layouts = lists[kind]
            block, prefix = getattr(network, name)[index], f"{name}.{index}."
            for layout in layouts:
                outputs, inner = (
                    tuple(prefix + path for path in present(block, paths)) for paths in (layout.outputs, layout.inner)
                )
                if outputs:
                    made.append(ModuleSite(depth, layout.names, outputs, inner))
        return tuple(made)

    def text_parts(self, network: Any) -> tuple[TextPart, ...]:
        """Return the parts of ``network`` that make keys and values of text alone, in execution order."""
        made = []
        for name, chains in self.text_projections:
            for index, block in enumerate(getattr(network, name, ())):
                for paths in (present(block, chain) for chain in chains):
                    full = [f"{name}.{index}.{path}" for path in paths]
                    made += [
                        TextPart(path, full[-1], first=place == 0, last=place == len(full) - 1)
                        for place, path in enumerate(full)
                    ]
        return tuple(made)

    def modulation_parts(self, network: Any) -> tuple[str, ...]:
        """Return the paths of modules of ``network`` that depend on the timestep's vector alone, in execution order."""
        return tuple(
            f"{name}.{index}.{path}"
            for name, paths in self.modulations
            for index, block in enumerate(getattr(network, name, ()))
            for path in present(block, paths)
        )

    def module_blocks(self, network: Any) -> int:
        """Return the number of blocks whose modules can be cached."""
        return len(self._keys(network, tuple((kind, name) for kind, name, _ in self.module_lists)))

    def heads(self, network: Any) -> int:
        """Return the number of attention heads, as a module of ``network`` tells it; one per 64 channels where none does."""
        for module in network.modules():
            found = (getattr(module, name, None) for name in _HEADS)
            heads = next((number for number in found if isinstance(number, int) and number > 0), 0)
            if heads:
                return heads
        return max(self.hidden_size(network) // 64, 1)

    def _keys(self, network: Any, lists: Sequence[tuple[str, str]]) -> list[tuple[str, int]]:
        """Return (kind, index) of the blocks of ``lists`` that the network runs."""
        skipped = {kind: getattr(network, name) for kind, name in self.skip_lists}
        return [
            (kind, index)
            for kind, name in lists
            for index in range(len(getattr(network, name)))
            if index not in skipped.get(kind, ())
        ]

    def grid(self, network: Any, latent_shape: Sequence[int]) -> tuple[int, int, int]:
        """Return the (t, h, w) token grid of a latent [B, C, (T,) H, W]; odd sides are padded up."""
        patch = self.patch_size(network)
        patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
        patch = (1,) * (3 - len(patch)) + patch
        sides = [1, *latent_shape[2:]] if len(latent_shape) == 4 else list(latent_shape[2:])
        return tuple(-(-side // step) for side, step in zip(sides, patch, strict=True))

    def tokens(self, network: Any, latent_shape: Sequence[int]) -> int:
        """Return the number of image tokens of one sample of a latent, without those of reference pictures."""
        t, h, w = self.grid(network, latent_shape)
        return t * h * w

    def image_slice(self, kind: str, args: dict[str, Any], text_tokens: int) -> slice:
        """Return where image tokens, references included, stand in ``args["img"]`` of a block of ``kind``.

        Args:
            kind: kind of the block.
            args: the arguments of its hook.
            text_tokens: length of ``txt`` in the blocks that had it apart.
        """
        if kind not in self.text_in_stream and kind not in self.text_after_image:
            return slice(0, args["img"].shape[1])
        # From 0.14 ComfyUI puts text first in every family, and says so here.
        told = (args.get("transformer_options") or {}).get("img_slice")
        if told is not None:
            return slice(*told)
        length = args["img"].shape[1]
        return slice(text_tokens, length) if kind in self.text_in_stream else slice(0, length - text_tokens)

    def target_slice(self, network: Any, latent_shape: Sequence[int], image_tokens: int) -> slice:
        """Return where the decoded tokens stand among the ``image_tokens`` of an image part (:meth:`image_slice`)."""
        tokens = self.tokens(network, latent_shape)
        start = image_tokens - tokens if self.reference_first(network) else 0
        return slice(start, start + tokens)
