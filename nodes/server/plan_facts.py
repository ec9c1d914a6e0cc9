"""Which node asks for which technique, and which of them cannot share a run: what a page needs to tell the plan of a graph."""

from itertools import combinations_with_replacement
from typing import Any

from ... import __version__
from ...acceleration.compatibility import TECHNIQUES, compatible
from ...acceleration.hosts.comfy import SKIPPING
from ...acceleration.savings import CACHING, GUIDANCE, RESOLUTION

#: Node id -> what it may ask of a run; of several, its settings choose one.
TECHNIQUES_OF: dict[str, tuple[str, ...]] = {
    "StrettoMeasure": ("measure",),
    "StrettoCache": ("cache",),
    "StrettoCacheSchedule": ("cache", "table"),
    "StrettoSparseAttention": ("attention",),
    "StrettoAttentionPlan": ("attention_plan",),
    "StrettoGuidanceSaver": ("guidance",),
    "StrettoProgressiveResolution": ("resolution",),
    "StrettoProgressiveSampler": ("resolution",),
    "StrettoSpectrum": ("resolution",),
    "StrettoTemporalFeatureCache": ("temporal_features",),
    "StrettoRegionAdaptive": ("region",),
    "StrettoFrameRateSecondPass": ("frame_rate",),
    "StrettoDynamicFrameRate": ("frame_rate",),
    "StrettoFrameRateProbe": ("frame_rate",),
    "StrettoProfile": ("profile",),
    "StrettoBlockProbe": ("block_probe",),
    "StrettoAttentionProbe": ("attention_probe",),
}
#: Nodes that pass a model on and ask nothing of its runs: they change or name weights.
WITHOUT = frozenset({"StrettoLoadAttentionWeights", "StrettoCombineWeights"})
#: Techniques that only look at a run.
LOOKING = frozenset({"measure", "profile", "module_profile", "attention_probe", "attention_greedy", "block_probe"})
#: ComfyUI's own nodes that skip steps, which ours refuse to stand beside.
CORE_CACHE = "core_cache"
CORE_NODES = ("EasyCache", "LazyCache")
#: Technique -> its factor in :func:`~...acceleration.savings.savings`.
FACTOR_OF = {"cache": CACHING, "table": CACHING, "guidance": GUIDANCE, "resolution": RESOLUTION}


def plan_facts() -> dict[str, Any]:
    """Return the ``plan-facts@1`` document: nodes with their techniques, and the pairs that cannot share a run."""
    nodes = {
        name: {"techniques": list(techniques), "accelerates": not LOOKING.issuperset(techniques)}
        for name, techniques in TECHNIQUES_OF.items()
    }
    nodes |= {name: {"techniques": [CORE_CACHE], "accelerates": False} for name in CORE_NODES}
    pairs = [pair for pair in combinations_with_replacement(TECHNIQUES, 2) if pair != ("measure",) * 2 and not compatible(*pair)]
    pairs += [(CORE_CACHE, technique) for technique in SKIPPING]
    return {"schema": "plan-facts@1", "version": __version__, "nodes": nodes, "conflicts": [list(pair) for pair in pairs]}
