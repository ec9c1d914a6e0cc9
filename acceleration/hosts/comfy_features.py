"""Temporal and prompt features in ComfyUI: object patches that look them up, and Linears whose weight stays in its file."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.float
import comfy.ops
import torch

from ..embeddings.rows import FileRows
from ..errors import StrettoError
from ..evaluation import Call
from ..models import describe
from ..plan import Plan
from ..temporal_features.saved import UNCHANGED
from ..temporal_features.session import FEATURES, MODULATION, PROMPT, FeaturePart
from ..temporal_features.tables import FeatureTables
from ..temporal_features.technique import prompt_paths

_SOURCE = "stretto_source"


@dataclass(frozen=True, eq=False)
class FeaturePatch:
    """Object patch in the place of a layer's ``forward``: passes through, unless the call keeps features."""

    part: FeaturePart
    original: Callable
    current: Callable[[], Call | None]

    def __call__(self, given: Any, *args: Any, **kwargs: Any) -> Any:
        # A compiled network takes the layer alone into its graph.
        call = None if args or kwargs or torch.compiler.is_compiling() else self.current()
        features = None if call is None else call.scratch.get(FEATURES)
        return self.original(given, *args, **kwargs) if features is None else features(self.part, given, self.original)


def reach_features(clone: Any, plan: Plan, current: Callable[[], Call | None]) -> None:
    """Patch the layers whose features ``plan`` keeps; once, however often it is asked."""
    network = clone.model.diffusion_model
    descriptor = describe(network)
    if descriptor is None or not plan.of("temporal_features"):
        return
    tables = FeatureTables()
    paths = [(path, MODULATION) for path in descriptor.modulation_parts(network)]
    paths += [(path, PROMPT) for path in prompt_paths(descriptor, network)]
    for path, component in paths:
        name = f"diffusion_model.{path}.forward"
        original, module = clone.get_model_object(name), network.get_submodule(path)
        if not isinstance(original, FeaturePatch):
            part = FeaturePart(path, component, lambda module=module: _held(module), tables)
            clone.add_object_patch(name, FeaturePatch(part, original, current))


def weights_identity(model: Any) -> Hashable:
    """Identify LoRAs, and modules that others have patched: another network under the same names. Without any: the file's own."""
    patcher = getattr(model, "current_patcher", None)
    patched = getattr(patcher, "object_patches", {})
    foreign = (
        (name, id(patch)) for name, patch in patched.items()
        if name.startswith("diffusion_model") and not type(patch).__module__.startswith(__package__)
    )  # fmt: skip
    found = tuple(sorted(foreign))
    return (getattr(patcher, "patches_uuid", None), found) if found or getattr(patcher, "patches", True) else UNCHANGED[0]


class _Rehearsed(Exception):
    """Ends a rehearsal at the first block."""


def rehearsal(
    executor: Any, x: torch.Tensor, sigma: torch.Tensor, args: tuple, kwargs: dict[str, Any], options: dict, first: Any
) -> Callable[[Sequence[float]], list[torch.Tensor]]:
    """Return a function that runs the network at other noise levels up to its first block, and no further.

    Wrappers, patches and ControlNets of others take no part: what they add comes later, or shows as a look-up that misses.

    Args:
        executor: of the network call, whose ``original`` is the call without anybody's wrappers.
        x: its latent.
        sigma: its noise level, one per row.
        args: what else it is given by position: c_concat, c_crossattn, control, transformer options.
        kwargs: and by name.
        options: its transformer options.
        first: hook key of the first block.
    """

    def rehearse(levels: Sequence[float]) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []

        def stop(arguments: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
            found.append(arguments["vec"])
            raise _Rehearsed

        bare = {**options, "patches_replace": {"dit": {first: stop}}, "patches": {}, "wrappers": {}, "callbacks": {}}
        given = [bare if item is options else item for item in args]
        if len(given) > 2:
            given[2] = None
        named = {name: bare if item is options else item for name, item in kwargs.items()}
        if "control" in named:
            named["control"] = None
        for level in levels:
            try:
                executor.original(x, torch.full_like(sigma, level), *given, **named)
            except _Rehearsed:
                continue
            return []  # blocks are not reached by their hook
        return found if all(isinstance(vector, torch.Tensor) for vector in found) else []

    return rehearse


def file_placeholder(rows: FileRows) -> torch.Tensor:
    """Return a tensor without storage that shows ComfyUI's loaders a weight's dtype and shape, and carries where it lies."""
    tensor = torch.empty(rows.shape, dtype=rows.dtype, device="meta")
    setattr(tensor, _SOURCE, rows)
    return tensor


@contextmanager
def _held(module: torch.nn.Module) -> Iterator[None]:
    """Read the weights that lie in files once, as long as this lasts."""
    with ExitStack() as stack:
        for inner in module.modules():
            if hasattr(inner, "stretto_hold"):
                stack.enter_context(inner.stretto_hold())
        yield


def file_operations(base: type) -> tuple[type, list[FileRows]]:
    """Return operations like ``base`` whose Linears leave their weight in the file where they are given a placeholder.

    ComfyUI sees an empty weight, which it moves and backs up for nothing. Its LoRA code gets the whole one
    (``convert_weight``) and leaves a patched one in its place, in memory, until the LoRA is taken off.
    The list returned with it gets every weight that found its place.
    """
    taken: list[FileRows] = []

    class FileOperations(base):
        class Linear(base.Linear):
            stretto_source: FileRows | None = None
            stretto_held: torch.Tensor | None = None

            @property
            def stretto_file_bytes(self) -> int:
                """Bytes of the weight that are not loaded."""
                here = self.stretto_source is None or self.weight.numel()
                return 0 if here else self.out_features * self.in_features * self.weight.dtype.itemsize

            @contextmanager
            def stretto_hold(self):
                try:
                    if self.stretto_source is not None and not self.weight.numel():
                        self.stretto_held = self._read()
                    yield
                finally:
                    self.stretto_held = None

            def _read(self):
                return self.stretto_source.whole().to(self.weight.dtype)

            def _load_from_state_dict(self, state_dict, prefix, *args):
                source = getattr(state_dict.get(f"{prefix}weight"), _SOURCE, None)
                if source is None:
                    return super()._load_from_state_dict(state_dict, prefix, *args)
                state_dict.pop(f"{prefix}weight")
                self.stretto_source, old = source, self.weight
                self.weight = torch.nn.Parameter(old.new_empty(0), requires_grad=False)
                taken.append(source)
                missing = args[2]
                super()._load_from_state_dict(state_dict, prefix, *args)
                if f"{prefix}weight" in missing:
                    missing.remove(f"{prefix}weight")

            def _save_to_state_dict(self, destination, prefix, keep_vars):
                super()._save_to_state_dict(destination, prefix, keep_vars)
                # ComfyUI asks single modules and the whole model for their size and names, the network for saving.
                if prefix and not prefix.startswith("diffusion_model.") and self.stretto_file_bytes:
                    destination[f"{prefix}weight"] = self._read()

            def forward(self, input, *args, **kwargs):
                if self.stretto_source is None or self.weight.numel():
                    return super().forward(input, *args, **kwargs)
                comfy.ops.run_every_op()
                return self.forward_comfy_cast_weights(input)

            def forward_comfy_cast_weights(self, input):
                if self.stretto_source is None or self.weight.numel():
                    return super().forward_comfy_cast_weights(input)
                empty, bias, stream = comfy.ops.cast_bias_weight(self, input, offloadable=True)
                weight = empty
                if not empty.numel():  # unless a weight function has made the patched one
                    weight = self._read() if self.stretto_held is None else self.stretto_held
                    weight = weight.to(device=input.device, dtype=input.dtype)
                output = torch.nn.functional.linear(input, weight, bias)
                comfy.ops.uncast_bias_weight(self, empty, bias, stream)
                return output

            def convert_weight(self, weight, inplace=False, **kwargs):
                if self.stretto_source is not None and not weight.numel():
                    return self._read().to(device=weight.device, dtype=weight.dtype)
                inner = getattr(super(), "convert_weight", None)
                return weight if inner is None else inner(weight, inplace=inplace, **kwargs)

            def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
                if self.stretto_source is None:
                    return super().set_weight(
                        weight, inplace_update=inplace_update, seed=seed, return_weight=return_weight, **kwargs
                    )
                made = comfy.float.stochastic_rounding(weight, self.weight.dtype, seed=seed)
                if return_weight:
                    return made
                if inplace_update:
                    raise StrettoError(
                        "a weight hook changes a layer whose weight was left in its file, where it cannot be switched; load the "
                        "model with feature weights 'loaded'"
                    )
                self.weight = torch.nn.Parameter(made, requires_grad=False)

    return FileOperations, taken
