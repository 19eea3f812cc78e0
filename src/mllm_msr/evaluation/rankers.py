"""What ranks by a history: what all baselines have in common, what they may learn from, and the two simplest."""

from abc import ABC, abstractmethod

import numpy as np
import polars as pl

from mllm_msr.data.vector_files import vector_matrix
from mllm_msr.evaluation.coded_tasks import Array, CodedLists, CodedTasks
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import CUT_INTERACTIONS, INTERACTIONS, ITEM_VECTORS, ITEMS, POPULARITY


class Ranker(ABC):
    """What gives each candidate of a task, or each item of the catalogue, a value from a history.

    Args:
        items: ``item_id`` of the whole catalogue; item codes are places in ``items.sort("item_id")``.
    """

    def __init__(self, items: pl.DataFrame) -> None:
        self.items = items.select("item_id")

    def __call__(self, tasks: pl.DataFrame) -> Array:
        """(N,): the value of every candidate, task after task, of ``history``, ``candidates``, ``labels``."""
        coded = CodedTasks(tasks, self.items)
        return self.score(coded.histories, coded.candidates)

    def catalogue(self, tasks: pl.DataFrame) -> Array:
        """(U, I): the value of every item for each task, of ``history``."""
        return self.score_catalogue(CodedLists.of(tasks["history"], self.items))

    @abstractmethod
    def score(self, histories: CodedLists, candidates: CodedLists) -> Array:
        """(N,): the value of every candidate, list after list."""

    @abstractmethod
    def score_catalogue(self, histories: CodedLists) -> Array:
        """(U, I): the value of every item."""


def training_interactions(
    interactions: pl.DataFrame, tasks: pl.DataFrame, protocol: str, popularity: pl.DataFrame
) -> pl.DataFrame:
    """The rows of a run's log that a model may be trained on, so that no baseline sees what is held out.

    ``strict``: all but each user's last two; ``paper``: all of the users who have training tasks; ``global-cutoff``:
    all before the moment at which four fifths of the log lie. Never more of any item than ``popularity`` (``item_id``,
    ``count``) says training has, or ValueError.
    """
    if protocol == "strict":
        training = interactions.filter(pl.int_range(pl.len()).reverse().over("user_id") >= 2)
    elif protocol == "paper":
        learners = tasks.filter(split="train")["user_id"].unique()
        training = interactions.filter(pl.col("user_id").is_in(learners.implode()))
    else:
        moments = interactions["timestamp"].sort()
        training = interactions.filter(pl.col("timestamp") < moments[int(0.8 * len(moments))])
    counts = training.group_by("item_id").len("found").join(popularity, on="item_id", how="left")
    if wrong := counts.filter(pl.col("found") > pl.col("count").fill_null(0)).rows(named=True):
        raise ValueError(
            f"item {wrong[0]['item_id']!r} has {wrong[0]['found']} training interactions in interactions.parquet, but "
            f"{wrong[0]['count']} in popularity.parquet: prepare the run again"
        )
    return training


def training_log(run: RunFolder) -> pl.DataFrame:
    """``user_id``, ``item_id`` of all that may be learnt from, each user's oldest first.

    ``max_history`` limits what prompts and tasks show. What it has cut off comes before what it has left, so it is part
    of this wherever that is: for users with training interactions, and under ``strict`` for all.
    """
    pairs, protocol = ["user_id", "item_id"], run.recipe.data.protocol
    training = training_interactions(run.read(INTERACTIONS), run.tasks("train"), protocol, run.read(POPULARITY))
    if run.recipe.data.max_history is None:
        return training.select(pairs)
    cut = run.read(CUT_INTERACTIONS, pairs).join(run.read(ITEMS, ["item_id"]), on="item_id", how="semi")
    if protocol != "strict":
        cut = cut.join(training, on="user_id", how="semi", maintain_order="left")
    return pl.concat([cut, training.select(pairs)])


def training_counts(run: RunFolder) -> pl.DataFrame:
    """``item_id``, ``count`` of what may be learnt from, for the whole catalogue: how well an item can be known."""
    counts = training_log(run).group_by("item_id").agg(pl.len().cast(pl.Int64).alias("count"))
    items = run.read(ITEMS, ["item_id"]).join(counts, on="item_id", how="left", maintain_order="left")
    return items.with_columns(pl.col("count").fill_null(0))


def item_vectors(run: RunFolder) -> Array:
    """(I, F) float32: the vectors of the items, by item code."""
    return vector_matrix(run.read(ITEM_VECTORS).sort("item_id"))


class Popularity(Ranker):
    """Training interactions of every item; ``counts`` have ``item_id``, ``count``."""

    def __init__(self, counts: pl.DataFrame) -> None:
        super().__init__(counts)
        self.counts = counts.sort("item_id")["count"].to_numpy().astype(np.float32)

    def score(self, histories: CodedLists, candidates: CodedLists) -> Array:
        return self.counts[candidates.codes]

    def score_catalogue(self, histories: CodedLists) -> Array:
        return np.tile(self.counts, (len(histories), 1))


class Chance(Ranker):
    """One value for all: metrics take equals at their expected place, which gives a random order's exact mean."""

    def score(self, histories: CodedLists, candidates: CodedLists) -> Array:
        return np.zeros(len(candidates.codes), np.float32)

    def score_catalogue(self, histories: CodedLists) -> Array:
        return np.zeros((len(histories), len(self.items)), np.float32)
