"""Where each user's choice stands in a ranking, and all that follows from places alone.

A place is a frame's row: ``first`` and ``last``, the places from 1 that the choice shares with its equals, and how many
``candidates`` there are. Tables of scores have ``user_id``, ``label``, ``logit``, one row a candidate.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl

from mllm_msr.evaluation.metrics import METRICS, Array, Rows, TieGroups, metric_column, missed_by_rank

OF_POPULARITY = ("hr@1", "hr@5", "hr@10", "mrr@5", "auc_user")


def rank_of_choice(scores: pl.DataFrame) -> pl.DataFrame:
    """``user_id``, ``first``, ``last``, ``candidates`` of each user's best positive; users without one are left out.

    >>> scores = pl.DataFrame({"user_id": ["a", "a", "a"], "label": [0, 1, 0], "logit": [2.0, 1.0, 1.0]})
    >>> rank_of_choice(scores).row(0)
    ('a', 2, 3, 3)
    """
    rows = Rows.read(scores["user_id"], scores["label"], scores["logit"])
    groups = TieGroups.of(rows)
    user, n, _, a = groups.best
    return pl.DataFrame(
        {"user_id": rows.users.gather(user), "first": a + 1, "last": a + n, "candidates": groups.candidates[user]}
    )


def hit_curve(scores: pl.DataFrame, longest: int = 50) -> Array:
    """HR@k for k = 1 .. the longest list's length, at most ``longest``: means over users, ties by expectation.

    >>> hit_curve(pl.DataFrame({"user_id": ["a"] * 3, "label": [0, 1, 0], "logit": [2.0, 1.0, 1.0]})).tolist()
    [0.0, 0.5, 1.0]
    """
    groups = TieGroups.of(Rows.read(scores["user_id"], scores["label"], scores["logit"]))
    ranks = min(longest, int(groups.candidates.max()))
    return np.array([1.0 - missed.mean() for missed in missed_by_rank(groups, ranks)])


def place_columns(places: pl.DataFrame, metrics: Sequence[str] = METRICS) -> dict[str, Array]:
    """``{metric: (U,)}`` as :func:`~mllm_msr.evaluation.metrics.user_columns`, without the pooled AUC, for which places
    do not suffice, of users with one positive each.

    >>> columns = place_columns(pl.DataFrame({"first": [1, 10], "last": [1, 11], "candidates": [100, 100]}))
    >>> columns["hr@1"].tolist(), columns["hr@10"].tolist()
    ([1.0, 0.0], [1.0, 0.5])
    """
    first, last, size = (places[name].to_numpy().astype(np.int64) for name in ("first", "last", "candidates"))
    if not len(first) or (first < 1).any() or (last < first).any() or (size < last).any():
        raise ValueError("places: needs users, each with 1 <= first <= last <= candidates")
    groups = TieGroups.of_places(first, last, size)
    return {name: metric_column(groups, name) for name in metrics if name != "auc"}


def popularity_figures(tasks: pl.DataFrame | pl.LazyFrame, popularity: pl.DataFrame) -> dict[str, float]:
    """What ranking by training counts alone scores: means of :data:`OF_POPULARITY` over tasks, to four decimals.

    ``tasks``: ``candidates``, ``labels`` with one positive each, of any number: a scanned file is read as a stream.
    ``popularity``: ``item_id``, ``count``. No tasks give no figures.
    """
    counts = pl.element().replace_strict(popularity["item_id"], popularity["count"], return_dtype=pl.Int64)
    gap = pl.col("counts") - pl.col("counts").list.get(pl.col("labels").list.arg_max())  # over the choice's
    above, equal = ((gap.list.eval(test)).list.sum() for test in (pl.element() > 0, pl.element() == 0))
    places = (
        tasks.lazy()
        .select(pl.col("candidates").list.eval(counts).alias("counts"), "labels")
        .select(above.alias("above"), equal.alias("equal"), candidates=pl.col("counts").list.len())
        .select("candidates", first=pl.col("above") + 1, last=pl.col("above") + pl.col("equal"))
        .collect(engine="streaming")
    )
    columns = place_columns(places, OF_POPULARITY) if len(places) else {}
    return {name: round(float(np.nanmean(column)), 4) for name, column in columns.items()}
