"""Networks of a diffusers pipeline under ComfyUI's memory management: each is loaded when the pipeline calls it."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch

#: Calls of a VAE, which do not go through its ``forward``.
_CALLS = ("encode", "decode")
#: Bytes of activations per byte of the largest tensor that a network is given; a guess on the safe side.
_TRANSFORMER, _VAE, _OTHER = 64, 4096, 16


class Holder(torch.nn.Module):
    """A network as ComfyUI's ModelPatcher wants it: diffusers' own ``device`` cannot be set."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network, self.device = network, None


class Residents:
    """The networks of one pipeline, each in a ModelPatcher, so that ComfyUI can make room by moving them away."""

    def __init__(self, pipeline: Any) -> None:
        self.device = comfy.model_management.get_torch_device()
        offload = comfy.model_management.unet_offload_device()
        self.patchers = {
            name: comfy.model_patcher.ModelPatcher(Holder(part), load_device=self.device, offload_device=offload)
            for name, part in pipeline.components.items()
            if isinstance(part, torch.nn.Module)
        }

    @contextmanager
    def at_work(self, seen: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
        """While this lasts, a network is loaded before each of its calls, and an interrupt ends the run there.

        Args:
            seen: told (component, first tensor) of every call of a VAE.
        """
        undo: list[Callable[[], None]] = []
        loaded: list[str | None] = [None]
        try:
            for name, patcher in self.patchers.items():
                network = patcher.model.network
                before = functools.partial(self._before, name, loaded)
                handle = network.register_forward_pre_hook(
                    lambda module, args, kwargs, before=before: before((*args, *kwargs.values())), with_kwargs=True
                )
                undo.append(handle.remove)
                undo += [_wrap(network, call, before, name, seen) for call in _CALLS if hasattr(network, call)]
            yield
        finally:
            while undo:
                undo.pop()()

    def _before(self, name: str, loaded: list[str | None], given: tuple) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if loaded[0] == name:
            return
        largest = max(
            (part.numel() * part.element_size() for part in given if isinstance(part, torch.Tensor)), default=0
        )
        factor = _TRANSFORMER if name.startswith("transformer") else _VAE if name.startswith("vae") else _OTHER
        comfy.model_management.load_models_gpu(
            [self.patchers[name]], memory_required=largest * factor, force_full_load=True
        )
        loaded[0] = name


def _wrap(network: Any, call: str, before: Callable, name: str, seen: Callable) -> Callable[[], None]:
    """Put ``before`` in front of a method of one instance; return what undoes it."""
    own, original = network.__dict__.get(call), getattr(network, call)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before((*args, *kwargs.values()))
        first = next((part for part in (*args, *kwargs.values()) if isinstance(part, torch.Tensor)), None)
        if call == "decode" and first is not None:
            seen(name, first)
        return original(*args, **kwargs)

    setattr(network, call, wrapped)

    def restore() -> None:
        if own is None:
            delattr(network, call)
        else:
            setattr(network, call, own)

    return restore
