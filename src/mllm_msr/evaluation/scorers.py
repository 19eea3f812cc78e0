"""What scores a variant of the results table: our model under a view, a ranker of histories, or the truth."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import polars as pl

from mllm_msr.data.sources.demo import DemoSource, true_utilities
from mllm_msr.data.sources.registry import source_options
from mllm_msr.evaluation.coded_tasks import Array
from mllm_msr.evaluation.loading import Computing, is_late, load_catalogue, load_recommender
from mllm_msr.evaluation.rankers import Ranker
from mllm_msr.evaluation.scoring import Show, as_it_is, own_context, pairs, score_with_model, score_with_values
from mllm_msr.processing.examples import users_of
from mllm_msr.records.run import RunFolder

if TYPE_CHECKING:
    from mllm_msr.evaluation.spread_scoring import Logits, Question
    from mllm_msr.modeling.ranking import Recommender

PROGRESS = "    pairs"  # label of the progress bar
PART = 256  # tasks, as many as a piece of what workers of a cluster are given
PAIRS_A_TASK = 400  # so many times a part's tasks are the pairs of a part that is ranked among all items
SPREAD = 64  # such pieces that a cluster has at a time


class Scorer(ABC):
    """What gives a value to every candidate of a task, and to every item of the catalogue.

    ``held``: what it holds elsewhere, such as workers of a cluster; given back at the end of a `with` block.
    ``part_size``: of how many tasks the scores are saved at a time; None: those of all.
    """

    part_size: int | None = None

    @cached_property
    def held(self) -> ExitStack:
        return ExitStack()

    def shown(self, tasks: pl.DataFrame) -> pl.DataFrame:
        """All tasks as they are scored; then any part of them may be scored by itself."""
        return tasks

    def catalogue_part(self, n_items: int) -> int | None:
        """Of how many tasks the places among ``n_items`` are saved at a time; None: those of all."""
        return None

    @abstractmethod
    def score(self, tasks: pl.DataFrame) -> pl.DataFrame:
        """``user_id``, ``item_id``, ``label``, ``logit``, ``score`` of every candidate of shown tasks, in order."""

    @abstractmethod
    def score_catalogue(self, tasks: pl.DataFrame, items: Sequence[str]) -> Array:
        """(U, I): the logit of every item for the user of each shown task; ``items`` are all ids, sorted."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.held.__exit__(*error)


@dataclass(frozen=True)
class ModelView:
    """What a model is shown of the items and of the users, and which model it is."""

    items: Show = as_it_is
    users: Callable[[pl.DataFrame, int], pl.DataFrame] = own_context
    load: Callable[[RunFolder], "Recommender"] = load_recommender


class ModelScorer(Scorer):
    """Our model under one view; its tasks are contexts, see ``records.schema.CONTEXTS``."""

    def __init__(self, view: ModelView, run: RunFolder) -> None:
        self.view, self.seed = view, run.recipe.evaluation.seed
        self.catalogue = view.items(load_catalogue(run), self.seed)
        self.part_size: int = PART
        if run.cluster is None:
            self.recommender = view.load(run)
            return
        from mllm_msr.evaluation.spread_index import ViewIndex
        from mllm_msr.evaluation.spread_scoring import SpreadRecommender

        index = None
        if view.load is load_recommender and is_late(run):
            index = self.held.enter_context(ViewIndex(run, view.items, self.catalogue))
        work = partial(_scoring_worker, view, run, index is not None)
        self.recommender = self.held.enter_context(SpreadRecommender(run, work, index))
        self.part_size = SPREAD * PART  # else most workers would wait for the last of a part

    def shown(self, tasks: pl.DataFrame) -> pl.DataFrame:
        return self.view.users(tasks, self.seed)

    def score(self, tasks: pl.DataFrame) -> pl.DataFrame:
        return score_with_model(self.recommender, tasks, self.catalogue, PROGRESS)

    def catalogue_part(self, n_items: int) -> int:
        return max(1, self.part_size * PAIRS_A_TASK // max(1, n_items))

    def score_catalogue(self, tasks: pl.DataFrame, items: Sequence[str]) -> Array:
        users = users_of(tasks)
        return np.stack(self.recommender.score(users, [items] * len(users), self.catalogue, progress=PROGRESS))


def _scoring_worker(view: ModelView, run: RunFolder, indexed: bool, *paths: Path) -> "Callable[[Question], Logits]":
    from mllm_msr.evaluation.spread_scoring import answer, run_at

    run, index = run_at(run, indexed, *paths)
    recommender = load_recommender(run, Computing(cache=index)) if index else view.load(run)
    return answer(recommender, view.items(load_catalogue(run), run.recipe.evaluation.seed))


class RankerScorer(Scorer):
    """A ranker of histories."""

    def __init__(self, ranker: Ranker) -> None:
        self.ranker = ranker

    def score(self, tasks: pl.DataFrame) -> pl.DataFrame:
        return score_with_values(tasks, self.ranker(tasks))

    def score_catalogue(self, tasks: pl.DataFrame, items: Sequence[str]) -> Array:
        return self.ranker.catalogue(tasks)


class Oracle(Scorer):
    """The true taste, which only the demo's drawn world has."""

    def __init__(self, run: RunFolder) -> None:
        options = source_options(run.recipe.source)
        if not isinstance(options, DemoSource):
            raise ValueError("the variant 'oracle' needs a drawn world: only the demo has one")
        self.source = options

    def score(self, tasks: pl.DataFrame) -> pl.DataFrame:
        return score_with_values(tasks, true_utilities(self.source, pairs(tasks)))

    def score_catalogue(self, tasks: pl.DataFrame, items: Sequence[str]) -> Array:
        every = tasks.select("user_id").join(pl.DataFrame({"item_id": items}), how="cross", maintain_order="left_right")
        return true_utilities(self.source, every).reshape(len(tasks), len(items))
