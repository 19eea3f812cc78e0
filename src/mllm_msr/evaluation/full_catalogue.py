"""Ranking of a user's choice among all items that the user has never chosen, not among a sample of them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import polars as pl

from mllm_msr.evaluation.baselines import Ranker
from mllm_msr.evaluation.coded_tasks import CodedLists, CodedTasks
from mllm_msr.evaluation.diagnostics import measured
from mllm_msr.evaluation.metrics import user_columns
from mllm_msr.evaluation.places import place_columns, rank_of_choice
from mllm_msr.evaluation.scorers import RankerScorer, Scorer
from mllm_msr.records.results import CatalogueFigures, FullCatalogue
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import CUT_INTERACTIONS, INTERACTIONS, ITEMS


def catalogue_pairs(run: RunFolder, users: int | Literal["all"]) -> int:
    """About how many candidates there are when the choices of so many users are ranked among all items."""
    n_users, n_items = run.tasks(run.recipe.evaluation.split).height, run.scan(ITEMS).select(pl.len()).collect().item()
    return (n_users if users == "all" else min(users, n_users)) * n_items


def rank_in_catalogue(run: RunFolder, tasks: pl.DataFrame, scorer: Scorer) -> pl.DataFrame:
    """``records.schema.PLACES`` of the targets of ``tasks`` among all items, by user."""
    pairs = ["user_id", "item_id"]
    logs = [run.read(INTERACTIONS, pairs)]
    if run.recipe.data.max_history is not None:  # what it has cut was chosen, too
        logs.append(run.read(CUT_INTERACTIONS, pairs))
    items = run.read(ITEMS, ["item_id"])
    chosen = pl.concat(logs).unique().join(items, on="item_id", how="semi")
    if isinstance(scorer, RankerScorer):
        places = places_by_ranker(scorer.ranker, tasks, chosen)
    else:
        parts = over_the_catalogue(tasks, items["item_id"], chosen)
        places = pl.concat([rank_of_choice(scorer(part)) for part in parts])
    return places.sort("user_id")


def places_by_ranker(ranker: Ranker, tasks: pl.DataFrame, chosen: pl.DataFrame) -> pl.DataFrame:
    """``records.schema.PLACES`` by a ranker of the whole catalogue, a block of users at a time; no pair is written out.

    Args:
        tasks: ``user_id``, ``history``, ``candidates``, ``labels`` with one positive each.
        chosen: distinct ``user_id``, ``item_id``: all that users have chosen, before the target and after it.
    """
    target = pl.col("candidates").list.get(pl.col("labels").list.arg_max()).alias("item_id")
    chosen = pl.concat([chosen, tasks.select("user_id", target)]).unique()
    lists = tasks.select("user_id").join(
        chosen.group_by("user_id").agg("item_id"), on="user_id", how="left", maintain_order="left"
    )
    left_out = CodedLists.of(lists["item_id"], ranker.items)
    above, equal = CodedTasks(tasks, ranker.items).catalogue_places(ranker.score_catalogue, left_out)
    candidates = len(ranker.items) - left_out.lengths + 1
    frame = {"user_id": tasks["user_id"], "first": above + 1, "last": above + equal + 1, "candidates": candidates}
    return pl.DataFrame(frame)


def over_the_catalogue(
    tasks: pl.DataFrame, catalogue: pl.Series, chosen: pl.DataFrame, pairs: int = 500_000
) -> Iterator[pl.DataFrame]:
    """``tasks``, some at a time, with their target among all items that their user has never chosen.

    Args:
        tasks: ``user_id``, ``candidates``, ``labels`` with one positive each, and whatever else a variant reads.
        catalogue: the ids of all items.
        chosen: ``user_id``, ``item_id``: all that users have chosen, before the target and after it.
        pairs: about how many candidates at a time.
    """
    ids, place = catalogue.to_numpy(), {item: place for place, item in enumerate(catalogue)}
    items_of = dict(chosen.group_by("user_id").agg("item_id").iter_rows())
    for part in tasks.iter_slices(max(1, pairs // len(ids))):
        candidates, labels = [], []
        for user, sampled, marks in part.select("user_id", "candidates", "labels").iter_rows():
            target, wanted = place[sampled[marks.index(1)]], np.ones(len(ids), dtype=bool)
            wanted[[place[item] for item in items_of.get(user, ())]] = False
            wanted[target] = True
            candidates.append(ids[wanted].tolist())
            labels.append((np.flatnonzero(wanted) == target).astype(np.int64).tolist())
        yield part.with_columns(pl.Series("candidates", candidates), pl.Series("labels", labels))


def measure_catalogue(
    scores: Mapping[str, pl.DataFrame], places: Mapping[str, pl.DataFrame], metrics: Sequence[str]
) -> FullCatalogue:
    """The metrics of the same users among sampled candidates and among all items.

    Args:
        scores: each variant's scores of the sampled candidates.
        places: each variant's ``records.schema.PLACES`` among all items.
    """
    variants = {}
    for variant, frame in places.items():
        own = scores[variant].join(frame.select("user_id"), on="user_id", how="semi", maintain_order="left")
        full = place_columns(frame, metrics)
        sampled = user_columns(own["user_id"], own["label"], own["logit"], list(full))
        variants[variant] = CatalogueFigures(measured(sampled), measured(full))
    sizes = next(iter(places.values()))["candidates"].to_numpy()
    return FullCatalogue(len(sizes), round(float(sizes.mean()), 1), variants)
