"""Fixtures of the panel's tests: the pack as `stretto`, a fake ComfyUI, and a small workflow."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


if "stretto" not in sys.modules:
    _load("load_pack", ROOT / "load_pack.py").load_pack()
# These tests need the panel's environment; another one may collect the whole folder and finds nothing here.
if importlib.util.find_spec("gradio") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    fake_comfy = _load("fake_comfy", Path(__file__).with_name("fake_comfy.py"))


@pytest.fixture
def fake():
    """Start fake servers: `fake(**options)` returns (server, address)."""
    started = []

    def start(**options):
        server = fake_comfy.FakeComfy(**options)
        started.append(server)
        return server, server.start()

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def workflow():
    """The demo workflow with a cache node, a report node and a saved picture, as API JSON."""
    return {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "m.safetensors", "weight_dtype": "default"}},
        "2": {
            "class_type": "StrettoCache",
            "inputs": {
                "model": ["1", 0],
                "method": "Taylor",
                "interval": 2,
                "order": 1,
                "threshold": 0.05,
                "warmup": 3,
                "tail": 1,
                "required": False,
            },
        },
        "3": {"class_type": "StrettoDemoText", "inputs": {"text": "flat hot dog"}},
        "4": {"class_type": "StrettoDemoText", "inputs": {"text": ""}},
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["2", 0],
                "positive": ["3", 0],
                "negative": ["4", 0],
                "latent_image": ["6", 0],
                "seed": 7,
                "steps": 28,
                "cfg": 5.0,
                "sampler_name": "euler",
                "scheduler": "simple",
                "denoise": 1.0,
            },
        },
        "6": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "7": {"class_type": "VAELoader", "inputs": {"vae_name": "v.safetensors"}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["7", 0]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "x"}},
        "10": {"class_type": "StrettoReport", "inputs": {"samples": ["5", 0]}},
        "11": {"class_type": "PreviewImage", "inputs": {"images": ["10", 0]}},
    }


@pytest.fixture
def video_workflow(workflow):
    """The demo video workflow: clips of 5 frames, written to a file that nobody can measure."""
    graph = workflow
    graph["12"] = {"class_type": "ModelSamplingSD3", "inputs": {"model": ["1", 0], "shift": 3.0}}
    graph["2"]["inputs"]["model"] = ["12", 0]
    for key in ("3", "4"):
        graph[key]["inputs"]["model"] = "video"
    graph["6"] = {
        "class_type": "EmptyHunyuanLatentVideo",
        "inputs": {"width": 64, "height": 64, "length": 5, "batch_size": 1},
    }
    graph["9"] = {"class_type": "CreateVideo", "inputs": {"images": ["8", 0], "fps": 8.0}}
    graph["13"] = {
        "class_type": "SaveVideo",
        "inputs": {"video": ["9", 0], "filename_prefix": "x", "format": "auto", "codec": "auto"},
    }
    return graph


@pytest.fixture
def schema():
    """The JSON Schema of a report."""
    return json.loads((ROOT / "acceleration" / "schemas" / "report.v1.json").read_text(encoding="utf-8"))


@pytest.fixture
def cli(monkeypatch):
    """The command line as a module."""
    monkeypatch.syspath_prepend(str(ROOT))
    return _load("stretto_cli_under_test", ROOT / "cli.py")
