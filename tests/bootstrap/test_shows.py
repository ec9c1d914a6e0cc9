"""What demo.sh compares: files that exist, and a sentence where one does not."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def demo(monkeypatch):
    """scripts/demo.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location("stretto_demo_script", ROOT / "scripts" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["PICTURES", "CLIPS"])
def test_everything_that_a_show_names_is_in_the_repository(demo, name):
    show = getattr(demo, name)
    demo.require_models(show)
    assert all((ROOT / "workflows" / workflow).is_file() for workflow in show.workflows)


def test_clips_and_pictures_do_not_overwrite_each_other(demo):
    assert demo.PICTURES.report != demo.CLIPS.report
    assert {demo.PICTURES.report, demo.CLIPS.report.parent} == {ROOT / "report"}, "git ignores that folder only"


def test_a_missing_model_is_named(demo):
    with pytest.raises(Exception, match=r"demo/models/vae/gone\.safetensors is missing.*git checkout"):
        demo.require_models(replace(demo.CLIPS, models=("vae/gone.safetensors",)))
