"""What the command line does with combinations and pruned models; `cli.py` has the arguments and the printing."""

import argparse
from collections.abc import Callable
from pathlib import Path

from ..errors import StrettoError
from .combining import Progress, open_combination, write_combination
from .depth import intervals, preset_drop, prune_file, prune_lora

Say = Callable[[str], None]


def run_combine(args: argparse.Namespace, say: Say, progress: Progress) -> int:
    """Handle `combine`."""
    weights = args.weights or [1 / len(args.files)] * len(args.files)
    with open_combination(args.files, weights, args.any_sum) as group:
        kind = "LoRAs: their products are combined, ranks add up" if group.lora else "checkpoints"
        say(f"{len(args.files)} {kind}")
        for path, value in zip(args.files, group.coefficients):
            say(f"  {value:+.6g}  {path}")
        if group.single is not None:
            say("  one of them alone: copied bit for bit")
        target = write_combination(group, args.out, args.replace, progress)
    say(f"{target}: {target.stat().st_size / 1e6:,.1f} MB written")
    return 0


def run_prune(args: argparse.Namespace, say: Say, progress: Progress) -> int:
    """Handle `prune-depth`."""
    if args.lora:
        if args.drop or args.preset:
            raise StrettoError("with --lora the pruned model says which blocks it was pruned of; leave --drop and --preset out")
        target = args.target or _named(args.lora, "pruned")
        kept, gone = prune_lora(args.lora, args.source, target, args.replace, progress)
        say(f"{target}: {kept} tensors renumbered for {args.source}, {gone} of dropped blocks left out")
        return 0
    if bool(args.drop) == bool(args.preset):
        raise StrettoError("name the blocks with --drop, for example 4,6-8, or a published list with --preset")
    drop, note = preset_drop(args.preset) if args.preset else (args.drop, "")
    target = args.target or _named(args.source, "pruned")
    depth, before, after = prune_file(args.source, drop, target, args.replace, progress, note)
    for blocks, kept in depth.kept.items():
        gone = sorted(set(range(max(kept) + 1)) - set(kept))
        say(f"{blocks}: {len(kept)} left, numbered 0 to {len(kept) - 1}" + (f" (without {intervals(gone)})" if gone else ""))
    if note:
        say(f"list: {note}")
    say(f"{target}: {after / 1e6:,.1f} MB written, {after / before:.0%} of the source")
    say("Without training after it a pruned model is worse; measure it (Stretto Block Probe ranks blocks by what they cost).")
    return 0


def _named(source: Path, suffix: str) -> Path:
    """The name of a result where none is given: beside the source."""
    return source.parent / f"{source.name.removesuffix('.index.json').removesuffix('.safetensors')}-{suffix}.safetensors"
