"""Vectors of items that a run has never seen, made as those of its catalogue were."""

from dataclasses import replace

import numpy as np
import torch

from mllm_msr.data.new_items import NewItems
from mllm_msr.modeling.item_ranking import ItemRanker
from mllm_msr.processing.vectors import recipe_encoder
from mllm_msr.records.recipe import Recipe


def put_new_items(ranker: ItemRanker, recipe: Recipe, new: NewItems) -> None:
    """Let a run's ranker rank new items.

    Raises:
        ValueError: there is no model that makes their vectors, or their vectors are not as those of the catalogue; the
            message names the file and the remedy.
    """
    vectors = with_vectors(recipe, new).vectors
    assert vectors is not None
    try:
        ranker.put_items(list(new.candidates), torch.from_numpy(vectors))
    except ValueError as error:
        raise ValueError(f"{new.path}: {error}; vectors must be made as those of the run's items were") from error


def with_vectors(recipe: Recipe, new: NewItems) -> NewItems:
    """New items with vectors, computed if their file has none; ValueError if there is no model that makes them."""
    options = recipe.vectors
    if new.vectors is not None:
        return new
    if options.own:
        raise ValueError(
            f"{new.path}: this run's item vectors are its owner's ({options.file or options.column}), so no model can "
            "make those of new items: give them in a column `vector`"
        )
    if recipe.vectors_read_summaries:
        print(f"{new.path}: new items have no summaries, which the vectors of this run's items read, too")
    encode, items = recipe_encoder(recipe), list(new.candidates.values())
    if not options.images:
        items = [replace(item, image=None) for item in items]
    steps = range(0, len(items), options.batch_size)
    vectors = np.concatenate([encode(items[begin : begin + options.batch_size]) for begin in steps])
    return replace(new, vectors=vectors.astype(np.float32))
