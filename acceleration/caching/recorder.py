"""A run with nothing skipped, written down step by step: the recording half of every calibration."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..errors import StrettoError
from ..evaluation import Call, Evaluation
from ..models import BlockSite, ModelDescriptor
from ..sampling import Schedule
from .indicator import TransformRate
from .probe import RelativeChange, relative_l1
from .profile import Profile
from .sketch import CountSketch

#: Place of the open row in a call's scratch.
_ROW = "profile"
#: An evaluation this close to a step's noise level (in steps) is that step's own.
_AT_STEP = 1e-6
#: Elements subtracted at a time: a video's hidden states must not be copied whole in fp32.
_PIECE = 1 << 22


@dataclass
class _Row:
    """What one step has shown so far; tensors stay on the device until the run is over."""

    step: int
    position: float
    sigma: float
    branch: int
    key: Hashable
    signals: dict[str, float | None] = field(default_factory=dict)
    entry: torch.Tensor | None = None
    sketch: torch.Tensor | None = None
    norm: torch.Tensor | None = None


@dataclass
class ProfileSession:
    """Recorder of one run (:class:`~..run.Session`). It computes everything and writes to no tensor of the run.

    Of every step, at its own noise level and for the conditional branch: a sketch of the last block's output (of the
    network's output where blocks are out of reach), the norm of what the stack adds, and what the indicators say.

    Args:
        token: what the record is found by.
        schedule: noise levels of the run.
        network: the network.
        descriptor: its family.
        about: plain values that go into the profile.
    """

    token: str
    schedule: Schedule
    network: Any
    descriptor: ModelDescriptor
    about: Mapping[str, Any] = field(default_factory=dict)
    sketch: CountSketch = field(default_factory=CountSketch)
    rate: TransformRate = field(default_factory=TransformRate)
    modulated: RelativeChange = field(default_factory=lambda: RelativeChange(0, previous=True))
    first: RelativeChange = field(default_factory=lambda: RelativeChange(1, previous=True))
    rows: dict[int, _Row] = field(default_factory=dict)
    name: str = "profile"
    peak_bytes: int = 0
    _output: tuple[Hashable, torch.Tensor] | None = None
    _moved: float | None = None
    _blocks: int = 0

    def __post_init__(self) -> None:
        self._blocks = len(self.descriptor.sites(self.network))

    @property
    def bytes(self) -> int:
        """Bytes kept now to compare the next step with."""
        kept = [*self.modulated.references.values(), *self.first.references.values()]
        kept += [self._output[1]] if self._output is not None else []
        kept += [row.sketch for row in self.rows.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def begin(self, evaluation: Evaluation) -> None:
        """Look at the network's input where the evaluation is a step's own and first one."""
        evaluation.reason = "profiled: everything is computed"
        self._moved = self.rate.change(evaluation.network_input) if self._wanted(evaluation) else None

    def network_call(self, call: Call, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Compute, and record the conditional branch."""
        row = self._open(call)
        denoised = compute()
        if row is not None:
            self._output_of(call, row, denoised)
        if row is not None and row.sketch is not None:
            self.rows[row.step] = row
            self.peak_bytes = max(self.peak_bytes, self.bytes)
        return denoised

    def depths(self, call: Call) -> frozenset[int] | None:
        """The first and the last block, while recording."""
        return frozenset({0, self._blocks - 1}) if _ROW in call.scratch and self._blocks else frozenset()

    def block(self, call: Call, site: BlockSite, args: dict, original: Callable[[dict], dict]) -> dict:
        """Run a block; look at the first one's input and output, and at the last one's output."""
        row = call.scratch.get(_ROW)
        if row is None or not call.skippable or not (site.depth == 0 or site.last):
            return original(args)
        if args.get("txt") is not None:
            call.text_tokens = args["txt"].shape[1]
        image = self.descriptor.image_slice(site.kind, args, call.text_tokens)
        if site.depth == 0:
            if self.descriptor.tea_input is not None:
                modulated = call.part(self.descriptor.tea_input(self.network, args), row.branch)
                row.signals["input"] = self.modulated.measure(row.key, self._target(call, modulated), row.position)
            row.entry = call.part(args["img"], row.branch)[:, image].clone()  # some blocks write into their input
        out = original(args)
        pictures = call.part(out["img"], row.branch)[:, image]
        if site.depth == 0:
            added = self._target(call, pictures) - self._target(call, row.entry)
            row.signals["residual"] = self.first.measure(row.key, added, row.position)
        if site.last:
            row.sketch, row.norm = self.sketch(pictures), _distance(pictures, row.entry)
            row.entry = None
        return out

    def reset(self) -> None:
        """Forget what the next step would be compared with; recorded steps stay."""
        for indicator in (self.rate, self.modulated, self.first):
            indicator.reset()
        self._output = self._moved = None

    def close(self) -> None:
        """Free everything."""
        self.reset()
        self.rows.clear()
        self.sketch.clear()

    def record(self) -> dict[str, Any]:
        """Return the profile as JSON values: ``token``, ``profile`` and ``error`` (one of the two is None).

        The seconds in it are 0: the trace has them. Call it before :meth:`close`; it waits for the device.
        """
        try:
            return {"token": self.token, "profile": self._profile().to_json(), "error": None}
        except StrettoError as error:  # told by whoever asked for the profile: a finished run is not made to fail
            return {"token": self.token, "profile": None, "error": str(error)}

    def _profile(self) -> Profile:
        steps = self.schedule.steps
        missing = [step for step in range(steps) if step not in self.rows]
        if missing:
            raise StrettoError(
                f"{len(missing)} of {steps} steps could not be recorded, the first is step {missing[0]}: the sampler "
                "makes no evaluation at their noise level, or another pack stands in the way of the model's blocks"
            )
        rows = [self.rows[step] for step in range(steps)]
        norms = torch.stack([row.norm for row in rows]).double().clamp(min=1e-30).log()
        names = sorted({name for row in rows for name in row.signals})
        return Profile(
            sigmas=self.schedule.sigmas,
            positions=[row.position for row in rows],
            sketches=np.stack([row.sketch.cpu().numpy() for row in rows]),
            log_norms=norms.tolist(),
            seconds_computed=0.0,
            signals={name: tuple(row.signals.get(name) for row in rows) for name in names},
            about=self.about,
        )

    def _wanted(self, evaluation: Evaluation) -> bool:
        return abs(evaluation.position - evaluation.step) < _AT_STEP and evaluation.step not in self.rows

    def _open(self, call: Call) -> _Row | None:
        names = [branch.name for branch in call.branches]
        if "cond" not in names or not self._wanted(call.evaluation):
            return None
        index, at = names.index("cond"), call.evaluation
        row = _Row(at.step, at.position, at.sigma, index, call.branches[index].key, {"rate": self._moved})
        call.scratch[_ROW] = row
        return row

    def _target(self, call: Call, tokens: torch.Tensor) -> torch.Tensor:
        """Return the decoded tokens of an image part: reference pictures hardly change and would dilute it."""
        return tokens[:, self.descriptor.target_slice(self.network, call.network_input.shape, tokens.shape[1])]

    def _output_of(self, call: Call, row: _Row, denoised: torch.Tensor) -> None:
        output = call.part(call.to_prediction(denoised), row.branch)
        given = call.part(call.network_input, row.branch)
        before, self._output = self._output, (row.key, output.clone())
        comparable = before is not None and before[0] == row.key and before[1].shape == output.shape
        row.signals["output"] = relative_l1(output, before[1]) if comparable else None
        self.rate.observe(given, output)
        if not self._blocks:
            row.sketch = self.sketch(output)
            row.norm = _distance(output, given)


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean distance of two equally shaped tensors as a scalar on their device, summed in fp32 or better."""
    a, b = a.reshape(-1), b.reshape(-1)
    wide = torch.float64 if a.device.type == "cpu" else torch.float32
    pieces = [torch.linalg.vector_norm(x.to(wide) - y.to(wide)) for x, y in zip(a.split(_PIECE), b.split(_PIECE))]
    return torch.linalg.vector_norm(torch.stack(pieces))
