"""The moving data of the demo video models: the animated Fluent emoji, decoded to small clips with captions.

Source (licence in LICENSES.md): npm `@lobehub/fluent-emoji-anim-1` .. `-4` 1.0.0, animated WebP of 256 x 256 pixels at 24
frames per second, named by code points. Captions are the names that the still sets give the same code points, so the
split by name of `data.py` holds here too: a held-out name is never seen in training, neither still nor moving.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .data import read_json, shared_names, split_held_out, words_of

PACKAGES = [(f"fluent-emoji-anim-{i}", "1.0.0") for i in (1, 2, 3, 4)]
SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
SOURCE_RATE, STRIDE = 24, 3
RATE = SOURCE_RATE // STRIDE  # frames per second of everything the models see
FRAMES = 17  # of one training clip: five latent frames, 2.1 seconds


@dataclass(frozen=True)
class Clips:
    """Decoded clips: `pixels` uint8 RGBA [F, S, S, 4] of all clips in a row; `start` int64 [N + 1] cuts them.

    `name` (words), `held_out` and `motion` (mean absolute change between neighbouring frames on white, 0..1) per clip.
    """

    pixels: np.ndarray
    start: np.ndarray
    name: list[str]
    held_out: np.ndarray
    motion: np.ndarray

    def frames(self, clip: int) -> np.ndarray:
        """All frames of one clip, uint8 RGBA [F, S, S, 4]."""
        return self.pixels[self.start[clip] : self.start[clip + 1]]

    def window(self, clip: int, first: int, count: int) -> np.ndarray:
        """`count` frames from `first` on, played to and fro at the ends (a cut would teach jumps)."""
        frames = self.frames(clip)
        period = max(2 * (len(frames) - 1), 1)
        index = (first + np.arange(count)) % period
        return frames[np.where(index < len(frames), index, period - index)]


def fetch_packages(folder: Path) -> list[Path]:
    """Download the four packages (about 700 MB) with npm into `folder`, unless they are there; returns the archives."""
    folder.mkdir(parents=True, exist_ok=True)
    archives = []
    for package, version in PACKAGES:
        path = folder / f"lobehub-{package}-{version}.tgz"
        if not path.exists():
            subprocess.run(
                ["npm", "pack", f"@lobehub/{package}@{version}"], cwd=folder, check=True, stdout=subprocess.DEVNULL
            )
        archives.append(path)
    return archives


def names_by_code(noto: Path) -> dict[str, str]:
    """Code points without variation selectors, as in "1f468-1f4bb", -> icon name, from the still set's character table."""
    with tarfile.open(noto) as archive:
        packed = archive.extractfile("package/chars.json")
        assert packed is not None
        table = json.loads(packed.read())
    return {plain_code(code): name for code, name in table.items()}


def plain_code(code: str) -> str:
    """Code points without the emoji variation selector, which the sources use differently."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def decode(data: bytes, size: int) -> np.ndarray | None:
    """Every third frame of an animated WebP as uint8 RGBA [F, size, size, 4]; None for a still."""
    from PIL import Image

    image = Image.open(io.BytesIO(data))
    count = getattr(image, "n_frames", 1)
    if count < STRIDE * FRAMES:
        return None
    frames = []
    for i in range(0, count, STRIDE):
        image.seek(i)
        # Colour is averaged weighted by alpha, or transparent black would darken every edge.
        small = image.convert("RGBA").convert("RGBa").resize((size, size), Image.Resampling.BOX).convert("RGBA")
        frames.append(np.asarray(small, np.uint8))
    return np.stack(frames)


def prepare(cache: Path, size: int, emit: Callable[[str], None]) -> Clips:
    """Decode all named clips without skin tones at `size` pixels and cache them; a second call reads the cache."""
    path = cache / f"clips_{size}.npz"
    if not path.exists():
        folder = cache / "npm"
        archives = fetch_packages(folder)
        names = shared_names(folder)
        categories = read_json(folder / "noto" / "metadata.json")["categories"]
        held = set(split_held_out(names, categories))
        table = names_by_code(folder / "iconify-json-noto-1.2.9.tgz")
        known = set(names)
        pixels, found = [], []
        for archive_path in archives:
            jobs, job_names = [], []
            with tarfile.open(archive_path) as archive:
                for member in archive.getmembers():
                    code = Path(member.name).stem
                    name = table.get(plain_code(code))
                    if not member.name.endswith(".webp") or name not in known or SKIN_TONES & set(code.split("-")):
                        continue
                    packed = archive.extractfile(member)
                    if packed is not None:
                        jobs.append((packed.read(), size))
                        job_names.append(name)
            with ThreadPoolExecutor(2) as pool:
                for name, frames in zip(job_names, pool.map(lambda job: decode(*job), jobs)):
                    if frames is not None:
                        pixels.append(frames)
                        found.append(name)
            emit(f"{archive_path.name}: {len(found)} clips so far")
        np.savez_compressed(
            path,
            pixels=np.concatenate(pixels),
            start=np.cumsum([0, *map(len, pixels)]),
            name=[words_of(n) for n in found],
            held_out=np.array([n in held for n in found]),
            motion=np.array([motion_of(p) for p in pixels]),
        )
    file = np.load(path)
    return Clips(file["pixels"], file["start"], file["name"].tolist(), file["held_out"], file["motion"])


def motion_of(frames: np.ndarray) -> float:
    """Mean absolute change between neighbouring frames on white, 0..1."""
    alpha = frames[..., 3:].astype(np.float32) / 255
    rgb = frames[..., :3].astype(np.float32) / 255 * alpha + 1 - alpha
    return float(np.abs(np.diff(rgb, axis=0)).mean())
