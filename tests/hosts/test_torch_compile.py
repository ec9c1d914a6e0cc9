"""A compiled network beside the techniques: the same latent to the bit, the same decisions, and no graph per decision."""

import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper

from stretto.acceleration.hosts import comfy as host
from stretto.acceleration.models import describe
from stretto.acceleration.plan import Request

from .tiny_models import sample

#: Hooks around blocks; around modules inside them; tokens left out; attention chosen at run time.
REQUESTS = {
    "FBCache": Request("cache", {"method": "FBCache", "threshold": 1.0, "max_skips": 3, "warmup": 2, "tail": 1}),
    "FORA modules": Request("cache", {"method": "FORA modules", "interval": 2, "warmup": 2, "tail": 1}),
    "region": Request("region", {"ratio": 0.5, "start": 2, "tail": 0, "refresh_every": 3, "min_tokens": 0}),
    "sparse attention": Request(
        "attention", {"method": "Block mass", "keep": 0.5, "min_tokens": 0, "block": 16, "dense_until": 0.0}
    ),
}
CLIP, STEPS = (16, 3, 12, 8), 8


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, keys=("diffusion_model",)):
    """Compile as ComfyUI's node does, by the front end alone; it asks which graphs there are, and runs them as they stand."""
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    clone = model.clone()
    set_torch_compile_wrapper(clone, backend, keys=list(keys))
    return clone, graphs


def blocks_of(model):
    network = model.model.diffusion_model
    lists = [name for _, name in describe(network).block_lists]
    return [f"diffusion_model.{name}.{index}" for name in lists for index in range(len(getattr(network, name)))]


def decisions():
    trace = host.TRACES.of_prompt(None)[-1]
    assert trace["techniques"][0]["status"] == "active"
    return [(entry["decision"], entry.get("active_share")) for entry in trace["evaluations"]]


def run(model, steps=STEPS):
    return sample(model, "wan", steps=steps, shape=CLIP)


@pytest.mark.parametrize("name", REQUESTS)
def test_a_compiled_network_decides_and_computes_the_same(tiny, name):
    right, expected = run(host.request(tiny("wan"), REQUESTS[name])), decisions()
    model, graphs = compiled(host.request(tiny("wan"), REQUESTS[name]))
    assert torch.equal(run(model), right) and decisions() == expected
    made = len(graphs)
    assert made
    assert torch.equal(run(model), right) and decisions() == expected and len(graphs) == made
    run(model, STEPS + 2)  # ComfyUI hands all levels to the network: another length is another shape, the third a free one
    made = len(graphs)
    run(model, 2 * STEPS)
    assert len(decisions()) > len(expected) and len(graphs) == made, "graphs stand for shapes and places, not for decisions"


def test_the_order_of_the_nodes_does_not_matter(tiny):
    right = run(host.request(tiny("wan"), REQUESTS["FBCache"]))
    model, graphs = compiled(tiny("wan"))
    assert torch.equal(run(host.request(model, REQUESTS["FBCache"])), right) and graphs


def test_blocks_compiled_one_by_one_stay_whole(tiny):
    """What skips whole blocks breaks no graph of theirs: one per kind of block and number of rows."""
    right = run(host.request(tiny("wan"), REQUESTS["FBCache"]))
    model = tiny("wan")
    model, graphs = compiled(host.request(model, REQUESTS["FBCache"]), blocks_of(model))
    assert torch.equal(run(model), right) and 0 < len(graphs) <= 3


def test_feature_tables_pass_by_a_compiled_network(tiny):
    """Their layers go into its graphs: nothing is kept, and the report says so."""
    wanted = Request("temporal_features", {"mode": "exact", "prompt": True})
    right = run(tiny("wan"))
    model, _ = compiled(host.request(tiny("wan"), wanted))
    assert torch.equal(run(model), right)
    assert not any(item["reused"] for item in host.TRACES.of_prompt(None)[-1]["features"]["components"])


def test_quantized_layers_are_left_outside_of_graphs(tiny):
    """Their weights are bytes, which a compiler does not take for the numbers they hold."""
    from stretto.acceleration.hosts.comfy_quantization import quantized_operations
    from stretto.acceleration.quantization.layouts import fitting

    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    packed = {"": (fitting("int8", 64, 256).quantize(weight), False)}
    layer = quantized_operations(packed).Linear(256, 64, bias=False)
    layer.load_state_dict({"weight": weight.to("meta")}, assign=True)
    x = torch.randn(8, 256)
    assert torch.equal(torch.compile(layer, backend="aot_eager")(x), layer(x))
