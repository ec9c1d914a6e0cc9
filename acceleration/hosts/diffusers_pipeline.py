"""A pipeline of diffusers on a link of ComfyUI, and runs of it: the plan of the technique nodes, memory, progress, previews."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.utils
import numpy as np
import torch

from ..compatibility import add_request
from ..errors import StrettoError
from ..plan import Plan, Request
from .diffusers import accelerate
from .diffusers_memory import Residents
from .diffusers_preview import Preview
from .trace_store import TraceStore

#: How pipelines call the number of pictures per prompt.
_BATCH = ("num_images_per_prompt", "num_videos_per_prompt")
_MASKS = {"prompt_attention_mask": "prompt_embeds", "negative_prompt_attention_mask": "negative_prompt_embeds",
          "prompt_embeds_mask": "prompt_embeds", "negative_prompt_embeds_mask": "negative_prompt_embeds"}  # fmt: skip


#: How configurations of transformers call the width of text, and of pooled text.
_TEXT_WIDTHS = ("caption_channels", "joint_attention_dim", "text_dim", "text_embed_dim", "cap_feat_dim")
_POOLED_WIDTHS = ("pooled_projection_dim",)


class WrongLinkError(StrettoError, AttributeError):
    """A pipeline was connected to a node that takes ComfyUI's own models."""


class Pipeline:
    """What a STRETTO_PIPELINE link carries: a loaded pipeline and the plan that nodes have put on it. Never changed in place."""

    def __init__(self, pipeline: Any, residents: Residents | None = None, plan: Plan | None = None) -> None:
        self.pipeline = pipeline
        self.residents = residents or Residents(pipeline)
        self.plan = plan or Plan()

    def request(self, wanted: Request) -> "Pipeline":
        """Return the same pipeline with a plan that also holds ``wanted``.

        Raises:
            StrettoError: bad settings, or a request that cannot share the pipeline with another.
        """
        return Pipeline(self.pipeline, self.residents, add_request(self.plan, wanted))

    def __deepcopy__(self, memo: dict) -> "Pipeline":
        return self

    def __getattr__(self, name: str) -> Any:
        raise WrongLinkError(
            "a diffusers pipeline is connected to a node that takes ComfyUI's own models. Stretto's technique nodes and Stretto "
            f"Diffusers Sample take it; nothing of ComfyUI's does ({name} is missing)"
        )


@dataclass(frozen=True)
class Sampling:
    """Settings of one run.

    Attributes:
        prompt: words; for class-conditional models the names of classes, separated by commas.
        negative: words to keep away from; "" for none.
        width: of the picture, in pixels.
        height: the same.
        frames: of a clip; models of pictures ignore it.
        steps: of the scheduler.
        guidance: scale; 1 is none.
        seed: of the noise, drawn on the processor, so it is the same on every device.
        batch: pictures or clips.
        embedded: conditionings of ComfyUI (positive, negative or None) in the place of words.
    """

    prompt: str
    negative: str
    width: int
    height: int
    frames: int
    steps: int
    guidance: float
    seed: int
    batch: int = 1
    embedded: tuple[Any, Any] | None = None


def run_pipeline(
    link: Pipeline, settings: Sampling, traces: TraceStore, ids: tuple[str | None, str | None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a pipeline under its plan.

    Args:
        link: pipeline and plan.
        settings: of the run.
        traces: where its traces are kept.
        ids: (prompt id, node id) to keep them under.

    Returns:
        (pictures [N, H, W, 3] float32 in 0..1, the frames of all clips one after another; latents as the VAE is given them).

    Raises:
        StrettoError: the pipeline cannot do what is asked for.
    """
    pipeline, residents = link.pipeline, link.residents
    if getattr(pipeline, "vae", None) is None:
        raise StrettoError(
            "Stretto Diffusers Sample: this pipeline was loaded without a VAE, so there is no way to a picture"
        )
    arguments = call_arguments(pipeline, settings, residents.device)
    latents: list[torch.Tensor] = []
    bar = comfy.utils.ProgressBar(settings.steps)
    preview = Preview(pipeline, settings.height, settings.width, residents.device)
    pictures: list[Any] = [None]

    def step_end(_: Any, index: int, __: Any, values: Mapping[str, Any]) -> dict[str, Any]:
        comfy.model_management.throw_exception_if_processing_interrupted()
        pictures[0] = preview.picture(index, values.get("latents"))
        return {}

    if "callback_on_step_end" in inspect.signature(pipeline.__call__).parameters:
        arguments["callback_on_step_end"] = step_end
    run = accelerate(pipeline, link.plan) if link.plan.requests else nullcontext()
    outcome = "failed"
    try:
        seen = residents.at_work(lambda name, latent: latents.append(latent.detach()))
        with seen, _in_comfyui(pipeline, residents.device, bar, pictures), run:
            made = pipeline(**arguments)[0]
        outcome = "completed"
    except comfy.model_management.InterruptProcessingException:
        outcome = "interrupted"
        raise
    except (ValueError, TypeError) as error:
        if isinstance(error, StrettoError):
            raise
        raise StrettoError(f"{_name(pipeline)}: {' '.join(str(error).split())[:300]}") from error
    finally:
        documents = run.traces if link.plan.requests else []
        for document in documents:
            traces.add(*ids, {**document, "seed": settings.seed, "outcome": _outcome(document, outcome)})
    if not latents:  # a VAE that is not called by its name; the link to a report must still carry something
        latents.append(torch.zeros(1, 4, settings.height // 8, settings.width // 8))
    device = comfy.model_management.intermediate_device()
    return pictures_of(made).to(device), torch.cat(latents).float().to(device)


def _outcome(document: Mapping[str, Any], outcome: str) -> str:
    """Runs end as failed when ComfyUI is told to stop; it is no failure."""
    return outcome if document["outcome"] == "failed" else document["outcome"]


def pictures_of(made: Any) -> torch.Tensor:
    """Return a pipeline's result, [B, (F,) H, W, C] or a list of such, as [N, H, W, 3] float32."""
    array = np.stack([np.asarray(each) for each in made]) if isinstance(made, list) else np.asarray(made)
    frames = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if frames.ndim not in (4, 5) or frames.shape[-1] != 3:
        raise StrettoError(f"the pipeline returned {tuple(frames.shape)}; expected pictures or clips in three colours")
    return frames.flatten(0, 1) if frames.ndim == 5 else frames


@contextmanager
def _in_comfyui(pipeline: Any, device: torch.device, bar: Any, pictures: list[Any]) -> Iterator[None]:
    """While this lasts, the pipeline makes its latents on ComfyUI's device, wherever its networks are, and reports to its bar."""
    before = type(pipeline)

    def progress_bar(self: Any, iterable: Any = None, total: int | None = None) -> "_Steps":
        return _Steps(bar, iterable, total, pictures)

    body = {
        "_execution_device": property(lambda self: device),
        "device": property(lambda self: device),
        "progress_bar": progress_bar,
        "__module__": before.__module__,
    }
    pipeline.__class__ = type(before.__name__, (before,), body)
    try:
        yield
    finally:
        pipeline.__class__ = before


class _Steps:
    """What a pipeline's loop counts on, in the place of its own progress bar."""

    def __init__(self, bar: Any, iterable: Any, total: int | None, pictures: list[Any]) -> None:
        self._bar, self._iterable, self._done, self._pictures = bar, iterable, 0, pictures
        self._total = total or (len(iterable) if iterable is not None else bar.total)

    def __enter__(self) -> "_Steps":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable:
            yield item
            self.update()

    def update(self, steps: int = 1) -> None:
        """Report steps that have ended, with the newest preview."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._done += steps
        self._bar.update_absolute(self._done, self._total, self._pictures[0])

    def set_postfix(self, *_: object, **__: object) -> None:
        """Words beside the bar, which ComfyUI has no room for."""

    set_description = set_postfix


def call_arguments(pipeline: Any, settings: Sampling, device: torch.device) -> dict[str, Any]:
    """Return the arguments of a pipeline's call for ``settings``, as far as the pipeline takes them.

    Raises:
        StrettoError: it needs words and has no text encoder, or embeddings and is given none.
    """
    takes = set(inspect.signature(pipeline.__call__).parameters)
    wanted = {
        "height": settings.height,
        "width": settings.width,
        "num_frames": settings.frames,
        "num_inference_steps": settings.steps,
        "generator": torch.Generator("cpu").manual_seed(settings.seed),
        "output_type": "np",
        "return_dict": False,
        **_guidance(pipeline, settings, takes),
    }
    wanted |= _embedded(pipeline, settings, takes, device) if settings.embedded else _words(pipeline, settings, takes)
    return {name: value for name, value in wanted.items() if name in takes}


def _guidance(pipeline: Any, settings: Sampling, takes: set[str]) -> dict[str, Any]:
    """Return which of a pipeline's guidance scales is set; FLUX has one that is distilled, and one that costs a second branch."""
    distilled = getattr(getattr(pipeline.transformer, "config", None), "guidance_embeds", None)
    if "true_cfg_scale" in takes and not distilled:
        return {"true_cfg_scale": settings.guidance}
    return {"guidance_scale": settings.guidance}


def _words(pipeline: Any, settings: Sampling, takes: set[str]) -> dict[str, Any]:
    batch = dict.fromkeys(_BATCH, settings.batch)
    if "class_labels" in takes and "prompt" not in takes:
        names = [name.strip() for name in settings.prompt.split(",") if name.strip()]
        known = getattr(pipeline, "labels", {})
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise StrettoError(
                f"{_name(pipeline)} draws classes, not words: {', '.join(unknown) or 'the prompt is empty'}; "
                f"it knows {len(known)}, such as {', '.join(list(known)[:4])}"
            )
        return {"class_labels": pipeline.get_label_ids(names) * settings.batch}
    encoders = [name for name in pipeline.components if name.startswith("text_encoder")]
    if encoders and all(getattr(pipeline, name) is None for name in encoders):
        raise StrettoError(
            f"{_name(pipeline)} was loaded without a text encoder: connect positive and negative conditioning"
        )
    # Pipelines with a second branch of their own ask for a negative prompt before they make it.
    negative = settings.negative or (" " if "true_cfg_scale" in _guidance(pipeline, settings, takes) else "")
    return {"prompt": settings.prompt, **({"negative_prompt": negative} if negative else {}), **batch}


def _embedded(pipeline: Any, settings: Sampling, takes: set[str], device: torch.device) -> dict[str, Any]:
    positive, negative = settings.embedded
    if "prompt_embeds" not in takes:
        raise StrettoError(f"{_name(pipeline)} takes no conditioning; disconnect it and write a prompt")
    if negative is None and settings.guidance > 1.0 and "negative_prompt_embeds" in takes:
        raise StrettoError("Stretto Diffusers Sample: guidance above 1 needs the negative conditioning too; connect it")
    dtype = pipeline.transformer.dtype
    wanted: dict[str, Any] = {"prompt": None, "negative_prompt": None}
    for prefix, conditioning in (("", positive), ("negative_", negative)):
        if conditioning is None:
            continue
        if len(conditioning) != 1:
            raise StrettoError(
                f"Stretto Diffusers Sample: {len(conditioning)} conditionings are combined; a pipeline takes one"
            )
        text, more = conditioning[0]
        pooled = more.get("pooled_output")
        parts = ((f"{prefix}prompt_embeds", text, _TEXT_WIDTHS), (f"{prefix}pooled_prompt_embeds", pooled, _POOLED_WIDTHS))
        for name, tensor, widths in parts:
            if tensor is not None and name in takes:
                _refuse_width(pipeline, tensor, widths)
                repeated = tensor.repeat(settings.batch, *[1] * (tensor.ndim - 1))
                wanted[name] = repeated.to(device=device, dtype=dtype)
    for mask, of in _MASKS.items():
        if of in wanted:
            wanted[mask] = torch.ones(wanted[of].shape[:2], dtype=torch.long, device=device)
    return wanted


def _refuse_width(pipeline: Any, tensor: torch.Tensor, names: tuple[str, ...]) -> None:
    wanted = next((pipeline.transformer.config[name] for name in names if pipeline.transformer.config.get(name)), None)
    if wanted is not None and tensor.shape[-1] != wanted:
        raise StrettoError(
            f"{_name(pipeline)}: the conditioning is for another model: its text is {tensor.shape[-1]} numbers wide, and this "
            f"model reads {wanted}"
        )


def _name(pipeline: Any) -> str:
    return type(pipeline).__name__
