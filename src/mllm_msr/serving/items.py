"""New and changed items: what the stages of a run would have made of them, made at once."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from mllm_msr.data.images import decode
from mllm_msr.modeling.inputs import Candidate
from mllm_msr.processing.engine_registry import build_engine
from mllm_msr.processing.engines import Engine, load
from mllm_msr.processing.summaries import summarize_items
from mllm_msr.processing.text_store import TextStore
from mllm_msr.records.recipe import Recipe
from mllm_msr.records.schema import ITEMS


@dataclass(frozen=True)
class NewItem:
    """An item that a client puts.

    Args:
        image: encoded, as :func:`mllm_msr.data.images.encode` writes it.
        summary: None: the run's engine writes one.
        vector: made as those of the run; None: the run's model makes one.
        columns: further values to filter by.
    """

    item_id: str
    title: str = ""
    text: str = ""
    image: bytes | None = None
    summary: str | None = None
    vector: Sequence[float] | None = None
    columns: dict | None = None


class ItemMaker:
    """The models that describe items, each loaded when it is first wanted; for one request at a time.

    Args:
        lock: held while a model is loaded or used.
        alone: calls a function while no other model computes: a load changes torch's default dtype for the whole
            process.
    """

    def __init__(self, recipe: Recipe, lock: AbstractContextManager[Any], alone: Callable[[Callable], Any]) -> None:
        self.recipe, self._lock, self._alone = recipe, lock, alone

    @cached_property
    def engine(self) -> Engine:
        engine = build_engine(self.recipe.summaries, self.recipe.prompts, self.recipe.item_noun)
        self._alone(partial(load, engine))
        return engine

    @cached_property
    def encode(self):
        from mllm_msr.processing.vectors import recipe_encoder

        return self._alone(partial(recipe_encoder, self.recipe))

    def summaries(self, items: Sequence[NewItem]) -> list[str]:
        """The summary of each item: its own, or the engine's.

        Raises:
            EngineUnavailable: no text can be written now, or none of use.
        """
        new = [item for item in items if item.summary is None]
        written: dict[str, str] = {}
        if new:
            images = [None if item.image is None else {"bytes": item.image, "path": None} for item in new]
            rows = [(item.item_id, item.title, item.text, image) for item, image in zip(new, images, strict=True)]
            with self._lock, TemporaryDirectory() as folder:
                store = TextStore(Path(folder))
                frame = summarize_items(ITEMS.frame(rows), self.engine, store, self.recipe.summaries)
            written = dict(frame.select("item_id", "summary").iter_rows())
        return [written.get(item.item_id, "") if item.summary is None else item.summary for item in items]

    def vectors(self, items: Sequence[NewItem], summaries: Sequence[str]) -> np.ndarray:
        """(N, F) float16: the vector of each item, made as the stage ``vectors`` does.

        Raises:
            ValueError: an item brings no vector, and none can be made.
        """
        given = [item.vector for item in items if item.vector is not None]
        if len({len(vector) for vector in given}) > 1:
            raise ValueError("their vectors have different lengths: make each as those of the run are made")
        if len(given) == len(items):
            return np.array(given, dtype=np.float16)
        if given or self.recipe.vectors.own:
            kind = "are your own" if self.recipe.vectors.own else "are made by a model unless all items bring one"
            raise ValueError(f"an item has no vector: those of this run {kind}, so send one with each")
        from mllm_msr.processing.vectors import item_words

        read, shown = self.recipe.vectors_read_summaries, self.recipe.vectors.images
        candidates = [
            Candidate(
                title=item.title,
                text=item_words(item.text, summary if read else None),
                image=decode(item.image) if item.image is not None and shown else None,
            )
            for item, summary in zip(items, summaries, strict=True)
        ]
        with self._lock:
            return self.encode(candidates)
