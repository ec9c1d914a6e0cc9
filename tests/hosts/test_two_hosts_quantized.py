"""A quantized file in both hosts: the same prediction from the same bytes, and what is refused."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from stretto.acceleration.errors import StrettoError
from stretto.acceleration.hosts import comfy_quantization
from stretto.acceleration.plan import Request
from stretto.acceleration.quantization.layouts import NAMES
from stretto.acceleration.quantization.quantizing import plan_file, write_file

from ..oracles.packages import required

required("diffusers")
from stretto.acceleration.hosts.diffusers import accelerate  # noqa: E402
from stretto.acceleration.hosts.diffusers_files import load_transformer  # noqa: E402
from stretto.acceleration.hosts.diffusers_quantization import QuantizedLinear, quantized_weights  # noqa: E402

MODELS = Path(__file__).resolve().parents[2] / "demo" / "models" / "diffusion_models"
IMAGE, VIDEO = MODELS / "stretto-demo-image.safetensors", MODELS / "stretto-demo-video.safetensors"
#: Formats whose products round activations flip a code here and there.
CLOSE = {"int8": 2e-3, "w6a8": 2e-3, "w4a8": 2e-3}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return ``made(format, source)``: path of a demo model in a format, written once."""
    folder, paths = tmp_path_factory.mktemp("quantized"), {}

    def make(form, source=IMAGE):
        if (form, source) not in paths:
            path = folder / f"{source.stem}-{form}.safetensors"
            plan = plan_file(source, format=form)
            with plan.checkpoint:
                write_file(plan, path)
            paths[form, source] = path
        return paths[form, source]

    return make


@pytest.fixture
def transformer():
    return load_transformer(IMAGE)


def arguments():
    generator = torch.Generator().manual_seed(3)
    x, text, pooled = (torch.randn(*shape, generator=generator) for shape in ((2, 16, 8, 8), (2, 12, 384), (2, 384)))
    return x, torch.full((2,), 700.0), text, pooled


@torch.no_grad()
def predict(transformer):
    x, t, text, pooled = arguments()
    return transformer(x, timestep=t, encoder_hidden_states=text, pooled_projections=pooled).sample


def relative(got, right):
    return float((got - right).norm() / right.norm())


@pytest.mark.parametrize("form", NAMES)
def test_one_file_one_prediction(made, transformer, form):
    x, t, text, pooled = arguments()
    comfys, _ = comfy_quantization.load_diffusion_model(str(made(form)), loader=comfy_quantization.STRETTO)
    plain, keys = predict(transformer), set(transformer.state_dict())
    with torch.no_grad():
        expected = comfys.model.diffusion_model(x, t, context=text, y=pooled)
    with quantized_weights(transformer, made(form)) as layers:
        kinds = [type(module) for module in transformer.modules()]
        assert kinds.count(QuantizedLinear) == layers >= 30
        result = predict(transformer)
    assert relative(result, expected) < CLOSE.get(form, 1e-5)
    assert 1e-3 < relative(result, plain) < 0.5
    assert set(transformer.state_dict()) == keys and torch.equal(predict(transformer), plain)


def test_it_comes_back_after_errors_and_runs_under_a_plan(made, transformer):
    plain = predict(transformer)
    with pytest.raises(KeyboardInterrupt), quantized_weights(transformer, made("int8")):
        raise KeyboardInterrupt
    assert torch.equal(predict(transformer), plain)
    sigmas = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
    taylor = Request("cache", {"method": "Taylor", "interval": 2, "warmup": 2, "tail": 1})
    x, _, text, pooled = arguments()
    with quantized_weights(transformer, made("int8")), accelerate(transformer, taylor, sigmas=sigmas) as run, torch.no_grad():
        for now, after in pairwise(sigmas):
            t = torch.full((2,), 1000 * now)
            out = transformer(x, timestep=t, encoder_hidden_states=text, pooled_projections=pooled).sample
            x = x + (after - now) * out
    assert run.trace["totals"]["forecast"] >= 1 and bool(x.isfinite().all())
    assert torch.equal(predict(transformer), plain)


def test_a_network_moved_inside_stays_whole(made, transformer):
    with quantized_weights(transformer, made("w4a16")):
        transformer.to(torch.bfloat16)
        assert all(module.arena.dtype == torch.uint8 for module in transformer.modules() if isinstance(module, QuantizedLinear))
    assert {parameter.dtype for parameter in transformer.parameters()} == {torch.bfloat16}


def test_other_files_are_refused_by_name(made, transformer, tmp_path):
    plain = predict(transformer)
    for path, words in ((IMAGE, "expected quantized layers"), (made("int8", VIDEO), "has no place in SD3Transformer2DModel")):
        with pytest.raises(StrettoError, match=words), quantized_weights(transformer, path):
            pass
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(made("int8").read_bytes()[:-64])
    with pytest.raises(StrettoError, match="cut"), quantized_weights(transformer, cut):
        pass
    smaller = type(transformer).from_config({**transformer.config, "num_layers": 3})
    with pytest.raises(StrettoError, match="has no place"), quantized_weights(smaller, made("int8")):
        pass
    assert torch.equal(predict(transformer), plain)
