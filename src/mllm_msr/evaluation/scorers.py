"""What scores each variant of the results table: one table from its name to what makes its scorer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from mllm_msr.data.catalogue import Catalogue
from mllm_msr.data.sources.demo import true_utilities
from mllm_msr.evaluation.baselines import knn, svd, tfidf, training_interactions
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
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import INTERACTIONS, ITEMS, POPULARITY
from mllm_msr.records.sections import DemoSource
from mllm_msr.records.variants import OURS

if TYPE_CHECKING:
    from mllm_msr.modeling.ranking import Recommender

Scorer = Callable[[pl.DataFrame], pl.DataFrame]  # tasks to ``user_id``, ``item_id``, ``label``, ``logit``, ``score``
Values = Callable[[pl.DataFrame], np.ndarray]  # tasks to the values of their candidates, task after task


@dataclass(frozen=True)
class ModelView:
    """What a model is shown of the items and of the users, and which model it is."""

    items: Callable[[Catalogue, int], Mapping[str, Candidate]] = as_it_is
    users: Callable[[pl.DataFrame, int], pl.DataFrame] = own_context
    load: Callable[[RunFolder], "Recommender"] = load_recommender


def model_scorer(name: str, view: ModelView, run: RunFolder) -> Scorer:
    """Our model; its tasks are contexts, see ``records.schema.CONTEXTS``."""
    seed = run.recipe.evaluation.seed
    recommender, catalogue = view.load(run), view.items(load_catalogue(run), seed)
    return lambda contexts: score_with_model(recommender, view.users(contexts, seed), catalogue, name)


def value_scorer(make: Callable[[RunFolder], Values], run: RunFolder) -> Scorer:
    """A ranker that is no language model, trained if it has to be."""
    ranker = make(run)
    return lambda tasks: score_with_values(tasks, ranker(tasks))


def popularity(run: RunFolder) -> Values:
    counts = run.read(POPULARITY)
    return lambda tasks: pairs(tasks).join(counts, on="item_id", how="left", maintain_order="left")["count"].to_numpy()


def random(run: RunFolder) -> Values:
    rng = np.random.default_rng(run.recipe.evaluation.seed)
    return lambda tasks: rng.random(pairs(tasks).height)


def oracle(run: RunFolder) -> Values:
    source = run.recipe.source
    if not isinstance(source, DemoSource):
        raise ValueError("the variant 'oracle' needs a drawn world: only the demo has one")
    return lambda tasks: true_utilities(source, pairs(tasks))


def words(run: RunFolder) -> Values:
    return tfidf(run.tasks("validation"), run.read(ITEMS, ["item_id", "title", "text"]))


def collaborative(train: Callable[[pl.DataFrame, pl.DataFrame, pl.DataFrame], Values], run: RunFolder) -> Values:
    """A ranker trained on the run's training interactions: from validation tasks, items and interactions."""
    training = training_interactions(
        run.read(INTERACTIONS), run.tasks("train"), run.recipe.data.protocol, run.read(POPULARITY)
    )
    return train(run.tasks("validation"), run.read(ITEMS, ["item_id"]), training)


def sequential(train: Callable[..., Values], run: RunFolder) -> Values:
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
RANKERS: dict[str, Callable[[RunFolder], Values]] = {
    "popularity": popularity,
    "random": random,
    "oracle": oracle,
    "tfidf": words,
    "knn": partial(collaborative, knn),
    "svd": lambda run: collaborative(partial(svd, seed=run.recipe.evaluation.seed), run),
    "sasrec": partial(sequential, sasrec),
    "gru4rec": partial(sequential, gru4rec),
}
SCORERS: dict[str, Callable[[RunFolder], Scorer]] = {
    **{name: partial(model_scorer, name, view) for name, view in MODELS.items()},
    **{name: partial(value_scorer, make) for name, make in RANKERS.items()},
}
