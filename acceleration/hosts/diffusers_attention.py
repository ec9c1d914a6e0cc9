"""How attention inside transformers of diffusers is reached: by the one function of torch that all of its processors call.

While a self-attention that a descriptor names computes, a function mode of torch (``torch.overrides``) offers its
``scaled_dot_product_attention`` to the run's sessions. The mode belongs to the thread and ends with the module, so no
processor is replaced and none is copied. Attention of other libraries (flash-attn, SageAttention, xFormers) passes by.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..evaluation import Attention, Call
from ..models import ModulePart
from ..run import RunState

OTHER_FUNCTION = "attention that is not computed by torch's scaled_dot_product_attention"


class OfferedAttention(TorchFunctionMode):
    """Offers every ``scaled_dot_product_attention`` in it to the sessions of a run; what they leave runs as it came.

    Attributes:
        seen: whether there was one.
    """

    def __init__(self, state: RunState, call: Call) -> None:
        super().__init__()
        self.state, self.call, self.seen = state, call, False

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func``, or what a session puts in its place."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.seen = True
            asked = _asked(*args, **kwargs)
            made = None if asked is None or self.call.attending is None else self.state.attention(self.call, asked)
            if made is not None:
                return made
        return func(*args, **kwargs)


def attend(state: RunState, call: Call, part: ModulePart, compute: Callable[[], Any]) -> Any:
    """Run one self-attention module, its attention offered to the sessions of ``state``."""

    def offered() -> Any:
        with OfferedAttention(state, call) as mode:
            out = compute()
        if not mode.seen:
            for session in state.sessions:
                if hasattr(session, "dense"):
                    session.dense[OTHER_FUNCTION] += 1
        return out

    return state.module(call, part, offered)


def _asked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Attention | None:
    """Return a call of torch's function as the engine has it; None for one that no session may compute."""
    if dropout_p or is_causal or query.ndim != 4:
        return None
    return Attention(query, key, value, attn_mask, 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
