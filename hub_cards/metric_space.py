"""The metric Space: `ranking_metrics` as a module of `evaluate`.

In the Space, the import of the metrics below is replaced by their source, so that one file is all there is.
"""

from typing import Any

import datasets
import evaluate

from mllm_msr.evaluation.metrics import ranking_metrics

USER_IDS = ("string", "int64", "float64")  # types of ids; the first that fits the input is taken
DESCRIPTION = """\
Ranking metrics of a recommender that scores candidates of users: pooled AUC, AUC per user, HR@1, HR@5, HR@10, MRR@5,
NDCG@5 and MAP, each with a 95 % bootstrap interval over users. Per user first, then the mean; candidates with equal
scores count by their expectation over all their orders, so a constant score gets what guessing gets.
"""
INPUTS = """\
Args:
    predictions: scores of user-candidate pairs, higher is better.
    references: 1 for what the user chose, else 0.
    user_ids: whose pair it is; texts or numbers.
    n_bootstrap: resamples of users (1000).
    seed: of the resampling (0).

Returns:
    `{"auc": float, "auc_ci95": [low, high], "hr@5": ..., ...}`.

Example:
    >>> metric = evaluate.load("ranking_metrics")
    >>> metric.compute(predictions=[0.9, 0.1, 0.3, 0.4], references=[1, 0, 1, 0], user_ids=["a", "a", "b", "b"])["hr@1"]
    0.5
"""
CITATION = "@inproceedings{ye2025harnessing, title = {Harnessing Multimodal Large Language Models for Multimodal \
Sequential Recommendation}, author = {Ye, Yuyang and others}, booktitle = {AAAI}, year = {2025}}"


class RankingMetrics(evaluate.Metric):
    """`evaluate.load("org/ranking_metrics")`."""

    def _info(self) -> evaluate.MetricInfo:
        pair = {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=[datasets.Features({**pair, "user_ids": datasets.Value(kind)}) for kind in USER_IDS],
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **others: Any) -> None:
        """A batch of lists, arrays, series or tensors; user ids of any kind."""
        batch = {"predictions": predictions, "references": references, **others}
        batch = {name: _listed(values) for name, values in batch.items()}
        if batch.get("user_ids"):
            batch["user_ids"] = _ids(batch["user_ids"])
        super().add_batch(**batch)

    def _compute(
        self,
        predictions: list[float],
        references: list[int],
        user_ids: list[str],
        n_bootstrap: int = 1000,
        seed: int = 0,
    ) -> dict[str, Any]:
        figures = ranking_metrics(user_ids, references, predictions, n_bootstrap=n_bootstrap, seed=seed)
        values = {name: result["value"] for name, result in figures.items()}
        return values | {f"{name}_ci95": result["ci95"] for name, result in figures.items()}


def _listed(values: Any) -> Any:
    for name in ("tolist", "to_list"):
        if hasattr(values, name):
            return getattr(values, name)()
    return values if values is None else list(values)


def _ids(values: list[Any]) -> list[Any]:
    """Numbers as they are, as far as Arrow has them, and all else as texts; ValueError for a row without an id."""
    for row, value in enumerate(values):
        if value is None or value != value:
            raise ValueError(f"row {row} has no user id")
    numbers = all(isinstance(value, int | float) and abs(value) < 2**63 for value in values)
    return values if numbers else [str(value) for value in values]
