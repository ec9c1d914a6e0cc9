"""Virtual environments: made once, believed only when complete, and never somebody else's."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from stretto.scripts.launch import environments, stamps
from stretto.scripts.launch.console import SetupError
from stretto.scripts.launch.environments import Environment, Layer

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def pip(monkeypatch):
    """Replace creation and installation by records of what was asked for; `pip.fail` makes the next one fail."""

    class Pip:
        calls: list[tuple[str, ...]]
        created: int
        fail: BaseException | None

        def __init__(self) -> None:
            self.calls, self.created, self.fail = [], 0, None

    record = Pip()

    def create(environment: Environment) -> None:
        stamps.mark_making(environment.folder)
        record.created += 1
        environment.python.parent.mkdir(parents=True)
        environment.python.touch()

    def install(_python, arguments, _title, _log) -> None:
        if record.fail is not None:
            raise record.fail
        record.calls.append(tuple(arguments))

    monkeypatch.setattr(environments, "_create", create)
    monkeypatch.setattr(environments, "pip_install", install)
    monkeypatch.setattr(environments, "version_of", lambda python: "3.11" if python.exists() else None)
    return record


def environment(folder: Path, *made_from: str) -> Environment:
    """An environment with one layer per text."""
    layers = tuple(Layer(f"layer{index}", (text,), text) for index, text in enumerate(made_from))
    return Environment(folder, "the environment", layers, space=1)


def test_made_once_and_then_left_alone(tmp_path, pip):
    wanted = environment(tmp_path / "venv", "a==1", "b==1")
    environments.ensure(wanted, adopt=False)
    environments.ensure(wanted, adopt=False)
    assert pip.created == 1
    assert pip.calls == [("a==1",), ("b==1",)]


def test_changed_requirements_are_installed_in_place(tmp_path, pip):
    environments.ensure(environment(tmp_path / "venv", "a==1", "b==1"), adopt=False)
    environments.ensure(environment(tmp_path / "venv", "a==1", "b==2"), adopt=False)
    assert pip.created == 1
    assert pip.calls == [("a==1",), ("b==1",), ("b==2",)]


def test_a_layer_can_be_added_later(tmp_path, pip):
    environments.ensure(environment(tmp_path / "venv", "a==1"), adopt=False)
    environments.ensure(environment(tmp_path / "venv", "a==1", "tools"), adopt=False)
    environments.ensure(environment(tmp_path / "venv", "a==1"), adopt=False)
    assert pip.calls == [("a==1",), ("tools",)]


@pytest.mark.parametrize("failure", [SetupError("no network"), KeyboardInterrupt()])
def test_nothing_half_made_stays(tmp_path, pip, failure):
    pip.fail = failure
    with pytest.raises(type(failure)):
        environments.ensure(environment(tmp_path / "venv", "a==1"), adopt=False)
    assert not (tmp_path / "venv").exists()


def test_a_later_failure_keeps_what_was_complete(tmp_path, pip):
    environments.ensure(environment(tmp_path / "venv", "a==1"), adopt=False)
    pip.fail = SetupError("no network")
    with pytest.raises(SetupError):
        environments.ensure(environment(tmp_path / "venv", "a==1", "b==1"), adopt=False)
    assert stamps.read(tmp_path / "venv", "layer0")
    assert stamps.read(tmp_path / "venv", "layer1") is None


def test_a_folder_left_by_a_killed_run_is_made_anew(tmp_path, pip):
    stamps.mark_making(tmp_path / "venv")
    (tmp_path / "venv" / "half").touch()
    environments.ensure(environment(tmp_path / "venv", "a==1"), adopt=False)
    assert not (tmp_path / "venv" / "half").exists()
    assert pip.created == 1


def test_an_environment_whose_interpreter_is_gone_is_made_anew(tmp_path, pip):
    wanted = environment(tmp_path / "venv", "a==1")
    environments.ensure(wanted, adopt=False)
    wanted.python.unlink()
    environments.ensure(wanted, adopt=False)
    assert pip.created == 2


def test_somebody_elses_folder_is_refused_and_untouched(tmp_path, pip):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "mine").touch()
    with pytest.raises(SetupError, match="was not made by this script"):
        environments.ensure(environment(tmp_path / "venv", "a==1"), adopt=False)
    assert (tmp_path / "venv" / "mine").exists()
    assert not pip.calls


def test_adopting_installs_into_the_folder_and_keeps_it(tmp_path, pip):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "mine").touch()
    environments.ensure(environment(tmp_path / "venv", "a==1"), adopt=True)
    assert (tmp_path / "venv" / "mine").exists()
    assert pip.created == 0
    assert pip.calls == [("a==1",)]


def test_adopting_never_removes_a_folder_when_it_fails(tmp_path, pip):
    (tmp_path / "venv").mkdir()
    pip.fail = SetupError("no network")
    with pytest.raises(SetupError):
        environments.ensure(environment(tmp_path / "venv", "a==1"), adopt=True)
    assert (tmp_path / "venv").exists()


def test_too_little_space_is_said_before_anything_is_made(tmp_path, pip, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 3 * 10**9))
    wanted = Environment(tmp_path / "venv", "the environment", (Layer("a", ("a",), "a"),), space=9 * 10**9)
    with pytest.raises(SetupError, match=r"9\.0 GB needed, 3\.0 GB free"):
        environments.ensure(wanted, adopt=False)
    assert not (tmp_path / "venv").exists()
    assert pip.created == 0


@pytest.mark.parametrize("content", ["", "{", "[]", '{"digest"', "\x00"])
def test_a_damaged_stamp_counts_as_none(tmp_path, content):
    (tmp_path / f"{stamps.STAMP}-layer").write_text(content)
    assert stamps.read(tmp_path, "layer") is None


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("WARNING: Retrying ... NewConnectionError(...)\nERROR: No matching distribution found for torch==2.11.0",
         "The package index cannot be reached"),
        ("socket.gaierror: [Errno -3] Temporary failure in name resolution", "check the network"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk became full"),
        ("ERROR: No matching distribution found for torch==2.11.0", "offers no torch==2.11.0 for Python"),
        ("ERROR: Something odd.", "failed (Something odd): see"),
        ("", "failed (pip failed): see"),
    ],
)
def test_what_pip_says_becomes_one_sentence(output, sentence, tmp_path):
    text = environments.explain_pip_failure(output, "the panel", tmp_path / "pip.log")
    assert sentence in text
    assert "\n" not in text
    assert text.endswith((".", "connection.", "pip.log."))


@pytest.mark.slow
def test_without_a_network_the_real_pip_fails_with_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(environments, "LOGS", tmp_path / "logs")
    wanted = Environment(tmp_path / "venv", "the panel", (Layer("a", ("no-such-package==1",), "a"),), space=1)
    with pytest.raises(SetupError, match="The package index cannot be reached"):
        environments.ensure(wanted, adopt=False)
    assert not (tmp_path / "venv").exists()
