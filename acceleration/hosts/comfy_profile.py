"""Profiling a MODEL: one recorded run, and a short one that times what a skipped step costs."""

import statistics
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any
from uuid import uuid4

import torch

from ..caching.profile import Profile
from ..errors import ConflictError, StrettoError
from ..plan import Request
from .comfy import TRACES, current_prompt_id, request

Sample = Callable[[Any], torch.Tensor]

#: Steps of the run that times skipping, and which of them are computed: three of each kind after the first, warm-up one.
TIMING_MASK = "##.#.#.#"


def profile(model: Any, sample: Sample, short: Sample | None = None) -> tuple[Profile, torch.Tensor]:
    """Record one plain run of MODEL ``model``.

    Args:
        model: MODEL without a technique that skips.
        sample: samples with the MODEL it is given and returns the latent.
        short: the same in ``len(TIMING_MASK)`` steps, for timing; None leaves skipped steps untimed.

    Returns:
        The profile, and the latent of the recorded run, which is that of plain sampling to the bit.

    Raises:
        StrettoError: the model, the sampler or the noise levels cannot be profiled; the message says why.
        ConflictError: a technique that skips is on the model already.
    """
    holder = model.model_options.get("transformer_options", {}).get("easycache")
    if holder is not None:
        name = getattr(holder, "name", "EasyCache")
        raise ConflictError(
            f"Stretto Profile records a run that skips nothing, and ComfyUI's own {name} node is on the model. "
            "Remove or bypass it."
        )
    token = uuid4().hex
    latent = sample(request(model, Request("profile", {"token": token}, required=True)))
    taken = TRACES.take_record("profile", token)
    if taken is None:
        raise StrettoError("Stretto Profile: the sampler did not run the model it was given, so nothing was recorded")
    record, trace = taken
    if record["error"] is not None:
        raise StrettoError(f"Stretto Profile: {record['error']}")
    recorded = Profile.from_json(record["profile"])
    computed, skipped = (None, None) if short is None else time_skipping(model, short)
    return replace(
        recorded,
        # The recorded run's own evaluations also pay for the recording: second best.
        seconds_computed=computed or median_seconds(trace, {"computed"}) or 0.0,
        seconds_skipped=skipped,
        about={**_about(trace), **recorded.about},
    ), latent


def time_skipping(model: Any, short: Sample) -> tuple[float | None, float | None]:
    """Return the median seconds of a computed and of a skipped evaluation in a run with some of each, None if unknown."""
    settings = {"method": "Schedule", "mask": TIMING_MASK, "order": 1, "warmup": 0, "tail": 0}
    _, trace = traced(request(model, Request("cache", settings)), short)
    return median_seconds(trace, {"computed"}), median_seconds(trace, {"forecast", "reused"})


def traced(model: Any, sample: Sample) -> tuple[torch.Tensor, dict[str, Any]]:
    """Sample with a MODEL that carries a plan; return the latent and the run's trace."""
    latent = sample(model)
    return latent, TRACES.of_prompt(current_prompt_id())[-1]


def median_seconds(trace: dict[str, Any], decisions: Collection[str]) -> float | None:
    """Return the median seconds of the evaluations with one of ``decisions``, the first evaluation apart; None of none."""
    seconds = [
        entry["seconds"]
        for entry in trace["evaluations"][1:]  # the first evaluation also pays for warm-up
        if entry["decision"] in decisions and entry["seconds"] is not None
    ]
    return statistics.median(seconds) if seconds else None


def evaluation_seconds(trace: dict[str, Any]) -> float:
    """Return the seconds of all evaluations; the first one, which also pays for warm-up, counts as a computed one."""
    later = [entry["seconds"] for entry in trace["evaluations"][1:]]
    usual = median_seconds(trace, {"computed"})
    return sum(later) + (trace["evaluations"][0]["seconds"] if usual is None else usual)


def _about(trace: dict[str, Any]) -> dict[str, Any]:
    """Return what a trace says about a run, as plain values."""
    model, names = trace["model"], ("family", "network", "blocks", "dtype", "device")
    return {
        **{name: model[name] for name in names},
        "sampler": trace["sampler"]["name"],
        "steps": len(trace["sigmas"]) - 1,
        "cfg": trace["cfg"],
        "seed": trace["seed"],
        "latent_shape": list(trace["latent_shape"]),
    }
