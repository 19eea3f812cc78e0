"""Multimodal sequential recommendation with multimodal large language models (MLLM-MSR, AAAI-25).

Importing this package loads nothing else. The first use of one of its public names loads them all, and registers model
and processor with transformers' `AutoConfig`, `AutoModel`, `AutoProcessor` and `pipeline`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mllm_msr.processing.auto import (
        Candidate,
        HistoryItem,
        MllmMsrConfig,
        MllmMsrForRecommendation,
        MllmMsrProcessor,
        Recommender,
        SequentialRecommendationPipeline,
        User,
    )

__version__ = "0.1.0"
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


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("mllm_msr.processing.auto"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
