"""Linear layers of other libraries, for the table of products in quantization.py: int8, quantizing the input included."""

from collections.abc import Callable


def peers(x, weight, bias) -> tuple[dict[str, Callable], dict[str, str]]:
    """Return what multiplies ``x`` [M, K] with ``weight`` [N, K] in int8 and adds ``bias`` [N], by name, and who is absent."""
    ways, absent = {}, {}
    for name, make in (("comfy-kitchen", _comfy_kitchen), ("torchao", _torchao)):
        try:
            way = make(weight, bias)
            way(x)
        except ImportError:
            absent[name] = "not installed"
        except (RuntimeError, NotImplementedError) as error:  # no backend of theirs for this device or shape
            absent[name] = str(error).splitlines()[0]
        else:
            ways[f"int8, {name}"] = lambda way=way: way(x)
    return ways, absent


def _comfy_kitchen(weight, bias) -> Callable:
    import comfy_kitchen

    codes, scale = comfy_kitchen.quantize_int8_rowwise(weight)
    return lambda x: comfy_kitchen.int8_linear(x, codes, scale, bias.to(x.dtype))


def _torchao(weight, bias) -> Callable:
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    module = torch.nn.Sequential(layer)
    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    return module
