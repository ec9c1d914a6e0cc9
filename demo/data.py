"""The data of the demo models: three openly licensed emoji sets, rendered from SVG, with English names as captions.

Sources (licences in LICENSES.md): npm `@iconify-json/fluent-emoji` 1.2.7, `@iconify-json/fluent-emoji-flat` 1.2.6 and
`@iconify-json/noto` 1.2.9. A name denotes the same code points in all three sets, so the split is made by name: a
held-out name is never seen in training, in no style, neither by the autoencoder nor by the transformer.
"""

from __future__ import annotations

import io
import json
import random
import re
import subprocess
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PACKAGES = {
    "fluent": ("fluent-emoji", "1.2.7"),
    "flat": ("fluent-emoji-flat", "1.2.6"),
    "noto": ("noto", "1.2.9"),
}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (24, 24, 28),
    "blue": (64, 120, 220),
    "green": (80, 180, 96),
    "yellow": (250, 214, 80),
    "pink": (246, 160, 190),
}
SPLIT_SEED = 20261121
HELD_OUT = 64
# How many held-out names each category gives; picturesque subjects come before signs and arrows.
HELD_OUT_SHARE = {
    "Smileys & Emotion": 18,
    "Animals & Nature": 12,
    "Food & Drink": 8,
    "Travel & Places": 8,
    "Objects": 10,
    "People & Body": 5,
    "Activities": 3,
}
SKIN_TONE = re.compile(r"-(light|medium-light|medium|medium-dark|dark)(-skin-tone)?$")


@dataclass(frozen=True)
class Emoji:
    """Rendered emoji: `pixels` uint8 RGBA [N, S, S, 4], with `style`, `name` (words) and `held_out` per row."""

    pixels: np.ndarray
    style: list[str]
    name: list[str]
    held_out: np.ndarray

    def captions(self) -> list[str]:
        """Caption of every row: the style word and the name."""
        return [f"{style} {name}" for style, name in zip(self.style, self.name)]


def fetch_packages(folder: Path) -> None:
    """Download the three packages with npm into `folder` and unpack them, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for package, version in PACKAGES.values():
        target = folder / package
        if (target / "icons.json").exists():
            continue
        subprocess.run(
            ["npm", "pack", f"@iconify-json/{package}@{version}"], cwd=folder, check=True, stdout=subprocess.DEVNULL
        )
        target.mkdir(exist_ok=True)
        with tarfile.open(folder / f"iconify-json-{package}-{version}.tgz") as archive:
            for member in ("icons.json", "metadata.json"):
                packed = archive.extractfile(f"package/{member}")
                if packed is not None:
                    (target / member).write_bytes(packed.read())


def read_json(path: Path) -> dict:
    """One JSON object."""
    return json.loads(path.read_text(encoding="utf-8"))


def shared_names(folder: Path) -> list[str]:
    """Names present in all three sets, without skin-tone variants, sorted."""
    sets = [set(read_json(folder / package / "icons.json")["icons"]) for package, _ in PACKAGES.values()]
    names = set.intersection(*sets)
    everything = set.union(*sets)
    return sorted(
        n for n in names if "skin-tone" not in n and not (SKIN_TONE.search(n) and SKIN_TONE.sub("", n) in everything)
    )


def words_of(name: str) -> str:
    """Icon name -> words: "face-with-monocle" -> "face with monocle"."""
    return name.replace("-", " ").replace("_", " ").lower().strip()


def split_held_out(names: list[str], categories: dict[str, list[str]], count: int = HELD_OUT) -> list[str]:
    """Choose held-out names, seeded, such that each of their words still occurs in at least two training names.

    A word-level encoder has no meaning for a word it never met, so a name like "blue heart" qualifies
    (other blue things and other hearts stay) and "avocado" does not.
    """
    uses = Counter(word for name in names for word in set(words_of(name).split()))
    rng = random.Random(SPLIT_SEED)
    chosen: list[str] = []
    for category, share in HELD_OUT_SHARE.items():
        pool = sorted(set(categories.get(category, [])) & set(names))
        rng.shuffle(pool)
        taken = 0
        for name in pool:
            words = set(words_of(name).split())
            skip = len(words) < 2 or any(w in {"clock", "oclock", "thirty", "woman", "man"} for w in words)
            if taken == share or len(chosen) == count:
                break
            if skip or any(uses[word] < 3 for word in words):
                continue
            uses.subtract(words)
            chosen.append(name)
            taken += 1
    return sorted(chosen)


def render_svg(body: str, box: tuple[float, float], size: int) -> np.ndarray:
    """One icon -> uint8 RGBA [size, size, 4] with straight alpha."""
    import resvg_py
    from PIL import Image

    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" viewBox="0 0 {box[0]} {box[1]}">{body}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA").resize((size, size)), dtype=np.uint8)


def prepare(cache: Path, size: int) -> Emoji:
    """Render all shared names of all styles at `size` pixels and cache them; a second call reads the cache."""
    path = cache / f"emoji_{size}.npz"
    if not path.exists():
        folder = cache / "npm"
        fetch_packages(folder)
        names = shared_names(folder)
        categories = read_json(folder / "noto" / "metadata.json")["categories"]
        held = set(split_held_out(names, categories))
        pixels, styles = [], []
        for style, (package, _) in PACKAGES.items():
            icons = read_json(folder / package / "icons.json")
            default = {"width": icons.get("width", 16), "height": icons.get("height", 16)}
            jobs = [{**default, **icons["icons"][name]} for name in names]
            with ThreadPoolExecutor(2) as pool:
                drawn = pool.map(lambda icon: render_svg(icon["body"], (icon["width"], icon["height"]), size), jobs)
                pixels += list(drawn)
            styles += [style] * len(names)
        rows = names * len(PACKAGES)
        np.savez(
            path,
            pixels=np.stack(pixels),
            style=styles,
            name=[words_of(n) for n in rows],
            held_out=np.array([n in held for n in rows]),
        )
    file = np.load(path)
    return Emoji(file["pixels"], file["style"].tolist(), file["name"].tolist(), file["held_out"])


def composite(pixels: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """RGBA uint8 [N, H, W, 4] over `colour` uint8 [3] or [N, 3] -> RGB float32 [N, H, W, 3] in 0..1."""
    alpha = pixels[..., 3:].astype(np.float32) / 255
    ground = np.broadcast_to(np.asarray(colour, np.float32).reshape(-1, 1, 1, 3), (len(pixels), 1, 1, 3))
    return (pixels[..., :3].astype(np.float32) * alpha + ground * (1 - alpha)) / 255


def held_out_prompts(emoji: Emoji, count: int = 48) -> list[str]:
    """Captions of held-out names, each in one style, in a seeded order that mixes subjects and styles."""
    names = sorted({n for n, held in zip(emoji.name, emoji.held_out) if held})
    random.Random(SPLIT_SEED + 1).shuffle(names)
    styles = list(PACKAGES)
    return [f"{styles[i % len(styles)]} {name}" for i, name in enumerate(names[:count])]
