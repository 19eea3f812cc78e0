"""A run's model, ready to rank, and its catalogue."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_msr.data.catalogue import Catalogue
from mllm_msr.data.hub_tables import load_table
from mllm_msr.records.recipe import backbone_path
from mllm_msr.records.run import RunFolder
from mllm_msr.records.storage import read_json

if TYPE_CHECKING:
    from mllm_msr.modeling.ranking import Recommender


@dataclass(frozen=True)
class Computing:
    """How scores are computed; none of it is meant to change them.

    Args:
        device: of the model; None: this process's own, an accelerator if there is one.
        dtype: of the weights; None: as they were saved.
        attn_implementation: None: the one the backbone chooses.
        token_budget, cache_dtype: see :class:`~mllm_msr.modeling.ranking.Recommender`; None: the recipe's.
        share_prefix, memory_gb, cache, compile: see there.
    """

    device: str | None = None
    dtype: str | None = None
    attn_implementation: str | None = None
    token_budget: int | None = None
    cache_dtype: str | None = None
    share_prefix: bool | None = None
    memory_gb: float | None = None
    cache: Path | None = None
    compile: str | None = None


def is_late(run: RunFolder) -> bool:
    """Whether the run's model has ``interaction="late"``."""
    config = read_json(run.model / "config.json")
    return config.get("interaction") == "late"


def check_cache_dtype(run: RunFolder, cache_dtype: str | None) -> None:
    """Raise ValueError if the run's model keeps no items that could have this type."""
    if cache_dtype and not is_late(run):
        raise ValueError(f"evaluation.cache_dtype: the model of {run.path} is `joint` and keeps no items: leave it out")


def load_recommender(run: RunFolder, how: Computing = Computing()) -> "Recommender":
    """The run's trained model, in this process or on the server of ``evaluation.served``."""
    if run.recipe.evaluation.served:
        return _served(run, run.recipe.evaluation.served)
    how = replace(how, cache_dtype=how.cache_dtype or run.recipe.evaluation.cache_dtype)
    check_cache_dtype(run, how.cache_dtype)
    from mllm_msr.processing.auto import MllmMsrForRecommendation

    loading = {"dtype": how.dtype, "attn_implementation": how.attn_implementation}
    model = MllmMsrForRecommendation.from_pretrained(
        run.model, **{name: value for name, value in loading.items() if value}
    )
    return _recommender(run, model, how)


def _served(run: RunFolder, url: str) -> "Recommender":
    from mllm_msr.processing.auto import MllmMsrConfig, MllmMsrProcessor
    from mllm_msr.processing.served_scoring import ServedRecommender

    if MllmMsrConfig.from_pretrained(run.model).interaction != "joint":
        raise ValueError(f"evaluation.served: the model of {run.path} is `late`, and servers answer whole prompts only")
    return ServedRecommender(MllmMsrProcessor.from_pretrained(run.model), url)


def load_backbone(run: RunFolder) -> "Recommender":
    """The backbone of the run's model under the same prompts, as it was before any training."""
    from mllm_msr.processing.auto import MllmMsrForRecommendation, MllmMsrProcessor

    flags = run.recipe.training
    model = MllmMsrForRecommendation.from_backbone(
        backbone_path(flags["model_name_or_path"]),
        revision=flags.get("model_revision"),
        processor=MllmMsrProcessor.from_pretrained(run.model),
        dtype=flags.get("dtype"),
    )
    return _recommender(run, model, Computing())


def _recommender(run: RunFolder, model: Any, how: Computing) -> "Recommender":
    from accelerate import PartialState

    from mllm_msr.processing.auto import MllmMsrProcessor, Recommender

    return Recommender(
        model.to(how.device or PartialState().device),
        MllmMsrProcessor.from_pretrained(run.model),
        token_budget=how.token_budget or run.recipe.evaluation.token_budget,
        memory_gb=how.memory_gb,
        cache=how.cache,
        share_prefix=how.share_prefix,
        compile=how.compile,
        cache_dtype=how.cache_dtype,
    )


def load_catalogue(run: RunFolder) -> Catalogue:
    """The run's items."""
    return Catalogue(load_table(str(run.path), "items", "train"))
