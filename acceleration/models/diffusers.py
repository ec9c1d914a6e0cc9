"""Transformers of diffusers, and what its pipelines do with each: who is called how, and what a block returns.

Family and variant names are those of ComfyUI's networks, so presets of one host hold in the other.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import flux, sd3, wan
from .descriptor import ModelDescriptor
from .modules import ATTN, Layout

#: How a latent lies in memory: [B, C, (T,) H, W], [B, T, C, H, W], or [B, N, C] with one row per token.
PLANES, FRAMES_FIRST, PACKED = "planes", "frames first", "packed"
#: What a block returns.
IMAGE, IMAGE_TEXT, TEXT_IMAGE = ("img",), ("img", "txt"), ("txt", "img")


@dataclass(frozen=True)
class LatentDescriptor(ModelDescriptor):
    """A descriptor whose latents may be packed or have their frames first.

    Attributes:
        latents: how they lie in memory.
        sides: (t, h, w) of packed ones, where a run's arguments tell them; None elsewhere.
    """

    latents: str = PLANES
    sides: tuple[int, int, int] | None = None

    def grid(self, network: Any, latent_shape: Sequence[int]) -> tuple[int, int, int]:
        """Return the (t, h, w) token grid; packed latents of unknown sides count as one row."""
        if self.latents == PACKED:
            return self.sides or (1, 1, latent_shape[1])
        if self.latents == FRAMES_FIRST:
            batch, frames, channels, *sides = latent_shape
            latent_shape = batch, channels, frames, *sides
        return super().grid(network, latent_shape)

    def heads(self, network: Any) -> int:
        """Return the number of attention heads, as the network's configuration tells it."""
        return network.config.num_attention_heads


@dataclass(frozen=True)
class Transformer:
    """One transformer class of diffusers.

    Attributes:
        descriptor: what the engine knows of it.
        returns: what a block returns, in order: ``"img"`` and ``"txt"``.
        batched: names of the halves of a batch in which a pipeline guides with one call; () where it makes two calls,
            the conditional one first.
        timestep: (value that the network is given, number of training timesteps) -> the scheduler's timestep.
        sign: what the pipeline multiplies the prediction with before the scheduler sees it.
        sides: (arguments of a call) -> (t, h, w) of its packed tokens, None where they do not tell.
    """

    descriptor: LatentDescriptor
    returns: tuple[str, ...] = IMAGE
    batched: tuple[str, ...] = ()
    timestep: Callable[[float, float], float] = lambda given, train: given
    sign: float = 1.0
    sides: Callable[[Mapping[str, Any]], tuple[int, int, int] | None] = lambda arguments: None

    def with_sides(self, arguments: Mapping[str, Any], latent_shape: Sequence[int]) -> "Transformer":
        """Return the transformer with the grid that a call's arguments tell of packed latents; itself where they do not."""
        sides = self.sides(arguments) if self.descriptor.latents == PACKED else None
        if sides is None or math.prod(sides) != latent_shape[1]:
            return self
        return replace(self, descriptor=replace(self.descriptor, sides=sides))

    @property
    def channel_dim(self) -> int:
        """Dimension of a latent's channels."""
        return {PLANES: 1, FRAMES_FIRST: 2, PACKED: 2}[self.descriptor.latents]

    def latent(self, network: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the channels of ``hidden_states`` that are the latent, a view: those of conditions stand behind them."""
        dim = self.channel_dim
        return hidden_states.narrow(dim, 0, min(hidden_states.shape[dim], self.descriptor.output_channels(network)))


def _of_train(given: float, train: float) -> float:
    return given * train


def _rising(given: float, train: float) -> float:
    return (1.0 - given) * train


def _width(network: Any) -> int:
    return network.config.num_attention_heads * network.config.attention_head_dim


def _patch(network: Any) -> Any:
    return network.config.patch_size


def _patch_3d(network: Any) -> tuple[int, int, int]:
    config = network.config
    return config.patch_size_t or 1, config.patch_size, config.patch_size


def _channels(network: Any) -> int:
    return network.config.out_channels or network.config.in_channels


def _first_norm(network: Any, args: dict[str, Any]) -> torch.Tensor:
    """Return the first block's norm of ``img`` under its shift and scale; the norm's further values are gates."""
    return network.transformer_blocks[0].norm1(args["img"], emb=args["vec"])[0]


def _time_embedding(network: Any, args: dict[str, Any]) -> torch.Tensor:
    """Return the projected time embedding, as Wan's descriptor for ComfyUI does."""
    return args["vec"]


def _sd3_variant(network: Any) -> str:
    config = network.config
    return sd3.VARIANTS.get((_width(network), config.num_layers, bool(config.dual_attention_layers)), "")


def _flux_variant(network: Any) -> str:
    config = network.config
    # Latents are packed by patches of two by two before they reach the network.
    sizes = _width(network), config.num_layers, config.num_single_layers, 2, config.in_channels // 4
    return flux.VARIANTS.get((*sizes, config.guidance_embeds), "")


def _wan_variant(network: Any) -> str:
    config = network.config
    kind = "i2v" if config.image_dim else "t2v"
    sizes = _width(network), config.num_layers, config.ffn_dim, config.in_channels, config.out_channels
    return wan.VARIANTS.get((*sizes, kind, config.pos_embed_seq_len is not None), "")


def _sides_of_positions(arguments: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Return the grid of FLUX's positions [N, 3] or [B, N, 3]: (picture, row, column) of each token, in raster order."""
    ids = arguments.get("img_ids")
    if not isinstance(ids, torch.Tensor) or ids.shape[-1] != 3:
        return None
    picture, rows, columns = (ids[0] if ids.ndim == 3 else ids).long().cpu().unbind(1)
    height, width = int(rows.max()) + 1, int(columns.max()) + 1
    raster = rows * width + columns
    plain = height * width == len(raster) and bool((picture == picture[0]).all())
    return (1, height, width) if plain and torch.equal(raster, torch.arange(len(raster))) else None


def _sides_of_shapes(arguments: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Return the only shape that every item of ``img_shapes`` holds; with reference pictures there are more."""
    given = arguments.get("img_shapes") or ()
    shapes = [list(item) if isinstance(item, list) else [item] for item in given]
    if not shapes or any(shape != shapes[0] for shape in shapes) or len(shapes[0]) != 1:
        return None
    return tuple(int(side) for side in shapes[0][0])


def _sides_by_name(arguments: Mapping[str, Any]) -> tuple[int, int, int] | None:
    given = [arguments.get(name) for name in ("num_frames", "height", "width")]
    return tuple(int(side) for side in given) if all(isinstance(side, int) for side in given) else None


def _text_first(network: Any) -> str:
    return "first"


def _text_last(network: Any) -> str:
    return "last"


def _attention(block_lists: tuple[tuple[str, str], ...], *paths: str) -> dict[str, Any]:
    """Descriptor fields of self-attentions that all go through torch's own function."""
    return {
        "block_lists": block_lists,
        "module_lists": tuple((kind, name, (Layout((ATTN,), paths),)) for kind, name in block_lists),
        "hooks": frozenset({"block_replace", "attention_override"}),
    }


_BLOCKS = (("double_block", "transformer_blocks"),)
_DOUBLE_AND_SINGLE = (*_BLOCKS, ("single_block", "single_transformer_blocks"))
#: diffusers splits picture and text again after every block, single ones included.
_BOTH = frozenset({"double_block", "single_block"})

TRANSFORMERS: tuple[Transformer, ...] = (
    Transformer(
        LatentDescriptor(
            family="sd3",
            networks=("SD3Transformer2DModel",),
            **_attention(_BLOCKS, "attn", "attn2"),
            joint_text=_text_last,
            hidden_size=_width,
            txt_out=frozenset({"double_block"}),
            patch_size=_patch,
            output_channels=_channels,
            tea_input=_first_norm,
            variant=_sd3_variant,
        ),
        returns=TEXT_IMAGE,
        batched=("uncond", "cond"),
    ),
    Transformer(
        LatentDescriptor(
            family="flux",
            networks=("FluxTransformer2DModel",),
            **_attention(_DOUBLE_AND_SINGLE, "attn"),
            joint_text=_text_first,
            hidden_size=_width,
            txt_out=_BOTH,
            output_channels=_channels,
            tea_input=_first_norm,
            variant=_flux_variant,
            latents=PACKED,
        ),
        returns=TEXT_IMAGE,
        timestep=_of_train,
        sides=_sides_of_positions,
    ),
    Transformer(
        LatentDescriptor(
            family="wan",
            networks=("WanTransformer3DModel",),
            **_attention((("double_block", "blocks"),), "attn1"),
            hidden_size=_width,
            patch_size=_patch,
            output_channels=_channels,
            tea_input=_time_embedding,
            variant=_wan_variant,
        ),
    ),
    Transformer(
        LatentDescriptor(
            family="qwen_image",
            networks=("QwenImageTransformer2DModel",),
            **_attention(_BLOCKS, "attn"),
            joint_text=_text_first,
            hidden_size=_width,
            txt_out=frozenset({"double_block"}),
            # The network counts the channels of a pixel, its packed latents those of a patch.
            output_channels=lambda network: network.config.out_channels * network.config.patch_size**2,
            latents=PACKED,
        ),
        returns=TEXT_IMAGE,
        timestep=_of_train,
        sides=_sides_of_shapes,
    ),
    Transformer(
        LatentDescriptor(
            family="hunyuan_video",
            networks=("HunyuanVideoTransformer3DModel",),
            **_attention(_DOUBLE_AND_SINGLE, "attn"),
            joint_text=_text_last,
            hidden_size=_width,
            txt_out=_BOTH,
            patch_size=_patch_3d,
            output_channels=_channels,
        ),
        returns=IMAGE_TEXT,
    ),
    Transformer(
        LatentDescriptor(
            family="ltxv",
            networks=("LTXVideoTransformer3DModel",),
            **_attention(_BLOCKS, "attn1"),
            hidden_size=_width,
            output_channels=_channels,
            latents=PACKED,
        ),
        batched=("uncond", "cond"),
        sides=_sides_by_name,
    ),
    Transformer(
        LatentDescriptor(
            family="cogvideox",
            networks=("CogVideoXTransformer3DModel",),
            **_attention(_BLOCKS, "attn1"),
            joint_text=_text_first,
            hidden_size=_width,
            txt_out=frozenset({"double_block"}),
            patch_size=_patch_3d,
            output_channels=_channels,
            latents=FRAMES_FIRST,
        ),
        returns=IMAGE_TEXT,
        batched=("uncond", "cond"),
    ),
    Transformer(
        LatentDescriptor(
            family="pixart",
            networks=("PixArtTransformer2DModel",),
            **_attention(_BLOCKS, "attn1"),
            hidden_size=_width,
            patch_size=_patch,
            output_channels=_channels,
        ),
        batched=("uncond", "cond"),
    ),
    Transformer(
        LatentDescriptor(
            family="dit",
            networks=("DiTTransformer2DModel",),
            **_attention(_BLOCKS, "attn1"),
            hidden_size=_width,
            patch_size=_patch,
            output_channels=_channels,
        ),
        batched=("cond", "uncond"),
    ),
    Transformer(
        LatentDescriptor(
            family="lumina2",
            networks=("Lumina2Transformer2DModel",),
            **_attention((("double_block", "layers"),), "attn"),
            joint_text=_text_first,
            hidden_size=lambda network: network.config.hidden_size,
            patch_size=_patch,
            output_channels=_channels,
            # Text stands before the picture in one stream, and no block is told where it ends: the picture is the far end.
            reference_first=lambda network: True,
        ),
        timestep=_rising,
        sign=-1.0,
    ),
)


def transformer_of(network: object) -> Transformer | None:
    """Return what is known of ``network``, by its exact class name; None when nothing is."""
    name = type(network).__name__
    return next((known for known in TRANSFORMERS if name in known.descriptor.networks), None)
