"""What a run says of itself, as types: for cards, report, Spaces and release."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from huggingface_hub.utils import validate_repo_id

from mllm_msr.records.public import is_hub_id
from mllm_msr.records.recipe import Recipe
from mllm_msr.records.results import Results
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import ITEM_VECTORS
from mllm_msr.records.storage import read_json

TAG = re.compile(r"(?!.*\.\.)[A-Za-z0-9_](?:[\w.+-]{0,98}[\w+-])?(?<!\.lock)", re.ASCII)


class LossPoint(NamedTuple):
    """The loss that the trainer reported at a step of the optimiser."""

    step: int
    loss: float


@dataclass(frozen=True)
class CleaningStep:
    """What a step of the cleaning left, and its rule."""

    step: str
    interactions: int
    users: int
    items: int
    why: str


@dataclass(frozen=True)
class Skipped:
    """Input that was left out, counted, with a few examples."""

    what: str
    count: int
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataFacts:
    """What preparation reports. ``statistics`` and ``protocol`` are shown as they are, by name."""

    source: str = ""
    cleaning: tuple[CleaningStep, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    statistics: Mapping[str, Any] = field(default_factory=dict)
    protocol: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "DataFacts":
        content = read_json(path, {})
        return cls(
            content.get("source", ""),
            tuple(CleaningStep(**step) for step in content.get("cleaning", ())),
            tuple(Skipped(**{**part, "examples": tuple(part["examples"])}) for part in content.get("skipped", ())),
            content.get("statistics", {}),
            content.get("protocol", {}),
        )


@dataclass(frozen=True)
class ModelFacts:
    """What the model folder holds.

    Args:
        kind: an adapter, whole weights with a merged adapter, or whole weights.
        backbone_type: the backbone's ``model_type``.
        interaction: how user and candidate meet, "joint" or "late".
        prompts: the processor's templates, by name.
        training, validation: the losses that were reported.
        head_items: how many items its sequence head knows; None without one.
    """

    kind: Literal["adapter", "merged", "full"]
    backbone_type: str | None
    interaction: str | None
    prompts: Mapping[str, str]
    training: tuple[LossPoint, ...]
    validation: tuple[LossPoint, ...]
    head_items: int | None = None

    @classmethod
    def read(cls, run: RunFolder) -> "ModelFacts":
        config, processor = (read_json(run.model / f"{name}.json", {}) for name in ("config", "processor_config"))
        log = read_json(run.training_log, [])
        return cls(
            "adapter" if config.get("adapter") else "merged" if run.recipe.training.get("use_peft") else "full",
            (config.get("vlm_config") or {}).get("model_type"),
            config.get("interaction"),
            processor.get("prompts") or {},
            tuple(LossPoint(entry["step"], entry["loss"]) for entry in log if "loss" in entry),
            tuple(LossPoint(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry),
            read_json(run.head / "config.json", {})["sequence_head"]["n_items"] if has_head(run) else None,
        )


@dataclass(frozen=True)
class RunFacts:
    """All facts of a run; what it has not made yet is None or empty.

    Args:
        seconds: what each stage took, by its name.
        versions: of the libraries, by name.
    """

    recipe: Recipe
    results: Results | None
    data: DataFacts
    model: ModelFacts
    seconds: Mapping[str, float]
    versions: Mapping[str, str]

    @classmethod
    def read(cls, run: RunFolder) -> "RunFacts":
        provenance = run.provenance()
        return cls(
            run.recipe,
            run.results() if run.metrics.is_file() else None,
            DataFacts.read(run.data_report),
            ModelFacts.read(run),
            {name: stage["seconds"] for name, stage in provenance["stages"].items() if "seconds" in stage},
            provenance["versions"],
        )

    @property
    def source(self) -> str:
        return self.recipe.source.type

    @property
    def backbone(self) -> str | None:
        """The backbone's repository on the Hub; None for a folder, or the demo's own."""
        name = self.recipe.training.get("model_name_or_path")
        return name if is_hub_id(name) else None

    @property
    def own_backbone(self) -> bool:
        """Whether the backbone is the tiny one that the package ships."""
        return self.recipe.training.get("model_name_or_path", "demo") == "demo"

    @property
    def backbone_revision(self) -> str | None:
        return self.recipe.training.get("model_revision")


@dataclass(frozen=True)
class Release:
    """The repositories of a release, and the tag that marks it in each.

    Raises:
        ValueError: a name or tag that the Hub does not take.
    """

    model: str
    dataset: str
    metric: str
    space: str
    tag: str | None = None

    def __post_init__(self) -> None:
        for repo_id in (self.model, self.dataset, self.metric, self.space):
            validate_repo_id(repo_id)
        if self.tag is not None and (not TAG.fullmatch(self.tag) or re.fullmatch("main|[0-9a-f]{40}", self.tag)):
            raise ValueError(
                f"tag {self.tag!r}: a tag is made of letters, digits and . _ - + (at most 100), such as v1.0, and is "
                "neither called `main` nor like a commit"
            )

    @classmethod
    def of(cls, recipe: Recipe, namespace: str, tag: str | None = None) -> "Release":
        """The repositories of a run below ``namespace``; all runs have one metric."""
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", namespace, re.ASCII):
            raise ValueError(f"namespace {namespace!r}: name a user or an organisation on the Hub")
        model = f"{namespace}/mllm-msr-{slug(recipe.name)}"
        return cls(model, f"{model}-data", f"{namespace}/ranking_metrics", f"{model}-app", tag)


def has_vectors(run: RunFolder) -> bool:
    """Whether a run has item vectors, made from what its recipe and data are now."""
    return run.has(ITEM_VECTORS) and not run.pending("vectors")


def has_head(run: RunFolder) -> bool:
    """Whether a run's sequence head is trained and belongs to what its recipe and data are now."""
    return run.recipe.head.enabled and not run.pending("head")


def slug(name: str) -> str:
    """``name`` as part of a repository id.

    >>> slug("MovieLens 100k!")
    'movielens-100k'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "run"
