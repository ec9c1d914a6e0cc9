"""How the networks of ComfyUI's video VAEs are driven at a frame rate that changes.

An adapter stands in the place of a VAE's network: ``encode`` and ``decode`` as ComfyUI calls them. It drives the
network's own modules in segments and changes features only where it pools or repeats them in time.
"""

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import comfy.ldm.modules.diffusionmodules.model
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


class WholeClipAdapter:
    """HunyuanVideo 1.0: pooled before the encoder's middle, repeated after the decoder's, the whole clip at once.

    No caches and no segments, so rates may change anywhere and nothing needs a warm-up.
    """

    def __init__(self, network: Any, patcher: Any, schedule: FrameRateSchedule):
        self.network, self.rates, self._active = network, (1, *schedule.rates), False
        enter, leave = "encoder.mid.block_1.forward", "decoder.mid.block_2.forward"
        patcher.add_object_patch(enter, self._pooling(patcher.get_model_object(enter)))
        patcher.add_object_patch(leave, self._repeating(patcher.get_model_object(leave)))

    @staticmethod
    def obstacle(network: Any) -> str | None:
        """Return why this network cannot be driven, or None."""
        video = getattr(comfy.ldm.modules.diffusionmodules.model, "VideoConv3d", None)
        if video is None or not isinstance(getattr(network.encoder, "conv_in", None), video):
            return "it codes pictures, not videos"
        if not hasattr(network.encoder, "mid") or not hasattr(network.decoder, "mid"):
            return "its encoder or decoder has no middle"
        return None

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """See :class:`Adapter`."""
        return self._run(self.network.encode, x)

    def decode(self, z: torch.Tensor, **options: Any) -> torch.Tensor:
        """See :class:`Adapter`."""
        return self._run(self.network.decode, z, **options)

    def encode_memory(self, rate: int) -> float:
        """See :class:`Adapter`: as ever."""
        return 1.0

    def decode_memory(self, rate: int) -> float:
        """See :class:`Adapter`: the estimate sees short latents of which at most ``rate`` times as many become frames."""
        return float(rate)

    def _run(self, function: Callable, x: torch.Tensor, **options: Any) -> torch.Tensor:
        self._active = True
        try:
            return function(x, **options)
        finally:
            self._active = False

    def _pooling(self, original: Callable) -> Callable:
        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return original(_pooled_by(x, self.rates, 2) if self._active else x, *args, **kwargs)

        return forward

    def _repeating(self, original: Callable) -> Callable:
        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            out = original(x, *args, **kwargs)
            return out.repeat_interleave(torch.tensor(self.rates, device=out.device), dim=2) if self._active else out

        return forward


class TinyVideoAdapter:
    """The tiny video VAEs (TAEHV): their pooling and growing layers of stride 1 take the rates as strides.

    Both stand where time is compressed the most, the one before the encoder's last stage, the other behind the
    decoder's first, and the network's own loop asks them for their stride at every time step.
    """

    def __init__(self, network: Any, patcher: Any, schedule: FrameRateSchedule):
        self.network, self.rates = network, (1, *schedule.rates)
        pool, grow = _unit_layers(network)
        names = f"encoder.{pool}", f"decoder.{grow}"
        # Another clone's layers may stand in the network still; the patcher knows the original ones.
        pooling, growing = (patcher.get_model_object(name) for name in names)
        self._layers = _rated(pooling, self.rates, _pool_step), _rated(growing, self.rates, _grow_step)
        for name, layer in zip(names, self._layers, strict=True):
            patcher.add_object_patch(name, layer)

    @staticmethod
    def obstacle(network: Any) -> str | None:
        """Return why this network cannot be driven, or None."""
        if not {"parallel", "frames_to_trim"} <= set(vars(network)):
            return f"this ComfyUI's {type(network).__name__} is built otherwise"
        return "it has no pooling or growing layer of stride 1" if None in _unit_layers(network) else None

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """See :class:`Adapter`."""
        return self._run(self.network.encode, x)

    def decode(self, z: torch.Tensor, **options: Any) -> torch.Tensor:
        """See :class:`Adapter`."""
        return self._run(self.network.decode, z, **options)

    def encode_memory(self, rate: int) -> float:
        """See :class:`Adapter`: as ever."""
        return 1.0

    def decode_memory(self, rate: int) -> float:
        """See :class:`Adapter`: a latent becomes up to ``rate`` times as many frames."""
        return float(rate)

    def _run(self, function: Callable, x: torch.Tensor, **options: Any) -> torch.Tensor:
        for layer in self._layers:
            layer.start(x.shape[0], self.network.parallel)
        try:
            return function(x, **options)
        finally:
            for layer in self._layers:
                layer.stop()


def _unit_layers(network: Any) -> tuple[int | None, int | None]:
    """Return the places of the encoder's pooling and the decoder's growing layer of stride 1; None where it has none."""

    def place(part: Any, kind: str) -> int | None:
        names = [{base.__name__ for base in type(layer).__mro__} for layer in part]
        return next((i for i, layer in enumerate(part) if kind in names[i] and layer.stride == 1), None)

    return place(network.encoder, "TPool"), place(network.decoder, "TGrow")


def _rated(layer: torch.nn.Module, rates: tuple[int, ...], step: Callable) -> torch.nn.Module:
    """Return a layer of the same kind, with the same weights, whose stride follows ``rates`` while it is started."""

    class Rated(type(layer)):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.conv = layer.conv
            self.stop()

        def start(self, batch: int, parallel: bool) -> None:
            self.batch, self.parallel, self.place, self.stride = batch, parallel, 0, rates[0]
            self.active = True

        def stop(self) -> None:
            self.active, self.stride = False, 1

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.active:
                return self.conv(x)
            return step(self, x, rates)

    return Rated()


def _pool_step(layer: Any, x: torch.Tensor, rates: tuple[int, ...]) -> torch.Tensor:
    """Pool what the network's loop has gathered for one latent (or, in parallel mode, everything)."""
    steps = x.unflatten(0, (layer.batch, -1))
    if layer.parallel:
        return layer.conv(_pooled_by(steps, rates, 1).flatten(0, 1))
    pooled = steps[:, 0] if layer.stride == 1 else steps.mean(1)
    layer.place += 1
    layer.stride = rates[min(layer.place, len(rates) - 1)]
    return layer.conv(pooled)


def _grow_step(layer: Any, x: torch.Tensor, rates: tuple[int, ...]) -> torch.Tensor:
    """Repeat one latent's features (or, in parallel mode, everybody's)."""
    out = layer.conv(x)
    if layer.parallel:
        steps = out.unflatten(0, (layer.batch, -1))
        return steps.repeat_interleave(torch.tensor(rates, device=x.device), dim=1).flatten(0, 1)
    layer.stride = rates[layer.place]
    layer.place += 1
    return out.repeat_interleave(layer.stride, 0)


def _pooled_by(x: torch.Tensor, rates: tuple[int, ...], axis: int) -> torch.Tensor:
    """Return features averaged along ``axis`` over consecutive runs of ``rates`` time steps."""
    runs = x.split(rates, axis)
    return torch.cat([run if run.shape[axis] == 1 else run.mean(axis, keepdim=True) for run in runs], axis)


#: Exact class name of a network -> what drives it.
ADAPTERS: dict[str, type] = {
    "comfy.ldm.wan.vae.WanVAE": WanAdapter,
    "comfy.ldm.models.autoencoder.AutoencoderKL": WholeClipAdapter,
    "comfy.taesd.taehv.TAEHV": TinyVideoAdapter,
}


def adapter_for(network: Any) -> type | str:
    """Return the adapter of ``network``, or why it has none."""
    name = f"{type(network).__module__}.{type(network).__qualname__}"
    if name not in ADAPTERS:
        return f"there is no adapter for {type(network).__name__}"
    return ADAPTERS[name].obstacle(network) or ADAPTERS[name]
