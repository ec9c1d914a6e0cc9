"""Recording what quantizing wants to know of a model in runs of it: inputs of linear layers, and what rounding each does."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.ops
import comfy.utils
import torch

from ..errors import StrettoError
from ..quantization.architectures import FREE, Architecture, find_architecture
from ..quantization.arena import LayerState, arena_linear
from ..quantization.layouts import Layout, fitting
from ..quantization.planning import MIXED_FORMATS
from ..quantization.sensitivity import Cell, measure
from ..quantization.statistics import Statistics
from .comfy_sampling import SamplingJob

PREFIX = "diffusion_model."


def record_statistics(
    job: SamplingJob, losses: bool, steps: int, formats: Sequence[str] = MIXED_FORMATS, tick: Callable[[], None] = lambda: None
) -> Statistics:
    """Run a model and record the largest input of every channel of its linear layers; on request, what rounding each does.

    Args:
        job: a run of the 16-bit model.
        losses: round one layer at a time, and compare the ends of short runs.
        steps: of the short runs.
        formats: that layers are tried in.
        tick: called after every run; what it raises ends the work.

    Raises:
        StrettoError: the model is quantized already, or of an architecture that is not known.
    """
    network = job.model.model.diffusion_model
    layers = {name: m for name, m in network.named_modules() if isinstance(m, torch.nn.Linear)}
    architecture = _architecture(network, layers)
    free = {name: layer for name, layer in layers.items() if architecture.role(name) == FREE}
    maxima: dict[str, torch.Tensor] = {}
    recorder = _patched(job.model, {name: _recording(layer, name, maxima) for name, layer in free.items()})
    job(recorder, callback=lambda *_: None)
    tick()
    cells: list[Cell] = []
    if losses:
        cells = _losses(job, {name: layer for name, layer in free.items() if name in maxima}, steps, formats, tick)
    words = f"{architecture.title}, {job.steps} steps of {job.sampler_name}, cfg {job.cfg:g}, seed {job.seed}"
    return Statistics({name: row.float().cpu() for name, row in maxima.items()}, tuple(cells), words)


def runs(job: SamplingJob, losses: bool, formats: Sequence[str] = MIXED_FORMATS) -> int:
    """Return how many times :func:`record_statistics` will call its ``tick``, for a progress bar."""
    if not losses:
        return 1
    network = job.model.model.diffusion_model
    layers = {name: m for name, m in network.named_modules() if isinstance(m, torch.nn.Linear)}
    architecture = _architecture(network, layers)
    return 2 + sum(architecture.role(name) == FREE for name in layers) * len(formats)


def _architecture(network: torch.nn.Module, layers: Mapping[str, torch.nn.Linear]) -> Architecture:
    if any(getattr(layer, "stretto_state", None) is not None for layer in layers.values()):
        raise StrettoError("the model is quantized already; record the statistics of the 16-bit one")
    architecture = find_architecture(network.state_dict().keys())
    if architecture is None:
        raise StrettoError("the model is of no architecture that this release quantizes")
    return architecture


def _patched(model: Any, forwards: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]) -> Any:
    clone = model.clone()
    for name, forward in forwards.items():
        clone.add_object_patch(f"{PREFIX}{name}.forward", forward)
    return clone


def _recording(layer: torch.nn.Linear, name: str, maxima: dict[str, torch.Tensor]) -> Callable[..., torch.Tensor]:
    original = layer.forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        largest = x.detach().abs().reshape(-1, x.shape[-1]).amax(0)
        maxima[name] = torch.maximum(maxima[name], largest) if name in maxima else largest
        return original(x, *args, **kwargs)

    return forward


def _rounded(layer: torch.nn.Linear, layout: Layout) -> Callable[..., torch.Tensor]:
    """The layer's forward with its weight rounded, on the first call: then ComfyUI has it where it is needed."""
    made: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    state = LayerState(layout, (layer.out_features, layer.in_features))

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not made:
            weight, bias = comfy.ops.cast_bias_weight(layer, x)[:2]
            made.append((layout.quantize(weight.detach()).arena(), None if bias is None else bias.detach().clone()))
        return arena_linear(state, x, *made[0])

    return forward


def _losses(
    job: SamplingJob, layers: Mapping[str, torch.nn.Linear], steps: int, formats: Sequence[str], tick: Callable[[], None]
) -> list[Cell]:
    current = job.model

    def call(index: int) -> torch.Tensor:
        latent = job(current, steps=steps, callback=lambda *_: None)
        tick()
        return latent.float().cpu()

    @contextmanager
    def swapped(name: str, form: str):
        nonlocal current
        layer = layers[name]
        current = _patched(job.model, {name: _rounded(layer, fitting(form, layer.out_features, layer.in_features))})
        try:
            yield
        finally:
            current = job.model

    tried = {
        name: [f for f in formats if isinstance(fitting(f, layer.out_features, layer.in_features), Layout)]
        for name, layer in layers.items()
    }
    return measure(call, [0.0], tried, swapped, ranges=1)
