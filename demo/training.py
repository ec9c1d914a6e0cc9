"""What both trainings share: optimizer, schedule by time or steps, averaged weights, checkpoints and progress lines."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates for weights of two or more dimensions (Jordan et al., 2024).

    Updates are scaled to the root mean square of AdamW's (Liu et al., 2025, arXiv:2502.16982, section 2.2), so that one
    learning rate serves both. Weights of equal shape are orthogonalised in one batched call.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """One update of every weight that has a gradient."""
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault((p.shape[0], p[0].numel()), []).append(p)
            for shape, params in shapes.items():
                update = torch.stack([self._direction(p, group["momentum"]).reshape(shape) for p in params])
                update = orthogonalise(update) * (0.2 * max(shape) ** 0.5)
                for p, u in zip(params, update):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(u.reshape(p.shape), alpha=-group["lr"])

    def _direction(self, p: nn.Parameter, momentum: float) -> torch.Tensor:
        """Nesterov momentum of one weight."""
        buffer = self.state[p].setdefault("momentum", torch.zeros_like(p.grad))
        buffer.lerp_(p.grad, 1 - momentum)
        return torch.lerp(p.grad, buffer, momentum)


def orthogonalise(g: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix, [N, rows, columns] -> same, float32."""
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return (x.mT if tall else x).float()


class Optimizers:
    """Muon for hidden matrices, AdamW for everything else, behind one interface."""

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        is_matrix: Callable[[str, nn.Parameter], bool],
        weight_decay: float = 0.0,
        beta2: float = 0.99,
    ):
        matrices, others = [], []
        for name, p in named:
            (matrices if is_matrix(name, p) else others).append(p)
        self.lr = lr
        self.parameters = matrices + others
        self.members: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=lr, betas=(0.9, beta2), weight_decay=0.0)
        ]
        if matrices:
            self.members.append(Muon(matrices, lr=lr, weight_decay=weight_decay))

    def step(self, factor: float, clip: float = 1.0) -> float:
        """Clip, step with `factor` times the base rate, clear the gradients; returns the gradient norm."""
        norm = float(nn.utils.clip_grad_norm_(self.parameters, clip))
        for member in self.members:
            for group in member.param_groups:
                group["lr"] = self.lr * factor
            member.step()
            member.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> list[dict]:
        """States of all members."""
        return [m.state_dict() for m in self.members]

    def load_state_dict(self, states: list[dict]) -> None:
        """Inverse of `state_dict`."""
        for member, state in zip(self.members, states):
            member.load_state_dict(state)


class Average:
    """Exponential moving average of a module's parameters, with a start-up correction."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.values = {k: v.detach().clone().float() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move towards the module's current values; early steps average over fewer updates."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        mine, theirs = [], []
        for key, value in module.state_dict().items():
            mine.append(self.values[key])
            theirs.append(value.detach().float())
        torch._foreach_lerp_(mine, theirs, weight)


@dataclass
class Budget:
    """How long a training runs: `minutes` of active time or `steps`, whichever is given; survives a resume."""

    minutes: float | None
    steps: int | None
    step: int = 0
    active_s: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def elapsed_s(self) -> float:
        """Active seconds, earlier runs of the same training included."""
        return self.active_s + time.monotonic() - self.started

    def progress(self) -> float:
        """Part of the budget that is spent, 0..1."""
        if self.steps is not None:
            return min(1.0, self.step / self.steps)
        return min(1.0, self.elapsed_s() / (60 * (self.minutes or 60)))

    def factor(self, warmup: int = 100, decay_from: float = 0.6) -> float:
        """Learning-rate factor: linear warm-up, constant, linear decay over the rest."""
        tail = (1 - self.progress()) / (1 - decay_from)
        return min(1.0, (self.step + 1) / warmup, max(tail, 0.0))


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write to a neighbour and rename, so that a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write(temporary)
    temporary.chmod(0o644)
    temporary.replace(path)


def save_checkpoint(
    path: Path,
    modules: dict[str, nn.Module],
    averages: dict[str, Average],
    optimizers: Optimizers,
    budget: Budget,
    history: list[tuple[float, ...]],
) -> None:
    """Everything needed to resume."""
    state = {
        "modules": {k: m.state_dict() for k, m in modules.items()},
        "averages": {k: a.values for k, a in averages.items()},
        "optimizers": optimizers.state_dict(),
        "step": budget.step,
        "active_s": budget.elapsed_s(),
        "history": history,
    }
    write_atomically(path, lambda p: torch.save(state, p))


def load_checkpoint(
    path: Path, modules: dict[str, nn.Module], averages: dict[str, Average], optimizers: Optimizers, budget: Budget
) -> list[tuple[float, ...]]:
    """Inverse of `save_checkpoint`; returns the history."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    for key, module in modules.items():
        module.load_state_dict(state["modules"][key])
        for name, value in state["averages"][key].items():
            averages[key].values[name].copy_(value)
    optimizers.load_state_dict(state["optimizers"])
    budget.step, budget.active_s = state["step"], state["active_s"]
    budget.started = time.monotonic()
    return [tuple(row) for row in state["history"]]


class Progress:
    """Progress lines: step, smoothed losses, rate and time left; keeps the history for the loss curve."""

    def __init__(
        self, budget: Budget, batch: int, emit: Callable[[str], None], every_s: float = 15.0, unit: str = "samples"
    ):
        self.budget, self.batch, self.emit, self.every_s, self.unit = budget, batch, emit, every_s, unit
        self.history: list[tuple[float, ...]] = []
        self._sums: torch.Tensor | None = None
        self._count = 0
        self._mark = time.monotonic()

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Collect the step's values; print a line when `every_s` seconds have gone by."""
        row = torch.stack([v.detach().float().cpu() for v in values.values()])
        self._sums = row if self._sums is None else self._sums + row
        self._count += 1
        now = time.monotonic()
        if now - self._mark < self.every_s:
            return
        means = (self._sums / self._count).tolist()
        rate = self._count * self.batch / (now - self._mark)
        done = self.budget.progress()
        left = self.budget.elapsed_s() * (1 - done) / max(done, 1e-6) / 60
        text = "  ".join(f"{k} {v:.4f}" for k, v in zip(values, means))
        self.emit(f"step {self.budget.step}  {text}  {rate:.1f} {self.unit}/s  {100 * done:.1f} %  ETA {left:.1f} min")
        self.history.append((float(self.budget.step), self.budget.elapsed_s(), *means))
        self._sums, self._count, self._mark = None, 0, now
