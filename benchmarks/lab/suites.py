"""The suites of the lab: scripts, what they write, their settings in three sizes, and the time each may take."""

from dataclasses import dataclass

from . import ROOT

FULL, USUAL, QUICK = "full", "usual", "quick"
SIZES = (QUICK, USUAL, FULL)


@dataclass(frozen=True)
class Job:
    """One call of a script.

    Attributes:
        script: its name in this folder, without ".py".
        result: name of the JSON it writes, without ".json".
        full, usual, quick: its arguments in each size; None where that size leaves it out.
        out: the option that takes the file to write.
    """

    script: str
    result: str
    full: str
    usual: str | None
    quick: str | None
    out: str = "--out"

    def arguments(self, size: str) -> list[str] | None:
        """Return the arguments of a size, None where it leaves the job out."""
        words = {FULL: self.full, USUAL: self.usual, QUICK: self.quick}[size]
        return None if words is None else words.split(";") if ";" in words else words.split()

    def is_there(self) -> bool:
        """Whether the script exists."""
        return (ROOT / "benchmarks" / f"{self.script}.py").is_file()


@dataclass(frozen=True)
class Suite:
    """Jobs that belong together.

    Attributes:
        name, title: how it is called, what it is about.
        minutes: the longest it may take in its usual size, on two quiet cores; all together stay below an hour.
        jobs: run one after the other.
        seeds: where its noise comes from.
        peers: what of other hands runs beside ours.
        missing: peers that do not run here, and why.
    """

    name: str
    title: str
    minutes: float
    jobs: tuple[Job, ...]
    seeds: str
    peers: tuple[str, ...] = ()
    missing: tuple[tuple[str, str], ...] = ()

    def limit(self, size: str) -> float:
        """Return the most seconds the suite may take."""
        return {FULL: 3 * 3600.0, USUAL: 60 * self.minutes, QUICK: 60.0}[size]


PLAIN = "plain sampling with fewer steps"
CACHING_ARMS = "core|^Fitted|Taylor every 3, tail 5|EasyCache|FBCache 0.1|TeaCache 0.1|DBCache"
NO_GPU = "needs a GPU"

SUITES = (
    Suite(
        "caching",
        "Caching",
        6,
        (
            Job("caching", "caching-image", "image", f"image;--steps;28;--count;4;--arms;{CACHING_ARMS}",
                "image;--steps;10;--count;1;--arms;core|Taylor every 3, tail 5"),
            Job("caching", "caching-video", "video", f"video;--steps;28;--count;2;--arms;{CACHING_ARMS}", None),
        ),
        "1000 and on, one per prompt",
        (PLAIN, "dpmpp_2m with fewer steps", "ComfyUI's EasyCache", "ComfyUI's LazyCache"),
        (("diffusers' and cache-dit's caches", "they run in the suite diffusers"),),
    ),
    Suite(
        "attention",
        "Sparse attention",
        8,
        (
            Job("sparse_kernel", "sparse-kernel-cpu", "--device cpu", "--device cpu --tokens 4096 --threads 1",
                "--device cpu --tokens 1024 --threads 1", "--json"),
            Job("sparse_attention", "sparse-attention", "",
                "quality speed --count 1 --steps 20 --rounds 1 --arms (Block.mass|DraftAttention|Radial).25%",
                "quality --count 1 --steps 6 --arms Block.mass.25%"),
        ),
        "1000 and on, one per prompt; random projections for the kernel",
        ("dense SDPA of torch", "FlexAttention (compiled; with --flex on a CPU)", PLAIN),
        (
            ("cuDNN attention", NO_GPU),
            ("FlashAttention, SageAttention", NO_GPU),
            ("SpargeAttn, block-sparse FlashAttention", NO_GPU),
        ),
    ),
    Suite(
        "search",
        "Plans of attention",
        4,
        (
            Job("attention_search", "attention-search", "--side 256 --steps 14 --count 2 --extra-seeds 0 --uniform",
                "--side 240 --steps 6 --count 1 --extra-seeds 0 --tries 2 --target 25 --methods Sparse-vDiT",
                "--side 64 --steps 4 --count 1 --extra-seeds 0 --tries 1 --methods Sparse-vDiT --no-schedules"),
        ),
        "2000 and on",
        (PLAIN, "published schedules of DiTFastAttn and Re-ttention, run by our engine"),
        (("the authors' own code of these plans", f"{NO_GPU} or the authors' pipelines"),),
    ),
    Suite(
        "region",
        "Regions",
        4,
        (
            Job("region", "region", "",
                r"quality;guard;speed;--count;1;--rounds;1;--arms;^plain|ratio 0\.5$|steps|ratio 0\.25$|corrected|published",
                r"quality --count 1 --arms 20.steps|ratio.0\.5$"),
        ),
        "one per prompt",
        (PLAIN, "the choice of tokens of RAS' published code, run by our engine"),
        (("RAS' own pipelines", f"{NO_GPU} and their weights"),),
    ),
    Suite(
        "quantization",
        "Quantization",
        4,
        (
            Job("quantization", "quantization", "--prompts 12", "--prompts 1 --steps 20 --parts quality products",
                "--prompts 1 --steps 4 --parts products"),
        ),
        "one per prompt",
        ("bf16", "torch._int_mm", "int8 layers of comfy-kitchen", "int8 layers of torchao, where it is installed"),
        (("torch._scaled_mm", NO_GPU),),
    ),
    Suite(
        "frame-rate",
        "Dynamic frame rate",
        2,
        (
            Job("frame_rate", "frame-rate", "", "--parts schedule sampler --sides 128 --pairs 1", "--parts schedule"),
        ),
        "7; clips by demo/clips.py",
        (PLAIN, "even rates with as many latents", "features pooled inside the VAE"),
    ),
    Suite(
        "guidance",
        "Guidance and resolution",
        4,
        (
            Job("guidance_resolution", "guidance-resolution", "--parts image wide video large analytic --count 8 --batch 1 8",
                "--parts image wide --count 1 --batch 8 --threads 1",
                "--parts image --count 1 --batch 1 --threads 1 --arms guidance:.Periodic.every.2$"),
        ),
        "one per prompt",
        (PLAIN, "FasterCache's two bands, SPEED, fresh noise, run by our engine"),
        (("FasterCache of diffusers", "made for video pipelines; the demo video model has no pipeline of diffusers"),),
    ),
    Suite(
        "weights",
        "Weights that need not be there",
        1,
        (Job("weights", "weights", "", "--parts table features vocabulary", "--parts table"),),
        "7",
        ("the same models with all their weights",),
    ),
    Suite(
        "stacks",
        "Stacks",
        3,
        (
            Job("stacks", "stacks", "", "--parts image batch --count 2", "--parts image --count 1 --arms cache:.Fitted.8.*int8"),
        ),
        "1000 and on, one per prompt",
        (PLAIN,),
    ),
    Suite(
        "overhead",
        "Overhead",
        6,
        (Job("overhead", "overhead", "", "--runs 1", "--runs 1 --sizes demo"),),
        "0 and on, one per run",
        ("the same run without our wrappers",),
    ),
    Suite(
        "diffusers",
        "Under diffusers",
        4,
        (Job("diffusers_host", "diffusers_host", "", "--count 1 --overhead-runs 4", "--count 1 --steps 8 --overhead-runs 1"),),
        "one per prompt",
        ("FirstBlockCache, TaylorSeer and MagCache of diffusers", "cache-dit's DBCache with TaylorSeer", PLAIN),
    ),
    Suite(
        "prediction",
        "Predicted against measured",
        3,
        (Job("prediction", "prediction", "--rounds 5 --shapes image batch wide video", "--rounds 3 --shapes image batch",
             "--rounds 1 --shapes image"),),
        "one per round",
    ),
    Suite(
        "sizes",
        "Real sizes with random weights",
        2,
        (Job("sizes", "sizes", "--device cpu", "--device cpu --rounds 1", "--device cpu --rounds 1 --shapes flux-dev"),),
        "random weights",
    ),
    Suite(
        "hot-paths",
        "Hot paths",
        1,
        (Job("hot_paths", "profile", "", "--rounds 5", "--rounds 1 --only indicator"),),
        "random weights",
    ),
    Suite(
        "compile",
        "torch.compile",
        7,
        (Job("torch_compile", "torch-compile", "", "--timed", "--only Taylor --timed"),),
        "random weights",
    ),
)


def named(names: list[str] | None) -> list[Suite]:
    """Return the suites of these names in the lab's order, all of them for None.

    Raises:
        KeyError: a name that no suite has.
    """
    known = {suite.name: suite for suite in SUITES}
    for name in names or []:
        if name not in known:
            raise KeyError(f"no suite is called {name!r}; there are {', '.join(known)}")
    return [suite for suite in SUITES if names is None or suite.name in names]
