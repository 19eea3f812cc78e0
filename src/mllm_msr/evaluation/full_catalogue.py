"""Ranking of a user's choice among all items that the user has never chosen, not among a sample of them."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import numpy as np
import polars as pl
from tqdm import tqdm

from mllm_msr.evaluation.coded_tasks import CodedLists, count_above, item_codes
from mllm_msr.evaluation.diagnostics import compared, measured
from mllm_msr.evaluation.metrics import user_columns
from mllm_msr.evaluation.places import place_columns
from mllm_msr.evaluation.rankers import training_counts
from mllm_msr.evaluation.scorers import Scorer
from mllm_msr.records.results import CatalogueFigures, FullCatalogue
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import CUT_INTERACTIONS, INTERACTIONS, ITEMS


def users_among_all(run: RunFolder) -> int | Literal["all"] | None:
    """How many users' choices the recipe wants ranked among all items."""
    return "all" if run.recipe.data.negatives == "all" else run.recipe.evaluation.full_catalogue


def n_users(run: RunFolder, users: int | Literal["all"]) -> int:
    """The same as a number."""
    every = run.tasks(run.recipe.evaluation.split).height
    return every if users == "all" else min(users, every)


def catalogue_pairs(run: RunFolder, users: int | Literal["all"]) -> int:
    """About how many candidates there are when the choices of so many users are ranked among all items."""
    return n_users(run, users) * run.scan(ITEMS).select(pl.len()).collect().item()


def rerank_depth(run: RunFolder) -> int:
    """For how many of each user's best items ``fused`` asks the answer, within the pairs that may be scored."""
    options, users = run.recipe.evaluation, users_among_all(run)
    if users is None or not run.recipe.fuses_answer:
        return 0
    return min(options.rerank, options.full_catalogue_pairs // max(1, n_users(run, users)))


def rank_in_catalogue(run: RunFolder, tasks: pl.DataFrame, scorer: Scorer) -> pl.DataFrame:
    """``records.schema.PLACES`` of the targets of ``tasks`` among all items that their users have never chosen."""
    pairs = ["user_id", "item_id"]
    logs = [run.read(INTERACTIONS, pairs)]
    if run.recipe.data.max_history is not None:  # what it has cut was chosen, too
        logs.append(run.read(CUT_INTERACTIONS, pairs))
    return places_in_catalogue(tasks, training_counts(run), pl.concat(logs), scorer)


def places_in_catalogue(
    tasks: pl.DataFrame, items: pl.DataFrame, chosen: pl.DataFrame, scorer: Scorer, pairs: int = 10_000_000
) -> pl.DataFrame:
    """``records.schema.PLACES`` by user, a block of users at a time; no pair is written out.

    Args:
        tasks: as the scorer has them shown: ``user_id``, ``candidates``, ``labels`` with one positive each, and what
            else it reads.
        items: ``item_id``, ``count`` of training interactions for the whole catalogue.
        chosen: ``user_id``, ``item_id``: all that users have chosen, before the target and after it.
        pairs: about how many scores are in memory at a time.
    """
    target = pl.col("candidates").list.get(pl.col("labels").list.arg_max()).alias("item_id")
    targets = tasks.select("user_id", target)
    chosen = pl.concat([chosen.join(items, on="item_id", how="semi"), targets]).unique()
    lists = tasks.select("user_id").join(
        chosen.group_by("user_id").agg("item_id"), on="user_id", how="left", maintain_order="left"
    )
    codes, left_out = item_codes(targets["item_id"], items), CodedLists.of(lists["item_id"], items)
    ids, step, counts = items["item_id"].sort().to_list(), max(1, pairs // len(items)), []
    cold = items.sort("item_id")["count"].to_numpy() == 0
    blocks = range(0, len(tasks), step)
    for begin in tqdm(blocks, desc="    among all items", unit="block", leave=False, disable=len(blocks) < 2):
        end = min(begin + step, len(tasks))
        values = scorer.score_catalogue(tasks[begin:end], ids)
        count, others = partial(count_above, values, codes[begin:end]), left_out.slice(begin, end)
        counts.append([*count(others), *count(others, cold)])
    above, equal, cold_above, cold_equal = (np.concatenate(part).astype(np.int64) for part in zip(*counts, strict=True))
    places = {
        "user_id": tasks["user_id"],
        "first": above + 1,
        "last": above + equal + 1,
        "candidates": len(items) - left_out.lengths + 1,
        "cold_above": cold_above,
        "cold_equal": cold_equal,
        "cold_candidates": cold.sum() - np.bincount(left_out.owner, cold[left_out.codes], len(tasks)).astype(np.int64),
    }
    return pl.DataFrame(places).sort("user_id")


def measure_catalogue(
    scores: Mapping[str, pl.DataFrame],
    places: Mapping[str, pl.DataFrame],
    metrics: Sequence[str],
    reranked: int = 0,
) -> FullCatalogue:
    """The metrics of the same users among sampled candidates and among all items.

    Args:
        scores: each variant's scores of the sampled candidates.
        places: each variant's ``records.schema.PLACES`` among all items.
        reranked: see :func:`rerank_depth`.
    """
    variants = {}
    columns = {variant: place_columns(frame, metrics) for variant, frame in places.items()}
    for variant, frame in places.items():
        own = scores[variant].join(frame.select("user_id"), on="user_id", how="semi", maintain_order="left")
        sampled = user_columns(own["user_id"], own["label"], own["logit"], list(columns[variant]))
        variants[variant] = CatalogueFigures(measured(sampled), measured(columns[variant]))
    sizes = next(iter(places.values()))["candidates"].to_numpy()
    sasrec = columns.pop("sasrec", None)
    differences = {} if sasrec is None else {variant: compared(own, sasrec) for variant, own in columns.items()}
    return FullCatalogue(len(sizes), round(float(sizes.mean()), 1), variants, differences, reranked)
