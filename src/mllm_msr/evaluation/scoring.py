"""Tables of scores, and what a model is shown under each variant: views of the catalogue and of the contexts."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from PIL import Image

from mllm_msr.data.catalogue import Catalogue
from mllm_msr.modeling.inputs import Candidate
from mllm_msr.processing.examples import users_of

if TYPE_CHECKING:
    from mllm_msr.modeling.ranking import Recommender

GREY = (128, 128, 128)
Show = Callable[[Catalogue, int], Mapping[str, Candidate]]  # a view of the catalogue, by a seed


@dataclass(frozen=True)
class View(Mapping[str, Candidate]):
    """A catalogue whose candidates are shown otherwise; each is made when it is asked for, and not kept."""

    catalogue: Catalogue
    show: Callable[[Candidate], Candidate]

    def __getitem__(self, item_id: str) -> Candidate:
        return self.show(self.catalogue[item_id])

    def __iter__(self) -> Iterator[str]:
        return iter(self.catalogue)

    def __len__(self) -> int:
        return len(self.catalogue)

    def __contains__(self, item_id: object) -> bool:
        return item_id in self.catalogue


def as_it_is(catalogue: Catalogue, seed: int) -> Catalogue:
    return catalogue


def without_images(catalogue: Catalogue, seed: int) -> View:
    """The model is asked about the titles alone."""
    return View(catalogue, lambda candidate: replace(candidate, image=None))


def with_blank_images(catalogue: Catalogue, seed: int) -> View:
    """Every image is one grey, of its own size."""

    def blank(candidate: Candidate) -> Candidate:
        image = candidate.image
        return replace(candidate, image=None if image is None else Image.new("RGB", image.size, GREY))

    return View(catalogue, blank)


def with_shuffled_images(catalogue: Catalogue, seed: int) -> View:
    """Every item that has an image is shown with another item's; no two with the same. ``seed`` decides whose."""
    items = list(catalogue)
    has_image = [image.is_valid for image in catalogue.items.data["image"]]
    order = [items[place] for place in np.random.default_rng(seed).permutation(np.flatnonzero(has_image))]
    lender = dict(zip(order, order[1:] + order[:1], strict=True))

    def borrow(candidate: Candidate) -> Candidate:
        other = lender.get(candidate.item_id)
        return candidate if other is None else replace(candidate, image=catalogue[other].image)

    return View(catalogue, borrow)


def own_context(contexts: pl.DataFrame, seed: int) -> pl.DataFrame:
    return contexts


def without_preference(contexts: pl.DataFrame, seed: int) -> pl.DataFrame:
    """Nothing is said about the user, only the candidate is shown."""
    return contexts.with_columns(pl.lit("").alias("preference"), recent=pl.col("recent").list.head(0))


def of_another_user(contexts: pl.DataFrame, seed: int) -> pl.DataFrame:
    """Each task is asked under another task's preference and recent items; ``seed`` decides whose."""
    order = np.random.default_rng(seed).permutation(contexts.height)
    lender = np.empty_like(order)
    lender[order] = np.roll(order, 1)
    return contexts.with_columns(contexts.select("preference", "recent")[lender].get_columns())


def pairs(tasks: pl.DataFrame) -> pl.DataFrame:
    """One row a candidate, task after task: ``user_id``, ``item_id``, ``label``."""
    exploded = tasks.select("user_id", pl.col("candidates").alias("item_id"), pl.col("labels").alias("label"))
    return exploded.explode("item_id", "label")


def score_with_model(
    recommender: "Recommender", contexts: pl.DataFrame, catalogue: Mapping[str, Candidate], progress: str | None = None
) -> pl.DataFrame:
    """``user_id``, ``item_id``, ``label``, ``logit`` and ``score``, the probability of Yes, of every candidate.

    Args:
        contexts: see ``records.schema.CONTEXTS``.
        progress: label of a progress bar; None shows none.
    """
    logits = recommender.score(users_of(contexts), contexts["candidates"].to_list(), catalogue, progress=progress)
    frame = pairs(contexts).with_columns(pl.Series("logit", np.concatenate(logits), pl.Float32))
    return frame.with_columns((1 / (1 + (-pl.col("logit")).exp())).alias("score"))


def score_with_values(tasks: pl.DataFrame, values: np.ndarray) -> pl.DataFrame:
    """The same columns for a baseline, whose value (N,) of a candidate is its logit and its score."""
    frame = pairs(tasks).with_columns(pl.Series("logit", values.astype(np.float32)))
    return frame.with_columns(pl.col("logit").alias("score"))


def random_tasks(tasks: pl.DataFrame, count: int | None, seed: int) -> pl.DataFrame:
    """A random sample of ``count`` tasks in their order; all of them if there are no more, or for None."""
    chosen = np.random.default_rng(seed).permutation(tasks.height)[:count]
    return tasks[np.sort(chosen)]
