"""What scores each variant of the results table: one table from its name to what makes its scorer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from mllm_msr.data.catalogue import Catalogue
from mllm_msr.data.sources.demo import true_utilities
from mllm_msr.evaluation.baselines import Ranker, knn, svd, tfidf, training_interactions
from mllm_msr.evaluation.coded_tasks import Array, CodedLists
from mllm_msr.evaluation.loading import load_backbone, load_catalogue, load_recommender
from mllm_msr.evaluation.scoring import (
    as_it_is,
    of_another_user,
    own_context,
    pairs,
    score_with_model,
    score_with_values,
    with_blank_images,
    with_shuffled_images,
    without_images,
    without_preference,
)
from mllm_msr.evaluation.sequential_baselines import gru4rec, sasrec
from mllm_msr.modeling.inputs import Candidate
from mllm_msr.processing.examples import users_of
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import INTERACTIONS, ITEMS, POPULARITY
from mllm_msr.records.sections import DemoSource
from mllm_msr.records.variants import OURS

if TYPE_CHECKING:
    from mllm_msr.modeling.ranking import Recommender


class Scorer(ABC):
    """What gives a value to every candidate of a task, and to every item of the catalogue."""

    @abstractmethod
    def score(self, tasks: pl.DataFrame) -> pl.DataFrame:
        """``user_id``, ``item_id``, ``label``, ``logit``, ``score`` of every candidate, task after task."""

    @abstractmethod
    def score_catalogue(self, tasks: pl.DataFrame, items: Sequence[str]) -> Array:
        """(U, I): the logit of every item for each task's user; ``items`` are all ids, sorted."""


@dataclass(frozen=True)
class ModelView:
    """What a model is shown of the items and of the users, and which model it is."""

    items: Callable[[Catalogue, int], Mapping[str, Candidate]] = as_it_is
    users: Callable[[pl.DataFrame, int], pl.DataFrame] = own_context
    load: Callable[[RunFolder], "Recommender"] = load_recommender


class ModelScorer(Scorer):
    """Our model under one view; its tasks are contexts, see ``records.schema.CONTEXTS``."""

    def __init__(self, name: str, view: ModelView, run: RunFolder) -> None:
        self.name, self.view, self.seed = name, view, run.recipe.evaluation.seed
        self.recommender, self.catalogue = view.load(run), view.items(load_catalogue(run), self.seed)

    def score(self, tasks: pl.DataFrame) -> pl.DataFrame:
        return score_with_model(self.recommender, self.view.users(tasks, self.seed), self.catalogue, self.name)

    def score_catalogue(self, tasks: pl.DataFrame, items: Sequence[str]) -> Array:
        users = users_of(self.view.users(tasks, self.seed))
        return np.stack(self.recommender.score(users, [items] * len(users), self.catalogue, progress=self.name))


class RankerScorer(Scorer):
    """A ranker of histories, which is trained if it has to be."""

    def __init__(self, make: Callable[[RunFolder], Ranker], run: RunFolder) -> None:
        self.ranker = make(run)

    def score(self, tasks: pl.DataFrame) -> pl.DataFrame:
        return score_with_values(tasks, self.ranker(tasks))

    def score_catalogue(self, tasks: pl.DataFrame, items: Sequence[str]) -> Array:
        return self.ranker.score_catalogue(CodedLists.of(tasks["history"], self.ranker.items))


class Oracle(Scorer):
    """The true taste, which only the demo's drawn world has."""

    def __init__(self, run: RunFolder) -> None:
        if not isinstance(run.recipe.source, DemoSource):
            raise ValueError("the variant 'oracle' needs a drawn world: only the demo has one")
        self.source = run.recipe.source

    def score(self, tasks: pl.DataFrame) -> pl.DataFrame:
        return score_with_values(tasks, true_utilities(self.source, pairs(tasks)))

    def score_catalogue(self, tasks: pl.DataFrame, items: Sequence[str]) -> Array:
        every = tasks.select("user_id").join(pl.DataFrame({"item_id": items}), how="cross", maintain_order="left_right")
        return true_utilities(self.source, every).reshape(len(tasks), len(items))


class Popularity(Ranker):
    """Training interactions of every item; ``counts`` have ``item_id``, ``count``."""

    def __init__(self, counts: pl.DataFrame) -> None:
        super().__init__(counts)
        self.counts = counts.sort("item_id")["count"].to_numpy().astype(np.float32)

    def score(self, histories: CodedLists, candidates: CodedLists) -> Array:
        return self.counts[candidates.codes]

    def score_catalogue(self, histories: CodedLists) -> Array:
        return np.tile(self.counts, (len(histories), 1))


class Random(Ranker):
    """A random order; one of its own for the whole catalogue, so that neither depends on the other."""

    def __init__(self, items: pl.DataFrame, seed: int) -> None:
        super().__init__(items)
        self.of_candidates, self.of_catalogue = (np.random.default_rng(key) for key in (seed, [seed, 1]))

    def score(self, histories: CodedLists, candidates: CodedLists) -> Array:
        return self.of_candidates.random(len(candidates.codes))

    def score_catalogue(self, histories: CodedLists) -> Array:
        return self.of_catalogue.random((len(histories), len(self.items)), dtype=np.float32)


def words(run: RunFolder) -> Ranker:
    return tfidf(run.tasks("validation"), run.read(ITEMS, ["item_id", "title", "text"]))


def collaborative(train: Callable[[pl.DataFrame, pl.DataFrame, pl.DataFrame], Ranker], run: RunFolder) -> Ranker:
    """A ranker trained on the run's training interactions: from validation tasks, items and interactions."""
    training = training_interactions(
        run.read(INTERACTIONS), run.tasks("train"), run.recipe.data.protocol, run.read(POPULARITY)
    )
    return train(run.tasks("validation"), run.read(ITEMS, ["item_id"]), training)


def sequential(train: Callable[..., Ranker], run: RunFolder) -> Ranker:
    """The same for a network, whose epochs are saved, so that a killed training goes on."""
    seed, folder = run.recipe.evaluation.seed, run.trained_baselines
    return collaborative(partial(train, seed=seed, folder=folder), run)


MODELS = {
    OURS: ModelView(),
    "text_only": ModelView(items=without_images),
    "blank_images": ModelView(items=with_blank_images),
    "shuffled_images": ModelView(items=with_shuffled_images),
    "no_preference": ModelView(users=without_preference),
    "other_user": ModelView(users=of_another_user),
    "no_sft": ModelView(load=load_backbone),
}
RANKERS: dict[str, Callable[[RunFolder], Ranker]] = {
    "popularity": lambda run: Popularity(run.read(POPULARITY)),
    "random": lambda run: Random(run.read(ITEMS, ["item_id"]), run.recipe.evaluation.seed),
    "tfidf": words,
    "knn": partial(collaborative, knn),
    "svd": lambda run: collaborative(partial(svd, seed=run.recipe.evaluation.seed), run),
    "sasrec": partial(sequential, sasrec),
    "gru4rec": partial(sequential, gru4rec),
}
SCORERS: dict[str, Callable[[RunFolder], Scorer]] = {
    **{name: partial(ModelScorer, name, view) for name, view in MODELS.items()},
    **{name: partial(RankerScorer, make) for name, make in RANKERS.items()},
    "oracle": Oracle,
}
