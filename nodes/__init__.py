"""What users see: one module per family of nodes."""

from pathlib import Path

import folder_paths
from comfy_api.latest import ComfyExtension, io

from .attention_plan import StrettoAttentionPlan
from .attention_search import StrettoAttentionProbe, StrettoAttentionSearch
from .block_probe import StrettoBlockProbe
from .cache import StrettoCache
from .calibrate import StrettoCalibrate
from .combine_weights import StrettoCombineWeights
from .demo import StrettoDemoText
from .diffusers import StrettoDiffusersSample, StrettoLoadDiffusersPipeline
from .frame_rate import (
    StrettoDynamicFrameRate,
    StrettoDynamicVAEDecode,
    StrettoDynamicVAEEncode,
    StrettoFrameRateProbe,
    StrettoFrameRateSecondPass,
    StrettoFrameSchedule,
    StrettoRestoreFrames,
)
from .frame_rate_files import StrettoLoadScheduledLatent, StrettoSaveScheduledLatent
from .guidance import StrettoGuidanceSaver
from .load_attention_weights import StrettoLoadAttentionWeights
from .load_quantized import StrettoLoadDiffusionModel, StrettoLoadTextEncoder
from .measure import StrettoMeasure
from .profile import StrettoProfile
from .quantize import StrettoQuantizationStatistics, StrettoQuantize
from .region import StrettoRegionAdaptive, StrettoRegionMap
from .renames import declare_renames
from .report import StrettoReport
from .resolution import StrettoProgressiveResolution, StrettoProgressiveSampler, StrettoSpectrum
from .routes import register_routes
from .schedule import StrettoCacheSchedule
from .sparse_attention import StrettoSparseAttention
from .temporal_features import StrettoTemporalFeatureCache

DEMO_MODELS = Path(__file__).resolve().parent.parent / "demo" / "models"


def prepare() -> None:
    """Offer the demo models to ComfyUI's own loaders, and the traces to the panel.

    Done here and not in ``ComfyExtension.on_load``, which ComfyUI 0.3.76 never calls.
    """
    for folder in ("diffusion_models", "vae", "text_encoders"):
        if (DEMO_MODELS / folder).is_dir():  # the registry package leaves the weights out
            folder_paths.add_model_folder_path(folder, str(DEMO_MODELS / folder))
    register_routes()


class StrettoExtension(ComfyExtension):
    """The pack as ComfyUI sees it."""

    async def on_load(self) -> None:
        """Say what was renamed. Never called by ComfyUI 0.3.76, which knows no renames either."""
        await declare_renames()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return every node of the pack."""
        return [
            StrettoCache,
            StrettoReport,
            StrettoMeasure,
            StrettoDemoText,
            StrettoProfile,
            StrettoCalibrate,
            StrettoCacheSchedule,
            StrettoSparseAttention,
            StrettoLoadAttentionWeights,
            StrettoAttentionPlan,
            StrettoAttentionProbe,
            StrettoAttentionSearch,
            StrettoLoadDiffusionModel,
            StrettoLoadTextEncoder,
            StrettoQuantizationStatistics,
            StrettoQuantize,
            StrettoGuidanceSaver,
            StrettoProgressiveResolution,
            StrettoProgressiveSampler,
            StrettoSpectrum,
            StrettoTemporalFeatureCache,
            StrettoCombineWeights,
            StrettoBlockProbe,
            StrettoRegionAdaptive,
            StrettoRegionMap,
            StrettoFrameSchedule,
            StrettoDynamicVAEEncode,
            StrettoDynamicVAEDecode,
            StrettoDynamicFrameRate,
            StrettoFrameRateSecondPass,
            StrettoFrameRateProbe,
            StrettoRestoreFrames,
            StrettoSaveScheduledLatent,
            StrettoLoadScheduledLatent,
            StrettoLoadDiffusersPipeline,
            StrettoDiffusersSample,
        ]
