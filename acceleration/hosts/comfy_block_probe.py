"""One probed run of a MODEL, block by block."""

from collections.abc import Callable
from typing import Any
from uuid import uuid4

import torch

from ..errors import StrettoError
from ..models import describe
from ..plan import Request
from ..weights.block_probe import Ranking
from .comfy import TRACES, request


def probe_blocks(
    model: Any, sample: Callable[[Any], torch.Tensor], probes: int = 3, cfg: float = 5.0
) -> tuple[Ranking, torch.Tensor]:
    """Probe one plain run of MODEL ``model``.

    Args:
        model: MODEL without a technique that skips.
        sample: samples with the MODEL it is given and returns the latent.
        probes: steps at which every block is left out once, and reused once.
        cfg: guidance scale that ``sample`` uses.

    Returns:
        The blocks with what they are worth, and the latent, which is that of plain sampling to the bit.

    Raises:
        StrettoError: the model, the sampler or the noise levels cannot be probed; the message says why.
        ConflictError: a technique that skips is on the model already.
    """
    token = uuid4().hex
    settings = {"token": token, "probes": probes, "cfg": cfg}
    latent = sample(request(model, Request("block_probe", settings, required=True)))
    taken = TRACES.take_record("block_probe", token)
    if taken is None:
        raise StrettoError("Stretto Block Probe: the sampler did not run the model it was given, so nothing was probed")
    record, _ = taken
    if record["error"] is not None:
        raise StrettoError(f"Stretto Block Probe: {record['error']}")
    network = model.model.diffusion_model
    damage = {kind: tuple(values) for kind, values in record["damage"].items()}
    return Ranking(describe(network).sites(network), damage), latent
