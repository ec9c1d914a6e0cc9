"""Our EasyCache against the node of ComfyUI's core, whose own code runs here on scripted inputs.

They agree on the rate, the norm and where the estimate is unknown. They differ in the reference of the input's change:
the paper, and this pack, measure it from the previous evaluation, so that the sum is the length of the path since the
last computed one. Core keeps the input of the last *computed* evaluation and sums the distances from there, so that n
equal steps count n (n + 1) / 2 times: the same threshold means fewer skips.
"""

import ast
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stretto.acceleration.caching.decision import AccumulatePolicy, Decision
from stretto.acceleration.caching.indicator import TransformRate
from stretto.acceleration.caching.policy import Accumulator, Rails
from stretto.acceleration.caching.technique import CacheTechnique
from stretto.acceleration.evaluation import Branch, Call, Evaluation
from stretto.acceleration.facts import Facts
from stretto.acceleration.models import ModelDescriptor
from stretto.acceleration.plan import Request
from stretto.acceleration.sampling import schedule_of, traits_of

SOURCE = Path(__file__).resolve().parents[2] / ".comfyui" / "comfy_extras" / "nodes_easycache.py"
SHAPE = (1, 2, 4, 4)
#: A family that is cached from outside.
OUTSIDE = ModelDescriptor("toy", ("Toy",), (), lambda network: 1, no_blocks="no blocks")


@pytest.fixture(scope="module")
def core():
    """The holder and the wrapper of core, without the modules they are registered with."""
    if not SOURCE.is_file():
        pytest.skip("no ComfyUI beside the pack: run ./test.sh, which fetches one")
    wanted = {"EasyCacheHolder", "easycache_forward_wrapper", "LazyCacheHolder", "lazycache_predict_noise_wrapper"}
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"] + [
        node for node in tree.body if getattr(node, "name", "") in wanted
    ]
    names = {"torch": torch, "logging": logging}
    exec(compile(tree, str(SOURCE), "exec"), names)
    assert wanted <= set(names)
    return names


def network(x):
    """Gain 2, so kappa is 2; the offset keeps its norm from zero."""
    return 2 * x + 4


def core_strip(core, inputs, threshold):
    holder = core["EasyCacheHolder"](threshold, 0.0, 1.0, 1, False, output_channels=SHAPE[1])
    holder.start_t, holder.end_t = 1e9, -1.0
    strip = ""
    for x in inputs:
        computed = []
        holder.skip_current_step = False

        def executor(value, options, computed=computed):
            computed.append(True)
            return network(value)

        options = {"easycache": holder, "sigmas": torch.ones(1), "uuids": ["a"]}
        core["easycache_forward_wrapper"](executor, torch.full(SHAPE, x), options)
        strip += "#" if computed else "."
    return strip


def our_strip(inputs, threshold):
    decision = Decision(
        Rails(0, 0), len(inputs), AccumulatePolicy(Accumulator(threshold)), rate=TransformRate()
    )
    strip = ""
    for step, x in enumerate(inputs):
        latent = torch.full(SHAPE, x)
        evaluation = Evaluation(step, 1.0, float(step), step, latent)
        call = Call(evaluation, (Branch("cond", "a"),), 1, 16, latent, lambda out: out, lambda out: out)
        decision.begin(evaluation)
        if not evaluation.skip:
            decision.computed(call, lambda latent=latent: network(latent))
        strip += "." if evaluation.skip else "#"
    return strip


def test_equal_steps_count_once_here_and_as_triangles_there(core):
    """Kappa 2, |v(1)| = 6: a third a step. Ours reaches 1.1 with the fourth (4/3), core with the third (1/3+2/3+1)."""
    inputs = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert our_strip(inputs, 1.1) == "##...#"
    assert core_strip(core, inputs, 1.1) == "##..#."


@pytest.mark.parametrize(("threshold", "expected"), [(0.35, "##.#.#"), (0.3, "###.#.")])
def test_a_single_skip_is_estimated_alike(core, threshold, expected):
    """One step after a computed one, the previous evaluation *is* the last computed one."""
    inputs = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert our_strip(inputs, threshold) == core_strip(core, inputs, threshold) == expected


def test_going_back_is_a_path_here_and_no_distance_there(core):
    """An input that returns to where it was computed: core adds nothing for it, the path has grown by the way back."""
    inputs = [0.0, 1.0, 2.0, 1.0, 2.0, 1.0]
    assert our_strip(inputs, 0.8) == "##..#."
    assert core_strip(core, inputs, 0.8) == "##...."


def test_nothing_is_skipped_before_two_computed_evaluations(core):
    inputs = [1.0, 1.5, 1.75, 1.75]
    for threshold in (0.05, 3.0):
        assert our_strip(inputs, threshold)[:2] == core_strip(core, inputs, threshold)[:2] == "##"


def test_lazycache_puts_in_what_core_puts_in(core):
    """One branch, and the same steps skipped: x + (denoised - x of the last computed one), on random latents."""
    generator = torch.Generator().manual_seed(5)
    latents = [torch.randn(SHAPE, generator=generator) for _ in range(4)]
    holder = core["LazyCacheHolder"](1e6, 0.0, 1.0, 1, False, output_channels=SHAPE[1])
    holder.start_t, holder.end_t = 1e9, -1.0
    options = {"transformer_options": {"easycache": holder}}
    theirs = [
        core["lazycache_predict_noise_wrapper"](lambda x, *_: network(x), x, torch.ones(1), options) for x in latents
    ]
    settings = {"method": "LazyCache", "threshold": 10.0, "warmup": 2, "tail": 0}
    schedule = schedule_of([1.0, 0.75, 0.5, 0.25, 0.0])
    facts = Facts(SimpleNamespace(blocks=[]), OUTSIDE, traits_of("euler"), schedule, SHAPE, branches=1)
    session = CacheTechnique().resolve(Request("cache", settings), facts).session
    for step, (x, expected) in enumerate(zip(latents, theirs, strict=True)):
        evaluation = Evaluation(step, 1.0 - step / 4, float(step), step, x)
        call = Call(evaluation, (Branch("cond", "a"),), 1, 16, x, lambda out: out, lambda out, x=x: x - out)
        session.begin(evaluation)
        denoised = session.network_call(call, lambda x=x: network(x))
        assert torch.allclose(denoised, expected, atol=1e-5)
        assert evaluation.skip == (step >= 2)
