"""Tiny random transformers of diffusers, and a denoising loop that calls each as its pipeline does."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

TEXT, WIDTH = 6, 16


@dataclass(frozen=True)
class Family:
    """One transformer class.

    Attributes:
        make: () -> a fresh network; weights are the same every time.
        latent: shape of one latent, without the batch.
        arguments: (network, latent, text [B, 6, 16]) -> further arguments of a call.
        timestep: (scheduler's timestep [B], training timesteps) -> what the network is given.
        batched: whether one call guides: the unconditional half first, except for DiT.
        sign: of the prediction that the scheduler is given.
        scheduler: makes one.
        learned: whether variances stand behind the prediction's channels.
    """

    make: Callable[[], torch.nn.Module]
    latent: tuple[int, ...]
    arguments: Callable[[Any, torch.Tensor, torch.Tensor], dict[str, Any]]
    timestep: Callable[[torch.Tensor], torch.Tensor] = lambda t: t
    batched: bool = False
    sign: float = 1.0
    scheduler: Callable[[], Any] = lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    learned: bool = False


def _positions(tokens: int) -> torch.Tensor:
    """Rows of three tokens."""
    ids = torch.zeros(tokens, 3)
    ids[:, 1], ids[:, 2] = torch.arange(tokens) // 3, torch.arange(tokens) % 3
    return ids


def _rope(pairs: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(tokens)[:, None] * torch.linspace(0.1, 1.0, pairs).repeat_interleave(2)[None]
    return angles.cos(), angles.sin()


HEADS = {"num_attention_heads": 2, "attention_head_dim": 12}
FAMILIES = {
    "SD3Transformer2DModel": Family(
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=8, in_channels=4, out_channels=4, num_layers=4, joint_attention_dim=WIDTH,
            caption_projection_dim=24, pooled_projection_dim=WIDTH, pos_embed_max_size=8, dual_attention_layers=(0, 1),
            **HEADS,
        ),
        (4, 8, 6),
        lambda network, latent, text: {"encoder_hidden_states": text, "pooled_projections": text[:, 0]},
        batched=True,
    ),
    "FluxTransformer2DModel": Family(
        lambda: diffusers.FluxTransformer2DModel(
            in_channels=8, num_layers=2, num_single_layers=2, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH,
            axes_dims_rope=(4, 4, 4), guidance_embeds=True, **HEADS,
        ),
        (12, 8),
        lambda network, latent, text: {
            "encoder_hidden_states": text,
            "pooled_projections": text[:, 0],
            "guidance": torch.full((len(latent),), 3.5),
            "img_ids": _positions(latent.shape[1]),
            "txt_ids": torch.zeros(TEXT, 3),
        },
        timestep=lambda t: t / 1000,
    ),
    "WanTransformer3DModel": Family(
        lambda: diffusers.WanTransformer3DModel(
            in_channels=4, out_channels=4, text_dim=WIDTH, freq_dim=32, ffn_dim=48, num_layers=4, rope_max_seq_len=32,
            **HEADS,
        ),
        (4, 3, 8, 6),
        lambda network, latent, text: {"encoder_hidden_states": text},
    ),
    "QwenImageTransformer2DModel": Family(
        lambda: diffusers.QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=3, joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 4), **HEADS
        ),
        (12, 16),
        lambda network, latent, text: {
            "encoder_hidden_states": text,
            "encoder_hidden_states_mask": torch.ones(len(latent), TEXT, dtype=torch.bool),
            "img_shapes": [[(1, latent.shape[1] // 3, 3)]] * len(latent),
        },
        timestep=lambda t: t / 1000,
    ),
    "HunyuanVideoTransformer3DModel": Family(
        lambda: diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, num_refiner_layers=1, text_embed_dim=WIDTH,
            pooled_projection_dim=WIDTH, rope_axes_dim=(4, 4, 4), guidance_embeds=True, **HEADS,
        ),
        (4, 3, 8, 6),
        lambda network, latent, text: {
            "encoder_hidden_states": text,
            "encoder_attention_mask": torch.ones(len(latent), TEXT, dtype=torch.bool),
            "pooled_projections": text[:, 0],
            "guidance": torch.full((len(latent),), 3500.0),
        },
    ),
    "LTXVideoTransformer3DModel": Family(
        lambda: diffusers.LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, num_layers=3, cross_attention_dim=24, caption_channels=WIDTH, **HEADS
        ),
        (24, 8),
        lambda network, latent, text: {
            "encoder_hidden_states": text,
            "encoder_attention_mask": torch.ones(len(latent), TEXT),
            "num_frames": 2, "height": latent.shape[1] // 6, "width": 3,
        },
        batched=True,
    ),
    "CogVideoXTransformer3DModel": Family(
        lambda: diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=WIDTH,
            num_layers=3, sample_width=6, sample_height=8, sample_frames=9, max_text_seq_length=TEXT,
        ),
        (3, 4, 8, 6),
        lambda network, latent, text: {"encoder_hidden_states": text},
        batched=True,
        scheduler=lambda: diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction"),
    ),
    "PixArtTransformer2DModel": Family(
        lambda: diffusers.PixArtTransformer2DModel(
            in_channels=4, out_channels=8, num_layers=3, cross_attention_dim=24, sample_size=8, caption_channels=WIDTH,
            use_additional_conditions=False, **HEADS,
        ),
        (4, 8, 8),
        lambda network, latent, text: {
            "encoder_hidden_states": text,
            "encoder_attention_mask": torch.ones(len(latent), TEXT),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        batched=True,
        scheduler=lambda: diffusers.DPMSolverMultistepScheduler(),
        learned=True,
    ),
    "DiTTransformer2DModel": Family(
        lambda: diffusers.DiTTransformer2DModel(in_channels=4, out_channels=8, num_layers=3, sample_size=8, **HEADS),
        (4, 8, 8),
        lambda network, latent, text: {"class_labels": (text[:, 0, 0].abs() * 100).long()},
        batched=True,
        scheduler=lambda: diffusers.DDIMScheduler(),
        learned=True,
    ),
    "Lumina2Transformer2DModel": Family(
        lambda: diffusers.Lumina2Transformer2DModel(
            sample_size=8, in_channels=4, out_channels=4, hidden_size=24, num_layers=3, num_refiner_layers=1,
            num_attention_heads=2, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(30, 16, 16),
            cap_feat_dim=WIDTH,
        ),
        (4, 8, 6),
        lambda network, latent, text: {
            "encoder_hidden_states": text, "encoder_attention_mask": torch.ones(len(latent), TEXT, dtype=torch.bool)
        },
        timestep=lambda t: 1 - t / 1000,
        sign=-1.0,
    ),
}  # fmt: skip


def network_of(name: str, seed: int = 7) -> torch.nn.Module:
    """Return the tiny network; random weights large enough that blocks matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = FAMILIES[name].make().eval()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.12)
    return network


@dataclass
class Loop:
    """What stands in for a pipeline: a transformer, a scheduler, and the attributes that pipelines have.

    Attributes:
        name: key of :data:`FAMILIES`.
        transformer: its network.
        scheduler: its scheduler.
        guidance_scale: CFG; 1 for none.
        embeddings: text [2, 6, 16]: conditional, unconditional.
    """

    name: str
    transformer: torch.nn.Module
    scheduler: Any
    guidance_scale: float = 4.0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.embeddings = torch.randn(2, TEXT, WIDTH, generator=generator)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """As pipelines say it."""
        return self.guidance_scale > 1.0

    @torch.no_grad()
    def __call__(
        self, steps: int = 8, batch: int = 1, seed: int = 1, latent: tuple[int, ...] = (), callback=None, return_dict=False
    ) -> torch.Tensor:
        """Sample and return the latent."""
        family = FAMILIES[self.name]
        shape = latent or family.latent
        x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))
        cond, uncond = (row[None].repeat(batch, 1, 1) for row in self.embeddings)
        self.scheduler.set_timesteps(steps)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        text = {}
        if family.batched and self.do_classifier_free_guidance:
            cond_first = self.name.startswith("DiT")
            both = torch.cat((cond, uncond) if cond_first else (uncond, cond))
            text["both"] = family.arguments(self.transformer, x.repeat(2, *[1] * len(shape)), both)
        else:
            text["cond"] = family.arguments(self.transformer, x, cond)
            text["uncond"] = family.arguments(self.transformer, x, uncond)
        for step, t in enumerate(self.scheduler.timesteps):
            if "both" in text:
                first, second = self._call(torch.cat((x, x)), t, text["both"], return_dict).chunk(2)
                c, u = (first, second) if cond_first else (second, first)
                out = u + self.guidance_scale * (c - u)
            else:
                out = self._call(x, t, text["cond"], return_dict)
                if self.do_classifier_free_guidance:
                    u = self._call(x, t, text["uncond"], return_dict)
                    out = u + self.guidance_scale * (out - u)
            if family.learned:
                out = out.chunk(2, dim=1)[0]
            x = self.scheduler.step(family.sign * out, t, x, return_dict=False)[0]
            if callback is not None:
                callback(step)
        return x

    def _call(self, x, t, arguments, return_dict):
        given = self.scheduler.scale_model_input(x, t) if hasattr(self.scheduler, "scale_model_input") else x
        timestep = FAMILIES[self.name].timestep(t.expand(len(x)))
        out = self.transformer(hidden_states=given, timestep=timestep, return_dict=return_dict, **arguments)
        return out.sample if return_dict else out[0]


def loop(name: str, **options) -> Loop:
    """Return a pipeline stand-in with a network and scheduler of its own."""
    return Loop(name, network_of(name), FAMILIES[name].scheduler(), **options)
