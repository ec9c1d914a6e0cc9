"""Arms of a comparison and the edits that make one out of a workflow (API JSON, never changed in place).

Nothing here depends on fixed node ids: samplers are found by class, everything else by following their links.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .errors import WorkflowError

Api = dict[str, dict[str, Any]]

# This pack's KSampler for pipelines of diffusers: it samples as it is told, and is nothing to bypass.
DIFFUSERS = "StrettoDiffusersSample"
SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced", "StrettoDynamicFrameRate", DIFFUSERS)
# This pack's nodes that sample themselves and what makes them sample plainly, to the bit (layers may be a probe's link).
SWITCHED_OFF = {"StrettoDynamicFrameRate": {"keep": 100.0, "layers": "auto"}}
# Nodes of this pack that take a MODEL to examine it and give none.
PROBES = ("StrettoProfile", "StrettoAttentionProbe", "StrettoBlockProbe", "StrettoFrameRateProbe")
SECOND_PASS = "StrettoFrameRateSecondPass"
MEASURE = "StrettoMeasure"
REPORT = "StrettoReport"
PREFIX = "Stretto"
# Nodes that turn frames into a moving picture, and their input for frames per second.
VIDEO_WRITERS = {
    "CreateVideo": "fps",
    "SaveWEBM": "fps",
    "SaveAnimatedWEBP": "fps",
    "SaveAnimatedPNG": "fps",
    "VHS_VideoCombine": "frame_rate",
}
USUAL_RATE = 16.0  # frames per second of Wan's clips, where a workflow does not say
ROLES = ("plain", "accelerated", "fewer-steps", "reference")
# KSampler treats every denoise above 0.9999 as 1: room for a nonce where StrettoMeasure does not exist.
FULL_DENOISE, DENOISE_QUANTUM = 0.9999, 1e-12


@dataclass(frozen=True)
class Arm:
    """One way of making the picture: `role` is one of `ROLES`, `workflow` is API JSON."""

    name: str
    label: str
    workflow: Api
    role: str = "accelerated"

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role {self.role!r} is not one of {', '.join(ROLES)}")
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.name):
            raise ValueError(f"arm name {self.name!r} must be lower-case words joined by hyphens: it names files")


def name_of(label: str, taken: Iterable[str] = ()) -> str:
    """A free arm name made from a label: "Taylor (every 2)" -> "taylor-every-2"."""
    base = "-".join(re.findall(r"[a-z0-9]+", label.lower())) or "arm"
    taken = set(taken)
    return next(name for name in (base, *(f"{base}-{n}" for n in range(2, len(taken) + 3))) if name not in taken)


def is_link(value: Any) -> bool:
    """Whether an input value is a link [node id, output slot]."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(value[1], int)
        and not isinstance(value[1], bool)
    )


def sampler_ids(api: Api) -> list[str]:
    """Ids of the sampler nodes, in the order of the file; raises `WorkflowError` when there is none."""
    found = [key for key, node in api.items() if node.get("class_type") in SAMPLERS]
    if not found:
        raise WorkflowError(f"The workflow has no sampler node ({', '.join(SAMPLERS)}).")
    return found


def fingerprint(api: Api) -> str:
    """Hash of a workflow, independent of key order."""
    return hashlib.sha256(json.dumps(api, sort_keys=True).encode()).hexdigest()[:16]


def shape(api: Api) -> list[str]:
    """What a workflow computes, whatever its node ids, titles, prompt and seed: one hash per node, sorted."""
    api = prepare(api)
    api = set_seed(api, 0) if get_seed(api) is not None else api
    api = set_prompt(api, "") if get_prompt(api) is not None else api
    known: dict[str, str] = {}

    def of(key: str) -> str:
        if key not in known:
            known[key] = "cycle"  # such a workflow never runs, but comparing it must end
            node = api.get(key, {"class_type": "missing", "inputs": {}})
            inputs = {
                name: [of(value[0]), value[1]] if is_link(value) else value for name, value in node["inputs"].items()
            }
            text = json.dumps([node["class_type"], inputs], sort_keys=True)
            known[key] = hashlib.sha256(text.encode()).hexdigest()
        return known[key]

    return sorted(of(key) for key in api)


# Finding what to set


def _upstream(api: Api, link: Any, wanted: Callable[[dict[str, Any]], bool], skip: Iterable[str] = ()) -> str | None:
    """Id of the nearest node at or above `link` that is `wanted`; inputs named in `skip` are not followed."""
    queue: deque[str] = deque([link[0]] if is_link(link) else [])
    seen: set[str] = set()
    while queue:
        key = queue.popleft()
        if key in seen or key not in api:
            continue
        seen.add(key)
        inputs = api[key].get("inputs", {})
        if wanted(inputs):
            return key
        queue.extend(value[0] for name, value in inputs.items() if is_link(value) and name not in skip)
    return None


def _holder(api: Api, sampler: str, fields: tuple[str, ...], via: tuple[str, ...]) -> tuple[str, str] | None:
    """Node and input that hold a sampler setting: the sampler itself, or a node above its inputs `via`."""
    inputs = api[sampler]["inputs"]
    for name in fields:
        if name in inputs:
            return sampler, name
    for entry in via:
        for name in fields:
            key = _upstream(api, inputs.get(entry), lambda node, name=name: name in node and not is_link(node[name]))
            if key is not None:
                return key, name
    return None


def _text_holders(api: Api) -> list[tuple[str, str]]:
    """Nodes and inputs with the positive prompt, one per sampler."""
    holders = []
    for sampler in sampler_ids(api):
        inputs = api[sampler]["inputs"]
        entry = inputs.get("positive")
        if entry is None and is_link(inputs.get("guider")):
            guider = api.get(inputs["guider"][0], {}).get("inputs", {})
            entry = guider.get("positive", guider.get("conditioning"))
        if entry is None and isinstance(inputs.get("prompt"), str):
            holders.append((sampler, "prompt"))  # pipelines of diffusers read words themselves
        for name in ("text", "prompt", "value", "string"):
            key = _upstream(
                api,
                entry,
                lambda node, name=name: isinstance(node.get(name), str),
                skip=("negative", "model", "vae", "clip"),
            )
            if key is not None:
                holders.append((key, name))
                break
    return list(dict.fromkeys(holders))


def _set(api: Api, holders: Iterable[tuple[str, str] | None], value: Any, what: str) -> Api:
    """A copy of `api` with `value` in every holder; raises `WorkflowError` when there is no holder."""
    places = [place for place in holders if place is not None]
    if not places:
        raise WorkflowError(f"The workflow has no {what} that could be set.")
    edited = copy.deepcopy(api)
    for key, name in places:
        edited[key]["inputs"][name] = value
    return edited


def _seed_holders(api: Api) -> list[tuple[str, str] | None]:
    return [_holder(api, key, ("seed", "noise_seed"), ("noise",)) for key in sampler_ids(api)]


def _step_holders(api: Api) -> list[tuple[str, str] | None]:
    return [_holder(api, key, ("steps",), ("sigmas",)) for key in sampler_ids(api)]


def _batch_holders(api: Api) -> list[tuple[str, str] | None]:
    return [_holder(api, key, ("batch_size", "batch"), ("latent_image",)) for key in sampler_ids(api)]


def _read(api: Api, holders: Iterable[tuple[str, str] | None]) -> Any:
    """The value in the first holder that holds one and not a link, or None."""
    for place in holders:
        if place is not None and not is_link(value := api[place[0]]["inputs"][place[1]]):
            return value
    return None


# Edits: each returns a changed copy


def set_prompt(api: Api, text: str) -> Api:
    """Set the positive prompt, found upstream of the samplers' positive conditioning."""
    return _set(api, _text_holders(api), text, "prompt text above the sampler's positive input")


def set_seed(api: Api, seed: int) -> Api:
    """Set the noise seed of every sampler."""
    return _set(api, _seed_holders(api), seed, "seed")


def set_steps(api: Api, steps: int) -> Api:
    """Set the number of sampling steps."""
    if steps < 1:
        raise WorkflowError(f"The number of steps must be at least 1, not {steps}.")
    return _set(api, _step_holders(api), steps, "number of steps")


def set_batch(api: Api, batch: int) -> Api:
    """Set how many pictures or clips one run makes."""
    if batch < 1:
        raise WorkflowError(f"The batch size must be at least 1, not {batch}.")
    return _set(api, _batch_holders(api), batch, "batch size above the sampler's latent input")


def set_inputs(api: Api, class_type: str, **values: Any) -> Api:
    """Set inputs of every node of a class."""
    holders = [(key, name) for key, node in api.items() if node["class_type"] == class_type for name in values]
    edited = _set(api, holders, None, f"{class_type} node")
    for key, name in holders:
        edited[key]["inputs"][name] = values[name]
    return edited


def fewer_steps(api: Api, steps: int) -> Api:
    """The competitor that costs nothing: the same sampler with `steps` steps."""
    return set_steps(api, steps)


def get_prompt(api: Api) -> str | None:
    """The positive prompt as the workflow has it."""
    return _read(api, _text_holders(api))


def get_seed(api: Api) -> int | None:
    """The noise seed as the workflow has it."""
    return _read(api, _seed_holders(api))


def get_steps(api: Api) -> int | None:
    """The number of steps as the workflow has it."""
    return _read(api, _step_holders(api))


def get_batch(api: Api) -> int | None:
    """The batch size as the workflow has it."""
    return _read(api, _batch_holders(api))


def get_frame_rate(api: Api) -> float | None:
    """Frames per second of the clips that the workflow makes; None when it makes pictures.

    Clips are told by a node that writes a video, or by the `length` of the latent that is sampled.
    """
    for node in api.values():
        if node["class_type"] in VIDEO_WRITERS and is_link(node["inputs"].get("images")):
            rate = node["inputs"].get(VIDEO_WRITERS[node["class_type"]])
            return float(rate) if isinstance(rate, int | float) and rate > 0 else USUAL_RATE
    for key in sampler_ids(api):
        latent = api[key]["inputs"].get("latent_image")
        if _upstream(api, latent, lambda node: "length" in node and "width" in node and node["length"] != 1):
            return USUAL_RATE
    return None


def accelerators(api: Api) -> list[str]:
    """Class names of this pack's nodes that take a MODEL and change how it runs, in the order of the file."""
    return list(dict.fromkeys(api[key]["class_type"] for key in accelerator_ids(api)))


def accelerator_ids(api: Api) -> list[str]:
    """Ids of the nodes that `accelerators` names."""
    return [
        key
        for key, node in api.items()
        if node["class_type"].startswith(PREFIX)
        and node["class_type"] not in (MEASURE, *PROBES)
        and is_link(node.get("inputs", {}).get("model"))
        and not _switched_off(node)
    ]


def _switched_off(node: dict[str, Any]) -> bool:
    """Whether a node that samples does so plainly, as that for pipelines of diffusers always does."""
    switched = node["class_type"] in SWITCHED_OFF and node["inputs"].get("keep") == 100
    return switched or node["class_type"] == DIFFUSERS


def bypass(api: Api, class_types: Iterable[str]) -> Api:
    """Remove the nodes of these classes and link their consumers to what came in at `model`.

    Raises `WorkflowError` for a node whose consumers want something else than a MODEL.
    """
    classes = set(class_types)
    return bypass_ids(api, [key for key, node in api.items() if node["class_type"] in classes])


def bypass_ids(api: Api, ids: Iterable[str]) -> Api:
    """`bypass` for single nodes."""
    edited = copy.deepcopy(api)
    for key in ids:
        source, name = edited[key].get("inputs", {}).get("model"), f"{edited[key]['class_type']} (node {key})"
        if not is_link(source):
            raise WorkflowError(f"{name} has no MODEL input, so it cannot be bypassed.")
        if edited[key]["class_type"] in (*SWITCHED_OFF, *PROBES, SECOND_PASS, DIFFUSERS):
            raise WorkflowError(f"{name} gives more than a MODEL, so it cannot be bypassed.")
        del edited[key]
        for node in edited.values():
            for name, value in node.get("inputs", {}).items():
                if is_link(value) and value[0] == key:
                    node["inputs"][name] = list(source)
    return edited


def plain(api: Api, keep: Iterable[str] = ()) -> Api:
    """The workflow without any accelerating node of this pack, and without those that examine the model.

    Nodes that sample themselves stay and are told to sample plainly. The nodes with the ids `keep` stay as they are, with what
    feeds their inputs. Raises `WorkflowError` where one run is spread over two samplers: what stands between them leaves
    nothing that would be the plain run.
    """
    stay = set(keep)
    for key in list(stay):
        stay |= _feeding(api, key)
    found = [key for key in accelerator_ids(api) if key not in stay]
    if SECOND_PASS in accelerators(api):
        raise WorkflowError(
            f"{SECOND_PASS} stands between two samplers, so no plain run follows from this workflow; compare with one of "
            "its own, or use StrettoDynamicFrameRate."
        )
    edited = copy.deepcopy(api)
    for key in found:
        edited[key]["inputs"].update(SWITCHED_OFF.get(edited[key]["class_type"], {}))
    edited = bypass_ids(edited, [key for key in found if edited[key]["class_type"] not in SWITCHED_OFF])
    return _without(edited, {key for key, node in edited.items() if node["class_type"] in PROBES and key not in stay})


def _feeding(api: Api, key: str) -> set[str]:
    """Ids of all nodes above a node's inputs, its model aside."""
    queue = [value[0] for name, value in api[key]["inputs"].items() if is_link(value) and name != "model"]
    found: set[str] = set()
    while queue:
        above = queue.pop()
        if above not in found and above in api:
            found.add(above)
            queue += [value[0] for value in api[above].get("inputs", {}).values() if is_link(value)]
    return found


def remove(api: Api, class_types: Iterable[str]) -> Api:
    """Remove the nodes of these classes and everything that is fed by them."""
    classes = set(class_types)
    return _without(api, {key for key, node in api.items() if node["class_type"] in classes})


def _without(api: Api, gone: set[str]) -> Api:
    """Remove the nodes with these ids and everything that is fed by them."""
    edited = copy.deepcopy(api)
    while gone:
        for key in gone:
            del edited[key]
        gone = {
            key
            for key, node in edited.items()
            if any(is_link(value) and value[0] not in edited for value in node.get("inputs", {}).values())
        }
    return edited


def prepare(api: Api) -> Api:
    """A workflow fit for measuring: nothing is drawn, and pictures become previews, so that no file is left behind.

    Video files lose detail, so of a workflow that writes videos the frames of the first one become previews (PNG).
    """
    edited = remove(api, [REPORT])
    videos = [
        (key, node["inputs"]["images"])
        for key, node in edited.items()
        if node["class_type"] in VIDEO_WRITERS and is_link(node["inputs"].get("images"))
    ]
    if videos:
        edited = remove(edited, [*VIDEO_WRITERS, "SaveImage", "PreviewImage"])
        key, frames = videos[0]
        if frames[0] not in edited:
            raise WorkflowError(f"The frames of node {key} are made from another video, which cannot be measured.")
        edited[key] = {"class_type": "PreviewImage", "inputs": {"images": list(frames)}}
        return edited
    saving = [key for key, node in edited.items() if node["class_type"] == "SaveImage"]
    if saving:
        edited = remove(edited, ["PreviewImage"])
    for key in saving:
        edited[key] = {"class_type": "PreviewImage", "inputs": {"images": edited[key]["inputs"].get("images")}}
    return edited


def ensure_measure(api: Api, nonce: int) -> Api:
    """Put StrettoMeasure with this nonce directly before the model input of every sampler."""
    edited = copy.deepcopy(api)
    for sampler in sampler_ids(api):
        consumer = sampler
        if not is_link(edited[sampler]["inputs"].get("model")):
            guider = edited[sampler]["inputs"].get("guider")
            consumer = guider[0] if is_link(guider) and guider[0] in edited else sampler
        source = edited[consumer]["inputs"].get("model")
        if not is_link(source) or source[0] not in edited:
            raise WorkflowError(f"The model input of sampler node {sampler} is not connected.")
        if edited[source[0]]["class_type"] == MEASURE:
            edited[source[0]]["inputs"]["nonce"] = nonce
            continue
        key = f"measure-{consumer}"
        edited[key] = {"class_type": MEASURE, "inputs": {"model": list(source), "nonce": nonce}}
        edited[consumer]["inputs"]["model"] = [key, 0]
    return edited


def defeat_cache_without_pack(api: Api, nonce: int) -> Api:
    """Change each KSampler so that ComfyUI's node cache misses and the picture stays the same."""
    edited = copy.deepcopy(api)
    for sampler in sampler_ids(api):
        denoise = edited[sampler]["inputs"].get("denoise")
        if not isinstance(denoise, (int, float)) or denoise <= FULL_DENOISE:
            raise WorkflowError(
                "This server lacks the Stretto nodes, and without them only KSampler with denoise 1 can be measured."
            )
        edited[sampler]["inputs"]["denoise"] = 1.0 - (nonce % 10_000_000) * DENOISE_QUANTUM
    return edited


def pictures_of(api: Api, outputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The picture files of a run's outputs, by node id, in order: what was sampled, not what our own nodes draw about it.

    Video files are left out; `prepare` has put pictures in their place.
    """
    return [
        image
        for node, output in outputs.items()
        if not api.get(node, {}).get("class_type", "").startswith(PREFIX) and not any(output.get("animated", ()))
        for image in output.get("images", [])
        if isinstance(image, dict) and isinstance(image.get("filename"), str)
    ]
