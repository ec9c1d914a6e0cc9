"""One recorded run of a MODEL, module by module."""

from collections.abc import Callable
from typing import Any
from uuid import uuid4

import torch

from ..caching.table_search import Unit
from ..errors import StrettoError
from ..plan import Request
from .comfy import TRACES, request


def profile_modules(model: Any, sample: Callable[[Any], torch.Tensor]) -> tuple[list[Unit], torch.Tensor]:
    """Record one plain run of MODEL ``model``.

    Args:
        model: MODEL without a technique that skips.
        sample: samples with the MODEL it is given and returns the latent.

    Returns:
        Every module with its change per step and its seconds, and the latent, which is that of plain sampling to the bit.

    Raises:
        StrettoError: the model, the sampler or the noise levels cannot be profiled; the message says why.
        ConflictError: a technique that skips is on the model already.
    """
    token = uuid4().hex
    latent = sample(request(model, Request("module_profile", {"token": token}, required=True)))
    taken = TRACES.take_record("module_profile", token)
    if taken is None:
        raise StrettoError("module profile: the sampler did not run the model it was given, so nothing was recorded")
    record, _ = taken
    if record["error"] is not None:
        raise StrettoError(f"module profile: {record['error']}")
    units = [
        Unit(unit["block"], tuple(unit["names"]), unit["cost"], tuple(unit["changes"])) for unit in record["units"]
    ]
    return units, latent
