"""Where ComfyUI asks for the branches of guidance: one wrapper around calc_cond_batch."""

from collections.abc import Callable, Hashable
from typing import Any

import comfy.patcher_extension
import torch
from comfy.patcher_extension import WrappersMP

from ..guidance.session import GuidanceSession, Guided
from ..run import RunState

#: Key of our wrappers.
KEY = "stretto_guidance"


def save_guidance(options: dict[str, Any], run: RunState) -> None:
    """Hang the run's guidance saver, where it has one, into its own copy of the model options.

    The outputs of both branches are handed on, so everything that reads them (rescaling, perturbed attention, APG, skip
    layer guidance, post-CFG functions) sees two, whichever was asked.
    """
    session = next((session for session in run.sessions if isinstance(session, GuidanceSession)), None)
    if session is None:
        return
    add = comfy.patcher_extension.add_wrapper_with_key
    add(WrappersMP.CALC_COND_BATCH, KEY, _calc_cond_batch(run, session), options, is_model_options=True)
    add(WrappersMP.SAMPLER_SAMPLE, KEY, _sampler_sample(run, session), options, is_model_options=True)


def _calc_cond_batch(run: RunState, session: GuidanceSession) -> Callable:
    """Stand around one request for branches: [cond, uncond] of a guider, once per context window."""

    def calc_cond_batch(
        executor: Callable, model: Any, conds: list, x: torch.Tensor, timestep: torch.Tensor, options: dict[str, Any]
    ) -> list[torch.Tensor]:
        if run.evaluation is None or len(conds) < 2 or conds[1] is None:
            return executor(model, conds, x, timestep, options)  # a pass of its own, or guidance scale 1
        reason = _obstacle(conds)
        if reason is not None:
            session.leave(reason)
            return executor(model, conds, x, timestep, options)
        sampling = model.model_sampling
        unit = [x.shape[0], *[1] * (x.ndim - 1)]
        one, zero = x.new_ones(unit), x.new_zeros(unit)

        def prediction(denoised: torch.Tensor) -> torch.Tensor:
            return (denoised - sampling.calculate_denoised(timestep, torch.zeros_like(x), x)) / wanted.gain

        wanted = Guided(
            key=_key(conds, x, run.evaluation.sigma, options),
            both=lambda: executor(model, conds, x, timestep, options),
            alone=lambda: executor(model, [conds[0], None], x, timestep, options)[0],
            gain=sampling.calculate_denoised(timestep, one, zero).float(),
            to_prediction=prediction,
        )
        return session.guide(wanted)

    return calc_cond_batch


def _sampler_sample(run: RunState, session: GuidanceSession) -> Callable:
    """Say in the trace, once the run is over, what was saved."""

    def sampler_sample(executor: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        samples = executor(*args, **kwargs)
        run.trace.header["notes"].append(session.words())
        return samples

    return sampler_sample


def _obstacle(conds: list) -> str | None:
    """Return why a request for several branches is left as it is, or None."""
    if len(conds) != 2:
        return f"a guider that asks for {len(conds)} branches at once"
    if conds[0] is None:
        return "a node that asks for the unconditional branch on its own"
    if any(_scheduled(entry.get("hooks")) for cond in conds for entry in cond):
        return "conditioning whose weights are scheduled over the run"
    return None


def _scheduled(hooks: Any) -> bool:
    """Whether a hook group has keyframes: its weights, and so the network, change during the run."""
    return any(len(hook.hook_keyframe.keyframes) > 0 for hook in getattr(hooks, "hooks", ()))


def _key(conds: list, x: torch.Tensor, sigma: float, options: dict[str, Any]) -> Hashable:
    """What a difference of the branches belongs to: where any of it changes, both are asked anew."""
    transformer_options = options.get("transformer_options", {})
    window = transformer_options.get("context_window")
    return (
        tuple(tuple(_entry(entry, sigma) for entry in cond) for cond in conds),
        tuple(window.index_list) if window is not None else None,
        tuple((name, *map(id, entries)) for name, entries in sorted(transformer_options.get("patches", {}).items())),
        tuple(
            (name, key, id(patch))
            for name, patches in sorted(transformer_options.get("patches_replace", {}).items())
            for key, patch in patches.items()
        ),
        tuple(x.shape),
        x.device,
    )


def _entry(entry: dict[str, Any], sigma: float) -> Hashable:
    """Identify one entry of conditioning, and which parts of it are in force at ``sigma``."""
    active = entry.get("timestep_start", sigma) >= sigma >= entry.get("timestep_end", sigma)
    controls, control = [], entry.get("control")
    while control is not None:
        start, end = getattr(control, "timestep_range", None) or (sigma, sigma)
        controls.append((id(control), start >= sigma >= end))
        control = getattr(control, "previous_controlnet", None)
    return entry.get("uuid", id(entry)), active, tuple(controls)
