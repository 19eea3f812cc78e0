"""The public names, registered with the Auto classes and pipelines of transformers: import this before using those."""

from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from mllm_msr.modeling.configuration_mllm_msr import MllmMsrConfig
from mllm_msr.modeling.inputs import Candidate, HistoryItem, User
from mllm_msr.modeling.modeling_mllm_msr import MllmMsrForRecommendation
from mllm_msr.modeling.pipeline import TASK, SequentialRecommendationPipeline
from mllm_msr.modeling.ranking import Recommender
from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor

__all__ = [
    "Candidate",
    "HistoryItem",
    "MllmMsrConfig",
    "MllmMsrForRecommendation",
    "MllmMsrProcessor",
    "Recommender",
    "SequentialRecommendationPipeline",
    "User",
]

AutoConfig.register(MllmMsrConfig.model_type, MllmMsrConfig, exist_ok=True)
for auto in (AutoModel, AutoModelForMultimodalLM):
    auto.register(MllmMsrConfig, MllmMsrForRecommendation, exist_ok=True)
AutoProcessor.register(MllmMsrConfig, MllmMsrProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(TASK, SequentialRecommendationPipeline, pt_model=AutoModel, type="multimodal")
