"""The performance lab: every benchmark from one command, and the page made of what they wrote.

    .venv/bin/python benchmarks/run.py --list              what there is, and how long it may take
    .venv/bin/python benchmarks/run.py --all               everything, unattended, in less than an hour on two quiet cores
    .venv/bin/python benchmarks/run.py --only caching region [--full]
    .venv/bin/python benchmarks/run.py --quick             every suite in its smallest form, in less than six minutes
    .venv/bin/python benchmarks/run.py --all --resume      goes on where the last run stopped
    .venv/bin/python benchmarks/run.py --page              the page and the README's tables from the results, nothing measured

Every script runs in a process of its own with a time limit; one that fails, hangs or is interrupted is named in the end and
costs the others nothing. A run writes to a folder of its own below report/lab. `--all` then puts its results into
benchmarks/results/lab and makes benchmarks/results/README.md anew; so does `--write` for a few suites. The results that the
README quotes are measured with `--full`, which takes hours, and replaced by `--full --write` alone.
"""

import argparse
import json
import signal
import sys
from pathlib import Path

from lab import RESULTS, ROOT, USUAL_RESULTS
from lab.runner import FINISHED, STATE, Runner, write_json
from lab.suites import FULL, QUICK, SUITES, USUAL, Suite, named

RUNS = ROOT / "report" / "lab"
#: The most that a whole run may take, in seconds.
LONGEST = {QUICK: 6 * 60, USUAL: 59 * 60, FULL: 24 * 3600}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what")
    what.add_argument("--list", action="store_true", help="name the suites and stop")
    what.add_argument("--all", action="store_true", help="run every suite")
    what.add_argument("--only", nargs="+", metavar="SUITE", help="run these suites")
    what.add_argument("--page", action="store_true", help="make the pages from the results and stop")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="each suite in its smallest form")
    size.add_argument("--full", action="store_true", help="each suite at the settings behind the README; hours")
    parser.add_argument("--resume", action="store_true", help="go on with the newest run, or with that of --folder")
    parser.add_argument("--folder", type=Path, help="of this run (default: a new one below report/lab)")
    parser.add_argument("--write", action="store_true", help="put the results into benchmarks/results")
    args = parser.parse_args()
    if not (args.list or args.all or args.only or args.page or args.quick or args.resume):
        parser.error("say what: --list, --all, --only SUITE, --quick, --resume or --page")
    return args


def overview() -> str:
    """Return every suite with its time limit, scripts and peers."""
    lines = []
    for suite in SUITES:
        scripts = dict.fromkeys(f"{job.script}.py" + ("" if job.is_there() else " (absent)") for job in suite.jobs)
        lines.append(f"{suite.name:14} at most {suite.minutes:2g} min   {', '.join(scripts)}")
        lines += [f"{'':14}   beside: {'; '.join(suite.peers)}"] if suite.peers else []
        lines += [f"{'':14}   not here: {name} ({why})" for name, why in suite.missing]
    return "\n".join([*lines, f"{'together':14} at most {sum(suite.minutes for suite in SUITES):g} min"])


def folder_of(args: argparse.Namespace, size: str) -> Path:
    """Return the folder of this run: the one asked for, the newest of this size to go on with, or a new one."""
    if args.folder:
        return args.folder.resolve()
    if args.resume:
        states = sorted(RUNS.glob(f"*/{STATE}"), reverse=True)
        for state in states:
            if json.loads(state.read_text(encoding="utf-8"))["size"] == size:
                return state.parent
        raise SystemExit(f"There is no {size} run in {RUNS} to go on with.")
    from lab.machine import now

    return RUNS / now().replace(":", "").replace("-", "").removesuffix("+0000")


def keep(runner: Runner, suites: list[Suite]) -> list[str]:
    """Copy the results of finished suites to benchmarks/results; return their names."""
    target, written = RESULTS if runner.size == FULL else USUAL_RESULTS, []
    target.mkdir(exist_ok=True)
    for suite in suites:
        for job in suite.jobs if runner.status(suite) == FINISHED else ():
            source = runner.folder / f"{job.result}.json"
            if source.is_file():
                old, new = target / source.name, json.loads(source.read_text(encoding="utf-8"))
                before = json.loads(old.read_text(encoding="utf-8")) if old.is_file() and runner.size == FULL else {}
                write_json(old, {**before, **new})
                written.append(str(old.relative_to(ROOT)))
    if runner.size != FULL:
        write_json(target / STATE, runner.state)
    return written


def pages() -> None:
    """Make the page and the README's tables anew."""
    from lab.page import write_pages

    for path in write_pages():
        print(f"written: {path.relative_to(ROOT)}")


def main() -> int:
    """Run the command; return the exit status: 0 where every suite finished."""
    args = arguments()
    if args.list:
        print(overview())
        return 0
    if args.page and not (args.all or args.only or args.quick):
        pages()
        return 0
    size = QUICK if args.quick else FULL if args.full else USUAL
    try:
        suites = named(args.only)
    except KeyError as error:
        print(error.args[0], file=sys.stderr)
        return 2
    runner = Runner(folder_of(args, size), size, LONGEST[size], lambda line: print(line, flush=True))
    if args.resume and not args.only and not args.all:
        suites = named(runner.state.get("wanted"))
    print(f"{size} run in {runner.folder}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended from outside, it ends its script too
    try:
        good = runner.run(suites)
    except KeyboardInterrupt:
        print(f"\nStopped. Go on with: .venv/bin/python benchmarks/run.py --resume --folder {runner.folder}"
              f"{' --' + size if size != USUAL else ''}\n\n{runner.ended()}")  # fmt: skip
        return 130
    print(f"\n{runner.ended()}")
    if args.write and size == QUICK:
        print("A quick run proves that everything runs; its figures are not kept.")
    elif args.write or (args.all and size == USUAL):
        for name in keep(runner, suites):
            print(f"written: {name}")
        pages()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
