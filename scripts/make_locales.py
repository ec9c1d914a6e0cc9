#!/usr/bin/env python3
"""Write locales/en/nodeDefs.json from the schemas of the nodes; run it with ComfyUI's Python after a schema has changed.

    .venv/bin/python scripts/make_locales.py
    .venv/bin/python scripts/make_locales.py --check    only says whether the file is as it should be

Other languages are files of the same form in a folder of their own, such as locales/de/.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "locales" / "en" / "nodeDefs.json"
#: The editor's message format gives these a meaning; texts with one are left to the schema.
SYNTAX = frozenset("@{}|")


def node_definitions(nodes: list[Any]) -> dict[str, Any]:
    """Return what nodeDefs.json holds for node classes, by node id."""
    return {schema.node_id: _definition(schema) for schema in (node.GET_SCHEMA() for node in nodes)}


def as_text(definitions: dict[str, Any]) -> str:
    """Return the file's text."""
    return json.dumps(definitions, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def _definition(schema: Any) -> dict[str, Any]:
    found = _plain(display_name=schema.display_name, description=schema.description)
    inputs = {
        item.id.replace(".", "_"): _plain(name=item.display_name or item.id, tooltip=item.tooltip)
        for item in schema.inputs
    }
    outputs = {
        str(place): _plain(name=item.display_name, tooltip=item.tooltip) for place, item in enumerate(schema.outputs)
    }
    return found | {name: values for name, values in (("inputs", inputs), ("outputs", outputs)) if values}


def _plain(**texts: str | None) -> dict[str, str]:
    return {name: text for name, text in texts.items() if text and not SYNTAX & set(text)}


def main() -> int:
    """Run the command; return the exit status."""
    sys.path.insert(0, str(ROOT / ".comfyui"))
    import comfy.options

    comfy.options.enable_args_parsing(False)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    sys.path.append(str(ROOT))
    from load_pack import load_pack

    sys.path.remove(str(ROOT))  # ComfyUI has a top-level `nodes` module, and so does this folder
    extension = asyncio.run(load_pack().comfy_entrypoint())
    text = as_text(node_definitions(asyncio.run(extension.get_node_list())))
    if "--check" in sys.argv[1:]:
        same = TARGET.is_file() and TARGET.read_text(encoding="utf-8") == text
        print("as it should be" if same else f"{TARGET} is out of date: run {Path(__file__).name}")
        return 0 if same else 1
    TARGET.write_text(text, encoding="utf-8")
    print(f"wrote {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
