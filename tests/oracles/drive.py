"""Our caching sessions around the blocks of a network of diffusers, and the same network under a foreign cache.

The engine is independent of its host: it needs evaluations, calls and blocks, and this is all that gives it them here.
"""

import contextlib
from dataclasses import dataclass

import torch

from stretto.acceleration.caching.technique import CacheTechnique
from stretto.acceleration.evaluation import Branch, Call
from stretto.acceleration.facts import Facts
from stretto.acceleration.plan import Request
from stretto.acceleration.run import RunState
from stretto.acceleration.sampling import schedule_of, traits_of
from stretto.acceleration.trace import TraceBuilder


@dataclass(frozen=True)
class Run:
    """What became of a sequence.

    Attributes:
        strip: one character a step, ``#`` computed and ``.`` skipped.
        outputs: predictions.
        signals: what our indicator said at each step; empty for a foreign run.
    """

    strip: str
    outputs: tuple[torch.Tensor, ...]
    signals: tuple[float | None, ...] = ()


def session_of(subject, network, sequence, **settings):
    """Return the session that the cache technique makes of these settings, as it would for a user."""
    facts = Facts(
        network=network,
        descriptor=subject.descriptor,
        sampler=traits_of("euler"),
        schedule=schedule_of(sequence.sigmas),
        latent_shape=sequence.latents[0].shape,
        branches=1,
    )
    outcome = CacheTechnique().resolve(Request("cache", settings), facts)
    assert outcome.status == "active", outcome.reason
    return outcome.session


def run_ours(subject, network, sequence, session):
    """Run the sequence under ``session``; the network is left as it was."""
    sites = {site.key: site for site in subject.descriptor.sites(network)}
    state = RunState(schedule_of(sequence.sigmas), (session,), sites, TraceBuilder({}))
    calls, outputs, signals = [], [], []
    tokens = subject.descriptor.tokens(network, sequence.latents[0].shape)
    with _blocks_under(subject, network, state, calls), torch.no_grad():
        for sigma, latent in zip(sequence.sigmas, sequence.latents):
            evaluation = state.begin(sigma, latent)
            branches = (Branch("cond", "a prompt"),)
            call = Call(evaluation, branches, len(latent), tokens, latent, lambda out: out, lambda out: out)
            calls.append(call)
            outputs.append(state.network(call, lambda at=(latent, sigma): subject.call(network, *at)))
            signals.append(evaluation.signal)
            state.end(lambda: 0.0)
    decisions = [entry["decision"] for entry in state.trace.evaluations]
    state.close()
    assert session.bytes == 0
    return Run("".join("#" if d == "computed" else "." for d in decisions), tuple(outputs), tuple(signals))


@contextlib.contextmanager
def _blocks_under(subject, network, state, calls):
    """Send every block of the network through ``state``; ``calls[-1]`` is the call in progress."""
    lists = dict(subject.descriptor.block_lists)
    blocks = [(site, getattr(network, lists[site.kind])[site.index]) for site in state.sites.values()]
    for site, block in blocks:
        block.forward = _around(site, block.forward, site.kind in subject.descriptor.txt_out, state, calls)
    try:
        yield
    finally:
        for _, block in blocks:
            del block.forward  # the instance's attribute, so the class's method shows again


def _around(site, forward, two_streams, state, calls):
    def replaced(*positional, **named):
        def original(args):
            if two_streams:
                text, image = forward(**{**named, "hidden_states": args["img"], "encoder_hidden_states": args["txt"]})
                return {"img": image, "txt": text}
            return {"img": forward(args["img"], *positional[1:], **named)}

        needed = state.depths(calls[-1])
        if needed is not None and site.depth not in needed:
            return forward(*positional, **named)  # a host does not even install a hook here
        args = {"img": named["hidden_states"] if two_streams else positional[0]}
        if two_streams:
            args["txt"] = named["encoder_hidden_states"]
        out = state.block(calls[-1], site, args, original)
        return (out["txt"], out["img"]) if two_streams else out["img"]

    return replaced


def run_theirs(subject, network, sequence, context=True):
    """Run the sequence on a network that carries a foreign cache; a step is computed when ``subject.probe`` ran."""
    ran, outputs, strip = [], [], ""
    handle = subject.probe(network).register_forward_hook(lambda *_: ran.append(True))
    inside = network.cache_context("cond") if context else contextlib.nullcontext()
    try:
        with inside, torch.no_grad():
            for sigma, latent in zip(sequence.sigmas, sequence.latents):
                outputs.append(subject.call(network, latent, sigma))
                strip += "#" if ran else "."
                ran.clear()
    finally:
        handle.remove()
    return Run(strip, tuple(outputs))


def farthest(first, second):
    """Largest absolute difference of each step's outputs."""
    return [(a - b).abs().max().item() for a, b in zip(first.outputs, second.outputs, strict=True)]
