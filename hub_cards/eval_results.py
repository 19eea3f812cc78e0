"""Results as pages of the Hub read them: `.eval_results/*.yaml` of a model, beside its card's `model-index`, and the
`eval.yaml` of the data set, which names the tasks that those refer to."""

from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.constants import EVAL_RESULTS_FOLDER

from mllm_msr.evaluation.metrics import metric_label
from mllm_msr.evaluation.variants import variant_of
from mllm_msr.hub_cards.facts import Release
from mllm_msr.records.recipe import Recipe
from mllm_msr.records.results import Results
from mllm_msr.records.sections import OURS

PUBLISHED_VARIANTS = (OURS, "sequence_head", "fused")  # which the model's repository holds


def task_id(metric: str) -> str:
    """
    >>> task_id("ndcg@5")
    'ndcg_at_5'
    """
    return metric.replace("@", "_at_")


def write_eval_results(folder: Path, results: Results, release: Release) -> None:
    """One file for each variant that the model ranks by; all but the answer's say in their notes what they are."""
    target = folder / EVAL_RESULTS_FOLDER
    for name in PUBLISHED_VARIANTS:
        if not (metrics := results.variants.get(name)):
            continue
        variant = variant_of(name)
        notes = None if name == OURS else f"{variant.label}: {variant.meaning}"
        entries = [
            EvalResultEntry(
                release.dataset,
                task_id(metric),
                round(estimate.value, 4),
                source_url=f"https://huggingface.co/{release.model}",
                source_name="model card",
                notes=notes,
            )
            for metric, estimate in metrics.items()
        ]
        target.mkdir(exist_ok=True)
        _write(target / f"{name}.yaml", eval_result_entries_to_yaml(entries))


def write_eval_yaml(folder: Path, recipe: Recipe, metrics: Sequence[str]) -> None:
    """The data set as a benchmark: a task for each metric of its ranking tasks."""
    options = recipe.evaluation
    _write(
        folder / "eval.yaml",
        {
            "name": recipe.name,
            "description": "Rank each task's candidates; "
            + ", ".join(metric_label(metric) for metric in metrics)
            + " over users, equal scores at their expected place.",
            "evaluation_framework": "mllm-msr",
            "tasks": [{"id": task_id(metric), "config": "tasks", "split": options.split} for metric in metrics],
        },
    )


def _write(path: Path, content: object) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
