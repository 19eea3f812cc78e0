"""The demo's world as raw data, and its oracle."""

import io
from dataclasses import dataclass

import numpy as np
import polars as pl

from mllm_msr.data.raw import CATALOGUE, RawData
from mllm_msr.data.sources.interface import SourceOptions
from mllm_msr.data.sources.world import DrawnItem, draw, make_world
from mllm_msr.records.schema import INTERACTIONS
from mllm_msr.records.sections import OnBadRows

DAY = 86_400  # seconds between a user's choices


@dataclass(frozen=True)
class DemoSource(SourceOptions):
    """The drawn world of the demo."""

    seed: int = 7
    n_users: int = 400
    n_items: int = 360

    drawn = True

    def read(self, on_bad_rows: OnBadRows) -> RawData:
        return read_demo(self.seed, self.n_users, self.n_items)


def read_demo(seed: int = 7, n_users: int = 400, n_items: int = 360) -> RawData:
    """Draw the catalogue and let the users choose; see :mod:`mllm_msr.data.sources.world`."""
    world = make_world(seed, n_users, n_items)
    rows = [
        (f"u{user:04d}", world.items[item].item_id, position * DAY + user)
        for user, history in enumerate(world.histories)
        for position, item in enumerate(history)
    ]
    items = [(item.item_id, item.title, item.text, None, _png(item)) for item in world.items]
    return RawData(INTERACTIONS.frame(rows).lazy(), pl.DataFrame(items, schema=CATALOGUE, orient="row"))


def true_utilities(source: DemoSource, pairs: pl.DataFrame) -> np.ndarray:
    """What each user would give each item at the last choice, by the taste that drew the world: (N,) float.

    Args:
        source: the options that the world was drawn by.
        pairs: ``user_id``, ``item_id`` as :func:`read_demo` writes them, N rows.
    """
    world = make_world(source.seed, source.n_users, source.n_items)
    users = pairs["user_id"].str.strip_prefix("u").cast(pl.Int64).to_numpy()
    items = pairs["item_id"].str.strip_prefix("i").cast(pl.Int64).to_numpy()
    return world.utilities[users, items]


def _png(item: DrawnItem) -> bytes:
    buffer = io.BytesIO()
    draw(item).save(buffer, "PNG")
    return buffer.getvalue()
