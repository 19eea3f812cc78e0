"""Beyond the mean: where a ranker is good, whether its probabilities are meant, whether it only knows what is popular.

All functions take ``scores`` as in a run's ``scores.parquet``: ``variant``, ``user_id``, ``item_id``, ``label``,
``logit``, ``score``, one row a candidate, one task a user.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl

from mllm_msr.evaluation.metrics import Values, ranking_metrics

SHOWN = ("auc_user", "hr@5", "ndcg@5")
COLD = 5  # a user of fewer items
COUNT_BANDS = (0, 1, 5, 20, 100)  # training interactions of the target: the lower ends of the bands


def slices(scores: pl.DataFrame, tasks: pl.DataFrame, popularity: pl.DataFrame) -> list[dict[str, Any]]:
    """Every row's metrics for parts of the users: by history length, by how often training saw the target.

    Args:
        tasks: ``user_id``, ``candidates``, ``labels``, ``history_length``, ``target_train_count``.
        popularity: ``item_id``, ``count`` of training interactions for the whole catalogue.

    Returns:
        ``{"by": "history_length" | "target_train_count" | "popularity_decile", "part": str, "users": int, "rows": {ROW:
        {metric: {"value", "ci95"}}}}``, parts in rising order. ``history_length`` has the users' quartiles, but cold
        users, of fewer than ``COLD`` items, apart;
        ``target_train_count`` has 0 (cold items) and bands above; ``popularity_decile`` is the target's place among the
        catalogue's items by training interactions, 1 the least popular tenth, equals together at their lowest place.
        A part without users is left out.
    """
    parts = tasks.select("user_id", *_parts(tasks, popularity))
    found = []
    for by in ("history_length", "target_train_count", "popularity_decile"):
        for (part,), users in parts.group_by(by, maintain_order=False):
            own = scores.join(users.select("user_id"), on="user_id", how="semi", maintain_order="left")
            rows = {
                str(row): {
                    name: result
                    for name, result in ranking_metrics(
                        frame["user_id"], frame["label"], frame["logit"], n_bootstrap=200
                    ).items()
                    if name in SHOWN
                }
                for (row,), frame in own.group_by("variant", maintain_order=True)
            }
            found.append({"by": by, "part": str(part), "users": users.height, "rows": rows})
    return sorted(found, key=lambda one: (one["by"], int(one["part"].split("-")[0].rstrip("+"))))


def _parts(tasks: pl.DataFrame, popularity: pl.DataFrame) -> list[pl.Series]:
    """Each task's part under the three divisions, as names that begin with a number."""
    lengths, counts = tasks["history_length"].to_numpy(), tasks["target_train_count"].to_numpy()
    known = lengths[lengths >= COLD]
    ends = np.unique([0, 1, COLD, *np.quantile(known, [0.25, 0.5, 0.75]).astype(np.int64)] if len(known) else [0, 1])
    if len(known) == len(lengths):
        ends = np.unique([known.min(), *ends[ends > known.min()]])
    all_counts = np.sort(popularity["count"].to_numpy())
    decile = np.minimum(10 * np.searchsorted(all_counts, counts) // max(len(all_counts), 1), 9) + 1
    return [
        pl.Series("history_length", _bands(lengths, ends)),
        pl.Series("target_train_count", _bands(counts, np.array(COUNT_BANDS))),
        pl.Series("popularity_decile", decile.astype(str)),
    ]


def _bands(values: np.ndarray, ends: np.ndarray) -> list[str]:
    """
    >>> _bands(np.array([0, 3, 7]), np.array([0, 1, 5]))
    ['0', '1-4', '5+']
    """
    names = [str(low) if high == low + 1 else f"{low}-{high - 1}" for low, high in pairwise(ends)]
    return [[*names, f"{ends[-1]}+"][place] for place in np.searchsorted(ends, values, side="right") - 1]


def calibration(labels: np.ndarray, logits: np.ndarray, shift: float = 0.0, bins: int = 10) -> dict[str, Any]:
    """Reliability of ``sigmoid(logit + shift)`` as a probability of being chosen.

    ``shift`` makes up for another share of positives in training: log odds here less log odds there. Bins have equally
    many pairs, so none is empty by chance; pairs of equal probability fall together.

    Returns ``{"bins": [{"mean", "chosen", "count"}], "error": float}``: mean probability and share of positives of each
    bin, and the expected calibration error, the mean of their absolute difference over pairs.

    >>> calibration(np.array([1, 0, 0, 0]), np.log(np.array([1, 1, 1, 1]) / 3))["error"]
    0.0
    """
    probability = 1 / (1 + np.exp(-(np.asarray(logits, dtype=np.float64) + shift)))
    edges = np.quantile(probability, np.linspace(0, 1, bins + 1)[1:-1])
    place = np.searchsorted(edges, probability, side="left")
    count = np.bincount(place, minlength=bins)
    mean = np.bincount(place, weights=probability, minlength=bins) / np.maximum(count, 1)
    chosen = np.bincount(place, weights=labels, minlength=bins) / np.maximum(count, 1)
    return {
        "bins": [
            {"mean": float(mean[i]), "chosen": float(chosen[i]), "count": int(count[i])} for i in np.flatnonzero(count)
        ],
        "error": float(np.round((np.abs(mean - chosen) * count).sum() / len(probability), 12)),
    }


def sanity(scores: pl.DataFrame, popularity: pl.DataFrame) -> dict[str, dict[str, float]]:
    """``{ROW: {"tied_users", "popularity_correlation"}}``.

    ``tied_users``: the share of users whose choice has the same score as another candidate, so that the order of equals
    would decide. ``popularity_correlation``: Spearman's between a user's scores and the candidates' training counts,
    ties at their mean rank, averaged over the users where it is defined; 1 would be a ranking by popularity.
    """
    frame = scores.join(popularity, on="item_id", how="left", maintain_order="left").with_columns(
        pl.col("count").fill_null(0)
    )
    users = (
        frame.with_columns(
            equals=pl.len().over("variant", "user_id", "logit"),
            score_rank=pl.col("logit").rank().over("variant", "user_id"),
            count_rank=pl.col("count").rank().over("variant", "user_id"),
        )
        .group_by("variant", "user_id", maintain_order=True)  # sums in one order give one result
        .agg(
            tied=(pl.col("equals").filter(pl.col("label") == 1) > 1).any(),
            correlation=pl.when(pl.col("score_rank").n_unique() > 1, pl.col("count_rank").n_unique() > 1).then(
                pl.corr("score_rank", "count_rank")
            ),
        )
    )
    means = users.group_by("variant", maintain_order=True).agg(pl.col("tied").mean(), pl.col("correlation").mean())
    return {
        row: {"tied_users": tied, **({} if r is None else {"popularity_correlation": r})}
        for row, tied, r in means.sort("variant").iter_rows()
    }


def agreement(user_ids: Values, logits: Values, others: Values) -> dict[str, float]:
    """How far two scorings of the same candidates agree, (N,) each.

    Returns ``max_difference`` of two scores of one pair; ``rank_correlation``, Spearman's within a user, ties at their
    mean rank, averaged over the users where it is defined (left out if there is none); ``first_changed``, the share of
    users of whom no candidate is first in both.

    >>> agreement(["a", "a", "b", "b"], [1.0, 0.0, 1.0, 0.0], [2.0, 0.0, 0.0, 1.0])
    {'max_difference': 1.0, 'rank_correlation': 0.0, 'first_changed': 0.5}
    """
    frame = pl.DataFrame({"user": pl.Series(user_ids), "one": pl.Series(logits), "other": pl.Series(others)})
    ranks = frame.with_columns(pl.col("one", "other").rank().over("user").name.suffix("_rank"))
    is_first = [pl.col(name) == pl.col(name).max() for name in ("one", "other")]
    users = ranks.group_by("user", maintain_order=True).agg(
        kept=(is_first[0] & is_first[1]).any(),
        correlation=pl.when(pl.col("one").n_unique() > 1, pl.col("other").n_unique() > 1).then(
            pl.corr("one_rank", "other_rank")
        ),
    )
    difference = (frame["one"].cast(pl.Float64) - frame["other"].cast(pl.Float64)).abs().to_numpy()
    defined = users["correlation"].drop_nulls().to_numpy()
    return {
        "max_difference": float(difference.max()),
        **({"rank_correlation": float(defined.mean())} if len(defined) else {}),
        "first_changed": float(1 - users["kept"].to_numpy().mean()),
    }
