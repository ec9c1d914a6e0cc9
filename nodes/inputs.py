"""What the inputs of several nodes share."""

import inspect

from comfy_api.latest import io

#: Newer editors fold such inputs away.
ADVANCED = {"advanced": True} if "advanced" in inspect.signature(io.Int.Input.__init__).parameters else {}
