"""Stretto's command line: compare accelerated workflows with the plain one, and start the panel.

Runs in the panel's environment (requirements-panel.txt), without torch; a ComfyUI server does the work.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from load_pack import ROOT, load_pack

DEFAULT_SERVER = "http://127.0.0.1:8188"
USAGE_ERROR, CANCELLED = 2, 130


def build_parser() -> argparse.ArgumentParser:
    """All subcommands; each sets `handler`."""
    parser = argparse.ArgumentParser(prog="cli.py", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_compare(commands)
    _add_panel(commands)
    return parser


def _add_compare(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "compare",
        help="measure workflows against the plain one and write a report",
        description="The first workflow with Stretto's nodes bypassed is the plain arm; "
        "every workflow that differs from it is an arm of its own.",
    )
    command.add_argument(
        "--server", default=DEFAULT_SERVER, metavar="URL", help="address of ComfyUI (default: %(default)s)"
    )
    command.add_argument(
        "--workflow",
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help="workflow JSON, as saved by the editor or in API form; may be given more than once",
    )
    command.add_argument(
        "--prompts",
        nargs="+",
        action="extend",
        default=[],
        metavar="TEXT|FILE",
        help="prompts, or files with one per line or a JSON list (default: the workflow's own)",
    )
    command.add_argument("--count", type=_positive, metavar="N", help="use only the first N prompts")
    command.add_argument(
        "--seed", type=int, nargs="+", default=[], metavar="S", help="seeds (default: the workflow's own)"
    )
    command.add_argument("--steps", type=_positive, metavar="N", help="sampling steps (default: the workflow's own)")
    command.add_argument(
        "--repeats", type=_positive, default=3, metavar="R", help="rounds per prompt and seed (default: %(default)s)"
    )
    command.add_argument(
        "--warmup", type=_count, default=1, metavar="W", help="discarded rounds (default: %(default)s)"
    )
    command.add_argument(
        "--batch", type=_positive, metavar="B", help="pictures or clips per run (default: the workflow's own)"
    )
    command.add_argument(
        "--reference-steps",
        type=_count,
        default=200,
        metavar="N",
        help="steps of the reference that every arm is measured against; 0 leaves it out (default: %(default)s)",
    )
    command.add_argument("--no-fewer-steps", action="store_true", help="leave out the plain sampler with fewer steps")
    command.add_argument("--resume", action="store_true", help="continue an interrupted comparison in the same folder")
    command.add_argument(
        "--out", type=Path, default=Path("report"), metavar="DIR", help="folder of the report (default: %(default)s)"
    )
    command.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")
    command.set_defaults(handler=run_compare)


def _add_panel(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("panel", help="open the A/B page in the browser")
    command.add_argument(
        "--server", default=DEFAULT_SERVER, metavar="URL", help="address of ComfyUI (default: %(default)s)"
    )
    command.add_argument("--port", type=_port, default=7860, help="port of the page (default: %(default)s)")
    command.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; anything but loopback lets others in (default: %(default)s)",
    )
    command.add_argument(
        "--workflows", type=Path, default=ROOT / "workflows", metavar="DIR", help="folder of workflows to choose from"
    )
    command.add_argument("--workflow", metavar="NAME", help="file in that folder that is chosen at first")
    command.add_argument(
        "--out",
        type=Path,
        default=Path("report") / "panel",
        metavar="DIR",
        help="folder of the reports (default: %(default)s)",
    )
    command.set_defaults(handler=run_panel)


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _port(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 65535:
        raise argparse.ArgumentTypeError("must be between 1 and 65535")
    return number


def run_compare(args: argparse.Namespace) -> int:
    """Handle `compare`."""
    from stretto.web.panel.measure.client import ComfyClient
    from stretto.web.panel.measure.compare import arms_of, compare, read_prompts, read_workflow
    from stretto.web.panel.terminal import output_console, print_paths, print_report, show_progress

    out, log = output_console(), output_console(stderr=True)
    prompts = read_prompts(args.prompts)[: args.count]
    with ComfyClient(args.server) as client:
        client.health()
        plain, arms = arms_of([(path.stem, read_workflow(path, client)) for path in args.workflow])
        with show_progress(log if args.json else out) as progress:
            report = compare(
                client,
                plain,
                arms,
                prompts,
                args.seed,
                args.repeats,
                args.warmup,
                args.out,
                args.reference_steps,
                progress,
                batch=args.batch,
                steps=args.steps,
                competitor=not args.no_fewer_steps,
                resume=args.resume,
                command=args.reproduce,
            )
    if args.json:
        print(json.dumps(report))
    else:
        print_report(report, out)
        print_paths(args.out, out)
    return 0


def run_panel(args: argparse.Namespace) -> int:
    """Handle `panel`."""
    from stretto.web.panel.app import PanelConfig, serve

    serve(PanelConfig(args.server, args.workflows, args.out, args.host, args.port, args.workflow), announce=print)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 2 for a mistake that is explained in one sentence, 130 cancelled."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(argv)
    args.reproduce = shlex.join(["python", "cli.py", *argv])
    load_pack()
    try:
        from stretto.web.panel.measure.errors import MeasureError, ServerDied
    except ModuleNotFoundError as error:
        print(f"stretto: {_missing(error)}", file=sys.stderr)
        return USAGE_ERROR
    try:
        return args.handler(args)
    except ServerDied as error:
        print(f"stretto: {error} The finished measurements are kept; --resume continues them.", file=sys.stderr)
    except MeasureError as error:
        print(f"stretto: {error}", file=sys.stderr)
    except ModuleNotFoundError as error:
        print(f"stretto: {_missing(error)}", file=sys.stderr)
    except OSError as error:
        print(f"stretto: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stretto: cancelled; the finished measurements are kept, and --resume continues them.", file=sys.stderr)
        return CANCELLED
    return USAGE_ERROR


def _missing(error: ModuleNotFoundError) -> str:
    """The sentence for a package that is not installed."""
    return f"the package {error.name!r} is missing; install the panel's with: pip install -r requirements-panel.txt"


if __name__ == "__main__":
    sys.exit(main())
