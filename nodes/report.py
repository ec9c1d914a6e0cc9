"""What a run did, as a picture, as sentences and as data."""

import json
from typing import Any

from comfy_api.latest import io, ui

from ..acceleration.errors import StrettoError
from ..acceleration.figures import plain_run
from ..acceleration.hosts.comfy import TRACES, current_prompt_id
from ..acceleration.summary import summary
from .attention_map import attention_map
from .attention_modes import attention_modes
from .charts import as_image
from .feature_bytes import feature_bytes
from .frame_rate_map import frame_rate_map
from .region_map import region_map
from .server.digest import digest
from .timeline import stacked, timeline

#: What is drawn below the timeline, where a run has something to show.
DRAWINGS = (attention_modes, attention_map, region_map, frame_rate_map, feature_bytes)


class StrettoReport(io.ComfyNode):
    """Draw what the sampler before it computed, forecast and reused."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StrettoReport",
            display_name="Stretto Report",
            category="Stretto",
            description="Shows which steps of the connected sampler were computed and which were skipped, "
            "how long they took, and why.",
            inputs=[
                io.Latent.Input("samples", tooltip="Connect the sampler's LATENT, so that the report comes after it."),
            ],
            outputs=[
                io.Image.Output(display_name="timeline"),
                io.String.Output(display_name="summary"),
                io.String.Output(display_name="trace"),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, samples: dict) -> io.NodeOutput:
        trace, note = _find(cls.hidden.prompt or {}, str(cls.hidden.unique_id))
        plain = plain_run(trace, TRACES.all())
        text = "\n".join(filter(None, (note, summary(trace, plain))))
        below = (draw(trace) for draw in DRAWINGS)
        picture = as_image(stacked(timeline(trace, plain), *below))
        shown = ui.PreviewImage(picture, cls=cls).as_dict()
        shown |= {"text": (text,), "stretto_run": (digest(trace, plain),)}
        return io.NodeOutput(picture, text, json.dumps(trace), ui=shown)


def _find(prompt: dict[str, Any], node_id: str) -> tuple[dict[str, Any], str]:
    """Return the trace of the nearest sampler upstream of ``node_id`` and a remark on its age.

    Raises:
        StrettoError: no sampler upstream has left a trace.
    """
    current = current_prompt_id()
    upstream = _upstream(prompt, node_id)
    for node in upstream:
        traces = TRACES.of_node(node, current)
        if traces:
            return traces[-1], f"{len(traces)} runs in this node; the last is shown." if len(traces) > 1 else ""
    for node in upstream:
        traces = TRACES.of_node(node)
        if traces:
            return traces[-1], "The sampler's output came from ComfyUI's cache of node outputs: this is its last real run."
    raise StrettoError(
        "no Stretto node took part in making this latent, so there is nothing to report. "
        "Put Stretto Measure (timing only) or Stretto Cache between the model loader and the sampler."
    )


def _upstream(prompt: dict[str, Any], node_id: str) -> list[str]:
    """Return the nodes before ``node_id``, nearest first, following its links in the API prompt."""
    order: list[str] = []
    frontier = [node_id]
    while frontier:
        links = [
            str(value[0])
            for node in frontier
            for value in prompt.get(node, {}).get("inputs", {}).values()
            if isinstance(value, list) and len(value) == 2
        ]
        frontier = [node for node in dict.fromkeys(links) if node not in order]
        order += frontier
    return order
