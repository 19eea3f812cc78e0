"""Score every row of the results table on the same frozen tasks."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from PIL import Image

from mllm_msr.data.catalogue import Catalogue
from mllm_msr.modeling.inputs import Candidate
from mllm_msr.modeling.ranking import Recommender

CandidateView = Callable[[Candidate], Candidate]


def as_it_is(shown: Any) -> Any:
    return shown


def without_image(candidate: Candidate) -> Candidate:
    """Row ``text_only``: the same model is asked about the title alone."""
    return replace(candidate, image=None)


def with_blank_image(candidate: Candidate) -> Candidate:
    """Row ``blank_images``: every picture is one grey, of its own size."""
    image = candidate.image
    return replace(candidate, image=None if image is None else Image.new("RGB", image.size, (128, 128, 128)))


class ShuffledImages:
    """Row ``shuffled_images``: every item that has a picture is shown with another item's; no two with the same.

    Args:
        items: the catalogue.
        seed: of who gets whose.
    """

    def __init__(self, items: Catalogue, seed: int) -> None:
        self.items, self.index = items, items.index
        pictured = [item for item, image in zip(items.index, items.items.data["image"], strict=True) if image.is_valid]
        order = [pictured[place] for place in np.random.default_rng(seed).permutation(len(pictured))]
        self.lender = dict(zip(order, order[1:] + order[:1], strict=True))

    def __getitem__(self, item_id: str) -> Candidate:
        own = self.items[item_id]
        return replace(own, image=self.items[self.lender[item_id]].image) if item_id in self.lender else own


def without_preference(contexts: pl.DataFrame) -> pl.DataFrame:
    """Row ``no_preference``: nothing is said about the user, only the candidate is shown."""
    return contexts.with_columns(pl.lit("").alias("preference"), recent=pl.col("recent").list.head(0))


def of_another_user(contexts: pl.DataFrame, seed: int) -> pl.DataFrame:
    """Row ``other_user``: each task is asked under another task's preference and recent items."""
    order = np.random.default_rng(seed).permutation(contexts.height)
    lender = np.empty_like(order)
    lender[order] = np.roll(order, 1)
    return contexts.with_columns(contexts.select("preference", "recent")[lender].get_columns())


def pairs(contexts: pl.DataFrame) -> pl.DataFrame:
    """One row a candidate, in the order the model scores them: ``user_id``, ``item_id``, ``label``."""
    exploded = contexts.select("user_id", pl.col("candidates").alias("item_id"), pl.col("labels").alias("label"))
    return exploded.explode("item_id", "label")


@dataclass(frozen=True)
class Viewed(Mapping[str, Candidate]):
    """A catalogue as the model is shown it; a picture is decoded when its item is asked for, and not kept."""

    catalogue: Catalogue | ShuffledImages
    view: CandidateView

    def __getitem__(self, item_id: str) -> Candidate:
        return self.view(self.catalogue[item_id])

    def __iter__(self) -> Iterator[str]:
        return iter(self.catalogue.index)

    def __len__(self) -> int:
        return len(self.catalogue.index)


def score_with_model(
    recommender: Recommender,
    contexts: pl.DataFrame,
    items: Catalogue | ShuffledImages,
    view: CandidateView = as_it_is,
    name: str = "",
) -> pl.DataFrame:
    """``user_id``, ``item_id``, ``label``, ``logit``, ``score`` of every candidate.

    Args:
        contexts: ``preference``, ``recent``, ``candidates``, ``labels`` a task, see ``processing.examples``.
        view: what the model is shown of a candidate.
    """
    users = [
        {"preference": preference, "recent": [{"summary": summary} for summary in recent]}
        for preference, recent in contexts.select("preference", "recent").iter_rows()
    ]
    wanted = contexts["candidates"].to_list()
    logits = recommender.score(users, wanted, Viewed(items, view), progress=name or None)
    frame = pairs(contexts).with_columns(pl.Series("logit", np.concatenate(logits), pl.Float32))
    return frame.with_columns((1 / (1 + (-pl.col("logit")).exp())).alias("score"))


def score_with_values(contexts: pl.DataFrame, values: Iterable[float]) -> pl.DataFrame:
    """The same columns for a baseline whose ranking value is its logit and its score."""
    frame = pairs(contexts).with_columns(pl.Series("logit", np.asarray(values, dtype=np.float32)))
    return frame.with_columns(pl.col("logit").alias("score"))


def some_tasks(tasks: pl.DataFrame, count: int | None, seed: int) -> pl.DataFrame:
    """``count`` tasks drawn by seed, in their order; all of them if there are no more, or for None."""
    chosen = np.random.default_rng(seed).permutation(tasks.height)[:count]
    return tasks[np.sort(chosen)]


def over_the_catalogue(
    tasks: pl.DataFrame, catalogue: pl.Series, seen: pl.DataFrame, pairs: int = 500_000
) -> Iterator[pl.DataFrame]:
    """``tasks``, some at a time, with their target among all items that their user has never chosen.

    Args:
        tasks: ``user_id``, ``candidates``, ``labels`` with one positive each, and whatever else a row reads.
        catalogue: the ids of all items.
        seen: ``user_id``, ``item_id``: all that users have chosen, before the target and after it.
        pairs: about how many candidates at a time.
    """
    ids, place = catalogue.to_numpy(), {item: place for place, item in enumerate(catalogue)}
    chosen = dict(seen.group_by("user_id").agg("item_id").iter_rows())
    for part in tasks.iter_slices(max(1, pairs // len(ids))):
        candidates, labels = [], []
        for user, shown, marks in part.select("user_id", "candidates", "labels").iter_rows():
            target, wanted = place[shown[marks.index(1)]], np.ones(len(ids), dtype=bool)
            wanted[[place[item] for item in chosen.get(user, ())]] = False
            wanted[target] = True
            candidates.append(ids[wanted].tolist())
            labels.append((np.flatnonzero(wanted) == target).astype(np.int64).tolist())
        yield part.with_columns(pl.Series("candidates", candidates), pl.Series("labels", labels))


def places(scores: pl.DataFrame) -> pl.DataFrame:
    """Where each user's one positive stands: ``user_id``, ``above``, ``equal``, ``candidates``.

    ``scores``: ``user_id``, ``label``, ``logit``, one row a candidate. Raises ``ValueError`` for a missing score.
    """
    if scores["logit"].is_nan().any() or scores["logit"].null_count():
        raise ValueError("a score is missing or NaN: score every candidate before evaluating")
    own = pl.col("logit").filter(pl.col("label") == 1).first()
    return scores.group_by("user_id", maintain_order=True).agg(
        above=(pl.col("logit") > own).sum(), equal=(pl.col("logit") == own).sum() - 1, candidates=pl.len()
    )


def popularity_values(contexts: pl.DataFrame, popularity: pl.DataFrame) -> np.ndarray:
    """Training interactions of each candidate; 0 if it had none."""
    joined = pairs(contexts).join(popularity, on="item_id", how="left", maintain_order="left")
    return joined["count"].fill_null(0).to_numpy()


def random_values(contexts: pl.DataFrame, rng: np.random.Generator) -> np.ndarray:
    """A random order of the candidates."""
    return rng.random(pairs(contexts).height)
