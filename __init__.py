"""Stretto: composable, measurable acceleration of diffusion transformers in ComfyUI.

Importing this package costs nothing: torch, ComfyUI and the nodes are only
imported when ComfyUI awaits :func:`comfy_entrypoint`. The panel and the
command line import subpackages of it in an environment without torch.
"""

WEB_DIRECTORY = "./web/static"
__version__ = "0.1.0"
__all__ = ["WEB_DIRECTORY", "accelerate", "comfy_entrypoint"]


async def comfy_entrypoint():
    """Return the ComfyUI extension (V3 entry point; ComfyUI awaits it once at start-up)."""
    from .nodes import StrettoExtension, prepare

    prepare()
    return StrettoExtension()


def __getattr__(name: str):
    """Import ``accelerate``, for pipelines of diffusers, when it is first asked for."""
    if name != "accelerate":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .acceleration.hosts.diffusers import accelerate

    return accelerate
