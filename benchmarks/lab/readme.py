"""The tables of the README and of help pages: which rows of the measured ones, under which names.

A file holds them between ``<!-- numbers: NAME -->`` and ``<!-- /numbers -->``; :func:`filled` writes them anew.
"""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path

from . import RESULTS, ROOT
from . import tables as made
from .tables import Table, decibels, times

BLOCK = re.compile(r"<!-- numbers: ([\w-]+) -->\n(.*?)<!-- /numbers -->", re.DOTALL)


@functools.cache
def result(name: str) -> dict:
    """Return a committed result by its name."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def files() -> list[Path]:
    """Return the files whose numbers are checked: the README, what docs holds, and the help pages."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "web" / "static" / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """Return a text with its blocks made from the results.

    Raises:
        KeyError: a block that nothing here makes.
    """
    return BLOCK.sub(lambda found: f"<!-- numbers: {found[1]} -->\n{BLOCKS[found[1]]().markdown()}\n<!-- /numbers -->", text)


def _plain_caching(model: str) -> Table:
    rows = result(f"caching-{model}")["28 steps"]
    names = {"plain": "plain", "16 steps": "16 steps"}
    levels = {16: " (*quality*)", 14: " (*balanced*)", 12: " (*fast*)"}
    names |= {f"Fitted, {n} of 28": f"**Fitted, {n}{levels.get(n, '')}**" for n in (18, 16, 14, 12, 10, 9)}
    names |= {
        "Taylor every 2, tail 5": "Taylor every 2", "Taylor every 3, tail 5": "Taylor every 3 (default)",
        "EasyCache 0.05": "EasyCache 0.05", "EasyCache 0.1": "EasyCache 0.1", "Adaptive 0.05": "Adaptive 0.05",
        "CG-Taylor 0.03": "CG-Taylor 0.03", "SpeCa 0.3": "SpeCa 0.3", "FBCache 0.1": "FBCache 0.1",
        "DiCache 0.1": "DiCache 0.1", "AdaCache 0.02": "AdaCache 0.02", "HiCache every 3, tail 3": "HiCache every 3",
        "TeaCache 0.1": "TeaCache 0.1 (no polynomial)", "SCM medium": "SCM medium",
    }  # fmt: skip
    if model == "video":
        names["core EasyCache 0.05"] = "core EasyCache 0.05"
    names |= {name: name for name in ("core LazyCache 0.05", "core LazyCache 0.1", "dpmpp_2m, 16 steps")}
    if model == "image":
        names["core EasyCache 0.1"] = "core EasyCache 0.1 (it does not reach SD3)"
    return Table("", made.CACHING_HEAD, [made.caching_row(rows, name, shown) for name, shown in names.items()])


def _lengths() -> Table:
    rows = []
    for model in ("image", "video"):
        for steps, computed in ((20, (11, 10, 9, 7)), (50, (29, 25, 21, 18))):
            found = result(f"caching-{model}")[f"{steps} steps"]
            lazy = [row for name, row in found.items() if name.startswith("core LazyCache")]
            for count in computed:
                ours = found[f"Fitted, {count} of {steps}"]
                near = min(lazy, key=lambda row: abs(row["calls"] - count))
                close = abs(near["calls"] - count) <= 0.15 * count
                theirs = [made.rival(found, count, key) for key in ("psnr_mean", "psnr_worst")]
                rows.append(
                    [model, f"{count} of {steps}", f"{ours['speedup']:.2f}", decibels(ours["psnr_mean"], ours["psnr_worst"]),
                     decibels(*theirs),
                     f"{decibels(near['psnr_mean'], near['psnr_worst'])} at {near['calls']:.1f}" if close else "-"]
                )  # fmt: skip
    return Table("", ("Model", "Calls", "Speed", "Fitted", "As many plain steps", "Core's LazyCache"), rows)


def _diffusers() -> Table:
    names = {
        "cache-dit DBCache F1B0 0.05, TaylorSeer": "cache-dit DBCache F1B0 0.05 with TaylorSeer",
        "FirstBlockCache hook 0.05": "FirstBlockCache of diffusers, 0.05", "FBCache 0.05": "FBCache 0.05, ours",
        "TaylorSeer hook, last block, every 2": "TaylorSeer of diffusers on the last block, every 2",
        "Taylor, every 2": "Taylor every 2, ours",
        "cache-dit DBCache F1B0 0.1, TaylorSeer": "cache-dit DBCache F1B0 0.1 with TaylorSeer",
        "Fitted, quality": "Fitted (quality), ours", "Fitted, balanced": "Fitted (balanced), ours",
        "TaylorSeer hook, lite, every 3": "TaylorSeer of diffusers, lite, every 3", "Taylor, every 3": "Taylor every 3, ours",
        "MagCache hook 0.12": "MagCache of diffusers, 0.12", "MagCache 0.12": "MagCache 0.12, ours",
        "EasyCache 0.1": "EasyCache 0.1, ours", "Fitted, fast": "Fitted (fast), ours", "Taylor, every 4": "Taylor every 4, ours",
        "TaylorSeer hook, lite, every 4": "TaylorSeer of diffusers, lite, every 4",
        "cache-dit DBCache F1B0 0.2, TaylorSeer": "cache-dit DBCache F1B0 0.2 with TaylorSeer",
        "cache-dit DBCache F1B0 0.2": "cache-dit DBCache F1B0 0.2",
        "DBCache-Taylor 0.05": "DBCache-Taylor 0.05, ours", "DBCache-Taylor 0.1": "DBCache-Taylor 0.1, ours",
        "DBCache-Taylor 0.2": "DBCache-Taylor 0.2, ours", "Adaptive 0.1": "Adaptive 0.1, ours",
        "Guidance Periodic, every 2": "Guidance Saver every 2, ours",
        "Guidance Periodic, every 3": "Guidance Saver every 3, ours",
    }  # fmt: skip
    found = result("diffusers_host")["quality"]
    rows = [(found[name], shown) for name, shown in names.items()]
    rows.sort(key=lambda item: (-item[0]["calls"], -item[0]["psnr_mean"]))
    cells = [[f"{row['calls']:.3g}", shown, f"{row['psnr_mean']:.1f} dB", f"{row['psnr_worst']:.1f} dB"] for row, shown in rows]
    return Table("", ("Computed", "Arm", "PSNR", "Worst"), cells)


def _diffusers_overhead() -> Table:
    names = {
        "Taylor": "Taylor, ours", "TaylorSeer hook, last block": "TaylorSeer of diffusers on the last block",
        "FBCache": "FBCache, ours", "FirstBlockCache hook": "FirstBlockCache of diffusers", "EasyCache": "EasyCache, ours",
        "MagCache hook": "MagCache of diffusers", "cache-dit DBCache F1B0": "cache-dit DBCache F1B0",
    }  # fmt: skip
    found = result("diffusers_host")["overhead"]
    rows = [
        [shown, f"{found[name]['us_per_step']:.0f}", " to ".join(f"{value:.0f}" for value in found[name]["quartiles"])]
        for name, shown in names.items()
    ]
    return Table("", ("Arm", "Microseconds a step", "Quartiles"), rows)


def _region() -> Table:
    doc = result("region")
    quality, speed = doc["quality"], doc["speed"]
    rows = []
    for name in (
        "25 steps", "ratio 0.75", "23 steps", "ratio 0.5", "21 steps", "20 steps", "ratio 0.25", "18 steps",
        "ratio 0.5, every fifth step complete",
    ):  # fmt: skip
        row = quality[name]
        gain = times(speed["plain"]["processor"]["median"] / speed[name]["processor"]["median"]) if name in speed else ""
        shown = f"**{name}**" if name in speed else name
        rows.append([shown, f"{row['work']:.0%}", gain, decibels(row["psnr_mean"], row["psnr_worst"])])
    return Table("", ("Arm", "Work", "Speed at 1,280 tokens", "PSNR to plain, mean / worst"), rows)


def _kernel() -> Table:
    short = {"float32": "fp32", "bfloat16": "bf16"}
    found = {
        (r["tokens"], r["head_size"], r["dtype"], r["form"]): r["speedup"]
        for r in result("sparse-kernel-cpu")["rows"] if r["threads"] == 1
    }  # fmt: skip
    shapes = [(4096, 64, "float32"), (4096, 128, "float32"), (4096, 128, "bfloat16"),
              (16384, 64, "float32"), (16384, 128, "float32"), (16384, 128, "bfloat16")]  # fmt: skip
    rows = [
        [f"{n:,}, {size}, {short[kind]}", *(f"{found[n, size, kind, f'gather {keep}%']:.1f}x" for keep in (50, 25, 10))]
        for n, size, kind in shapes
    ]
    return Table("", ("Tokens, head size, type", "50 % kept", "25 %", "10 %"), rows)


def _sparse_attention() -> Table:
    rows = []
    for name, row in sorted(result("sparse-attention")["speed"].items(), key=lambda item: item[1]["relative_l2"]):
        step = f"{row['full_step'] / row['sparse_step']:.1f}x" if row["full_step"] else ""
        rows.append([name.removesuffix(" 25%"), f"{row['kept']:.0%}", f"{row['relative_l2']:.3f}", step])
    return Table("", ("Method", "Kept", "Off", "Step"), rows)


def _search(tokens: int) -> Table:
    arms = result("attention-search")[f"{tokens} tokens"]["arms"]
    rows = [made.search_row(name, row) for name, row in arms.items() if name != "plain"]
    return Table("", made.SEARCH_HEAD, rows)


GUIDANCE = {
    "22 steps": "22 steps",
    "guidance: Periodic, from 10 %": "Guidance Saver, every 3rd step, guidance from 10 % (as the node is set)",
    "guidance: Periodic every 2, from 10 %": "Guidance Saver, every 2nd step, from 10 %",
    "guidance: Periodic every 2": "Guidance Saver, every 2nd step, from the start",
    "guidance: FasterCache": "Guidance Saver with FasterCache's two bands",
    "cache: Taylor every 2": "Taylor cache, every 2nd step",
    "stacked: guidance every 4, cache": "Taylor cache and Guidance Saver, every 4th step",
}


def _guidance(*names: str) -> Table:
    found = result("guidance-resolution")["image, batch 8"]["rows"]
    rows = [
        [GUIDANCE[name], times(found[name]["speedup_processor"]), decibels(found[name]["psnr_mean"], found[name]["psnr_worst"])]
        for name in names or GUIDANCE
    ]
    return Table("", ("Arm", "Speed", "PSNR to plain, mean / worst"), rows)


WIDE = {
    "22 steps": "22 steps", "20 steps": "20 steps", "18 steps": "18 steps",
    "progressive: Corrected every 4, half size to 40%": "Corrected every 4 steps, to 40 %",
    "progressive: Corrected every 4, half size to 57%": "Corrected every 4 steps, to 57 %",
    "progressive: Corrected every 4, half size to 71%": "Corrected every 4 steps, to 71 %",
    "progressive: Coupled, half size to 40%": "Coupled, to 40 %",
    "stacked: corrected to 57 %, cache": "Corrected to 57 % and Taylor cache",
}  # fmt: skip


def _resolution() -> Table:
    found = result("guidance-resolution")["wide, batch 1"]["rows"]
    rows = [
        [shown, f"{found[name]['work']:.2f}", times(found[name]["speedup_processor"]),
         decibels(found[name]["psnr_mean"], found[name]["psnr_worst"])]
        for name, shown in WIDE.items()
    ]  # fmt: skip
    return Table("", ("Arm", "Work", "Speed", "PSNR to plain, mean / worst"), rows)


def _own_size() -> Table:
    found = result("guidance-resolution")["image, batch 1"]["rows"]
    rows = []
    for way in ("Coupled", "SPEED", "Fresh noise"):
        row = [found[f"progressive: {way}, half size to {share}%"]["psnr_mean"] for share in (20, 40)]
        rows.append([way, *map(decibels, row)])
    rows.append(["as many fewer steps", *(decibels(own_size_rival(share)) for share in (20, 40))])
    return Table("", ("At its own size", "half size to 20 % of the steps", "to 40 %"), rows)


def own_size_rival(share: int) -> float:
    """Return the PSNR of fewer plain steps with as much work as coupled stages until ``share`` % of the steps."""
    found = result("guidance-resolution")["image, batch 1"]["rows"]
    by_work = {name: {**row, "calls": row["work"]} for name, row in found.items()}
    return made.rival(by_work, found[f"progressive: Coupled, half size to {share}%"]["work"], "psnr_mean")


def _quantization() -> Table:
    doc = result("quantization")
    rows = made.quantization_rows(doc)
    for row in rows:
        if row[0] == "int8":
            row[0] = "int8 (W8A8, rotated, no calibration)"
    return Table("", made.QUANTIZATION_HEAD, [["16 bit", "", "", "", f"{doc['cpu_seconds_16_bit']:.2f}"], *rows])


STACK_HEAD = ("Arm", "Speed", "Product of its parts", "PSNR to plain, mean / worst")


def _stacks(part: str) -> Table:
    found = result("stacks")["parts"][part]["rows"]
    rows = []
    for name, row in found.items():
        if name == "plain":
            continue
        product = times(row["product"]["processor"]) if "product" in row else ""
        shown = f"**{name}**" if "product" in row else name
        rows.append([shown, times(row["speedup_processor"]), product, decibels(row["psnr_mean"], row["psnr_worst"])])
    return Table("", STACK_HEAD, rows)


BLOCKS: dict[str, Callable[[], Table]] = {
    "caching-image": lambda: _plain_caching("image"),
    "caching-video": lambda: _plain_caching("video"),
    "caching-lengths": _lengths,
    "calibrated": lambda: Table("", made.CALIBRATED_HEAD, made.calibrated_rows(result("calibrated-image")["fitted"])),
    "diffusers": _diffusers,
    "diffusers-overhead": _diffusers_overhead,
    "region": _region,
    "stacks-batch": lambda: _stacks("batch"),
    "stacks-wide": lambda: _stacks("wide"),
    "sparse-kernel": _kernel,
    "sparse-attention": _sparse_attention,
    "attention-search-1280": lambda: _search(1280),
    "attention-search-4205": lambda: _search(4205),
    "guidance": _guidance,
    "resolution": _resolution,
    "resolution-own-size": _own_size,
    "frame-rate": lambda: Table("", made.ROUNDTRIP_HEAD, made.roundtrip_rows(result("frame-rate"))),
    "quantization": _quantization,
    "weights": lambda: Table("", made.WEIGHTS_HEAD, made.weights_rows(result("weights"))),
}
