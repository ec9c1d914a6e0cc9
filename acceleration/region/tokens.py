"""Where the active tokens stand in what a block is given, and how a block is given no others."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ...kernels.token_rows import take_rows
from ..evaluation import Call
from ..models import BlockSite, ModelDescriptor


def _no_more(network: Any) -> int:
    return 0


@dataclass(frozen=True)
class Stream:
    """How the blocks of a family take what belongs to single tokens.

    Attributes:
        rope_axis: axis of the tokens in ``args["pe"]``, which covers all of a joint sequence; None where there is none.
        frames: whether ``args["vec"]`` [B, frames, 6, D] may hold a modulation per frame.
        cross: whether attention to text follows self-attention in a block.
        further: network -> self-attentions beyond one a block.
        patched: (attribute holding the blocks, name of their argument with the tokens, with the positions) where no hook
            replaces blocks, so that their ``forward`` is patched.
    """

    rope_axis: int | None = None
    frames: bool = False
    cross: bool = False
    further: Callable[[Any], int] = _no_more
    patched: tuple[str, str, str] | None = None


#: Families whose blocks can be given fewer tokens, and whose attention can be given other keys.
STREAMS: dict[str, Stream] = {
    # SD3.5 medium has blocks with a second attention, over the image alone.
    "sd3": Stream(further=lambda network: len(getattr(network, "x_block_self_attn_layers", ()))),
    "wan": Stream(rope_axis=1, frames=True, cross=True),
    "flux": Stream(rope_axis=2),
    "chroma": Stream(rope_axis=2),
    "qwen_image": Stream(rope_axis=2),
    "lumina2": Stream(rope_axis=1, patched=("layers", "x", "freqs_cis")),
}


def sites_of(descriptor: ModelDescriptor, network: Any) -> tuple[BlockSite, ...]:
    """Return the blocks that are given fewer tokens, in execution order."""
    patched = STREAMS[descriptor.family].patched
    if patched is None:
        return descriptor.sites(network)
    count = len(getattr(network, patched[0]))
    return tuple(BlockSite("layer", index, index, last=index == count - 1) for index in range(count))


@dataclass(frozen=True, eq=False)
class Rows:
    """Places of the active tokens. Tokens of text and of reference pictures are always active.

    Attributes:
        stream: in the block's ``img``, int64 [n].
        stream_length: length of that.
        joint: in the sequence of its self-attention, int64 [m].
        joint_length: length of that.
    """

    stream: torch.Tensor
    stream_length: int
    joint: torch.Tensor
    joint_length: int

    def of_length(self, length: int) -> tuple[torch.Tensor, int] | None:
        """Return (places, full length) of the sequence that has ``length`` active tokens, None where neither has."""
        if length == len(self.joint):
            return self.joint, self.joint_length
        return (self.stream, self.stream_length) if length == len(self.stream) else None


@dataclass
class TokenPlaces:
    """Finds the :class:`Rows` of the blocks of one network.

    Attributes:
        descriptor: the network's family.
        network: the network; only its sizes are read.
    """

    descriptor: ModelDescriptor
    network: Any
    _last: tuple[tuple, torch.Tensor, Rows] | None = field(default=None, repr=False)

    def span(self, call: Call, site: BlockSite, args: dict[str, Any]) -> tuple[int, int] | None:
        """Return the first target token in the block's ``img`` and in its self-attention; None where that is not known."""
        shape, length = call.network_input.shape, args["img"].shape[1]
        text = args.get("txt")
        if site.kind in self.descriptor.txt_out and text is not None:
            call.text_tokens = text.shape[1]
        if STREAMS[self.descriptor.family].patched is not None:  # text, image and padding in one sequence
            start = self.descriptor.joint_text_tokens(self.network, call.context_tokens)
            return (start, start) if 0 < start <= length - call.tokens else None
        image = self.descriptor.image_slice(site.kind, args, call.text_tokens)
        start = image.start + self.descriptor.target_slice(self.network, shape, image.stop - image.start).start
        ahead = text.shape[1] if site.kind in self.descriptor.txt_out and text is not None else 0
        return (start, start + ahead) if 0 <= start <= length - call.tokens else None

    def rows(self, call: Call, site: BlockSite, args: dict[str, Any], active: torch.Tensor) -> Rows:
        """Return the places of the ``active`` target tokens; made once for blocks that are alike."""
        start, joint = self.span(call, site, args)
        length = args["img"].shape[1]
        key = start, joint, length, call.tokens
        if self._last is None or self._last[0] != key or self._last[1] is not active:
            whole = length + joint - start
            made = Rows(
                _around(active, start, call.tokens, length), length, _around(active, joint, call.tokens, whole), whole
            )
            self._last = key, active, made
        return self._last[2]

    def reset(self) -> None:
        """Forget the last places."""
        self._last = None


def readable(stream: Stream, args: dict[str, Any]) -> bool:
    """Whether the arguments of a block hold nothing per token that :func:`shortened` does not know of."""
    if args.get("modulation_dims_img") is not None or args.get("timestep_zero_index") is not None:
        return False  # newer versions: ranges of tokens with a modulation of their own
    vec = args.get("vec")
    return not isinstance(vec, torch.Tensor) or stream.frames or len(vec) == len(args["img"])


def shortened(stream: Stream, args: dict[str, Any], rows: Rows, known: dict[int, tuple]) -> dict[str, Any]:
    """Return a block's arguments with the rows of active tokens alone.

    Args:
        stream: of the family.
        args: the block's arguments; not changed.
        rows: places of the active tokens.
        known: positions and modulations shortened for earlier blocks of the call, by identity.
    """
    made = {**args, "img": take_rows(args["img"], rows.stream)}
    if stream.rope_axis is not None and args.get("pe") is not None:
        made["pe"] = _once(known, args["pe"], rows, lambda pe: take_rows(pe, rows.joint, stream.rope_axis))
    vec = args.get("vec")
    if stream.frames and isinstance(vec, torch.Tensor) and vec.ndim == 4 and vec.shape[1] > 1:
        made["vec"] = _once(known, vec, rows, lambda vec: _per_token(vec, rows))
    return made


def _per_token(vec: torch.Tensor, rows: Rows) -> torch.Tensor:
    """[B, frames, 6, D] -> [B, n, 6, D]: Wan repeats the modulation of a frame for its tokens."""
    frames, length = vec.shape[1], rows.stream_length
    repeats = length // frames + (length % frames != 0)
    return take_rows(vec, rows.stream // repeats)


def _once(known: dict[int, tuple], tensor: torch.Tensor, rows: Rows, make: Callable) -> torch.Tensor:
    key = id(tensor), id(rows)
    if key not in known:
        known[key] = tensor, rows, make(tensor)  # kept beside the answer: their ids stay taken
    return known[key][2]


def _around(active: torch.Tensor, start: int, tokens: int, length: int) -> torch.Tensor:
    """Return the places of active target tokens, and of all others, in a sequence whose target begins at ``start``."""
    if start == 0 and tokens == length:
        return active
    every = torch.arange(length, device=active.device)
    return torch.cat((every[:start], active + start, every[start + tokens :]))
