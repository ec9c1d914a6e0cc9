#!/usr/bin/env python3
"""Write the workflow files that are described in shipped_workflows/catalogue.py, after a look at ComfyUI's own nodes.

    .venv/bin/python scripts/make_workflows.py [--only flux-*] [--table]

Thumbnails are made by make_thumbnails.py. --table prints the list of workflows by model, for the README.
"""

import argparse
import fnmatch
import sys

from launch.installation import COMFYUI_FOLDER
from launch.pins import ROOT

sys.path.insert(0, str(ROOT))
from load_pack import load_pack

sys.path.remove(str(ROOT))
load_pack()
from stretto.scripts.shipped_workflows.catalogue import WORKFLOWS  # noqa: E402
from stretto.scripts.shipped_workflows.drawing import draw, dump  # noqa: E402
from stretto.scripts.shipped_workflows.schemas import object_info  # noqa: E402
from stretto.scripts.shipped_workflows.table import table  # noqa: E402
from stretto.web.panel.measure.workflow import api_to_ui  # noqa: E402


def main() -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names of the workflows to write (default: all)")
    parser.add_argument("--table", action="store_true", help="print the table of workflows and write nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(WORKFLOWS))
        return 0
    schemas = object_info(COMFYUI_FOLDER)
    for workflow in WORKFLOWS:
        if fnmatch.fnmatch(workflow.name, arguments.only):
            path = ROOT / "workflows" / f"{workflow.name}.json"
            path.write_text(dump(draw(workflow, schemas, api_to_ui)) + "\n", encoding="utf-8")
            print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
