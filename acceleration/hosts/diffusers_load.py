"""Pipelines of diffusers from checked folders, and from the hub where a user asks for it. Imports diffusers when it must."""

import importlib.util
import inspect
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..errors import StrettoError
from .diffusers_folder import Component, Folder

DTYPES: Mapping[str, torch.dtype | None] = {
    "as stored": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
#: What a pipeline needs of a repository; neither pickles nor code.
_WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "DIFFUSERS_OFFLINE")
_SLACK = 1 << 30
log = logging.getLogger("stretto")


def import_diffusers() -> Any:
    """Return the module ``diffusers``.

    Raises:
        StrettoError: it is not installed, or does not fit the other packages; says what to type.
    """
    try:
        import diffusers
    except ImportError as error:
        raise StrettoError(
            f"pipelines of diffusers need the package diffusers, which cannot be imported here ({str(error)[:160]}). Install it "
            "into ComfyUI's Python: pip install diffusers"
        ) from error
    return diffusers


def load_pipeline(folder: Folder, dtype: torch.dtype | None = None) -> Any:
    """Return the pipeline of a checked folder, in evaluation mode on the processor.

    Args:
        folder: what :func:`~.diffusers_folder.check_folder` returned.
        dtype: type of all weights; None takes what the transformer's are stored in.

    Raises:
        StrettoError: diffusers is missing, a class is unknown to it, weights do not fit their configuration, or memory is short.
    """
    diffusers = import_diffusers()
    pipeline_class = _class_of(diffusers, "diffusers", folder.class_name, f"{folder.path}")
    if not issubclass(pipeline_class, diffusers.DiffusionPipeline):
        raise StrettoError(f"{folder.path}: {folder.class_name} is no pipeline of diffusers")
    takes = set(inspect.signature(pipeline_class.__init__).parameters)
    for component in folder.components.values():
        if component.name not in takes:
            raise StrettoError(f"{folder.path}: {folder.class_name} has no component {component.name!r}")
        _check_component(diffusers, component)
    given = {*folder.components, *folder.absent, *getattr(pipeline_class, "_optional_components", ())}
    modules, _ = pipeline_class._get_signature_keys(pipeline_class)
    lacking = sorted(name for name in modules if name not in given)
    if lacking:
        raise StrettoError(
            f"{folder.path}/model_index.json: {lacking[0]} is missing, which a {folder.class_name} needs; where it is left out "
            f'on purpose the file says "{lacking[0]}": [null, null]'
        )
    dtype = dtype or _stored(folder)
    _refuse_memory(folder, dtype)
    log.info("Stretto: loading %s from %s in %s", folder.class_name, folder.path, str(dtype).removeprefix("torch."))
    try:
        networks = {
            name: _network(getattr(diffusers, part.class_name), part, dtype)
            for name, part in folder.components.items()
            if part.headers and part.library == "diffusers"
        }
        pipeline = pipeline_class.from_pretrained(
            str(folder.path),
            torch_dtype=dtype,
            variant=folder.variant,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=importlib.util.find_spec("accelerate") is not None,
            **dict.fromkeys(folder.absent),
            **networks,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise StrettoError(
            f"{folder.path}: diffusers cannot load it: {type(error).__name__}: {str(error)[:300]}"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
    return pipeline


def _stored(folder: Folder) -> torch.dtype:
    return next(part.dtype for name, part in folder.components.items() if name.startswith("transformer"))


def _class_of(diffusers: Any, library: str, name: str, where: str) -> type:
    if library == "transformers":
        try:
            import transformers as module
        except ImportError as error:
            raise StrettoError(f"{where}: needs the package transformers: pip install transformers") from error
    else:
        module = diffusers
    found = getattr(module, name, None)
    if not isinstance(found, type):
        raise StrettoError(
            f"{where}: the {library} installed here ({module.__version__}) has no class {name}; a newer one may, or "
            "the name is wrong"
        )
    if getattr(found, "_backends", None):
        raise StrettoError(f"{where}: {name} needs {', '.join(found._backends)}, of which something is not installed")
    return found


def _check_component(diffusers: Any, component: Component) -> None:
    """Refuse a class that is none, and weights that do not fit the network which the configuration describes."""
    where = str(component.folder)
    found = _class_of(diffusers, component.library, component.class_name, where)
    if not hasattr(found, "from_pretrained"):
        raise StrettoError(f"{where}: {component.class_name} of {component.library} is no component of a pipeline")
    if not component.headers or component.library != "diffusers":
        return
    try:
        with torch.device("meta"):
            network = found.from_config(dict(component.config))
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, AssertionError, ZeroDivisionError) as error:
        raise StrettoError(
            f"{where}/config.json: no {component.class_name} can be built from it: {str(error)[:200]}"
        ) from error
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    shapes = component.shapes
    for name, shape in expected.items():
        if name not in shapes:
            raise StrettoError(
                f"{where}: the weight {name} is missing; the file is not whole, or belongs to another config.json"
            )
        if shapes[name] != shape:
            raise StrettoError(
                f"{where}: {name} is {list(shapes[name])}, but config.json describes a network where it is {list(shape)}"
            )


def _network(found: type, component: Component, dtype: torch.dtype) -> torch.nn.Module:
    """Return a network of diffusers with the weights of its files; no weight is allocated twice.

    Its own ``from_pretrained`` makes random weights first unless the package accelerate is there, and fails for Wan without it.
    """
    from safetensors.torch import load_file

    with _weightless():
        network = found.from_config(dict(component.config))
    kept = set(getattr(found, "_keep_in_fp32_modules", None) or ())
    weights = {}
    wanted = set(network.state_dict())
    for header in component.headers:
        for name, tensor in load_file(header.path).items():
            if name in wanted:
                precise = torch.float32 if kept & set(name.split(".")) else dtype
                weights[name] = tensor.to(precise) if tensor.is_floating_point() else tensor
    network.load_state_dict(weights, assign=True)
    network.register_to_config(_name_or_path=str(component.folder))
    return network


@contextmanager
def _weightless() -> Iterator[None]:
    """Make parameters of networks built meanwhile empty; buffers, which files need not hold, are made as ever."""
    here = threading.get_ident()

    def empty(module: torch.nn.Module, name: str, parameter: Any) -> torch.nn.Parameter | None:
        if parameter is None or threading.get_ident() != here:
            return None
        return torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(empty)
    try:
        yield
    finally:
        handle.remove()


def _refuse_memory(folder: Folder, dtype: torch.dtype) -> None:
    from .device import free_memory

    needed = sum(
        part.nbytes * dtype.itemsize // part.dtype.itemsize for part in folder.components.values() if part.headers
    )
    free = free_memory(torch.device("cpu"))
    if free and needed > free:
        raise StrettoError(
            f"{folder.path}: its weights take {needed / 2**30:.1f} GB in {str(dtype).removeprefix('torch.')}, and "
            f"{free / 2**30:.1f} GB of system memory are free"
        )


def download(hub_id: str, base: Path) -> Path:
    """Get a pipeline from the Hugging Face hub into a folder of its own below ``base``; safetensors and texts alone.

    Raises:
        StrettoError: the id is none, this machine is set to be offline, the disk has no room, or the hub refuses.
    """
    hub_id = hub_id.strip()
    if not _HUB_ID.fullmatch(hub_id) or ".." in hub_id:
        raise StrettoError(f"hub_id is {hub_id!r:.120}; expected owner/name, as on the model's page")
    target = base / hub_id.replace("/", "--")
    if (target / "model_index.json").is_file() and not (target / ".stretto-incomplete").exists():
        return target
    offline = [name for name in _OFFLINE if os.environ.get(name, "").lower() in ("1", "true", "yes", "on")]
    if offline:
        raise StrettoError(f"{hub_id} is not in {base}, and {offline[0]} is set, so nothing is downloaded")
    try:
        import huggingface_hub
    except ImportError as error:
        raise StrettoError("downloading needs the package huggingface_hub: pip install huggingface_hub") from error
    try:
        size = _size(huggingface_hub, hub_id)
        base.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(base).free
        if size + _SLACK > free:
            raise StrettoError(f"{hub_id} takes {size / 2**30:.1f} GB, and {free / 2**30:.1f} GB are free in {base}")
        target.mkdir(exist_ok=True)
        (target / ".stretto-incomplete").touch()
        log.info("Stretto: downloading %s (%.1f GB) to %s", hub_id, size / 2**30, target)
        huggingface_hub.snapshot_download(hub_id, local_dir=target, allow_patterns=list(_WANTED))
        (target / ".stretto-incomplete").unlink()
    except StrettoError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise StrettoError(f"{hub_id} cannot be downloaded: {reason[:300]}") from error
    return target


def _size(hub: Any, hub_id: str) -> int:
    found = hub.HfApi().model_info(hub_id, files_metadata=True).siblings or []
    names = {part.rfilename for part in found}
    if "model_index.json" not in names:
        raise StrettoError(f"{hub_id} holds no model_index.json, so it is no diffusers pipeline")
    endings = tuple(pattern.removeprefix("*") for pattern in _WANTED)
    return sum(part.size or 0 for part in found if part.rfilename.endswith(endings))
