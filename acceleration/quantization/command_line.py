"""What the command line does with checkpoints; `cli.py` has the arguments and the printing."""

import argparse
from pathlib import Path

from .inspecting import inspect, verify
from .layouts import Layout
from .planning import Say, Wishes, plan_wishes
from .quantizing import Plan, Progress, Result, write_file
from .recipes import load_recipe
from .sensitivity import load_cells
from .statistics import load_statistics


def run_quantize(args: argparse.Namespace, say: Say, progress: Progress) -> int:
    """Handle `quantize` and `transcode`."""
    wishes = Wishes(
        args.source,
        load_recipe(args.recipe) if args.recipe else None,
        args.format,
        args.keep,
        args.safe,
        transcode=args.command == "transcode",
        assume_rotation=getattr(args, "assume_rotation", None),
        budget=args.budget,
        cells=load_cells(args.sensitivity) if args.sensitivity else None,
        by_group=args.by_group,
        statistics=load_statistics(args.statistics) if args.statistics else None,
        balance=args.balance,
    )
    plan = plan_wishes(wishes, say)
    with plan.checkpoint:
        _say_plan(plan, args, say)
        if args.dry_run:
            return 0
        result = write_file(
            plan,
            args.target,
            replace=args.replace,
            progress=progress,
            workers=args.workers,
            hash_source=not args.no_hash,
        )
    _say_result(plan, result, say)
    return 0


def _say_plan(plan: Plan, args: argparse.Namespace, say: Say) -> None:
    title = plan.architecture.title if plan.architecture else "architecture not known"
    say(f"{plan.checkpoint.paths[0]}: {title}, {plan.checkpoint.nbytes / 1e6:,.1f} MB, recipe {plan.recipe.name!r}")
    for note in plan.notes:
        say(f"  {note}")
    counts: dict[str, int] = {}
    for choice in plan.choices:
        name = choice.layout.name if isinstance(choice.layout, Layout) else f"kept: {choice.why}"
        counts[name] = counts.get(name, 0) + 1
    for name, count in sorted(counts.items(), key=lambda item: (item[0].startswith("kept"), -item[1])):
        say(f"  {count:5d} layers  {name}")
    if args.list:
        for choice in plan.choices:
            form = choice.layout.name if choice.layout else "keep"
            say(f"    {form:9s} {choice.layer} {list(choice.shape)}{f'  ({choice.why})' if choice.why else ''}")
    say(f"  {plan.nbytes() / 1e6:,.1f} MB ({plan.nbytes() / max(plan.checkpoint.nbytes, 1):.0%} of the source)")


def _say_result(plan: Plan, result: Result, say: Say) -> None:
    worst = sorted(result.layers, key=lambda report: -report.error)[:3]
    say(f"{result.path}: {result.nbytes / 1e6:,.1f} MB written, relative weight error {result.error:.4f}")
    for report in worst:
        say(f"  {report.error:.4f}  {report.format:9s} {report.layer}")


def run_inspect(args: argparse.Namespace, say: Say, progress: Progress) -> int:
    """Handle `inspect`."""
    for path in args.files:
        for line in inspect(path).lines():
            say(line)
    return 0


def run_verify(args: argparse.Namespace, say: Say, progress: Progress) -> int:
    """Handle `verify`: status 1 where a layer is wrong."""
    checks = verify(args.file, args.source, args.blocks)
    bad = [check for check in checks if check.problem]
    for check in bad:
        say(f"wrong: {check.layer} ({check.format}): {check.problem}")
    errors = [check.error for check in checks if check.error is not None]
    against = f", relative weight error {max(errors):.4f} at most" if errors else ""
    say(f"{args.file}: {len(checks)} quantized layers read, {len(bad)} wrong{against}")
    return 1 if bad else 0


def target_for(source: Path, format: str) -> Path:
    """Return the name a result gets where none is given: beside the source, with the format."""
    stem = source.name.removesuffix(".index.json").removesuffix(".safetensors").removesuffix(".gguf")
    return source.parent / f"{stem}-{format}.safetensors"
