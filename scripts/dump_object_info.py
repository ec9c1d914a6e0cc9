"""Print what ComfyUI's server would answer to /object_info, as one line of JSON.

    python dump_object_info.py COMFYUI_FOLDER PACK_FOLDER
"""

import asyncio
import json
import sys


def v1_info(name: str, node: type) -> dict:
    """The schema of a node of the old kind, in the server's form."""
    inputs = node.INPUT_TYPES()
    return {
        "input": inputs,
        "input_order": {section: list(entries) for section, entries in inputs.items()},
        "output": node.RETURN_TYPES,
        "output_name": getattr(node, "RETURN_NAMES", node.RETURN_TYPES),
        "output_node": getattr(node, "OUTPUT_NODE", False) is True,
        "name": name,
    }


def main() -> None:
    """Import ComfyUI with its extra nodes and the pack; print all schemas."""
    comfyui, pack = sys.argv[1:]
    sys.argv[1:] = ["--cpu"]
    sys.path.insert(0, comfyui)
    import comfy.options

    comfy.options.enable_args_parsing()
    import utils.install_util  # noqa: F401, I001  (first, as in main.py: `nodes` puts another `utils` on the path)
    import nodes
    from comfy_api.internal import _ComfyNodeInternal

    async def load() -> None:
        await nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False)
        if not await nodes.load_custom_node(pack):
            raise SystemExit("the pack could not be loaded")

    asyncio.run(load())
    infos = {}
    for name, node in nodes.NODE_CLASS_MAPPINGS.items():
        infos[name] = node.GET_NODE_INFO_V1() if issubclass(node, _ComfyNodeInternal) else v1_info(name, node)
    print(json.dumps(infos, default=str))


if __name__ == "__main__":
    main()
