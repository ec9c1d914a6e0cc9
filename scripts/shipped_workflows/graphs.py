"""From a description to a graph in the API form, and the group that each of its nodes belongs to."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .models import FAMILIES, Family, File

Json = dict[str, Any]
Link = list[Any]

FILES_GROUP, PROMPT, FASTER, SAMPLING, RESULT, REPORT, THERE_AND_BACK = (
    "Models", "Prompt and size", "Stretto", "Sampling", "Result", "What was computed", "On fewer latent frames and back",
)


@dataclass(frozen=True)
class Node:
    """A node of the pack on its way from MODEL to MODEL, with the settings that differ from its defaults."""

    kind: str
    settings: Json = field(default_factory=dict)


def node(kind: str, **settings: Any) -> Node:
    """Describe a node."""
    return Node(f"Stretto{kind}", settings)


@dataclass(frozen=True)
class Workflow:
    """A shipped workflow.

    `chains` are the nodes between a model and its sampler, one chain per model. `recipe` names the graph around them.
    `loader` and `encoder` are settings of the pack's own loaders, which then stand in the place of ComfyUI's. `twin` is
    the workflow of the demo models that shows the same at once. `source` says where its numbers come from.
    """

    name: str
    family: str
    title: str
    words: str
    chains: tuple[tuple[Node, ...], ...] = ((),)
    twin: str = ""
    source: str = ""
    recipe: str = "plain"
    loader: Json | None = None
    encoder: Json | None = None
    changes: Json = field(default_factory=dict)
    settings: Json = field(default_factory=dict)

    @property
    def model(self) -> Family:
        """The family, with what this workflow changes of it."""
        return FAMILIES[self.family].changed(**self.changes)

    @property
    def techniques(self) -> tuple[str, ...]:
        """Kinds of the nodes that make it faster, in order and without repeats."""
        kinds = [entry.kind for chain in self.chains for entry in chain]
        return tuple(dict.fromkeys([*kinds, *_RECIPES[self.recipe][1]]))


class Graph:
    """A workflow in the API form while it is built."""

    def __init__(self) -> None:
        self.api: Json = {}
        self.groups: dict[str, str] = {}
        self.files: dict[str, tuple[File, ...]] = {}

    def add(self, group: str, kind: str, title: str = "", files: tuple[File, ...] = (), **inputs: Any) -> str:
        """Add a node and return its key. Inputs that are left out have their defaults."""
        key = str(len(self.api) + 1)
        self.api[key] = {"class_type": kind, "inputs": inputs}
        if title:
            self.api[key]["_meta"] = {"title": title}
        self.groups[key] = group
        if files:
            self.files[key] = files
        return key


@dataclass
class Parts:
    """What every recipe starts from: models (after their shift), conditioning, latent and VAE, as links."""

    graph: Graph
    workflow: Workflow
    family: Family
    models: list[Link]
    positive: Link
    negative: Link
    latent: Link
    vae: Link


def build(workflow: Workflow) -> Graph:
    """Return the graph of a description."""
    graph, family = Graph(), workflow.model
    loaded = _demo_models(graph, workflow) if family.demo else _models(graph, workflow)
    models, clip, vae = loaded
    if family.shift:
        kind, amount = family.shift
        models = [[graph.add(FILES_GROUP, kind, model=model, shift=amount), 0] for model in models]
    positive, negative = _conditioning(graph, family, clip)
    size = dict(zip(("width", "height", "length"), family.size, strict=False))
    latent = [graph.add(PROMPT, family.latent, **size, batch_size=1), 0]
    _RECIPES[workflow.recipe][0](Parts(graph, workflow, family, models, positive, negative, latent, vae))
    return graph


def _models(graph: Graph, workflow: Workflow) -> tuple[list[Link], Link, Link]:
    """Loaders of a published model. Returns models, text encoder and VAE."""
    family, models, clip, vae = workflow.model, [], None, None
    names = ("Model of the early steps", "Model of the late steps") if len(family.models) == 2 else ("",)
    for file, title in zip(family.models, names, strict=True):
        if file.folder == "checkpoints":
            key = graph.add(FILES_GROUP, "CheckpointLoaderSimple", files=(file,), ckpt_name=file.name)
            clip, vae = [key, 1], [key, 2]
        elif workflow.loader is not None:
            key = graph.add(FILES_GROUP, "StrettoLoadDiffusionModel", title, (file,), model_name=file.name, **workflow.loader)
        else:
            key = graph.add(FILES_GROUP, "UNETLoader", title, (file,), unet_name=file.name, weight_dtype="default")
        models.append([key, 0])
    if family.text:
        clip = [_encoder(graph, workflow), 0]
    if family.vae:
        vae = [graph.add(FILES_GROUP, "VAELoader", files=(family.vae,), vae_name=family.vae.name), 0]
    return models, clip, vae


def _encoder(graph: Graph, workflow: Workflow) -> str:
    """The text encoder's loader."""
    family = workflow.model
    files, kind = family.text, family.text_type
    if workflow.encoder is not None:
        names = {"clip_name" + (str(index + 1) if index else ""): file.name for index, file in enumerate(files)}
        return graph.add(FILES_GROUP, "StrettoLoadTextEncoder", files=files, **names, type=kind, **workflow.encoder)
    if len(files) == 2:
        first, second = (file.name for file in files)
        return graph.add(FILES_GROUP, "DualCLIPLoader", files=files, clip_name1=first, clip_name2=second, type=kind)
    return graph.add(FILES_GROUP, "CLIPLoader", files=files, clip_name=files[0].name, type=kind)


def _demo_models(graph: Graph, workflow: Workflow) -> tuple[list[Link], None, Link]:
    """Loaders of the models that come with the pack; their text needs none."""
    stem = f"stretto-demo-{workflow.model.demo}"
    if workflow.loader is not None:
        model = graph.add(FILES_GROUP, "StrettoLoadDiffusionModel", model_name=f"{stem}.safetensors", **workflow.loader)
    else:
        model = graph.add(FILES_GROUP, "UNETLoader", unet_name=f"{stem}.safetensors", weight_dtype="default")
    vae = graph.add(FILES_GROUP, "VAELoader", vae_name=f"{stem}-vae.safetensors")
    return [[model, 0]], None, [vae, 0]


def _conditioning(graph: Graph, family: Family, clip: Link | None) -> tuple[Link, Link]:
    """Prompt and negative prompt. Without guidance the second one is not asked, and stays empty."""
    if family.demo:
        first = graph.add(PROMPT, "StrettoDemoText", "Prompt", text=family.prompt, model=family.demo)
        second = graph.add(PROMPT, "StrettoDemoText", "Empty prompt (for CFG)", text="", model=family.demo)
        return [first, 0], [second, 0]
    positive = [graph.add(PROMPT, "CLIPTextEncode", "Prompt", text=family.prompt, clip=clip), 0]
    if family.cfg == 1.0:
        negative = [graph.add(PROMPT, "ConditioningZeroOut", "No negative prompt (CFG is 1)", conditioning=positive), 0]
    else:
        negative = [graph.add(PROMPT, "CLIPTextEncode", "Negative prompt", text=family.negative, clip=clip), 0]
    if family.guidance:
        positive = [graph.add(PROMPT, "FluxGuidance", conditioning=positive, guidance=family.guidance), 0]
    if family.latent == "EmptyLTXVLatentVideo":
        rated = graph.add(PROMPT, "LTXVConditioning", positive=positive, negative=negative, frame_rate=family.fps)
        positive, negative = [rated, 0], [rated, 1]
    return positive, negative


# Recipes: what stands around the chain of nodes


def _chain(parts: Parts, model: Link, nodes: tuple[Node, ...], given: Json | None = None) -> Link:
    """Put a chain of nodes and Stretto Measure behind a model. `given` are links by kind of node."""
    for entry in nodes:
        links = (given or {}).get(entry.kind, {})
        model = [parts.graph.add(FASTER, entry.kind, model=model, **entry.settings, **links), 0]
    return [parts.graph.add(FASTER, "StrettoMeasure", model=model), 0]


def _sampled(parts: Parts, model: Link, **changes: Any) -> Link:
    """A KSampler with the family's numbers."""
    values = _run(parts.family) | changes
    return [parts.graph.add(SAMPLING, "KSampler", model=model, denoise=1.0, **_ends(parts), **values), 0]


def _run(family: Family) -> Json:
    return {"seed": 1, "steps": family.steps, "cfg": family.cfg, "sampler_name": family.sampler, "scheduler": family.scheduler}


def _ends(parts: Parts) -> Json:
    return {"positive": parts.positive, "negative": parts.negative, "latent_image": parts.latent}


def _decoded(parts: Parts, samples: Link, kind: str = "VAEDecode") -> Link:
    return [parts.graph.add(RESULT, kind, samples=samples, vae=parts.vae), 0]


def _saved(parts: Parts, images: Link, group: str = RESULT, suffix: str = "") -> None:
    """Save a picture, or a clip."""
    prefix = f"stretto/{parts.workflow.name}{suffix}"
    if not parts.family.is_video:
        parts.graph.add(group, "SaveImage", images=images, filename_prefix=prefix)
        return
    video = parts.graph.add(group, "CreateVideo", images=images, fps=parts.family.fps)
    parts.graph.add(group, "SaveVideo", video=[video, 0], filename_prefix=prefix, format="auto", codec="auto")


def _reported(parts: Parts, samples: Link, title: str = "") -> str:
    """Report and its timeline."""
    report = parts.graph.add(REPORT, "StrettoReport", title, samples=samples)
    parts.graph.add(REPORT, "PreviewImage", "Timeline", images=[report, 0])
    return report


def _finish(parts: Parts, model: Link) -> None:
    samples = _sampled(parts, model)
    _saved(parts, _decoded(parts, samples))
    _reported(parts, samples)


def _plain(parts: Parts) -> None:
    """Model, chain, sampler."""
    _finish(parts, _chain(parts, parts.models[0], parts.workflow.chains[0]))


def _custom(parts: Parts) -> None:
    """A sampler, noise levels and SamplerCustom in the place of KSampler, as LTX-Video's template has it."""
    model, family = _chain(parts, parts.models[0], parts.workflow.chains[0]), parts.family
    sampler = parts.graph.add(SAMPLING, "KSamplerSelect", sampler_name=family.sampler)
    sigmas = parts.graph.add(SAMPLING, "LTXVScheduler", steps=family.steps, latent=parts.latent)
    samples = [parts.graph.add(
        SAMPLING, "SamplerCustom", model=model, add_noise=True, noise_seed=1, cfg=family.cfg, sampler=[sampler, 0],
        sigmas=[sigmas, 0], **_ends(parts),
    ), 0]
    _saved(parts, _decoded(parts, samples))
    _reported(parts, samples)


def _experts(parts: Parts) -> None:
    """Two models, each with a chain and a sampler of its own: the first stops half way and hands its noise on."""
    family, half = parts.family, parts.family.steps // 2
    pairs = zip(parts.models, parts.workflow.chains, strict=True)
    models = [_chain(parts, model, chain) for model, chain in pairs]
    names = (f"Steps 1 to {half}", f"Steps {half + 1} to {family.steps}")
    latent = parts.latent
    for late, (model, title) in enumerate(zip(models, names, strict=True)):
        values = {name: value for name, value in _run(family).items() if name != "seed"}
        latent = [parts.graph.add(
            SAMPLING, "KSamplerAdvanced", title, model=model, noise_seed=1, **values, **_ends(parts) | {"latent_image": latent},
            add_noise="disable" if late else "enable", start_at_step=half if late else 0,
            end_at_step=10000 if late else half, return_with_leftover_noise="disable" if late else "enable",
        ), 0]
        _reported(parts, latent, f"Report of steps {title.split(' ', 1)[1]}")
    _saved(parts, _decoded(parts, latent))


def _region(parts: Parts) -> None:
    """A map of where the model worked, over the picture."""
    samples = _sampled(parts, _chain(parts, parts.models[0], parts.workflow.chains[0]))
    images = _decoded(parts, samples)
    _saved(parts, images)
    report = _reported(parts, samples)
    drawn = parts.graph.add(REPORT, "StrettoRegionMap", trace=[report, 2], images=images)
    parts.graph.add(REPORT, "PreviewImage", "Where the model worked", images=[drawn, 0])


def _watched(parts: Parts, kind: str, **settings: Any) -> str:
    """A node that samples once and watches, with another seed than the picture's."""
    run = _run(parts.family) | {"seed": 2}
    return parts.graph.add(FASTER, kind, model=parts.models[0], **run, **_ends(parts), **settings)


def _calibrate(parts: Parts) -> None:
    """Record a run, name the quality, get the cache's settings."""
    profile = _watched(parts, "StrettoProfile")
    preset = parts.graph.add(FASTER, "StrettoCalibrate", profile=[profile, 0], vae=parts.vae, **parts.workflow.settings)
    given = {"StrettoCache": {"calibrated": [preset, 0]}}
    _finish(parts, _chain(parts, parts.models[0], parts.workflow.chains[0], given))


def _find_plan(parts: Parts) -> None:
    """Look at a run, search for a plan of attention, follow it."""
    probe = _watched(parts, "StrettoAttentionProbe")
    plan = parts.graph.add(FASTER, "StrettoAttentionSearch", probe=[probe, 0], vae=parts.vae, **parts.workflow.settings)
    given = {"StrettoAttentionPlan": {"found": [plan, 0]}}
    _finish(parts, _chain(parts, parts.models[0], parts.workflow.chains[0], given))


def _block_probe(parts: Parts) -> None:
    """What each block is worth, and a schedule that reuses the cheapest ones."""
    probe = _watched(parts, "StrettoBlockProbe", **parts.workflow.settings)
    given = {"StrettoCacheSchedule": {"schedule": [probe, 0]}}
    model = _chain(parts, parts.models[0], parts.workflow.chains[0], given)
    parts.graph.add(FASTER, "PreviewImage", "What each block is worth", images=[probe, 2])
    _finish(parts, model)


def _quantize(parts: Parts) -> None:
    """Measure how much each layer minds fewer bits, and make a file within a budget."""
    profile = _watched(parts, "StrettoProfile")
    statistics = parts.graph.add(FASTER, "StrettoQuantizationStatistics", profile=[profile, 0])
    file = parts.family.models[0]
    made = parts.graph.add(
        FASTER, "StrettoQuantize", files=(file,), statistics=[statistics, 0], model_name=file.name, **parts.workflow.settings
    )
    _finish(parts, _chain(parts, [made, 0], parts.workflow.chains[0]))


def _dynamic(parts: Parts) -> None:
    """A sampler that drops latent frames where the coming clip is calm, and a decoder that makes up for them."""
    model = _chain(parts, parts.models[0], parts.workflow.chains[0])
    settings = _run(parts.family) | parts.workflow.settings
    run = parts.graph.add(SAMPLING, "StrettoDynamicFrameRate", model=model, vae=parts.vae, **_ends(parts), **settings)
    _saved(parts, _decoded(parts, [run, 0], "StrettoDynamicVAEDecode"))
    _reported(parts, [run, 0])


def _round_trip(parts: Parts) -> None:
    """A clip through fewer latent frames and back."""
    images = _decoded(parts, _sampled(parts, _chain(parts, parts.models[0], parts.workflow.chains[0])))
    schedule = parts.graph.add(THERE_AND_BACK, "StrettoFrameSchedule", images=images, vae=parts.vae, **parts.workflow.settings)
    parts.graph.add(THERE_AND_BACK, "PreviewImage", "Schedule", images=[schedule, 1])
    coded = parts.graph.add(THERE_AND_BACK, "StrettoDynamicVAEEncode", images=images, vae=parts.vae, schedule=[schedule, 0])
    back = parts.graph.add(THERE_AND_BACK, "StrettoDynamicVAEDecode", samples=[coded, 0], vae=parts.vae)
    _saved(parts, images)
    _saved(parts, [back, 0], THERE_AND_BACK, "-back")


def _progressive_sampler(parts: Parts) -> None:
    """Stages as a part of the sampler, for SamplerCustom and its relatives."""
    family, model = parts.family, _chain(parts, parts.models[0], parts.workflow.chains[0])
    chosen = parts.graph.add(SAMPLING, "KSamplerSelect", sampler_name=family.sampler)
    sampler = parts.graph.add(SAMPLING, "StrettoProgressiveSampler", sampler=[chosen, 0], **parts.workflow.settings)
    sigmas = parts.graph.add(SAMPLING, "BasicScheduler", model=model, steps=family.steps, scheduler=family.scheduler, denoise=1.0)
    samples = [parts.graph.add(
        SAMPLING, "SamplerCustom", model=model, add_noise=True, noise_seed=1, cfg=family.cfg, sampler=[sampler, 0],
        sigmas=[sigmas, 0], **_ends(parts),
    ), 0]
    _saved(parts, _decoded(parts, samples))
    _reported(parts, samples)


def _second_pass(parts: Parts) -> None:
    """What Stretto Dynamic Frame Rate does in one node, in parts: two samplers, the frames dropped in between."""
    family, graph, ends = parts.family, parts.graph, {"positive": parts.positive, "negative": parts.negative}
    model = _chain(parts, parts.models[0], parts.workflow.chains[0])
    noise = graph.add(SAMPLING, "RandomNoise", noise_seed=1)
    sampler = graph.add(SAMPLING, "KSamplerSelect", sampler_name=family.sampler)
    sigmas = graph.add(SAMPLING, "BasicScheduler", model=model, steps=family.steps, scheduler=family.scheduler, denoise=1.0)
    split = graph.add(SAMPLING, "SplitSigmas", sigmas=[sigmas, 0], step=family.steps // 5)
    guider = graph.add(SAMPLING, "CFGGuider", model=model, **ends, cfg=family.cfg)
    first = graph.add(
        SAMPLING, "SamplerCustomAdvanced", "First pass: every frame", noise=[noise, 0], guider=[guider, 0], sampler=[sampler, 0],
        sigmas=[split, 0], latent_image=parts.latent,
    )
    middle = graph.add(
        SAMPLING, "StrettoFrameRateSecondPass", model=model, vae=parts.vae, **ends, noise=[noise, 0], denoised=[first, 1],
        **parts.workflow.settings,
    )
    again = graph.add(SAMPLING, "CFGGuider", model=[middle, 0], positive=[middle, 1], negative=[middle, 2], cfg=family.cfg)
    second = graph.add(
        SAMPLING, "SamplerCustomAdvanced", "Second pass: fewer frames", noise=[middle, 3], guider=[again, 0],
        sampler=[sampler, 0], sigmas=[split, 1], latent_image=[middle, 4],
    )
    short = graph.add(RESULT, "StrettoDynamicVAEDecode", samples=[second, 0], vae=parts.vae, restore="none")
    whole = graph.add(RESULT, "StrettoRestoreFrames", images=[short, 0], schedule=[short, 1], method="linear")
    _saved(parts, [whole, 0])
    graph.add(RESULT, "StrettoSaveScheduledLatent", samples=[second, 0], filename_prefix=f"latents/{parts.workflow.name}")
    _reported(parts, [second, 0])


#: Recipe -> what it adds, and the nodes of the pack in it.
_RECIPES = {
    "plain": (_plain, ()),
    "custom": (_custom, ()),
    "experts": (_experts, ()),
    "region": (_region, ("StrettoRegionMap",)),
    "calibrate": (_calibrate, ("StrettoProfile", "StrettoCalibrate")),
    "find-plan": (_find_plan, ("StrettoAttentionProbe", "StrettoAttentionSearch")),
    "block-probe": (_block_probe, ("StrettoBlockProbe",)),
    "quantize": (_quantize, ("StrettoQuantizationStatistics", "StrettoQuantize")),
    "dynamic": (_dynamic, ("StrettoDynamicFrameRate", "StrettoDynamicVAEDecode")),
    "progressive-sampler": (_progressive_sampler, ("StrettoProgressiveSampler",)),
    "second-pass": (
        _second_pass,
        ("StrettoFrameRateSecondPass", "StrettoDynamicVAEDecode", "StrettoRestoreFrames", "StrettoSaveScheduledLatent"),
    ),
    "round-trip": (_round_trip, ("StrettoFrameSchedule", "StrettoDynamicVAEEncode", "StrettoDynamicVAEDecode")),
}
#: Recipes whose nodes in the group of the techniques read the prompt.
PROMPT_FIRST = ("calibrate", "find-plan", "block-probe", "quantize")
