#!/usr/bin/env python3
"""Draw the pictures that ComfyUI's template browser shows for our workflows, from what the workflows really make.

    .venv-panel/bin/python scripts/make_thumbnails.py [--server http://127.0.0.1:8188]

Without --server a ComfyUI is started for it. Each thumbnail shows four prompts (a clip as a row of frames) and, below,
one cell per step: computed, computed in part (sparse attention, active regions, a smaller latent), forecast or reused.
Workflows whose models have to be downloaded do not run here: they get a card with their nodes and their graph.
"""

import argparse
import io
import json
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from launch.comfyui_server import HOST, free_port, start_comfyui
from launch.console import SetupError, say
from launch.environments import interpreter
from launch.installation import COMFYUI_FOLDER, MAIN_FOLDER
from launch.pins import ROOT

sys.path.insert(0, str(ROOT))
from load_pack import load_pack

sys.path.remove(str(ROOT))
load_pack()
from stretto.scripts.shipped_workflows.card import draw_card  # noqa: E402
from stretto.scripts.shipped_workflows.catalogue import WORKFLOWS  # noqa: E402
from stretto.web.panel.measure import arms as edit  # noqa: E402
from stretto.web.panel.measure.client import ComfyClient  # noqa: E402
from stretto.web.panel.measure.errors import MeasureError  # noqa: E402
from stretto.web.panel.measure.workflow import ui_to_api  # noqa: E402

PROMPTS = ("fluent red apple", "noto cat face", "flat blue heart", "fluent sun with face")
CLIP_PROMPTS = (
    "fluent two hearts",
    "fluent sun behind small cloud",
    "fluent cat face",
    "fluent grinning face with sweat",
)
SIDE, PICTURE, GAP = 480, 216, 8
FRAMES = 4  # shown of a clip
BACKGROUND = (27, 27, 31)
COLOURS = {
    "computed": (0, 114, 178),
    "sparse": (86, 180, 233),
    "forecast": (230, 159, 0),
    "reused": (0, 158, 115),
    "mixed": (204, 121, 167),
}


@contextmanager
def server(address: str | None) -> Iterator[str]:
    """Yield the address of a ComfyUI: the given one, or one that lives as long as this."""
    if address is not None:
        yield address
        return
    port = free_port()
    log = ROOT / ".cache" / "logs" / "thumbnails.log"
    child = start_comfyui(COMFYUI_FOLDER, interpreter(MAIN_FOLDER), port, log)
    try:
        child.wait_for(f"http://{HOST}:{port}/system_stats", lambda _: None)
        yield f"http://{HOST}:{port}"
    finally:
        child.stop()


def with_prompt(api: dict[str, Any], prompt: str) -> dict[str, Any]:
    """Set the prompt, make ComfyUI sample again, and keep nothing on disk."""
    return edit.ensure_measure(edit.set_prompt(edit.prepare(api), prompt), secrets.randbits(32))


def draw(pictures: list[list[Image.Image]], decisions: list[str]) -> Image.Image:
    """Four pictures in a square, or the frames of four clips in rows, and below them one cell per step."""
    sheet = Image.new("RGB", (SIDE, SIDE), BACKGROUND)
    left = (SIDE - 2 * PICTURE - GAP) // 2
    columns = max(len(frames) for frames in pictures) if len(pictures[0]) > 1 else 2
    side = (2 * PICTURE + GAP - (columns - 1) * GAP) // columns
    for index, picture in enumerate(frame for frames in pictures for frame in frames):
        x, y = left + index % columns * (side + GAP), GAP // 2 + index // columns * (side + GAP)
        sheet.paste(picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC), (x, y))
    canvas = ImageDraw.Draw(sheet)
    width = (2 * PICTURE + GAP) / len(decisions)
    top = GAP // 2 + 2 * (PICTURE + GAP)
    for index, decision in enumerate(decisions):
        x = left + index * width
        height = SIDE - GAP - top if decision == "computed" else (SIDE - GAP - top) // 2
        canvas.rectangle((x, SIDE - GAP - height, x + width - 2, SIDE - GAP), COLOURS[decision])
    return sheet


def make(client: ComfyClient, path: Path) -> None:
    """Run one workflow for every prompt and write its thumbnail."""
    api = ui_to_api(json.loads(path.read_text(encoding="utf-8")), client.object_info())
    pictures, decisions = [], []
    for prompt in CLIP_PROMPTS if edit.get_frame_rate(api) else PROMPTS:
        result = client.run(with_prompt(api, prompt))
        images = edit.pictures_of(api, result.outputs)
        count = min(FRAMES, len(images))
        picked = [images[index * (len(images) - 1) // max(count - 1, 1)] for index in range(count)]
        pictures.append([Image.open(io.BytesIO(client.fetch_image(image))) for image in picked])
        last = {trace["sampler_node"]: trace["evaluations"] for trace in client.traces(result.prompt_id)}
        samplers = sorted(edit.sampler_ids(api), key=lambda key: int(api[key]["inputs"].get("start_at_step", 0)))
        entries = [entry for key in samplers for entry in last.get(key, ())]
        tokens = [max((branch["tokens"] for branch in entry["branches"]), default=0) for entry in entries]
        shares = ("attention_kept", "active_share")
        decisions = [
            "sparse" if any(entry[name] is not None for name in shares) or 0 < size < max(tokens) else entry["decision"]
            for entry, size in zip(entries, tokens)
        ]
    save(draw(pictures, decisions), path)


def save(picture: Image.Image, path: Path) -> None:
    """Put a thumbnail beside its workflow."""
    picture.save(path.with_suffix(".jpg"), quality=88, optimize=True)
    say(f"{path.with_suffix('.jpg').relative_to(ROOT)}")


def main() -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", metavar="URL", help="address of a running ComfyUI with the pack")
    parser.add_argument("--only", default="*.json", metavar="PATTERN", help="files to draw (default: all of them)")
    arguments = parser.parse_args()
    paths = sorted((ROOT / "workflows").glob(arguments.only))
    cards = {workflow.name: workflow for workflow in WORKFLOWS if not workflow.model.demo}
    for path in paths:
        if path.stem in cards:
            save(draw_card(cards[path.stem], json.loads(path.read_text(encoding="utf-8"))), path)
    pending = [path for path in paths if path.stem not in cards]
    if not pending:
        return 0
    try:
        with server(arguments.server) as address, ComfyClient(address) as client:
            for path in pending:
                make(client, path)
    except (SetupError, MeasureError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
