"""Markdown tables of what the benchmarks wrote: each function takes a script's JSON and returns head and rows."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass

Rows = list[list[str]]


@dataclass(frozen=True)
class Table:
    """A title, may be empty, column names, and cells as text."""

    title: str
    head: tuple[str, ...]
    rows: Rows

    def markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [f"| {' | '.join(self.head)} |", "|" + "---|" * len(self.head)]
        return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in self.rows)])


#: Above this many dB two pictures are the same to the bit.
SAME = 119.0


def decibels(mean: float | None, worst: float | None = None) -> str:
    """Return "mean / worst dB", "identical" where nothing differs, nothing where nothing was compared."""
    if mean is None:
        return ""
    if min(mean, mean if worst is None else worst) > SAME:
        return "identical"
    return f"{mean:.1f} dB" if worst is None else f"{mean:.1f} / {worst:.1f} dB"


def times(value: float | None) -> str:
    """Return a factor, nothing where it was not measured."""
    return "" if value is None else f"{value:.2f}x"


def share(value: float | None) -> str:
    """Return a share in percent, nothing where it was not measured."""
    return "" if value is None else f"{value:.0%}"


def rival(rows: dict[str, dict], calls: float, key: str) -> float:
    """Return what plain sampling with as many network calls gives, between the two nearest step counts."""
    points = sorted((row["calls"], row[key]) for name, row in rows.items() if re.fullmatch(r"plain|\d+ steps", name))
    points = [point for point in points if point[1] < SAME]
    below = [point for point in points if point[0] <= calls] or points[:1]
    above = [point for point in points if point[0] >= calls] or points[-1:]
    (c0, v0), (c1, v1) = below[-1], above[0]
    return v0 if c1 == c0 else v0 + (v1 - v0) * (calls - c0) / (c1 - c0)


CACHING_HEAD = (
    "Arm", "Calls", "Speed", "PSNR to plain, mean / worst", "Mean against as many plain steps", "Worst against theirs",
    "To 200 steps",
)  # fmt: skip


def caching_row(rows: dict[str, dict], name: str, shown: str | None = None) -> list[str]:
    """Return one arm of caching.py, beside as many plain steps."""
    row, label = rows[name], shown or name
    start = [label, f"{row['calls']:.3g}", f"{row['speedup']:.2f}"]
    end = f"{row['reference_mean']:.1f} dB"
    if name == "plain":
        return [label, f"{row['calls']:.3g}", "1", "", "", "", end]
    if row["psnr_worst"] > SAME:
        return [*start, "identical", "", "", end]
    gaps = [row[key] - rival(rows, row["calls"], key) for key in ("psnr_mean", "psnr_worst")]
    mean, worst = ("0" if abs(gap) < 0.05 else f"{gap:+.1f} dB" for gap in gaps)
    if "Fitted" in name:
        mean = f"**{mean}**"
    return [*start, decibels(row["psnr_mean"], row["psnr_worst"]), mean, worst, end]


def caching(doc: dict) -> list[Table]:
    """All arms of caching.py per number of steps."""
    return [
        Table(f"{doc['model']}, {steps}, {doc['prompts']} held-out prompts, CFG 5", CACHING_HEAD,
              [caching_row(rows, name) for name in rows])
        for steps, rows in doc.items() if steps.endswith(" steps")
    ]  # fmt: skip


def calibrated(doc: dict) -> list[Table]:
    """What calibrated presets gave on fresh seeds."""
    return [
        Table(f"{kind}: {part['steps']} steps, {part['fresh_seeds']} fresh seeds", CALIBRATED_HEAD, calibrated_rows(part))
        for kind, part in doc.items() if kind != "lab"
    ]  # fmt: skip


CALIBRATED_HEAD = ("Target", "Kept on fresh seeds", "Steps computed, mean", "Median over prompts", "Worst prompt")
TARGETS = {
    "psnr": ("PSNR at least {} dB", "{:.1f} dB"),
    "ssim": ("SSIM at least {}", "{:.3f}"),
    "speed": ("Speed {}x", "{:.2f}x"),
}


def calibrated_rows(part: dict) -> Rows:
    """Return a row per target."""
    rows = []
    for target, found in part["targets"].items():
        kind, value = target.split(":")
        words, number = TARGETS[kind]
        tried = [row for row in found if "median" in row]
        medians = [row["median"] for row in tried]
        rows.append(
            [words.format(value), f"{sum(row['met'] for row in tried)} of {len(tried)}",
             f"{statistics.mean(row['mask'].count('#') for row in tried):.1f} of {part['steps']}",
             number.format(statistics.median(medians)), number.format(min(medians))]
        )  # fmt: skip
    return rows


def diffusers(doc: dict) -> list[Table]:
    """Ours beside the caches of diffusers and cache-dit."""
    rows = [
        [f"{row['calls']:.3g}", name, row["whose"], f"{row['psnr_mean']:.1f}", f"{row['psnr_worst']:.1f}"]
        for name, row in sorted(doc["quality"].items(), key=lambda item: -item[1]["calls"])
        if name != "plain" and "psnr_mean" in row
    ]
    cost = [
        [name, row["whose"], f"{row['us_per_step']:.0f}", " to ".join(f"{v:.0f}" for v in row["quartiles"])]
        for name, row in doc["overhead"].items() if "us_per_step" in row
    ]  # fmt: skip
    title = f"{doc['model']}, {doc['steps']} steps, {doc['prompts']} held-out prompts, dB to plain"
    return [
        Table(title, ("Computed", "Arm", "Whose", "PSNR", "Worst"), rows),
        Table("Added to a step which is computed", ("Arm", "Whose", "Microseconds", "Quartiles"), cost),
    ]


def region(doc: dict) -> list[Table]:
    """Quality for work, guards, speed."""
    tables = []
    for part in ("quality", "guard"):
        rows = [
            [name, f"{row['work']:.0%}", decibels(row["psnr_mean"], row["psnr_worst"]), str(row["prompts"])]
            for name, row in sorted(doc.get(part, {}).items(), key=lambda item: -item[1]["work"])
        ]
        if rows:
            tables.append(Table(f"{part}, 80 tokens", ("Arm", "Work", "PSNR to plain, mean / worst", "Prompts"), rows))
    if speed := doc.get("speed"):
        plain = speed["plain"]
        rows = [
            [name, f"{row['work']:.0%}", *(times(plain[kind]["median"] / row[kind]["median"]) for kind in ("processor", "clock")),
             " to ".join(f"{v:.1f}" for v in row["processor"]["spread"])]
            for name, row in speed.items()
        ]  # fmt: skip
        head = ("Arm", "Work", "Speed, processor time", "Speed, clock", "Seconds of the processor")
        tables.append(Table("speed, 1,280 tokens", head, rows))
    return tables


def sparse_kernel(doc: dict) -> list[Table]:
    """The kernel beside dense and compiled attention."""
    head = ("Threads", "Tokens", "Head size", "Type", "Form", "Kept", "ms", "Fastest to slowest", "Speed")
    rows = [
        [str(r.get("threads", "")), f"{r['tokens']:,}", str(r["head_size"]), r["dtype"], r["form"], f"{r['density']:.0%}",
         f"{r['milliseconds']:.1f}", f"{r['fastest']:.1f} to {r['slowest']:.1f}", times(r["speedup"])]
        for r in doc["rows"]
    ]  # fmt: skip
    return [Table("", head, rows)]


def sparse_attention(doc: dict) -> list[Table]:
    """Methods on the demo video model."""
    tables = []
    if quality := doc.get("quality"):
        rows = [
            [name, share(row.get("kept")), decibels(row["psnr_mean"], row["psnr_worst"])]
            for name, row in quality.items() if row.get("psnr_mean") is not None
        ]  # fmt: skip
        tables.append(Table("80 tokens", ("Arm", "Kept", "PSNR to plain, mean / worst"), rows))
    if speed := doc.get("speed"):
        rows = []
        for name, row in speed.items():
            step = times(row["full_step"] / row["sparse_step"]) if row.get("full_step") else ""
            off = "" if row.get("relative_l2") is None else f"{row['relative_l2']:.3f}"
            spread = " to ".join(f"{v:.2f}" for v in row.get("sparse_step_spread") or ())
            rows.append([name, share(row.get("kept")), off, step, spread])
        tables.append(Table("5,120 tokens", ("Method", "Kept", "Off (relative L2)", "Step", "Seconds of a step"), rows))
    return tables


def attention_search(doc: dict) -> list[Table]:
    """Plans beside fewer steps and one setting for all heads."""
    tables = []
    for tokens, part in doc.items():
        if tokens == "lab":
            continue
        rows = [search_row(name, row) for name, row in part["arms"].items() if name != "plain"]
        title = f"{tokens}, {part['steps']} steps, plans for {part['target']:g} dB, {part['prompts']} held-out prompts"
        tables.append(Table(title, SEARCH_HEAD, rows))
    return tables


SEARCH_HEAD = ("Arm", "Speed", "PSNR to plain, mean / worst", "Kept between steps")


def search_row(name: str, row: dict) -> list[str]:
    """Return one arm of attention_search.py."""
    kept = f"{row['peak_mib']:.0f} MiB" if row["peak_mib"] >= 0.5 else ""
    label = f"**found, {name.removeprefix('found: ')}**" if name.startswith("found") else name
    return [label, times(row["speed"]), decibels(row["psnr_mean"], row["psnr_worst"]), kept]


def guidance(doc: dict) -> list[Table]:
    """Guidance Saver and progressive resolution."""
    tables = []
    for part in doc.values():
        if not isinstance(part, dict) or "rows" not in part:
            continue
        rows = [
            [name, f"{row['work']:.2f}", times(row.get("speedup_processor")), times(row.get("speedup_clock")),
             decibels(row.get("psnr_mean"), row.get("psnr_worst"))]
            for name, row in part["rows"].items()
        ]  # fmt: skip
        head = ("Arm", "Work", "Speed, processor time", "Speed, clock", "PSNR to plain, mean / worst")
        tables.append(Table(part["title"], head, rows))
    return tables


ROUNDTRIP_HEAD = ("Clips", "Every latent", "Even rates", "Its own schedule")


def roundtrip_rows(doc: dict) -> Rows:
    """Return a row per kind of clips of frame_rate.py."""
    rows = []
    for kind, row in doc["roundtrip"]["kinds"].items():
        cells = [f"{row['psnr'][way]:.1f} dB, {row['ssim'][way]:.3f}" for way in ("full", "uniform", "dynamic")]
        rows.append([f"{kind} ({row['clips']})", *cells[:2], f"**{cells[2]}**"])
    return rows


def frame_rate(doc: dict) -> list[Table]:
    """Round trips, the schedule's time, the sampler's gain."""
    tables = []
    if "roundtrip" in doc:
        title = f"{doc['roundtrip']['frames']} frames at {doc['keep']:.0%} of the latents, PSNR and SSIM to the clip"
        tables.append(Table(title, ROUNDTRIP_HEAD, roundtrip_rows(doc)))
    if "schedule" in doc:
        part = doc["schedule"]
        seconds = part["seconds"]
        row = [str(part["frames"]), " x ".join(map(str, part["size"])), f"{seconds['median']:.2f} s",
               f"{seconds['least']:.2f} to {seconds['most']:.2f} s"]  # fmt: skip
        tables.append(Table("Making a schedule", ("Frames", "Size", "Time", "Spread"), [row]))
    if "sampler" in doc:
        rows = [
            [f"{r['side']} px", f"{r['tokens']:,}", f"{r['kept']:.0%}", times(r["sampler_speedup"]), times(r["total_speedup"])]
            for r in doc["sampler"]["sizes"]
        ]
        head = ("Side", "Tokens", "Latents kept", "Sampler", "With decoding and encoding in between")
        tables.append(Table("Sampling", head, rows))
    return tables


QUANTIZATION_HEAD = ("Format", "Size", "PSNR, all pictures / worst", "Ten LoRAs beside / in the weights", "Seconds")


def quantization_rows(doc: dict) -> Rows:
    """Return a row per format, sizes in MB (10^6 bytes)."""
    rows = []
    for row in doc["formats"]:
        loras = [row.get(f"lora {where} the weights") for where in ("beside", "in")]
        words = " / ".join(f"{(v['psnr'] if isinstance(v, dict) else v):.1f}" for v in loras if v is not None)
        rows.append(
            [row["format"], f"{row['bytes'] / 1e6:.1f} MB", f"{row['psnr']:.1f} / {row['worst']:.1f} dB",
             f"{words} dB" if words else "", f"{row['cpu_seconds']:.2f}"]
        )  # fmt: skip
    return rows


def quantization(doc: dict) -> list[Table]:
    """Formats, products of layers, the writer."""
    tables = []
    if "formats" in doc:
        plain = ["16 bit", "", "", "", f"{doc['cpu_seconds_16_bit']:.2f}"]
        title = f"{doc['model']}, {doc['steps']} steps, {len(doc['prompts'])} held-out prompts"
        tables.append(Table(title, QUANTIZATION_HEAD, [plain, *quantization_rows(doc)]))
    for device in ("cpu", "gpu"):
        rows = [
            [f"{r['m']} x {r['k']} x {r['n']}", name, f"{ms:.2f}", times(r["times_16_bit"][name])]
            for r in doc.get("products", {}).get(device, ()) for name, ms in r["ms"].items()
        ]  # fmt: skip
        absent = {who: why for r in doc.get("products", {}).get(device, ()) for who, why in r.get("absent", {}).items()}
        rows += [["all", who, "", f"absent: {why}"] for who, why in absent.items()]
        if rows:
            tables.append(Table(f"Linear layers, {device}", ("Rows x in x out", "Form", "ms", "Against 16 bit"), rows))
    return tables


WEIGHTS_HEAD = ("Model", "What", "All weights", "Need not be loaded", "Kept instead", "Same result")


def weights_rows(doc: dict) -> Rows:
    """Return a row per model of the computed table, sizes in GB (10^9 bytes) and MB (10^6)."""
    rows = []
    for row in doc["table"]:
        saved = f"{row['saved_bytes'] / 1e9:.2f} GB ({row['saved_bytes'] / row['total_bytes']:.0%})"
        kept = f"{row['table_bytes'] / 1e6:.0f} MB for {row['table_for']}" if row.get("table_bytes") else ""
        rows.append([row["model"], row["what"], f"{row['total_bytes'] / 1e9:.1f} GB", saved, kept, row["exact"]])
    return rows


def weights(doc: dict) -> list[Table]:
    """What need not be loaded, computed and measured."""
    tables = [Table("Computed from ComfyUI's own model classes", WEIGHTS_HEAD, weights_rows(doc))] if "table" in doc else []
    rows = [
        [r["model"], f"{r['loaded_before'] / 1e6:.1f} MB", f"{r['loaded_after'] / 1e6:.1f} MB", "yes" if r["equal"] else "NO",
         str(r["prompts"])]
        for r in doc.get("features", ())
    ]  # fmt: skip
    if rows:
        tables.append(Table("Measured", ("Model", "Loaded before", "Loaded after", "Equal to the bit", "Prompts"), rows))
    return tables


def overhead(doc: dict) -> list[Table]:
    """What hooks cost where nothing is skipped."""
    head = ("Arm", "Microseconds per evaluation", "Spread", "Of a step", "Goal")
    return [
        Table(f"{name}: {size['tokens']} image tokens, {size['steps']} steps, {size['runs']} runs", head, [
            [arm, f"{r['median_us']:.0f}", f"{r['min_us']:.0f} to {r['max_us']:.0f}", f"{r['median_percent']:.2f} %",
             "reached" if r["goal_reached"] else "missed"]
            for arm, r in size["rows"].items()
        ])
        for name, size in doc["sizes"].items()
    ]  # fmt: skip


def prediction(doc: dict) -> list[Table]:
    """The predicted speed-up beside the measured one."""
    head = ("Shape", "Arm", "Counted", "Predicted", "Measured", "Spread", "Error of counting", "Error")
    rows = []
    for shape, part in doc["shapes"].items():
        for arm, r in part["arms"].items():
            rows.append(
                [shape, arm, times(r["counted"]), times(r["predicted"]), times(r["measured"]),
                 " to ".join(f"{v:.2f}" for v in r["spread"]), f"{r['counted'] / r['measured'] - 1:+.0%}",
                 f"{r['predicted'] / r['measured'] - 1:+.1%}"]
            )  # fmt: skip
    return [Table("", head, rows)]


def comparison(doc: dict) -> list[Table]:
    """A comparison of workflows on a server, a report@1 document."""
    rows = []
    for arm in doc["arms"]:
        gain = arm["ratio"]["sampler"]
        spread = f"{gain['low']:.2f} to {gain['high']:.2f}" if gain else ""
        computed = f"{arm['calls']['computed']:.3g} of {arm['steps']}"
        rows.append([arm["label"], computed, times(gain["median"] if gain else None), spread, str(arm["runs"])])
    head = ("Arm", "Computed", "Speed", "Interval of the median", "Runs")
    return [Table(f"`{doc['command']}`, {doc['created'][:10]}, batch {doc['settings']['batch']}", head, rows)]


def nothing(doc: dict) -> list[Table]:
    """Masks and weights, no figures of a benchmark."""
    return []


def generic(doc: dict) -> list[Table]:
    """Any list or dictionary of flat rows, as it stands."""
    tables = []
    for name, part in doc.items():
        rows = part if isinstance(part, list) else None
        if isinstance(part, dict) and part and all(isinstance(v, dict) for v in part.values()):
            rows = [{"name": key, **value} for key, value in part.items()]
        if name == "lab" or not rows or not all(isinstance(row, dict) for row in rows):
            continue
        flat = [{k: v for k, v in row.items() if not isinstance(v, (dict, list))} for row in rows]
        columns = list(dict.fromkeys(key for row in flat for key in row))
        cells = [[_cell(row.get(key)) for key in columns] for row in flat]
        if columns:
            tables.append(Table(name, tuple(columns), cells))
    return tables


def _cell(value) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")


#: What makes tables of a result, by its name; any other is shown as it stands.
TABLES: dict[str, Callable[[dict], list[Table]]] = {
    "caching-image": caching, "caching-video": caching, "calibrated-image": calibrated, "diffusers_host": diffusers,
    "region": region, "sparse-kernel-cpu": sparse_kernel, "sparse-attention": sparse_attention,
    "attention-search": attention_search, "guidance-resolution": guidance, "frame-rate": frame_rate,
    "demo-image-batch-1": comparison, "demo-image-batch-8": comparison, "demo-video-batch-1": comparison,
    "fitted-image": nothing, "fitted-video": nothing, "quantization": quantization, "weights": weights,
    "overhead": overhead, "prediction": prediction,
}  # fmt: skip


def tables_of(name: str, doc: dict) -> list[Table]:
    """Return the tables of a result."""
    return TABLES.get(name, generic)(doc)
