"""Make the pack importable as ``stretto``; tests need nothing else on their path."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from load_pack import load_pack  # noqa: E402

sys.path.remove(str(ROOT))  # ComfyUI has a top-level `nodes` module, and so does this folder
load_pack()
