#!/usr/bin/env python3
"""The demonstration: ComfyUI, the same pictures (or clips) plain and accelerated, a report, then a panel to play with.

Called by ./demo.sh; see `./demo.sh --help`.
"""

import argparse
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from bootstrap import add_arguments, wishes_from
from launch.comfyui_server import HOST, Child, require_free_port, require_pack, start_comfyui
from launch.console import Progress, SetupError, clock, say
from launch.installation import Installation, prepare
from launch.pins import ROOT

LOGS = ROOT / ".cache" / "logs"
# Where the panel looks, so that what the demo measured can be opened there.
HISTORY = ROOT / "report" / "panel" / "history.sqlite"


@dataclass(frozen=True)
class Show:
    """What is compared: workflow files (the panel begins with the first), prompts, rounds, the report's folder."""

    workflows: tuple[str, ...]
    prompts: str
    count: int
    repeats: int
    report: Path
    models: tuple[str, ...]


PICTURES = Show(
    workflows=("demo-image-fitted.json", "demo-image-taylor.json", "demo-image-easycache.json"),
    prompts="demo/heldout_prompts.json",
    count=6,
    repeats=3,
    report=ROOT / "report",
    models=("diffusion_models/stretto-demo-image.safetensors", "vae/stretto-demo-image-vae.safetensors"),
)
# Fewer rounds than for pictures, since a clip takes several times as long; from six on the speed has an interval.
CLIPS = Show(
    workflows=("demo-video-fitted.json", "demo-video-taylor.json", "demo-video-easycache.json"),
    prompts="demo/heldout_video_prompts.json",
    count=6,
    repeats=2,
    report=ROOT / "report" / "video",
    models=("diffusion_models/stretto-demo-video.safetensors", "vae/stretto-demo-video-vae.safetensors"),
)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="demo.sh", description="Show what Stretto does, on this machine.")
    parser.add_argument("--video", action="store_true", help="compare clips instead of pictures")
    parser.add_argument("--once", action="store_true", help="stop ComfyUI and exit after the report")
    parser.add_argument("--port", type=int, default=8188, help="port for ComfyUI (default 8188)")
    parser.add_argument("--panel-port", type=int, default=7860, help="port for the panel (default 7860)")
    add_arguments(parser)
    return parser.parse_args()


def terminate(number: int, _frame: FrameType | None) -> None:
    """Turn a signal into an exception, so that every child is stopped on the way out."""
    raise SystemExit(128 + number)


def start_server(installation: Installation, port: int) -> Child:
    """Start ComfyUI, showing that something happens; stop it again when it does not come up."""
    progress = Progress("ComfyUI")
    server = start_comfyui(
        installation.comfyui, installation.python, port, LOGS / "comfyui.log", own=installation.own
    )
    try:
        server.wait_for(f"http://{HOST}:{port}/system_stats", lambda _: progress.update("starting"))
        require_pack(f"http://{HOST}:{port}", server.log)
    except BaseException:
        # Also on Ctrl-C; the caller does not have the child yet.
        server.stop()
        raise
    finally:
        progress.close()
    say(f"ComfyUI runs at http://{HOST}:{port} after {clock(progress.seconds)}")
    return server


def require_models(show: Show) -> None:
    """Refuse to begin what would only fail after ComfyUI has started."""
    for name in (show.prompts, *(f"demo/models/{model}" for model in show.models)):
        if not (ROOT / name).is_file():
            raise SetupError(f"{name} is missing: it comes with the repository, so `git checkout {name}` restores it.")


def compare(installation: Installation, url: str, show: Show) -> int:
    """Measure plain against accelerated and write the report; return the exit status."""
    command = [str(installation.panel_python), "cli.py", "compare", "--server", url]
    for workflow in show.workflows:
        command += ["--workflow", f"workflows/{workflow}"]
    command += ["--prompts", show.prompts, "--count", str(show.count), "--repeats", str(show.repeats)]
    command += ["--out", str(show.report), "--history", str(HISTORY)]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def start_panel(installation: Installation, url: str, port: int, show: Show) -> Child:
    """Start the panel and wait until it answers."""
    progress = Progress("Panel")
    command = [str(installation.panel_python), "-u", "cli.py", "panel", "--server", url, "--port", str(port)]
    command += ["--workflow", show.workflows[0]]
    panel = Child(command, LOGS / "panel.log", ROOT, "The panel")
    try:
        panel.wait_for(f"http://{HOST}:{port}/", lambda _: progress.update("starting"), limit=120.0)
    except BaseException:
        # Also on Ctrl-C; the caller does not have the child yet.
        panel.stop()
        raise
    finally:
        progress.close()
    return panel


def stay(children: list[Child]) -> int:
    """Wait until the person stops us or a child dies."""
    while True:
        time.sleep(0.5)
        for child in children:
            if not child.alive():
                say(f"{child.last_lines()}\n{child.name} has stopped: the whole log is {child.log}.")
                return 1


def run(arguments: argparse.Namespace) -> int:
    """Do it all; return the exit status."""
    require_free_port(arguments.port, "ComfyUI", "--port")
    if not arguments.once:
        require_free_port(arguments.panel_port, "the panel", "--panel-port")
    show = CLIPS if arguments.video else PICTURES
    require_models(show)
    installation = prepare(wishes_from(arguments))
    url = f"http://{HOST}:{arguments.port}"
    with ExitStack() as children:
        server = start_server(installation, arguments.port)
        children.callback(server.stop)
        status = compare(installation, url, show)
        if status != 0 and not server.alive():
            say(f"{server.last_lines()}\nComfyUI stopped during the comparison: the whole log is {server.log}.")
        if status == 0:
            say(f"Report: {show.report / 'index.html'}")
        if arguments.once or status != 0:
            return status
        panel = start_panel(installation, url, arguments.panel_port, show)
        children.callback(panel.stop)
        say(f"ComfyUI: {url} (the workflows are under Templates, Stretto)")
        say(f"Panel:   http://{HOST}:{arguments.panel_port}")
        say("Press Ctrl-C to stop both.")
        return stay([server, panel])


def main() -> int:
    """Run the command; return the exit status."""
    arguments = parse()
    # A script that started us in the background has left Ctrl-C ignored; whoever sends it means it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), terminate)
    try:
        return run(arguments)
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("\nStopped.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
