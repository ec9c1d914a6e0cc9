"""How the networks of ComfyUI's video VAEs are driven at a frame rate that changes.

An adapter stands in the place of a VAE's network: ``encode`` and ``decode`` as ComfyUI calls them. It drives the
network's own modules in segments and changes features only where it pools or repeats them in time.
"""

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import comfy.ldm.wan.vae
import torch

from ..frame_rate.schedule import FrameRateSchedule


class Adapter(Protocol):
    """What :class:`~.comfy_video_vae.DynamicRateVAE` asks of an adapter, which is made from (network, patcher, schedule)."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Return latents [B, C, L', h, w] of frames [B, 3, T, H, W], as the network takes them."""

    def decode(self, z: torch.Tensor, **options: Any) -> torch.Tensor:
        """Return frames [B, 3, T, H, W] of latents [B, C, L', h, w]."""

    def encode_memory(self, rate: int) -> float:
        """Return how many times as much memory encoding takes where ``rate`` is the lowest rate's divisor."""

    def decode_memory(self, rate: int) -> float:
        """Return how many times as much memory decoding takes."""


class WanAdapter:
    """Wan 2.1: features are pooled before the encoder's middle and repeated after the decoder's middle.

    Each segment is one chunk of ``4 * rate`` frames through the encoder and one latent through the decoder. Wan's
    caches hold the last two time steps of whatever chunk came before, so they carry over from rate to rate.
    """

    def __init__(self, network: Any, patcher: Any, schedule: FrameRateSchedule):
        self.network, self.schedule, self._rate = network, schedule, 1
        enter, leave = "encoder.middle.0.forward", f"decoder.middle.{len(network.decoder.middle) - 1}.forward"
        patcher.add_object_patch(enter, self._pooling(patcher.get_model_object(enter)))
        patcher.add_object_patch(leave, self._repeating(patcher.get_model_object(leave)))

    @staticmethod
    def obstacle(network: Any) -> str | None:
        """Return why this network cannot be driven, or None."""
        wanted = ["x", "feat_cache", "feat_idx"]
        for name in ("encoder", "decoder"):
            found = list(inspect.signature(getattr(network, name).forward).parameters)
            if found[:3] != wanted:
                return f"this ComfyUI's Wan {name} takes ({', '.join(found)}), not ({', '.join(wanted)})"
        return None

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """See :class:`Adapter`."""
        caches, cuts = self._caches(), self.schedule.legal_cuts()
        parts = []
        try:
            for first, end, rate in zip(cuts[:-1], cuts[1:], (1, *self.schedule.rates), strict=True):
                self._rate = rate
                parts.append(self.network.encoder(x[:, :, first:end], feat_cache=caches, feat_idx=[0]))
        finally:
            self._rate = 1
        return self.network.conv1(torch.cat(parts, 2)).chunk(2, dim=1)[0]

    def decode(self, z: torch.Tensor, **options: Any) -> torch.Tensor:
        """See :class:`Adapter`."""
        caches, x = self._caches(), self.network.conv2(z)
        parts = []
        try:
            for i, rate in enumerate((1, *self.schedule.rates)):
                self._rate = rate
                parts.append(self.network.decoder(x[:, :, i : i + 1], feat_cache=caches, feat_idx=[0]))
        finally:
            self._rate = 1
        return torch.cat(parts, 2)

    def encode_memory(self, rate: int) -> float:
        """See :class:`Adapter`: a chunk is ``rate`` times as long."""
        return float(rate)

    def decode_memory(self, rate: int) -> float:
        """See :class:`Adapter`: a latent becomes ``rate`` times as many frames."""
        return float(rate)

    def _caches(self) -> list:
        return [None] * comfy.ldm.wan.vae.count_conv3d(self.network.decoder)

    def _pooling(self, original: Callable) -> Callable:
        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            rate = self._rate
            return original(x if rate == 1 else _pooled(x, rate), *args, **kwargs)

        return forward

    def _repeating(self, original: Callable) -> Callable:
        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            rate, out = self._rate, original(x, *args, **kwargs)
            return out if rate == 1 else out.repeat_interleave(rate, dim=2)

        return forward


def _pooled(x: torch.Tensor, rate: int) -> torch.Tensor:
    """Return features [B, C, T, h, w] averaged over every ``rate`` time steps."""
    return x.unflatten(2, (-1, rate)).mean(3)


#: Exact class name of a network -> what drives it.
ADAPTERS: dict[str, type] = {"comfy.ldm.wan.vae.WanVAE": WanAdapter}


def adapter_for(network: Any) -> type | str:
    """Return the adapter of ``network``, or why it has none."""
    name = f"{type(network).__module__}.{type(network).__qualname__}"
    if name not in ADAPTERS:
        return f"there is no adapter for {type(network).__name__}"
    return ADAPTERS[name].obstacle(network) or ADAPTERS[name]
