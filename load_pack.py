"""Load this folder as the package ``stretto``, wherever it was cloned to.

ComfyUI loads a pack by path and owns a top-level ``nodes`` module, so the
folder itself must never be on ``sys.path``. Tests, benchmarks and the command
line therefore all import the pack through this one helper.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent


def load_pack(name: str = "stretto") -> ModuleType:
    """Return the pack as package ``name``; afterwards ``import stretto.x`` works everywhere."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(
        name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
