"""Transformers of diffusers, and what its pipelines do with each: who is called how, and what a block returns.

Family and variant names are those of ComfyUI's networks, so presets of one host hold in the other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import flux, sd3, wan
from .descriptor import ModelDescriptor

#: How a latent lies in memory: [B, C, (T,) H, W], [B, T, C, H, W], or [B, N, C] with one row per token.
PLANES, FRAMES_FIRST, PACKED = "planes", "frames first", "packed"
#: What a block returns.
IMAGE, IMAGE_TEXT, TEXT_IMAGE = ("img",), ("img", "txt"), ("txt", "img")


@dataclass(frozen=True)
class LatentDescriptor(ModelDescriptor):
    """A descriptor whose latents may be packed or have their frames first."""

    latents: str = PLANES

    def grid(self, network: Any, latent_shape: Sequence[int]) -> tuple[int, int, int]:
        """Return the (t, h, w) token grid; packed latents do not tell their sides and count as one row."""
        if self.latents == PACKED:
            return 1, 1, latent_shape[1]
        if self.latents == FRAMES_FIRST:
            batch, frames, channels, *sides = latent_shape
            latent_shape = batch, channels, frames, *sides
        return super().grid(network, latent_shape)


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
    """

    descriptor: LatentDescriptor
    returns: tuple[str, ...] = IMAGE
    batched: tuple[str, ...] = ()
    timestep: Callable[[float, float], float] = lambda given, train: given
    sign: float = 1.0

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


_BLOCKS = (("double_block", "transformer_blocks"),)
_DOUBLE_AND_SINGLE = (*_BLOCKS, ("single_block", "single_transformer_blocks"))
#: diffusers splits picture and text again after every block, single ones included.
_BOTH = frozenset({"double_block", "single_block"})

TRANSFORMERS: tuple[Transformer, ...] = (
    Transformer(
        LatentDescriptor(
            family="sd3",
            networks=("SD3Transformer2DModel",),
            block_lists=_BLOCKS,
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
            block_lists=_DOUBLE_AND_SINGLE,
            hidden_size=_width,
            txt_out=_BOTH,
            output_channels=_channels,
            tea_input=_first_norm,
            variant=_flux_variant,
            latents=PACKED,
        ),
        returns=TEXT_IMAGE,
        timestep=_of_train,
    ),
    Transformer(
        LatentDescriptor(
            family="wan",
            networks=("WanTransformer3DModel",),
            block_lists=(("double_block", "blocks"),),
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
            block_lists=_BLOCKS,
            hidden_size=_width,
            txt_out=frozenset({"double_block"}),
            # The network counts the channels of a pixel, its packed latents those of a patch.
            output_channels=lambda network: network.config.out_channels * network.config.patch_size**2,
            latents=PACKED,
        ),
        returns=TEXT_IMAGE,
        timestep=_of_train,
    ),
    Transformer(
        LatentDescriptor(
            family="hunyuan_video",
            networks=("HunyuanVideoTransformer3DModel",),
            block_lists=_DOUBLE_AND_SINGLE,
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
            block_lists=_BLOCKS,
            hidden_size=_width,
            output_channels=_channels,
            latents=PACKED,
        ),
        batched=("uncond", "cond"),
    ),
    Transformer(
        LatentDescriptor(
            family="cogvideox",
            networks=("CogVideoXTransformer3DModel",),
            block_lists=_BLOCKS,
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
            block_lists=_BLOCKS,
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
            block_lists=_BLOCKS,
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
            block_lists=(("double_block", "layers"),),
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
