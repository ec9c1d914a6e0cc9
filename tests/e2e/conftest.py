"""A real ComfyUI with the pack, the panel, and a browser: each started once for all tests of this folder."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stretto.scripts.launch.comfyui_server import Child, free_port, start_comfyui
from stretto.web.panel.measure.workflow import ui_to_api

from .comfy_api import ComfyApi
from .shipped import ROOT, load_ui

COMFYUI = ROOT / ".comfyui"
LOGS = ROOT / ".cache" / "logs"
PANEL_PYTHON = ROOT / ".venv-panel" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
SCREENSHOTS = ROOT / ".cache" / "screenshots"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER_ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-quic", "--no-first-run",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs a server."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def broken_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with files that are no models."""
    folder = tmp_path_factory.mktemp("models") / "diffusion_models"
    folder.mkdir()
    whole = next((ROOT / "demo" / "models").rglob("stretto-demo-image.safetensors")).read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "foreign.safetensors").write_bytes(b"this is no safetensors file")
    return folder


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, broken_models: Path) -> Iterator[Child]:
    """ComfyUI with folders of its own for everything it writes."""
    if not (COMFYUI / "main.py").exists():
        pytest.fail("there is no .comfyui: run ./test.sh, which makes it")
    base = tmp_path_factory.mktemp("comfyui")
    extra = ["--database-url", "sqlite:///:memory:"]
    for name in ("output", "temp", "input", "user"):
        (base / name).mkdir()
        extra += [f"--{name}-directory", str(base / name)]
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir()
    # Otherwise the first visit opens the template browser in front of everything.
    settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}))
    config = base / "extra.yaml"
    config.write_text(f"tests:\n  base_path: {broken_models.parent}\n  diffusion_models: {broken_models.name}\n")
    extra += ["--extra-model-paths-config", str(config)]
    if frontend := os.environ.get("STRETTO_FRONTEND"):  # the static folder of another release of ComfyUI's frontend
        extra += ["--front-end-root", frontend]
    port = free_port()
    child = start_comfyui(COMFYUI, Path(sys.executable), port, LOGS / "e2e-comfyui.log", extra)
    child.url = f"http://127.0.0.1:{port}"
    try:
        child.wait_for(f"{child.url}/system_stats", lambda _: None)
        yield child
    finally:
        child.stop()


@pytest.fixture(scope="session")
def comfy(server: Child) -> ComfyApi:
    """A client of the server."""
    return ComfyApi(server.url)


@pytest.fixture(scope="session")
def object_info(comfy: ComfyApi) -> dict[str, Any]:
    """The schemas of all nodes."""
    return comfy.get("/object_info")


@pytest.fixture
def api(object_info: dict[str, Any]) -> Callable[[str], dict[str, Any]]:
    """`api("taylor")` is that shipped workflow in the API form, fresh each time; `api("taylor", "video")` too."""
    return lambda kind, medium="image": ui_to_api(load_ui(kind, medium), object_info)


@pytest.fixture(scope="session")
def panel(server: Child, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    """The A/B page, in its own environment."""
    port = free_port()
    command = [str(PANEL_PYTHON), "-u", "cli.py", "panel", "--server", server.url, "--port", str(port)]
    command += ["--out", str(tmp_path_factory.mktemp("panel"))]
    child = Child(command, LOGS / "e2e-panel.log", ROOT, "The panel")
    child.url = f"http://127.0.0.1:{port}"
    try:
        child.wait_for(child.url, lambda _: None, limit=120.0)
        yield child
    finally:
        child.stop()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium; skips where there is none, fails in CI."""
    executable = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if executable is None:
        reason = f"no browser: none of {', '.join(BROWSERS)} is installed"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=executable, args=BROWSER_ARGUMENTS)
        yield instance
        instance.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A fresh page in a context of its own; errors of the page's scripts are collected in `page.script_errors`."""
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    opened = context.new_page()
    opened.script_errors = []
    opened.on("pageerror", lambda error: opened.script_errors.append(str(error)))
    opened.set_default_timeout(60_000)
    yield opened
    context.close()
