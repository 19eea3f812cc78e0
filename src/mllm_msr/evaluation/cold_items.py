"""Whether cold items, which nobody chose in training, can hold their own: chosen and other items of each kind.

The softmax of the heads and of SASRec goes over trained items, so training never pushes a cold item down. If that alone
brought cold targets up, trained targets would lose to cold negatives. Hence four figures: how often a cold target, and
a trained one, stands above a cold negative of the same user, and above a trained one.
"""

from collections.abc import Mapping

import numpy as np
import polars as pl

from mllm_msr.evaluation.diagnostics import measured
from mllm_msr.evaluation.metrics import Columns
from mllm_msr.records.results import ColdItems

WELL_TRAINED = 5  # training interactions from which on a target counts as trained
KINDS = ("cold", "trained")


def cold_items(
    scores: Mapping[str, pl.DataFrame], places: Mapping[str, pl.DataFrame], counts: pl.DataFrame
) -> ColdItems:
    """The four figures of every variant, among all items where places are given, else among the sampled candidates.

    Args:
        scores: by variant, ``user_id``, ``item_id``, ``label``, ``logit`` of the sampled candidates.
        places: by variant, ``records.schema.PLACES`` of some of these users.
        counts: ``item_id``, ``count`` of training interactions for the whole catalogue.
    """
    first = next(iter(scores.values()))
    targets = first.filter(label=1).join(counts, on="item_id").select("user_id", "count")
    shown = places or {name: places_among_candidates(frame, counts) for name, frame in scores.items()}
    columns = {name: kind_columns(frame, targets) for name, frame in shown.items()}
    users = targets.join(next(iter(shown.values())), on="user_id", how="semi")["count"]
    return ColdItems(
        among_all=bool(places),
        cold_targets=int((users == 0).sum()),
        trained_targets=int((users >= WELL_TRAINED).sum()),
        variants={
            name: measured({figure: own for figure, own in figures.items() if not np.isnan(own).all()})
            for name, figures in columns.items()
        },
    )


def places_among_candidates(scores: pl.DataFrame, counts: pl.DataFrame) -> pl.DataFrame:
    """``records.schema.PLACES`` among the sampled candidates, of users with one positive each."""
    own = pl.col("logit").filter(pl.col("label") == 1).first().over("user_id")
    frame = scores.join(counts, on="item_id", how="left", maintain_order="left").with_columns(
        above=pl.col("logit") > own,
        equal=(pl.col("logit") == own) & (pl.col("label") == 0),
        cold=(pl.col("count").fill_null(0) == 0) & (pl.col("label") == 0),
    )
    above, equal, cold = pl.col("above"), pl.col("equal"), pl.col("cold")
    return frame.group_by("user_id").agg(
        first=above.sum().cast(pl.Int64) + 1,
        last=(above | equal).sum().cast(pl.Int64) + 1,
        candidates=pl.len().cast(pl.Int64),
        cold_above=(above & cold).sum().cast(pl.Int64),
        cold_equal=(equal & cold).sum().cast(pl.Int64),
        cold_candidates=cold.sum().cast(pl.Int64),
    )


def kind_columns(places: pl.DataFrame, targets: pl.DataFrame) -> Columns:
    """(U,) of each figure such as "cold_trained", a cold target against trained negatives: the share of these that
    stand below it, equals one half; NaN for users with another kind of target or without such negatives.

    ``targets``: ``user_id``, ``count`` of training interactions of the target.
    """
    frame = places.join(targets, on="user_id", how="left", maintain_order="left").sort("user_id")
    whole = {
        "above": frame["first"] - 1,
        "equal": frame["last"] - frame["first"],
        "candidates": frame["candidates"] - 1,
    }
    cold = {name: frame[f"cold_{name}"] for name in whole}
    negatives = {"cold": cold, "trained": {name: whole[name] - cold[name] for name in whole}}
    is_target = {"cold": frame["count"] == 0, "trained": frame["count"] >= WELL_TRAINED}
    columns = {}
    for target, negative in ((target, negative) for target in KINDS for negative in KINDS):
        above, equal, n = (series.to_numpy().astype(np.float64) for series in negatives[negative].values())
        share = 1 - np.divide(above + equal / 2, n, out=np.full(len(n), np.nan), where=n > 0)
        columns[f"{target}_{negative}"] = np.where(is_target[target].to_numpy(), share, np.nan)
    return columns
