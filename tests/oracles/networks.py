"""Tiny transformers of diffusers with random weights, what our engine must know of them, and smooth runs for them."""

from dataclasses import dataclass
from typing import Any

import torch

from stretto.acceleration.caching.magnitude import flow_sigmas
from stretto.acceleration.models import ModelDescriptor

#: One stream: text enters by cross-attention. Blocks take and return the picture alone.
WAN = ModelDescriptor(
    family="wan",
    networks=("WanTransformer3DModel",),
    block_lists=(("double_block", "blocks"),),
    hidden_size=lambda network: network.config.num_attention_heads * network.config.attention_head_dim,
    patch_size=lambda network: network.config.patch_size,
    output_channels=lambda network: network.config.out_channels,
)
#: Two streams: all blocks, double and single, take picture and text apart and return both.
FLUX = ModelDescriptor(
    family="flux",
    networks=("FluxTransformer2DModel",),
    block_lists=(("double_block", "transformer_blocks"), ("single_block", "single_transformer_blocks")),
    hidden_size=lambda network: network.inner_dim,
    txt_out=frozenset({"double_block", "single_block"}),
    patch_size=lambda network: network.config.patch_size,
)


@dataclass(frozen=True)
class Subject:
    """A way to make a network, and to call it.

    Attributes:
        name: for test ids.
        descriptor: for our engine.
        make: () -> a new network, always with the same weights.
        call: (network, latent, sigma) -> its prediction.
        latent_shape: of one run's latents.
        probe: network -> a module inside a middle block: it runs when, and only when, the blocks are computed.
    """

    name: str
    descriptor: ModelDescriptor
    make: Any
    call: Any
    latent_shape: tuple[int, ...]
    probe: Any


def _seeded(build):
    def make():
        with torch.random.fork_rng():
            torch.manual_seed(11)
            return build().eval()

    return make


def _wan():
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=48,
        num_layers=4,
        rope_max_seq_len=32,
    )


def _call_wan(network, latent, sigma):
    text = _text(len(latent), 6, 16)
    return network(latent, torch.full((len(latent),), 1000.0 * sigma), text, return_dict=False)[0]


def _flux():
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    )


def _call_flux(network, latent, sigma):
    """``latent`` [B, C, H, W] as the network's tokens [B, H W, C] and back."""
    batch, _, height, width = latent.shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).reshape(-1, 3).float()
    text = _text(batch, 6, 16)
    prediction = network(
        hidden_states=latent.flatten(2).transpose(1, 2),
        encoder_hidden_states=text,
        pooled_projections=text[:, 0],
        timestep=torch.full((batch,), sigma),
        img_ids=places,
        txt_ids=torch.zeros(text.shape[1], 3),
        return_dict=False,
    )[0]
    return prediction.transpose(1, 2).reshape(latent.shape)


def _text(batch, tokens, width):
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(5))


SUBJECTS = (
    Subject("wan", WAN, _seeded(_wan), _call_wan, (2, 4, 3, 8, 8), lambda network: network.blocks[2].attn1.to_q),
    Subject(
        "flux",
        FLUX,
        _seeded(_flux),
        _call_flux,
        (2, 8, 6, 6),
        lambda network: network.single_transformer_blocks[0].proj_mlp,
    ),
)


@dataclass(frozen=True)
class Sequence:
    """Noise levels of a run, one more than steps, and the latent of every step: the same for both engines."""

    sigmas: tuple[float, ...]
    latents: tuple[torch.Tensor, ...]

    @property
    def steps(self):
        """Number of evaluations."""
        return len(self.latents)


def smooth_sequence(shape, steps=20, shift=3.0):
    """A flow's straight path from noise to a point that itself moves along an arc, so that steps differ in size."""
    generator = torch.Generator().manual_seed(3)
    noise, first, second = (torch.randn(shape, generator=generator) for _ in range(3))
    sigmas = flow_sigmas(steps, shift)
    latents = []
    for sigma in sigmas[:steps]:
        turn = torch.tensor(3.0 * (1.0 - sigma))
        latents.append(sigma * noise + (1.0 - sigma) * (torch.cos(turn) * first + torch.sin(turn) * second))
    return Sequence(sigmas, tuple(latents))
