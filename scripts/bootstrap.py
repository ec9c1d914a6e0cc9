#!/usr/bin/env python3
"""Make everything that Stretto needs to run from a fresh clone; safe to run again, quick when nothing is to do.

    python3 scripts/bootstrap.py                    own ComfyUI in .comfyui, environments .venv and .venv-panel
    python3 scripts/bootstrap.py --dev              the test tools too
    python3 scripts/bootstrap.py --comfyui PATH     use a ComfyUI that is already there
"""

import argparse
import sys
from pathlib import Path

from launch.console import SetupError
from launch.installation import Wishes, prepare, report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every program with a bootstrap in front of it shares."""
    parser.add_argument("--comfyui", type=Path, metavar="PATH", help="use this ComfyUI instead of making one")
    parser.add_argument("--python", type=Path, metavar="EXE", help="the interpreter that runs the ComfyUI of --comfyui")
    parser.add_argument("--adopt", action="store_true", help="check and keep folders that this script did not make")


def wishes_from(arguments: argparse.Namespace, dev: bool = False) -> Wishes:
    """Turn parsed options into Wishes."""
    if arguments.python is not None and arguments.comfyui is None:
        raise SetupError("--python says who runs the ComfyUI of --comfyui: give both.")
    return Wishes(arguments.comfyui, arguments.python, dev, arguments.adopt)


def main() -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(description="Make everything that Stretto needs to run.")
    add_arguments(parser)
    parser.add_argument("--dev", action="store_true", help="install the test tools too")
    arguments = parser.parse_args()
    try:
        report(prepare(wishes_from(arguments, arguments.dev)))
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. Run this again to go on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
