"""A cache at work: one decision per evaluation, one tap, one store."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...kernels.weighted_sum import weighted_sum
from ..evaluation import COMPUTED, FORECAST, REUSED, Call, Evaluation
from ..models import BlockSite, ModelDescriptor
from ..sampling import Coordinate
from .decision import Decision, deciding_branch
from .store import History, SnapshotStore
from .tap import BLOCKS, DELTA, DENOISED, Tap
from .text_features import TextFeatures

Weights = Callable[[Sequence[float], float], list[float]]


@dataclass
class CacheSession:
    """Cache of one run.

    Args:
        tap: where features are taken and put back.
        weights: forecaster: coordinates (newest first) and target -> one weight per snapshot used.
        decision: when to skip.
        store: snapshots.
        network: the network, for the probe of a first block's input.
        descriptor: its family.
        coordinate: evaluation -> the coordinate that forecasts are made in.
        text: what keeps keys and values of the prompt, None where nothing does.
    """

    tap: Tap
    weights: Weights
    decision: Decision
    store: SnapshotStore
    network: Any
    descriptor: ModelDescriptor | None
    coordinate: Coordinate
    text: TextFeatures | None = None
    _targets: dict[Hashable, slice | None] = field(default_factory=dict, repr=False)
    _watched: tuple[Tap, frozenset[int]] | None = field(default=None, repr=False)

    @property
    def joint(self) -> bool:
        """Whether text joins the image stream further on."""
        return bool(self.descriptor.text_in_stream or self.descriptor.text_after_image)

    @property
    def bytes(self) -> int:
        """Bytes stored now."""
        return self.store.bytes + (self.text.bytes if self.text else 0)

    @property
    def peak_bytes(self) -> int:
        """Most bytes ever stored in this run."""
        return self.store.peak_bytes + (self.text.peak_bytes if self.text else 0)

    def begin(self, evaluation: Evaluation) -> None:
        """Decide about the evaluation, or leave that to the probe in its first call; every branch follows."""
        self.decision.begin(evaluation)

    def network_call(self, call: Call, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Compute, or arrange for the call to be skipped; see :class:`~..run.Session`."""
        if not call.evaluation.pending or not call.skippable:
            self._decide(call)
        if call.decisions and call.decisions[0] != COMPUTED and self.tap.kind != BLOCKS:
            return self._forecast_denoised(call)
        if self.text is not None:
            self.text.begin(call)
        denoised = compute()  # on a skipped step the blocks do the skipping; embeddings and head run as ever
        if not call.decisions or call.decisions[0] == COMPUTED:
            call.decisions = (COMPUTED,) * len(call.branches)
            self._learn(call, denoised)
        return denoised

    def depths(self, call: Call) -> frozenset[int] | None:
        """Blocks whose hooks this call needs, by depth; None for all."""
        if self.tap.kind != BLOCKS or not call.skippable:
            return frozenset()
        return self._watch() if call.decisions and call.decisions[0] == COMPUTED else None

    def block(self, call: Call, site: BlockSite, args: dict, original: Callable[[dict], dict]) -> dict:
        """Run, observe or replace one block; see :class:`~..run.Session`."""
        if self.tap.kind != BLOCKS or not call.skippable:
            return original(args)
        if call.decisions and call.decisions[0] == COMPUTED and site.depth not in self._watch():
            return original(args)  # decided by a probe after the hooks were set
        if args.get("txt") is not None:
            call.text_tokens = args["txt"].shape[1]
        image = self.descriptor.image_slice(site.kind, args, call.text_tokens)
        probe = self.decision.probe if call.evaluation.pending else None
        if probe is not None and site.depth == 0:
            if probe.blocks == 0:
                self._measure(call, self._tea_input(call, args))
            elif not probe.raw:
                call.scratch["start"] = self._shown(call, args["img"][:, image]).clone()
        if not self.tap.first <= site.depth < self.tap.last:
            out = original(args)
        elif call.decisions and call.decisions[0] != COMPUTED:
            out = self._bypass(call, site, args, image)
        else:
            out = self._observe(call, site, args, original, image)
        if probe is not None and site.depth == probe.blocks - 1:
            self._measure(call, self._shown(call, out["img"][:, image]), call.scratch.pop("start", None))
        return out

    def reset(self) -> None:
        """Forget features and estimates."""
        self.store.clear()
        self.decision.reset()

    def close(self) -> None:
        """Free everything."""
        self.reset()
        if self.text is not None:
            self.text.clear()

    def _watch(self) -> frozenset[int]:
        """Return the depths of the blocks whose hooks a call needs that is computed; worked out once."""
        if self._watched is None or self._watched[0] is not self.tap:
            wanted = {self.tap.last - 1}
            if self.tap.residual:
                wanted.add(self.tap.first)
            if self.joint:  # the first block tells the number of text tokens
                wanted.add(0)
            self._watched = self.tap, frozenset(wanted)
        return self._watched[1]

    def _decide(self, call: Call) -> None:
        """Set the call's decisions. One branch without history computes the whole call: the batch cannot be split."""
        skip = call.evaluation.skip and call.skippable
        if skip and all(self.store.get(branch.key) is not None for branch in call.branches):
            call.decisions = tuple(self._kind(call, branch.key) for branch in call.branches)
        else:
            call.decisions = (COMPUTED,) * len(call.branches)

    def _tea_input(self, call: Call, args: dict) -> torch.Tensor:
        """Return TeaCache's indicator tensor for the deciding branch's target tokens."""
        image, vec, rows = args["img"], args["vec"], call.rows * len(call.branches)
        if not (isinstance(vec, torch.Tensor) and image.shape[0] == vec.shape[0] == rows):
            return self._shown(call, self.descriptor.tea_input(self.network, args))
        index = deciding_branch(call)
        own = {**args, "img": call.part(image, index), "vec": call.part(vec, index)}  # nobody asks about the others
        return self._of_target(call, self.descriptor.tea_input(self.network, own))

    def _shown(self, call: Call, tensor: torch.Tensor) -> torch.Tensor:
        """Return the deciding branch's target tokens of a stream [B, N, C]."""
        return self._of_target(call, call.part(tensor, deciding_branch(call)))

    def _of_target(self, call: Call, tensor: torch.Tensor) -> torch.Tensor:
        """Return the target's tokens: reference pictures hardly change and would dilute a signal."""
        key = call.network_input.shape, tensor.shape[1]
        if key not in self._targets:
            target = self.descriptor.target_slice(self.network, *key)
            self._targets[key] = None if target == slice(0, key[1]) else target
        target = self._targets[key]
        return tensor if target is None else tensor[:, target]

    def _measure(self, call: Call, seen: torch.Tensor, start: torch.Tensor | None = None) -> None:
        """Let the probe look, and decide."""
        key, at = call.branches[deciding_branch(call)].key, self.coordinate(call.evaluation)
        probe = self.decision.probe
        self.decision.settle(call.evaluation, probe.measure(key, seen, at, start))
        self._decide(call)
        if call.decisions[0] == COMPUTED:
            probe.computed(key, seen, at, start)

    def _learn(self, call: Call, denoised: torch.Tensor) -> None:
        """Store what lies outside the blocks, and let the decision learn."""
        if self.tap.kind == BLOCKS and self.decision.rate is None:
            if call.skippable:
                self.decision.computed(call)
            return
        made: list[torch.Tensor] = []

        def prediction() -> torch.Tensor:
            if not made:
                made.append(call.to_prediction(denoised))
            return made[0]

        if self.tap.kind == DENOISED:
            self._push(call, denoised.float(), _latent(call))
        elif self.tap.kind == DELTA:
            self._push(call, prediction().float(), call.network_input.float())
        elif self.tap.kind != BLOCKS:
            self._push(call, prediction().float())
        if call.skippable:
            self.decision.computed(call, (lambda: denoised) if self.tap.kind == DENOISED else prediction)

    def _observe(self, call: Call, site: BlockSite, args: dict, original: Callable[[dict], dict], image: slice) -> dict:
        """Run a block of the range, and take the range's features where it ends."""
        self._enter(call, site, args, image)
        out = original(args)
        if site.depth != self.tap.last - 1:
            return out
        pictures, words = _split(out["img"], image)
        if site.kind in self.descriptor.txt_out:
            words = out.get("txt")
        if self.tap.residual:
            entry, entry_words = call.scratch["entry"]
            if not site.last and words is not None:
                self._push(call, words, entry_words, "text")
            self._push(call, pictures, entry)
        else:
            self._push(call, pictures)
        return out

    def _bypass(self, call: Call, site: BlockSite, args: dict, image: slice) -> dict:
        """Hand a block's input on; where the range ends, put the features in."""
        self._enter(call, site, args, image)
        out = {"img": args["img"]}
        apart = site.kind in self.descriptor.txt_out
        if apart:
            out["txt"] = args.get("txt")
        if site.depth != self.tap.last - 1:
            return out
        pictures = self._forecast_all(call)
        words = _split(args["img"], image)[1]
        if self.tap.residual:
            # Not the block's input: ComfyUI adds ControlNet's output after every block, and the residual holds it already.
            entry, entry_words = call.scratch["entry"]
            pictures = entry + pictures.to(entry.dtype)
            if not site.last and entry_words is not None:
                entry_words = entry_words + self._forecast_all(call, "text").to(entry_words.dtype)
                words = None if apart else entry_words
                if apart:
                    out["txt"] = entry_words
        out["img"] = _join(pictures, words, image)
        return out

    def _enter(self, call: Call, site: BlockSite, args: dict, image: slice) -> None:
        """Copy what goes into the range: blocks and ControlNet may write into these tensors."""
        if self.tap.residual and site.depth == self.tap.first:
            pictures, words = _split(args["img"], image)
            if site.kind in self.descriptor.txt_out:
                words = args.get("txt")
            call.scratch["entry"] = pictures.clone(), words.clone() if words is not None else None

    def _push(self, call: Call, tensor: torch.Tensor, less: torch.Tensor | None = None, slot: str = "") -> None:
        """Store ``tensor``, or what it exceeds ``less`` by, of every branch."""
        if not call.skippable:
            return  # such a call will never read it
        branches, at = call.branches, self.coordinate(call.evaluation)
        parts = _parts(call, tensor)
        if less is not None:
            parts = [part - other for part, other in zip(parts, _parts(call, less), strict=True)]
        if not slot and self.decision.drift is not None:
            self._compare(call, parts[deciding_branch(call)])
        for branch, part in zip(branches, parts, strict=True):
            self.store.push((branch.key, slot) if slot else branch.key, at, part, ours=less is not None)

    def _compare(self, call: Call, feature: torch.Tensor) -> None:
        """Show the decision what the deciding branch is about to store, and what it stored last."""
        history, blocks = self.store.get(call.branches[deciding_branch(call)].key), self.tap.kind == BLOCKS
        before = None if history is None else history.tensors[0]
        if blocks:
            feature, before = (None if of is None else self._of_target(call, of) for of in (feature, before))
        self.decision.stored(call, feature, before)

    def _weights(self, history: History, at: float) -> Sequence[float]:
        """Weights over a branch's snapshots: what was measured says, where it does and they reach that far back."""
        told, known = self.decision.weights, len(history.positions)
        return told if told is not None and len(told) <= known else self.weights(list(history.positions), at)

    def _kind(self, call: Call, key: object) -> str:
        weights = self._weights(self.store.get(key), self.coordinate(call.evaluation))
        return FORECAST if any(weights[1:]) else REUSED

    def _forecast_all(self, call: Call, slot: str = "") -> torch.Tensor:
        at = self.coordinate(call.evaluation)
        parts = []
        for branch in call.branches:
            history = self.store.get((branch.key, slot) if slot else branch.key)
            weights = self._weights(history, at)
            parts.append(weighted_sum([history.tensors[index] for index in range(len(weights))], weights))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _forecast_denoised(self, call: Call) -> torch.Tensor:
        """Return the denoised latent from a forecast of what lies outside the blocks."""
        forecast = self._forecast_all(call)
        if self.tap.kind == DENOISED:
            return forecast + _latent(call)
        return call.to_denoised(forecast + call.network_input.float() if self.tap.kind == DELTA else forecast)


def _parts(call: Call, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return the rows of every branch, as views."""
    count = len(call.branches)
    if tensor.shape[0] == count * call.rows:
        return tensor.chunk(count)
    return [call.part(tensor, index) for index in range(count)]


def _latent(call: Call) -> torch.Tensor:
    """Return what remains when the network predicts nothing: the latent itself, for flow and epsilon models."""
    return call.to_denoised(torch.zeros_like(call.network_input, dtype=torch.float32))


def _split(stream: torch.Tensor, image: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Image tokens of a stream [B, N, C], and the text tokens before or behind them, None where there are none."""
    length = stream.shape[1]
    start, stop, _ = image.indices(length)
    if start == 0 and stop == length:
        return stream, None
    words = stream[:, :start] if start else stream[:, stop:]
    return stream[:, start:stop], words if words.shape[1] else None


def _join(pictures: torch.Tensor, words: torch.Tensor | None, image: slice) -> torch.Tensor:
    """Inverse of :func:`_split`, as a tensor of its own."""
    if words is None:
        return pictures
    return torch.cat((words, pictures) if image.start else (pictures, words), dim=1)
