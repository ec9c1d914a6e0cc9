"""Which weights of a checkpoint belong to layers whose features can be kept, by architecture. Names are ComfyUI's."""

import math
import re
from collections.abc import Collection, Mapping

from ..embeddings.rows import DTYPES, Rows
from ..quantization.architectures import WEIGHT_ONLY, Architecture
from ..quantization.files import Stored

#: Architectures whose layers for few rows are all known to the feature cache, less what it does not reach.
_NOT_REACHED = {
    "flux": None, "hunyuan_video": None, "qwen_image": None, "sd3": None, "ltxv": None, "wan": r"time_projection\.1",
}  # fmt: skip

#: AuraFlow is no architecture that is quantized.
_AURAFLOW = r"(double|single)_layers\.\d+\.mod(C|X|CX)\.1\.weight"


def feature_weights(architecture: Architecture | None, tensors: Mapping[str, Stored]) -> tuple[str, ...]:
    """Return the names of weights that see the timestep or the prompt alone, and that tables can stand for."""
    if architecture is None:
        return tuple(name for name, tensor in tensors.items() if re.fullmatch(_AURAFLOW, name) and tensor.dtype in DTYPES)
    if architecture.name not in _NOT_REACHED:
        return ()
    beyond = _NOT_REACHED[architecture.name] or r"(?!)"
    layers = (name.removesuffix(".weight") for name in tensors if name.endswith(".weight"))
    return tuple(
        f"{layer}.weight" for layer in layers
        if architecture.role(layer) == WEIGHT_ONLY and not re.fullmatch(beyond, layer)
        and len(tensors[f"{layer}.weight"].shape) == 2 and tensors[f"{layer}.weight"].dtype in DTYPES
    )  # fmt: skip


def feature_note(weights: Collection[Rows]) -> str:
    """Return what became of weights that were left in their file, in words."""
    nbytes = sum(math.prod(weight.shape) * weight.dtype.itemsize for weight in weights)
    return (
        f"{len(weights)} weights stay in the file, {nbytes / 1e6:,.1f} MB: Stretto Temporal Feature Cache reads each once per "
        "list of timesteps, or prompt; without that node every step reads them all"
    )
