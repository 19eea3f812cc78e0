"""Beyond the mean: where a ranker is good, whether its probabilities are meant, whether it only knows what is popular.

``scores`` are tables of the columns of ``records.schema.SCORES``: one row a candidate, one task a user.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl

from mllm_msr.data.statistics import BELOW_CHANCE
from mllm_msr.evaluation.metrics import Array, Columns, Values, estimates, paired
from mllm_msr.records.results import (
    AgreementFigures,
    ByVariant,
    Check,
    Difference,
    Estimate,
    Metrics,
    Reliability,
    ReliabilityBin,
    Slice,
)

SLICE_METRICS = ("auc_user", "hr@5", "ndcg@5")
COLD = 5  # a user of fewer items
COUNT_BANDS = (0, 1, 5, 20, 100)  # training interactions of the target: the lower ends of the bands


def measured(columns: Columns, n_bootstrap: int = 1000) -> Metrics:
    """The metrics of :func:`~mllm_msr.evaluation.metrics.user_columns` with their intervals; of no column, none."""
    found = estimates(columns, n_bootstrap) if columns else {}
    return {name: Estimate.from_json(content) for name, content in found.items()}


def compared(ours: Columns, theirs: Columns) -> dict[str, Difference]:
    """The metrics of one variant less another's, columns of the same users; see
    :func:`~mllm_msr.evaluation.metrics.paired`."""
    return {name: Difference.from_json(content) for name, content in paired(ours, theirs).items()}


def notes(report: Mapping[str, Any], variants: ByVariant) -> list[str]:
    """What of the data must be known to read the figures right.

    Args:
        report: of ``prepare``.
        variants: the metrics of each.
    """
    found = []
    for before, row in pairwise(report["cleaning"]):
        if row["step"] == "sample" and row["items"] < before["items"]:
            found.append(
                f"The data is a sample of {row['users']:,} of {before['users']:,} users, and the catalogue is what "
                f"they have met, {row['items']:,} of {before['items']:,} items: among all items every figure is higher "
                "than it would be in the whole catalogue."
            )
    auc = [estimate for name, estimate in variants.get("popularity", {}).items() if name in ("auc", "auc_user")]
    if report["protocol"]["name"] == "strict" and any(estimate.high < 0.5 for estimate in auc):
        found.append(BELOW_CHANCE)
    return found


def slices(columns: Mapping[str, Columns], tasks: pl.DataFrame, popularity: pl.DataFrame) -> list[Slice]:
    """The metrics of every variant for parts of the users, parts in rising order.

    ``history_length`` has the users' quartiles, but cold users, of fewer than ``COLD`` items, apart;
    ``target_train_count`` has 0 (cold items) and bands above; ``popularity_decile`` is the target's place among the
    catalogue's items by training interactions, 1 the least popular tenth, equals together at their lowest place. A part
    without users is left out.

    Args:
        columns: of each variant, see :func:`~mllm_msr.evaluation.metrics.user_columns`.
        tasks: ``user_id``, ``history_length``, ``target_train_count`` of the same users.
        popularity: ``item_id``, ``count`` of training interactions for the whole catalogue.
    """
    parts = tasks.select("user_id", *_parts(tasks, popularity)).sort("user_id")
    sliced = []
    for by in ("history_length", "target_train_count", "popularity_decile"):
        for part in parts[by].unique().sort():
            within = (parts[by] == part).to_numpy()
            variants = {
                variant: measured({name: column[within] for name, column in own.items()}, n_bootstrap=200)
                for variant, own in columns.items()
            }
            sliced.append(Slice(by, part, int(within.sum()), variants))
    return sorted(sliced, key=lambda each: (each.by, int(each.part.split("-")[0].rstrip("+"))))


def _parts(tasks: pl.DataFrame, popularity: pl.DataFrame) -> list[pl.Series]:
    """Each task's part under the three divisions, as names that begin with a number."""
    lengths, counts = tasks["history_length"].to_numpy(), tasks["target_train_count"].to_numpy()
    warm = lengths[lengths >= COLD]
    ends = np.unique([0, 1, COLD, *np.quantile(warm, [0.25, 0.5, 0.75]).astype(np.int64)] if len(warm) else [0, 1])
    if len(warm) == len(lengths):
        ends = np.unique([warm.min(), *ends[ends > warm.min()]])
    all_counts = np.sort(popularity["count"].to_numpy())
    decile = np.minimum(10 * np.searchsorted(all_counts, counts) // max(len(all_counts), 1), 9) + 1
    return [
        pl.Series("history_length", _bands(lengths, ends)),
        pl.Series("target_train_count", _bands(counts, np.array(COUNT_BANDS))),
        pl.Series("popularity_decile", decile.astype(str)),
    ]


def _bands(values: Array, ends: Array) -> list[str]:
    """
    >>> _bands(np.array([0, 3, 7]), np.array([0, 1, 5]))
    ['0', '1-4', '5+']
    """
    names = [str(low) if high == low + 1 else f"{low}-{high - 1}" for low, high in pairwise(ends)]
    return [[*names, f"{ends[-1]}+"][place] for place in np.searchsorted(ends, values, side="right") - 1]


def reliability(labels: Array, logits: Array, shift: float = 0.0, bins: int = 10) -> Reliability:
    """How well ``sigmoid(logit + shift)`` (N,) is the probability of being chosen.

    ``shift`` makes up for another share of positives in training: log odds here less log odds there. Bins have equally
    many pairs, so none is empty by chance; pairs of equal probability fall together. The error is the expected
    calibration error: the absolute difference of mean probability and share of positives in a bin, averaged over pairs.

    >>> reliability(np.array([1, 0, 0, 0]), np.log(np.array([1, 1, 1, 1]) / 3)).error
    0.0
    """
    probability = 1 / (1 + np.exp(-(np.asarray(logits, dtype=np.float64) + shift)))
    edges = np.quantile(probability, np.linspace(0, 1, bins + 1)[1:-1])
    place = np.searchsorted(edges, probability, side="left")
    count = np.bincount(place, minlength=bins)
    mean = np.bincount(place, weights=probability, minlength=bins) / np.maximum(count, 1)
    chosen = np.bincount(place, weights=labels, minlength=bins) / np.maximum(count, 1)
    return Reliability(
        [ReliabilityBin(float(mean[i]), float(chosen[i]), int(count[i])) for i in np.flatnonzero(count)],
        float(np.round((np.abs(mean - chosen) * count).sum() / len(probability), 12)),
    )


def checks(scores: pl.DataFrame, popularity: pl.DataFrame) -> dict[str, Check]:
    """Of each variant: the share of users whose choice has the same score as another candidate, so that the order of
    equals would decide; and Spearman's correlation between a user's scores and the candidates' training counts, ties at
    their mean rank, averaged over the users where it is defined (1 would be a ranking by popularity)."""
    frame = scores.join(popularity, on="item_id", how="left", maintain_order="left").with_columns(
        pl.col("count").fill_null(0)
    )
    users = (
        frame.with_columns(equals=pl.len().over("variant", "user_id", "logit"))
        .group_by("variant", "user_id", maintain_order=True)  # sums in one order give one result
        .agg(
            tied=(pl.col("equals").filter(pl.col("label") == 1) > 1).any(),
            correlation=_spearman("logit", "count"),
        )
    )
    means = users.group_by("variant", maintain_order=True).agg(pl.col("tied").mean(), pl.col("correlation").mean())
    return {variant: Check(tied, correlation) for variant, tied, correlation in means.sort("variant").iter_rows()}


def agreement(user_ids: Values, logits: Values, others: Values) -> AgreementFigures:
    """How far two scorings of the same candidates agree, (N,) each; see :class:`~mllm_msr.records.results.Agreement`.

    The rank correlation is Spearman's within a user, ties at their mean rank, averaged over the users where it is
    defined.

    >>> agreement(["a", "a", "b", "b"], [1.0, 0.0, 1.0, 0.0], [2.0, 0.0, 0.0, 1.0])
    AgreementFigures(max_difference=1.0, first_changed=0.5, rank_correlation=0.0)
    """
    frame = pl.DataFrame({"user": pl.Series(user_ids), "ours": pl.Series(logits), "other": pl.Series(others)})
    is_first = [pl.col(name) == pl.col(name).max() for name in ("ours", "other")]
    users = frame.group_by("user", maintain_order=True).agg(
        kept=(is_first[0] & is_first[1]).any(), correlation=_spearman("ours", "other")
    )
    difference = (frame["ours"].cast(pl.Float64) - frame["other"].cast(pl.Float64)).abs().to_numpy()
    defined = users["correlation"].drop_nulls().to_numpy()
    return AgreementFigures(
        float(difference.max()),
        float(1 - users["kept"].to_numpy().mean()),
        float(defined.mean()) if len(defined) else None,
    )


def _spearman(left: str, right: str) -> pl.Expr:
    """Of two columns of a group, null where either is constant."""
    varied = [pl.col(name).n_unique() > 1 for name in (left, right)]
    return pl.when(*varied).then(pl.corr(pl.col(left).rank(), pl.col(right).rank()))
