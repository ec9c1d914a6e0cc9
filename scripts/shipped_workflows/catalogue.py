"""Every workflow that is drawn from a description: which model, which nodes, which settings, and why these."""
from __future__ import annotations

from .graphs import Workflow, node

#: Where numbers come from.
DEMO = "The settings are those that held on the demo models (see the README)"
PAPER = "The settings are published ones"
CHOSEN = "The settings are a careful start"

GUIDANCE = node("GuidanceSaver", method="Periodic")
FEATURES = node("TemporalFeatureCache")
TAYLOR = node("Cache", method="Taylor", preset="balanced")
#: A cache for a run of ten steps: each expert of Wan 2.2 has a sampler of its own.
SHORT_CACHE = node("Cache", method="Taylor", interval=2, warmup=3, tail=1)
SHORT_GUIDANCE = node("GuidanceSaver", method="Periodic", interval=2, warmup=2, tail=1)
SPARSE = node("SparseAttention", method="Block mass", keep=25.0, dense_until=20.0)

WORKFLOWS = (
    Workflow(
        "flux-fast", "flux", "FLUX.1 [dev], faster",
        "**Stretto Cache** skips steps whose result can be predicted. **Stretto Temporal Feature Cache** computes "
        "each modulation once, and *feature_weights* leaves their weights in the file: a quarter of the model or "
        "more is never loaded.",
        ((FEATURES, TAYLOR),), "demo-image-stacked", DEMO, loader={"feature_weights": "read from the file"},
    ),
    Workflow(
        "flux-teacache", "flux", "FLUX.1 [dev] with TeaCache as published",
        "**Stretto Cache** with *preset* on *published*: TeaCache's own polynomial and threshold for this model. "
        "Set *method* to another one, such as FBCache, DBCache or TaylorSeer, to compare what their authors "
        "recommend.",
        ((node("Cache", method="TeaCache", preset="published"),),), "demo-image-easycache", PAPER,
    ),
    Workflow(
        "flux-progressive", "flux", "FLUX.1 [dev], the first steps at half the size",
        "**Stretto Progressive Resolution** lets the network predict from a small latent while the picture is "
        "mostly noise, and corrects it by a full prediction now and then. Where the switch falls comes from the "
        "published spectrum of FLUX's latents.",
        ((node("ProgressiveResolution", stages="0.5, 1", spectrum="FLUX", min_side=64),),), "demo-image-progressive", PAPER,
    ),
    Workflow(
        "flux-large-sparse", "flux", "FLUX.1 [dev] at 2048 x 2048 with sparse attention",
        "At 16,384 tokens attention is most of the work. **Stretto Sparse Attention** keeps, from the second "
        "fifth of the steps on, the blocks that GRAT's cross shape reaches; nothing is trained. Below 8,192 "
        "tokens it is off and says so: smaller pictures gain nothing.",
        ((node("SparseAttention", method="GRAT-X", dense_until=20.0),),), "demo-video-sparse", CHOSEN,
        changes={"size": (2048, 2048)},
    ),
    Workflow(
        "flux-quantized", "flux", "FLUX.1 [dev] with 8 bits a weight",
        "**Stretto Load Diffusion Model** reads the 16-bit file and keeps its linear layers as 8-bit numbers: "
        "half the memory, no calibration. **Stretto Load Text Encoder** does the same for T5 and leaves its "
        "vocabulary table in the file.",
        ((),), "demo-image-quantized", DEMO, loader={"format": "int8"},
        encoder={"format": "fp8", "vocabulary": "rows from the file"},
    ),
    Workflow(
        "flux-quantize", "flux", "Make a FLUX.1 [dev] of 4, 6 and 8 bits",
        "**Stretto Profile** samples once. **Stretto Quantization Statistics** rounds one layer at a time and "
        "sees how much the result changes; **Stretto Quantize** gives each layer the bits that the **budget** "
        "(MB) allows and writes the file into *output/diffusion_models*.",
        ((),), "demo-image-quantize", CHOSEN, recipe="quantize", settings={"format": "mixed", "budget": 9000.0},
    ),
    Workflow(
        "sd35-fast", "sd35", "Stable Diffusion 3.5 Large, faster",
        "Three nodes on one model: **Stretto Guidance Saver** asks the negative prompt at every third step (and "
        "not at all in the first tenth), **Stretto Cache** skips steps whose result can be predicted, **Stretto "
        "Temporal Feature Cache** computes each modulation once.",
        ((GUIDANCE, FEATURES, TAYLOR),), "demo-image-stacked", DEMO,
    ),
    Workflow(
        "sd35-guidance", "sd35", "Stable Diffusion 3.5 Large, guidance where it matters",
        "**Stretto Guidance Saver** asks the branch of the negative prompt at every third step and continues its "
        "difference in between. Nothing else is changed: a cautious start.",
        ((GUIDANCE,),), "demo-image-guidance", DEMO,
    ),
    Workflow(
        "sd35-region", "sd35", "Stable Diffusion 3.5 Large, work where the picture changes",
        "**Stretto Region Adaptive** computes, at every second step of the middle of the run, only the half of "
        "the picture that changes most. The map shows where the model worked: the brighter, the more often.",
        ((node("RegionAdaptive", ratio=50.0, refresh_every=2),),), "demo-video-region", CHOSEN, recipe="region",
    ),
    Workflow(
        "sd35-calibrate", "sd35", "Name the quality, get the settings: Stable Diffusion 3.5 Large",
        "**Stretto Profile** records one plain run; **Stretto Calibrate** finds the cheapest schedule that keeps "
        "at least 30 dB PSNR, tries it by real runs and saves it as a preset; **Stretto Cache** uses it. Takes "
        "some ten runs, once.",
        ((node("Cache"),),), "demo-image-calibrate", CHOSEN, recipe="calibrate",
        settings={"target": "PSNR at least (dB)", "value": 30.0, "name": "sd35-large"},
    ),
    Workflow(
        "qwen-image-fast", "qwen-image", "Qwen-Image, faster",
        "**Stretto Guidance Saver** and **Stretto Cache** share the model. **Stretto Load Text Encoder** leaves "
        "the encoder's vocabulary table, a gigabyte, in its file and reads the rows of your words.",
        ((GUIDANCE, FEATURES, TAYLOR),), "demo-image-stacked", DEMO, encoder={"vocabulary": "rows from the file"},
    ),
    Workflow(
        "qwen-image-magcache", "qwen-image", "Qwen-Image with MagCache as published",
        "**Stretto Cache** with *preset* on *published*: MagCache's curve of how much each step's residual "
        "shrinks, and its thresholds for this model.",
        ((node("Cache", method="MagCache", preset="published"),),), "demo-image-easycache", PAPER,
    ),
    Workflow(
        "qwen-image-block-probe", "qwen-image", "Which blocks can Qwen-Image do without?",
        "**Stretto Block Probe** leaves out every block once, and puts in its last residual once, and draws what "
        "either does. The schedule that it writes reuses the cheapest blocks. Its *drop* output is for `python "
        "cli.py prune-depth`; so is the interval list that comes with the pack.",
        ((node("CacheSchedule"),),), "demo-video-block-probe", CHOSEN, recipe="block-probe", settings={"count": 20, "probes": 2},
    ),
    Workflow(
        "z-image-fast", "z-image", "Z-Image Turbo, faster",
        "Nine steps leave little to skip: **Stretto Cache** follows a published mask for so few (SCM, *slow*: one "
        "step of nine). 8-bit weights and a vocabulary table that stays in its file save memory.",
        ((node("Cache", method="SCM", level="slow", warmup=0, tail=0),),), "demo-image-quantized", PAPER,
        loader={"format": "int8"},
        encoder={"vocabulary": "rows from the file"},
    ),
    Workflow(
        "wan21-fast", "wan21", "Wan 2.1, faster",
        "Three nodes on one model: **Stretto Guidance Saver** asks the negative prompt at every third step, "
        "**Stretto Cache** skips steps whose result can be predicted, **Stretto Sparse Attention** keeps a "
        "quarter of the attention of 32,760 tokens.",
        ((GUIDANCE, TAYLOR, SPARSE),), "demo-video-stacked", DEMO,
    ),
    Workflow(
        "wan21-magcache", "wan21", "Wan 2.1 with MagCache as published",
        "**Stretto Cache** with *preset* on *published*: MagCache's curve and thresholds for the 1.3B model. The "
        "14B one has a curve of its own, found by itself.",
        ((node("Cache", method="MagCache", preset="published"),),), "demo-video-easycache", PAPER,
    ),
    Workflow(
        "wan21-radial", "wan21", "Wan 2.1 with radial attention",
        "**Stretto Sparse Attention** with *Radial*: far frames see each other less and less, as attention maps "
        "of videos do. The first fifth of the steps is complete. Nothing is trained.",
        ((node("SparseAttention", method="Radial", dense_until=20.0),),), "demo-video-sparse", CHOSEN,
    ),
    Workflow(
        "wan21-attention-plan", "wan21", "Wan 2.1 with DiTFastAttn",
        "**Stretto Attention Plan** shares attention between steps and between guidance branches and narrows it "
        "to a window, by a plan that needs no calibration. *wan21-find-plan* makes one for your model.",
        ((node("AttentionPlan", plan="DiTFastAttn"),),), "demo-video-ditfastattn", PAPER,
    ),
    Workflow(
        "wan21-find-plan", "wan21", "Find a plan of attention for Wan 2.1",
        "**Stretto Attention Probe** samples once and sees what every head could do without. **Stretto Attention "
        "Search** makes the fastest plan that stays at least 30 dB close, tries it by real runs and saves it; "
        "**Stretto Attention Plan** follows it with another seed.",
        ((node("AttentionPlan"),),), "demo-video-find-plan", CHOSEN, recipe="find-plan",
        changes={"size": (832, 480, 33), "sampler": "euler"},
        settings={"method": "Budgets", "value": 30.0, "tries": 3, "name": "wan21-1.3b"},
    ),
    Workflow(
        "wan21-dynamic", "wan21", "Wan 2.1 on fewer latent frames",
        "**Stretto Dynamic Frame Rate** stands in the place of KSampler: a fifth of the steps at full length, "
        "then it drops latent frames where the coming clip is calm (VGDFR). **Dynamic VAE Decode** makes up for "
        "them.",
        ((),), "demo-video-dynamic", PAPER, recipe="dynamic", changes={"sampler": "euler"},
        settings={"keep": 60.0, "after": 20.0},
    ),
    Workflow(
        "wan21-roundtrip", "wan21", "A clip through Wan 2.1's VAE on fewer latent frames",
        "A clip (here sampled; connect any frames) gets a **Stretto Frame Schedule**: 60 % of the latent frames, "
        "most of them where it moves (DLFR-VAE). **Dynamic VAE Encode** and **Decode** follow it, and every frame "
        "comes back.",
        ((),), "demo-video-roundtrip", PAPER, recipe="round-trip", settings={"keep": 60.0},
    ),
    Workflow(
        "wan22-fast", "wan22", "Wan 2.2, faster: each expert with nodes of its own",
        "One model for the noisy steps, one for the rest: each has its own **Stretto Guidance Saver**, **Cache** "
        "and **Sparse Attention**, because each sampler is a run of its own. Features of one never reach the "
        "other. The early expert's attention is complete for its first four steps.",
        ((SHORT_GUIDANCE, SHORT_CACHE, node("SparseAttention", dense_until=40.0)),
         (SHORT_GUIDANCE, SHORT_CACHE, node("SparseAttention", dense_until=0.0))),
        "demo-image-experts", CHOSEN, recipe="experts",
    ),
    Workflow(
        "hunyuan-video-fast", "hunyuan-video", "HunyuanVideo, faster",
        "**Stretto Cache** skips steps whose result can be predicted, **Stretto Sparse Attention** keeps a "
        "quarter of the attention of 30,210 tokens, and **Stretto Temporal Feature Cache** computes each "
        "modulation once.",
        ((FEATURES, TAYLOR, SPARSE),), "demo-video-stacked", DEMO,
    ),
    Workflow(
        "hunyuan-video-draft", "hunyuan-video", "HunyuanVideo with DraftAttention",
        "**Stretto Sparse Attention** with *DraftAttention*: a small draft of the attention map, from pooled "
        "queries and keys, says which blocks are worth computing. Nothing is trained.",
        ((node("SparseAttention", method="DraftAttention", keep=25.0, dense_until=20.0),),), "demo-video-sparse", PAPER,
    ),
    Workflow(
        "hunyuan-video-dynamic", "hunyuan-video", "HunyuanVideo on fewer latent frames",
        "**Stretto Dynamic Frame Rate** stands in the place of KSampler: a fifth of the steps at full length, "
        "then it drops latent frames where the coming clip is calm (VGDFR). **Dynamic VAE Decode** makes up for "
        "them.",
        ((),), "demo-video-dynamic", PAPER, recipe="dynamic", settings={"keep": 60.0, "after": 20.0},
    ),
    Workflow(
        "ltx-fast", "ltx", "LTX-Video, faster",
        "**Stretto Guidance Saver** asks the negative prompt at every third step, **Stretto Cache** skips steps "
        "whose result can be predicted. LTX-Video's latents are small: attention over 4,992 tokens is not worth "
        "thinning.",
        ((GUIDANCE, TAYLOR),), "demo-video-stacked", DEMO, recipe="custom",
    ),
    Workflow(
        "ltx-fbcache", "ltx", "LTX-Video with First-Block Cache as published",
        "**Stretto Cache** with *preset* on *published*: the first block runs at every step; where its residual "
        "hardly moved, the others are skipped.",
        ((node("Cache", method="FBCache", preset="published"),),), "demo-video-easycache", PAPER, recipe="custom",
    ),
    Workflow(
        "demo-image-stacked", "demo-image", "Three techniques at once",
        "**Stretto Guidance Saver**, **Stretto Temporal Feature Cache** and **Stretto Cache** share one model. "
        "The order of the nodes does not matter.\n"
        "Press **Run** and look at the timeline: what each of them saved. Then press **Ctrl-B** on one of them "
        "(bypass) and run again.",
        ((GUIDANCE, FEATURES, TAYLOR),), source=DEMO,
    ),
    Workflow(
        "demo-video-stacked", "demo-video", "Three techniques at once, on a clip",
        "**Stretto Guidance Saver**, **Stretto Cache** and **Stretto Sparse Attention** share one model. The "
        "order of the nodes does not matter.\n"
        "Press **Run** and look at the timeline and, below it, at what attention kept. This clip has 80 tokens: "
        "sparse attention saves nothing and changes it, as every block matters; large and long clips are what it "
        "is for.",
        ((GUIDANCE, TAYLOR, node("SparseAttention", keep=50.0, dense_until=50.0, min_tokens=0, block="16")),), source=DEMO,
    ),
    Workflow(
        "flux-progressive-sampler", "flux", "FLUX.1 [dev] with SamplerCustom, the first steps at half the size",
        "The same as *flux-progressive* for graphs of custom samplers: **Stretto Progressive Sampler** goes "
        "between KSamplerSelect and the sampler, and the model stays as it is.",
        ((),), "demo-image-progressive-sampler", PAPER, recipe="progressive-sampler",
        settings={"stages": "0.5, 1", "spectrum": "FLUX", "min_side": 64},
    ),
    Workflow(
        "demo-image-progressive-sampler", "demo-image", "Progressive resolution with SamplerCustom",
        "**Stretto Progressive Sampler** does what *demo-image-progressive* shows, as a part of the sampler: put "
        "it between KSamplerSelect and SamplerCustom or SamplerCustomAdvanced. On one run it is this node or the "
        "one for models.\n"
        "Press **Run** and read the report: small steps have a quarter of the tokens. On a demo this small the "
        "clock hardly notices.",
        ((),), source=DEMO, recipe="progressive-sampler", settings={"stages": "0.5, 1", "switches": "57", "min_side": 4},
    ),
    Workflow(
        "demo-video-second-pass", "demo-video", "Fewer latent frames, in parts",
        "What **Stretto Dynamic Frame Rate** does in one node: a first sampler runs a fifth of the steps on every "
        "frame, **Stretto Frame Rate Second Pass** drops latent frames where the coming clip is calm, a second "
        "sampler goes on. **Dynamic VAE Decode** leaves out what is missing and **Stretto Restore Frames** makes "
        "it up: put RIFE or FILM between the two if you have it.\n"
        "**Stretto Save Scheduled Latent** keeps the short latents with their schedule; its file opens with the "
        "node *Load*.",
        ((),), source=DEMO, recipe="second-pass", changes={"size": (64, 64, 33)}, settings={"keep": 60.0},
    ),
)
