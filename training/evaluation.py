"""Score every row of the results table on the same frozen tasks."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import polars as pl
from PIL import Image

from mllm_msr.modeling.ranking import Recommender
from mllm_msr.training.collator import ItemTable

CandidateView = Callable[[dict[str, Any]], dict[str, Any]]


def as_it_is(candidate: dict[str, Any]) -> dict[str, Any]:
    return candidate


def without_image(candidate: dict[str, Any]) -> dict[str, Any]:
    """Row ``text_only``: the same model is asked about the title alone."""
    return {**candidate, "image": None}


def with_blank_image(candidate: dict[str, Any]) -> dict[str, Any]:
    """Row ``blank_images``: every picture is one grey, of its own size."""
    image = candidate["image"]
    return {**candidate, "image": None if image is None else Image.new("RGB", image.size, (128, 128, 128))}


class ShuffledImages:
    """Row ``shuffled_images``: every item that has a picture is shown with another item's; no two with the same.

    Args:
        items: the catalogue.
        seed: of who gets whose.
    """

    def __init__(self, items: ItemTable, seed: int) -> None:
        self.items = items
        pictured = [item for item, image in zip(items.index, items.items.data["image"], strict=True) if image.is_valid]
        order = [pictured[place] for place in np.random.default_rng(seed).permutation(len(pictured))]
        self.lender = dict(zip(order, order[1:] + order[:1], strict=True))

    def __getitem__(self, item_id: str) -> dict[str, Any]:
        own = self.items[item_id]
        return {**own, "image": self.items[self.lender[item_id]]["image"]} if item_id in self.lender else own


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


def score_with_model(
    recommender: Recommender, contexts: pl.DataFrame, items: ItemTable, view: CandidateView = as_it_is, name: str = ""
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
    catalogue = {item_id: view(items[item_id]) for item_id in {one for row in wanted for one in row}}
    logits = recommender.score(users, wanted, catalogue, progress=name or None)
    frame = pairs(contexts).with_columns(pl.Series("logit", np.concatenate(logits), pl.Float32))
    return frame.with_columns((1 / (1 + (-pl.col("logit")).exp())).alias("score"))


def score_with_values(contexts: pl.DataFrame, values: Iterable[float]) -> pl.DataFrame:
    """The same columns for a baseline whose ranking value is its logit and its score."""
    frame = pairs(contexts).with_columns(pl.Series("logit", np.asarray(values, dtype=np.float32)))
    return frame.with_columns(pl.col("logit").alias("score"))


def popularity_values(contexts: pl.DataFrame, popularity: pl.DataFrame) -> np.ndarray:
    """Training interactions of each candidate; 0 if it had none."""
    joined = pairs(contexts).join(popularity, on="item_id", how="left", maintain_order="left")
    return joined["count"].fill_null(0).to_numpy()


def random_values(contexts: pl.DataFrame, seed: int) -> np.ndarray:
    """A seeded random order of the candidates."""
    return np.random.default_rng(seed).random(pairs(contexts).height)
