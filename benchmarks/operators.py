"""Where the time of a call goes, by class of operator, from torch's profiler; the most that a technique can give there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

ATTENTION, LINEAR, NORM, ROPE, CONVOLUTION, OTHER = (
    "attention", "linear", "norm and modulation", "rotary positions", "convolution", "other",
)  # fmt: skip
CLASSES = (ATTENTION, LINEAR, NORM, ROPE, CONVOLUTION, OTHER)
COLORS = ("#c0504d", "#4f81bd", "#9bbb59", "#8064a2", "#f79646", "#a6a6a6")
#: Beginnings of the names of torch's operators.
NAMES = (
    (ATTENTION, ("scaled_dot", "_scaled_dot", "_flash_attention", "_efficient_attention", "_cudnn_attention", "softmax",
                 "_softmax", "block_sparse", "_fused_sdp")),
    (CONVOLUTION, ("conv", "_conv", "mkldnn_conv", "cudnn_conv", "slow_conv", "thnn_conv", "upsample")),
    (LINEAR, ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "_int_mm", "_scaled_mm", "mkldnn_linear", "int8_linear")),
    (NORM, ("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms", "native_group_norm", "group_norm", "mul", "add",
            "addcmul", "silu", "gelu", "rsqrt", "pow", "mean", "var", "sigmoid", "sub", "div")),
)  # fmt: skip


def class_of(name: str, ranks: list[int]) -> str:
    """Return the class of an operator by its name and the ranks of its inputs.

    Rotary positions have no operator of their own: they are arithmetic on pairs of channels, [B, H, N, D / 2, 2] and more.
    """
    short = name.split("::")[-1].lower()
    if "rope" in short:
        return ROPE
    found = next((kind for kind, starts in NAMES if short.startswith(starts)), OTHER)
    return ROPE if found in (NORM, OTHER) and max(ranks, default=0) >= 5 else found


def breakdown(call: Callable[[], Any], device: str, positions: bool = True) -> dict[str, float]:
    """Run ``call`` once under the profiler and return the seconds of the device by class of operator.

    ``positions`` says whether the network has rotary positions at all: a decoder of clips has tensors of many axes and none.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    seconds = dict.fromkeys(CLASSES, 0.0)
    for event in profiler.key_averages(group_by_input_shape=True):
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        if own <= 0 or (device == "cuda" and str(event.device_type).endswith("CUDA")):
            continue  # kernels are counted with the operator that launched them
        ranks = [len(shape) for shape in event.input_shapes or [] if isinstance(shape, list | tuple)]
        seconds[class_of(event.key, ranks if positions else [])] += own / 1e6
    return seconds


def shares(seconds: dict[str, float]) -> dict[str, float]:
    """Return shares of the whole, rounded."""
    whole = sum(seconds.values()) or 1.0
    return {name: round(value / whole, 4) for name, value in seconds.items()}


def at_most(share: float, factor: float = float("inf")) -> float:
    """Return the speed-up of a whole of which ``share`` becomes ``factor`` times as fast (Amdahl)."""
    rest = 1.0 - share + (0.0 if factor == float("inf") else share / factor)
    return 1.0 / rest if rest > 0 else float("inf")


def draw(rows: dict[str, dict[str, float]], path: Path, title: str) -> None:
    """Write a picture: one bar of shares per row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9.5, 1.3 + 0.55 * len(rows)), layout="constrained")
    names = list(rows)[::-1]
    left = [0.0] * len(names)
    for kind, color in zip(CLASSES, COLORS, strict=True):
        values = [100 * rows[name].get(kind, 0.0) for name in names]
        bars = axes.barh(names, values, left=left, color=color, label=kind, height=0.62)
        labels = [f"{value:.0f}" if value >= 5 else "" for value in values]
        axes.bar_label(bars, labels, label_type="center", color="white", fontsize=9)
        left = [before + value for before, value in zip(left, values)]
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the time, %")
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=3, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.28 if len(rows) < 4 else -0.14), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
