"""Stretto's command line: measure accelerated workflows, open the panel, and make quantized checkpoints.

`compare` and `panel` run in the panel's environment (requirements-panel.txt), without torch; a ComfyUI server does the work.
`quantize`, `inspect`, `verify`, `transcode`, `combine`, `combine-search`, `prune-depth` and `to-diffusers` work on files and run
in ComfyUI's environment (torch), without a server.
"""

from __future__ import annotations

import _thread
import argparse
import os
import shlex
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from load_pack import ROOT, load_pack

DEFAULT_SERVER = "http://127.0.0.1:8188"
USAGE_ERROR, CANCELLED = 2, 130
GRACE = 10.0  # seconds in which the page may end what it is doing


def build_parser() -> argparse.ArgumentParser:
    """All subcommands; each sets `handler`."""
    parser = argparse.ArgumentParser(prog="cli.py", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_compare(commands)
    _add_panel(commands)
    _add_quantize(commands)
    _add_inspect(commands)
    _add_verify(commands)
    _add_transcode(commands)
    _add_combine(commands)
    _add_combine_search(commands)
    _add_prune(commands)
    _add_to_diffusers(commands)
    return parser


def _add_compare(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "compare",
        help="measure workflows against the plain one and write a report",
        description="The first workflow with Stretto's nodes bypassed is the plain arm; "
        "every workflow that differs from it is an arm of its own.",
    )
    command.add_argument(
        "--server", default=DEFAULT_SERVER, metavar="URL", help="address of ComfyUI (default: %(default)s)"
    )
    command.add_argument(
        "--workflow",
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help="workflow as JSON in either form, or a PNG, WebP or video that carries one; may be given more than once",
    )
    command.add_argument(
        "--prompts",
        nargs="+",
        action="extend",
        default=[],
        metavar="TEXT|FILE",
        help="prompts, or files with one per line or a JSON list (default: the workflow's own)",
    )
    command.add_argument("--count", type=_positive, metavar="N", help="use only the first N prompts")
    command.add_argument(
        "--seed", type=int, nargs="+", default=[], metavar="S", help="seeds (default: the workflow's own)"
    )
    command.add_argument("--steps", type=_positive, metavar="N", help="sampling steps (default: the workflow's own)")
    command.add_argument(
        "--repeats", type=_positive, default=3, metavar="R", help="rounds per prompt and seed (default: %(default)s)"
    )
    command.add_argument(
        "--warmup", type=_count, default=1, metavar="W", help="discarded rounds (default: %(default)s)"
    )
    command.add_argument(
        "--batch", type=_positive, metavar="B", help="pictures or clips per run (default: the workflow's own)"
    )
    command.add_argument(
        "--reference-steps",
        type=_count,
        default=200,
        metavar="N",
        help="steps of the reference that every arm is measured against; 0 leaves it out (default: %(default)s)",
    )
    command.add_argument(
        "--each", action="store_true", help="also each Stretto node of the first workflow alone, where it has several"
    )
    command.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="NODE.SETTING=V1,V2",
        help="also the first workflow with a setting at each of these values, such as Cache.interval=2,3,4; may be repeated",
    )
    command.add_argument("--no-fewer-steps", action="store_true", help="leave out the plain sampler with fewer steps")
    command.add_argument("--resume", action="store_true", help="continue an interrupted comparison in the same folder")
    command.add_argument(
        "--out", type=Path, default=Path("report"), metavar="DIR", help="folder of the report (default: %(default)s)"
    )
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")
    form.add_argument("--csv", action="store_true", help="print one line of comma-separated values per arm instead of a table")
    command.add_argument(
        "--history", type=Path, metavar="FILE", help="enter the comparison in this history, which the panel can open"
    )
    command.set_defaults(handler=run_compare)


def _add_panel(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("panel", help="open the A/B page in the browser")
    command.add_argument(
        "--server", default=DEFAULT_SERVER, metavar="URL", help="address of ComfyUI (default: %(default)s)"
    )
    command.add_argument("--port", type=_port, default=7860, help="port of the page (default: %(default)s)")
    command.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; anything but loopback lets others in (default: %(default)s)",
    )
    command.add_argument(
        "--workflows", type=Path, default=ROOT / "workflows", metavar="DIR", help="folder of workflows to choose from"
    )
    command.add_argument("--workflow", metavar="NAME", help="file in that folder that is chosen at first")
    command.add_argument(
        "--history",
        type=Path,
        metavar="FILE",
        help="file that remembers the comparisons (default: history.sqlite in the folder of the reports)",
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("report") / "panel",
        metavar="DIR",
        help="folder of the reports (default: %(default)s)",
    )
    command.add_argument(
        "--until-stdin-closes",
        action="store_true",
        help="end when the standard input closes: for programs that start the page and may not outlive it",
    )
    command.set_defaults(handler=run_panel)


FORMATS = ("int8", "w6a8", "w4a8", "fp8", "fp8_rows", "w4a16", "mixed")
FORMATS_HELP = """\
formats, with bytes per weight and the usual loss:
  int8      1.003  8-bit weights and activations, rotated; the default. Quality of 16 bit for most pictures.
  fp8       1.0    8-bit weights, one scale per layer. Loads in every ComfyUI since 0.3.75 without this pack.
  fp8_rows  1.001  the same with a scale per row. Needs this pack.
  w6a8      0.815  6-bit weights on the int8 grid
  w4a8      0.565  4-bit weights on the int8 grid: smallest
  w4a16     0.563  4-bit weights, 16-bit activations: for layers that see few rows
  mixed     any    w4a8, w6a8 or int8 per layer, the best that fits --budget
Norms, biases, embeddings, the first and last projections and modulations stay as they are; the recipe of the architecture
(presets/quantization) says which layers may change. int8, w6a8, w4a8 and w4a16 load in ComfyUI releases that know them, and in
older ones through Stretto's loader nodes.
"""
_QUANTIZE_EXAMPLES = """\
examples:
  python cli.py quantize flux1-dev.safetensors                              int8, beside the source
  python cli.py quantize flux1-dev.safetensors small.safetensors --format w4a8 --safe
  python cli.py quantize wan2.2/transformer/ wan.safetensors                sharded, with diffusers' names
  python cli.py quantize big.safetensors --format mixed --budget 9GB        as good as 9 GB allow
  python cli.py quantize flux1-dev.safetensors --format w4a8 --statistics run.safetensors --balance
  python cli.py quantize big.safetensors --dry-run --list                   what would be done, layer by layer
"""


def _add_quantize(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "quantize",
        help="make a quantized checkpoint, block by block",
        description="Write a quantized copy of a 16- or 32-bit checkpoint in ComfyUI's own format. The source is only read, "
        "memory stays below 1 GB whatever its size, and the result appears under its name only when it is whole.",
        epilog=FORMATS_HELP + "\n" + _QUANTIZE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "source",
        type=Path,
        help="safetensors file, index of shards, or folder of a diffusers transformer; any may be sharded",
    )
    _add_target(command)


def _add_transcode(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "transcode",
        help="turn a GGUF or quantized checkpoint into another format",
        description="Like quantize, for sources that are quantized already: GGUF (needs `pip install gguf`), scaled fp8, plain "
        "fp8, int8, or ComfyUI's format. They are dequantized block by block; what they lost stays lost.",
        epilog=FORMATS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("source", type=Path, help="GGUF or safetensors file")
    _add_target(command)
    command.add_argument(
        "--assume-rotation",
        type=int,
        choices=(0, 16, 64, 256),
        metavar="SIZE",
        help="for int8 files without markers: size of the rotated groups of the tool that made them (0 none, 256 usual)",
    )


def _add_target(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "target", type=Path, nargs="?", help="file to write (default: beside the source, named by format)"
    )
    command.add_argument(
        "--format", choices=FORMATS, default=None, help="format of the layers (default: the recipe's, int8)"
    )
    command.add_argument(
        "--recipe", type=Path, metavar="FILE", help="recipe of your own (default: the architecture's preset)"
    )
    command.add_argument(
        "--keep", nargs="+", action="extend", default=[], metavar="REGEX", help="layers to leave as they are, by name"
    )
    command.add_argument("--safe", action="store_true", help="leave the first and last blocks as they are")
    command.add_argument(
        "--budget", type=_bytes, metavar="SIZE", help="for mixed: size of the file, for example 8GB or 350MB"
    )
    command.add_argument(
        "--sensitivity", type=Path, metavar="FILE", help="for mixed: measured sensitivities of the layers"
    )
    command.add_argument(
        "--statistics",
        type=Path,
        metavar="FILE",
        help="what the node Stretto Quantization Statistics recorded: inputs per channel, and losses for mixed",
    )
    command.add_argument(
        "--balance",
        action="store_true",
        help="with --statistics: fold factors per channel where that is exact (ViDiT-Q). Such files need this pack's loader",
    )
    command.add_argument(
        "--by-group", action="store_true", help="for mixed: judge attention and MLP layers apart (ViDiT-Q)"
    )
    command.add_argument(
        "--workers", type=_positive, default=2, metavar="N", help="layers at a time (default: %(default)s)"
    )
    command.add_argument("--no-hash", action="store_true", help="do not put the source's SHA-256 into the file")
    command.add_argument("--replace", action="store_true", help="write over the target if it exists")
    command.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    command.add_argument("--list", action="store_true", help="list every layer with what becomes of it, and why")
    command.set_defaults(handler=run_file_command, files_only=True)


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "inspect",
        help="say what a checkpoint is, from its header",
        description="Format, architecture, layers per format, size, and where the file came from. Nothing but the header is "
        "read. Recognises ComfyUI's formats, scaled fp8, GGUF, nunchaku and bitsandbytes files.",
    )
    command.add_argument("files", type=Path, nargs="+", help="safetensors or GGUF files")
    command.set_defaults(handler=run_file_command, files_only=True)


def _add_verify(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "verify",
        help="read a quantized checkpoint again and check it",
        description="Checks every layer's shapes and markers, that weights decode to finite values, that the rotation flag "
        "belongs to the weights, and with --source how far they are from the original. Exit status 1 if a layer is wrong.",
    )
    command.add_argument("file", type=Path, help="quantized safetensors file")
    command.add_argument("--source", type=Path, help="what it was made from")
    command.add_argument(
        "--blocks", type=_positive, default=4, metavar="N", help="blocks of rows per layer (default: %(default)s)"
    )
    command.set_defaults(handler=run_file_command, files_only=True)


_COMBINE_EXAMPLES = """\
examples:
  python cli.py combine epoch-08.safetensors epoch-10.safetensors --weights -0.4 1.4 --out best.safetensors
  python cli.py combine lora-*.safetensors --out mean.safetensors      LoRA epochs: the mean of what they add
combine-search finds the weights, by a metric of yours.
"""


def _add_combine(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "combine",
        help="add up checkpoints or LoRAs with signed weights",
        description="Signed linear combination of checkpoints of one training (LCSC), or of LoRAs, tensor by tensor: products "
        "are summed in fp32 and rounded once, memory stays small, sources are only read. Of LoRAs the products are combined and "
        "not the factors, so ranks add up.",
        epilog=_COMBINE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("files", type=Path, nargs="+", help="safetensors files of one model, 16 or 32 bit")
    command.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="one per file, negative ones too (default: their mean)"
    )
    command.add_argument("--any-sum", action="store_true", help="allow weights of checkpoints that do not add up to 1")
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write")
    command.add_argument("--replace", action="store_true", help="write over that file if it exists")
    command.set_defaults(handler=run_file_command, files_only=True)


_SEARCH_EXAMPLES = """\
The metric command is run once per evaluation, without a shell. {file} in it becomes the path of a combination (without {file} the
path comes last), and the last word that it prints is the metric: lower is better, unless --maximize. For example a script that
loads the file, computes a loss on pictures that were not trained on, with fixed noise, and prints it. Keep other pictures for the
final judgement: a search finds what is good on the pictures it is shown.

Every evaluation is kept at once. After Ctrl-C, an error or a power cut the same command goes on where it was.

examples:
  python cli.py combine-search epoch-*.safetensors --metric "python loss.py --weights {file}" --out best.safetensors
  python cli.py combine-search lora-*.safetensors --metric ./score.sh --maximize --out best-lora.safetensors --curve curve.svg
"""


def _add_combine_search(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "combine-search",
        help="find the weights for combine by a metric of yours",
        description="Evolutionary search for signed weights with sum 1 (LCSC): each file alone, their means, then generations "
        "drawn around the best so far. Writes the best combination. Files are to be given in the order of training.",
        epilog=_SEARCH_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("files", type=Path, nargs="+", help="safetensors files of one training, 16 or 32 bit")
    command.add_argument("--metric", required=True, metavar="COMMAND", help="prints a number for a file; see below")
    command.add_argument("--maximize", action="store_true", help="a higher metric is better")
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write")
    command.add_argument("--replace", action="store_true", help="write over that file if it exists")
    command.add_argument(
        "--keep", type=Path, metavar="FILE", help="JSON of all evaluations and their curve (default: OUT.search.json)"
    )
    command.add_argument("--curve", type=Path, metavar="FILE", help="draw the best metric after each evaluation, as SVG")
    command.add_argument(
        "--scratch", type=Path, metavar="DIR", help="folder for the file that is measured (default: that of OUT)"
    )
    command.add_argument(
        "--generations", type=_positive, default=12, metavar="N", help="rounds after the first (default: %(default)s)"
    )
    command.add_argument(
        "--population", type=_positive, default=12, metavar="N", help="evaluations a round (default: %(default)s)"
    )
    command.add_argument(
        "--spread", type=float, default=0.15, metavar="S", help="how far weights are varied at first (default: %(default)s)"
    )
    command.add_argument("--seed", type=_count, default=0, metavar="S", help="of the drawing (default: %(default)s)")
    command.set_defaults(handler=run_file_command, files_only=True)


_PRUNE_EXAMPLES = """\
examples:
  python cli.py prune-depth qwen-image.safetensors --preset ppcl-qwen-image
  python cli.py prune-depth flux1-dev.safetensors small.safetensors --drop double_blocks:5,9,single_blocks:12-14,30
  python cli.py prune-depth small.safetensors --lora style.safetensors      the LoRA, renumbered for the pruned model
"""


def _add_prune(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "prune-depth",
        help="drop blocks of a model and renumber the others",
        description="Writes a copy without some blocks, numbered without gaps, which ComfyUI loads by counting them: FLUX, "
        "HunyuanVideo, Qwen-Image, Wan, LTX-Video. The file remembers the old numbers, and LoRAs can be renumbered like it.",
        epilog=_PRUNE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("source", type=Path, help="model to prune; with --lora the pruned model")
    command.add_argument("target", type=Path, nargs="?", help="file to write (default: beside the source, -pruned)")
    command.add_argument("--drop", metavar="BLOCKS", help="for example 4,6-8 or double_blocks:3,single_blocks:10-12")
    command.add_argument("--preset", metavar="NAME", help="a published list: ppcl-qwen-image")
    command.add_argument("--lora", type=Path, metavar="FILE", help="LoRA of the whole model to renumber instead")
    command.add_argument("--replace", action="store_true", help="write over the target if it exists")
    command.set_defaults(handler=run_file_command, files_only=True)


def _add_to_diffusers(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "to-diffusers",
        help="make a diffusers pipeline folder of ComfyUI's files",
        description="Write a transformer of SD3 or Wan and its VAE (TAESD, Wan 2.1's) as a folder that diffusers and Stretto "
        "Load Diffusers Pipeline read. Text encoders are left out: such a pipeline takes embeddings.",
    )
    command.add_argument("transformer", type=Path, help="safetensors file of an SD3 or Wan transformer")
    command.add_argument("vae", type=Path, help="safetensors file of its VAE")
    command.add_argument("folder", type=Path, help="the folder to make, such as models/diffusers/NAME")
    command.add_argument(
        "--shift", type=float, default=3.0, metavar="S", help="shift of the noise levels (default: %(default)s)"
    )
    command.set_defaults(handler=run_file_command, files_only=True)


def _bytes(text: str) -> int:
    units = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
    number = text.strip().lower().removesuffix("b").strip()
    try:
        value = float(number[:-1]) * units[number[-1]] if number[-1:] in units and number[-1:] else float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write for example 8GB") from None
    if not 0 < value < 1e15:
        raise argparse.ArgumentTypeError(f"{text!r} is no size of a file")
    return int(value)


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _port(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 65535:
        raise argparse.ArgumentTypeError("must be between 1 and 65535")
    return number


def run_compare(args: argparse.Namespace) -> int:
    """Handle `compare`."""
    from stretto.web.panel.measure.client import ComfyClient
    from stretto.web.panel.measure.compare import arms_of, compare, read_prompts, read_workflow
    from stretto.web.panel.measure.exports import csv_of, json_of
    from stretto.web.panel.measure.history import entered
    from stretto.web.panel.measure.variants import arms_beside, requested
    from stretto.web.panel.terminal import output_console, print_paths, print_report, show_progress

    out, log = output_console(), output_console(stderr=True)
    prompts = read_prompts(args.prompts)[: args.count]
    request = {"workflow": args.workflow[0].name, "prompts": prompts, "command": args.reproduce}
    with ComfyClient(args.server) as client:
        client.health()
        workflows = [(path.stem, read_workflow(path, client)) for path in args.workflow]
        plain, arms = arms_of(workflows)
        first = workflows[0][1]
        arms = arms_beside(arms, requested(first, client.object_info(), args.each, args.sweep), first)
        with (
            entered(args.history, args.out, request) as enter,
            show_progress(log if args.json or args.csv else out) as progress,
        ):
            report = compare(
                client,
                plain,
                arms,
                prompts,
                args.seed,
                args.repeats,
                args.warmup,
                args.out,
                args.reference_steps,
                progress,
                batch=args.batch,
                steps=args.steps,
                competitor=not args.no_fewer_steps,
                resume=args.resume,
                command=args.reproduce,
            )
            enter(report)
    if args.json or args.csv:
        print((csv_of if args.csv else json_of)(report), end="")
    else:
        print_report(report, out)
        print_paths(args.out, out)
    return 0


def run_panel(args: argparse.Namespace) -> int:
    """Handle `panel`."""
    from stretto.web.panel.app import PanelConfig, serve

    if args.until_stdin_closes:
        threading.Thread(target=_interrupt_at_end_of, args=(sys.stdin.buffer,), daemon=True).start()
    config = PanelConfig(args.server, args.workflows, args.out, args.host, args.port, args.workflow, args.history)
    serve(config, announce=print)
    return 0


def _interrupt_at_end_of(stream: BinaryIO) -> None:
    """Wait until whoever holds the other end is gone, then end this program as Ctrl+C would."""
    while stream.read(4096):
        pass
    _thread.interrupt_main()
    time.sleep(GRACE)
    os._exit(CANCELLED)


def run_file_command(args: argparse.Namespace) -> int:
    """Handle the commands that work on checkpoints."""
    try:
        import torch

        from stretto.acceleration.errors import StrettoError
        from stretto.acceleration.hosts.diffusers_write import run_to_diffusers
        from stretto.acceleration.quantization import command_line
        from stretto.acceleration.weights import command_line as weights
        from stretto.acceleration.weights.search_command import run_search
    except ModuleNotFoundError as error:
        print(f"stretto: the package {error.name!r} is missing; run this with ComfyUI's Python", file=sys.stderr)
        return USAGE_ERROR
    if "format" in args and args.target is None:
        args.target = command_line.target_for(args.source, args.format or "int8")
    handlers = {"inspect": command_line.run_inspect, "verify": command_line.run_verify}
    handlers |= {"combine": weights.run_combine, "prune-depth": weights.run_prune, "combine-search": run_search}
    handlers["to-diffusers"] = run_to_diffusers
    bar = _Bar()
    if "workers" in args:
        torch.set_num_threads(1)  # layers run side by side instead
    try:
        return handlers.get(args.command, command_line.run_quantize)(args, bar.say, bar)
    except StrettoError as error:
        bar.end()
        print(f"stretto: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        bar.end()
        print("stretto: cancelled; nothing was written.", file=sys.stderr)
        return CANCELLED
    return USAGE_ERROR


class _Bar:
    """A line of progress on the terminal; silent where the output is no terminal."""

    def __init__(self) -> None:
        self._start, self._shown, self._open = time.monotonic(), 0.0, False

    def __call__(self, done: int, total: int, words: str) -> None:
        now = time.monotonic()
        if not sys.stderr.isatty() or (now - self._shown < 0.1 and done < total):
            return
        share, seconds = done / max(total, 1), now - self._start
        rate = done / max(seconds, 1e-3)
        left = (total - done) / max(rate, 1.0)
        bar = "#" * int(30 * share)
        line = f"\r[{bar:30s}] {share:4.0%}  {rate / 1e6:,.0f} MB/s  {left:,.0f} s left  {words[-40:]:40s}"
        print(line, end="", file=sys.stderr, flush=True)
        self._shown, self._open = now, True

    def say(self, line: str) -> None:
        """Print a line of its own."""
        self.end()
        print(line, flush=True)

    def end(self) -> None:
        """Leave the line of progress."""
        if self._open:
            print(file=sys.stderr)
            self._open = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 2 for a mistake that is explained in one sentence, 130 cancelled."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(argv)
    args.reproduce = shlex.join(["python", "cli.py", *argv])
    load_pack()
    if getattr(args, "files_only", False):
        return args.handler(args)
    try:
        from stretto.web.panel.measure.errors import CannotWrite, MeasureError, ServerDied
    except ModuleNotFoundError as error:
        print(f"stretto: {_missing(error)}", file=sys.stderr)
        return USAGE_ERROR
    try:
        return args.handler(args)
    except (ServerDied, CannotWrite) as error:
        print(f"stretto: {error} (--resume)", file=sys.stderr)
    except MeasureError as error:
        print(f"stretto: {error}", file=sys.stderr)
    except ModuleNotFoundError as error:
        print(f"stretto: {_missing(error)}", file=sys.stderr)
    except OSError as error:
        print(f"stretto: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stretto: cancelled; the finished measurements are kept, and --resume continues them.", file=sys.stderr)
        return CANCELLED
    return USAGE_ERROR


def _missing(error: ModuleNotFoundError) -> str:
    """The sentence for a package that is not installed."""
    return f"the package {error.name!r} is missing; install the panel's with: pip install -r requirements-panel.txt"


if __name__ == "__main__":
    sys.exit(main())
