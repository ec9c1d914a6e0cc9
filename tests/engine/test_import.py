"""The engine imports with torch and numpy alone; the package root with nothing at all."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = """
import sys
class Block:
    allowed = {allowed!r}
    blocked = {{"comfy", "comfy_api", "folder_paths", "nodes", "server", "PIL", "psutil", "diffusers", "triton", "torch"}}
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top in self.blocked - self.allowed:
            raise ImportError(f"{{name}} must not be imported here")
sys.meta_path.insert(0, Block())
sys.path.insert(0, {root!r})
from load_pack import load_pack
load_pack()
sys.path.remove({root!r})
{body}
"""
ENGINE = """
import importlib, pathlib
root = pathlib.Path({root!r})
for path in sorted([*root.glob("acceleration/**/*.py"), *root.glob("kernels/**/*.py")]):
    if "hosts" not in path.parts and not path.name.startswith("triton_"):
        importlib.import_module(".".join(("stretto", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__"))
"""


@pytest.mark.parametrize(
    ("allowed", "body"),
    [({"torch"}, ENGINE.format(root=str(ROOT))), (set(), "import stretto; assert 'torch' not in sys.modules")],
    ids=["engine", "root"],
)
def test_imports_without(allowed, body):
    code = BLOCK.format(allowed=allowed, root=str(ROOT), body=body)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
