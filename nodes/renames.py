"""Nodes that had another id once, told to ComfyUI, which then opens old workflows with their new names.

Ids are for ever here, and nothing has been renamed. Should two nodes become one, a row of :data:`RENAMES` keeps the
workflows that people saved: ComfyUI from 0.14 on replaces the old node in the editor and in prompts. Older ones know no
such thing and are left alone: for them the old node stays as well, as a deprecated one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from comfy_api import latest


@dataclass(frozen=True)
class Rename:
    """A node that another one stands for now.

    Attributes:
        old: the id in saved workflows.
        new: the id of the node that takes its place.
        widgets: names of the old node's widgets, in the order in which workflows store their values.
        inputs: new input -> old input; empty where all names stayed.
        values: new input -> the value that makes the new node do what the old one did.
        outputs: new output -> old output, by index; empty where all stayed in place.
    """

    old: str
    new: str
    widgets: tuple[str, ...] = ()
    inputs: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    outputs: dict[int, int] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of ComfyUI's ``NodeReplace``."""
        found: dict[str, Any] = {"new_node_id": self.new, "old_node_id": self.old}
        if self.widgets:
            found["old_widget_ids"] = list(self.widgets)
        if self.inputs or self.values:
            kept = [{"new_id": new, "old_id": old} for new, old in self.inputs.items()]
            found["input_mapping"] = kept + [{"new_id": new, "set_value": value} for new, value in self.values.items()]
        if self.outputs:
            found["output_mapping"] = [{"new_idx": new, "old_idx": old} for new, old in self.outputs.items()]
        return found


#: Every rename since the first release. Rows are never removed: workflows live longer than versions.
RENAMES: tuple[Rename, ...] = ()


async def declare_renames(renames: Sequence[Rename] = RENAMES, api: Any = latest) -> int:
    """Tell ComfyUI of ``renames``; return how many it was told of, 0 where it has no node replacement.

    Args:
        renames: what to tell.
        api: the module ``comfy_api.latest``.
    """
    entry = getattr(api.ComfyAPI(), "node_replacement", None) if renames and hasattr(api, "ComfyAPI") else None
    replace = getattr(api.io, "NodeReplace", None)
    if entry is None or replace is None:
        return 0
    for rename in renames:
        await entry.register(replace(**rename.arguments()))
    return len(renames)
