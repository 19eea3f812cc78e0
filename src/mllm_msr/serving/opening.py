"""What is served: a run's model, heads, items, summaries, and what it knows of its users."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import polars.selectors as cs

from mllm_msr.data.catalogue import Catalogue
from mllm_msr.data.ids import joined_ids
from mllm_msr.data.raw import ROW, BadRows, meant, need_columns
from mllm_msr.data.table_files import TableFile
from mllm_msr.evaluation.loading import Computing, is_late, load_catalogue, load_recommender
from mllm_msr.records.recipe import FORMAT, Recipe
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import CUT_INTERACTIONS, INTERACTIONS, ITEM_SUMMARIES, ITEMS, PREFERENCES

if TYPE_CHECKING:
    from mllm_msr.modeling.item_ranking import ItemRanker
    from mllm_msr.modeling.ranking import Recommender


class ListsByUser(Mapping[str, list[str]]):
    """A column of a log by user, whose rows lie together; it costs memory for the log and a number a user."""

    def __init__(self, log: pl.DataFrame, column: str) -> None:
        counts = log.group_by("user_id", maintain_order=True).len()
        ends = counts["len"].cum_sum()
        self.values_of_all = log[column]
        self.parts = {
            user: (end - length, length)
            for user, length, end in zip(counts["user_id"], counts["len"], ends, strict=True)
        }

    def __getitem__(self, user_id: str) -> list[str]:
        """Oldest first; empty for a user that the log does not know."""
        begin, length = self.parts.get(user_id, (0, 0))
        return self.values_of_all.slice(begin, length).to_list()

    def __contains__(self, user_id: object) -> bool:
        return user_id in self.parts

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


@dataclass(frozen=True)
class RunUsers:
    """What a run knows of its users.

    Args:
        histories: as far as prompts read them.
        cut: what ``max_history`` has cut off, before them.
        preferences: after each history block.
    """

    histories: Mapping[str, list[str]]
    cut: Mapping[str, list[str]]
    preferences: Mapping[str, list[str]]


@dataclass(frozen=True)
class Opened:
    """All that is served.

    Args:
        name, revision: of the model.
        format: of the run.
        vectors_key: all that item vectors depend on beside their items.
        recommender: the model, ready to rank.
        item_ranker: the heads over item vectors; None if the run has none.
        columns: values of items by column and item.
    """

    name: str
    revision: str
    format: int
    vectors_key: str
    recipe: Recipe
    recommender: "Recommender"
    item_ranker: "ItemRanker | None"
    items: Catalogue
    titles: Mapping[str, str]
    summaries: Mapping[str, str]
    users: RunUsers
    columns: Mapping[str, Mapping[str, Any]]

    @cached_property
    def image_tokens(self) -> int:
        """Tokens of an image in a prompt, about."""
        from PIL import Image

        (prepared,) = self.recommender.processor.prepare_images([Image.new("RGB", (96, 96), "white")])
        return prepared.num_image_tokens


def open_run(path: Path, how: Computing, columns: Path | None = None) -> Opened:
    """All of a run whose model is trained.

    Args:
        how: scores are computed; the cache of a ``late`` model is the run's own.
        columns: a CSV or Parquet file with ``item_id`` and columns to filter by.

    Raises:
        FileNotFoundError, ValueError: no run, or a stage that is to be done first.
    """
    run = RunFolder.open(path)
    run.require("train")
    recommender = load_recommender(run, replace(how, cache=run.item_cache if is_late(run) else None))
    item_ranker = None
    if run.recipe.head.enabled and run.head.is_dir():
        from mllm_msr.modeling.item_ranking import ItemRanker

        run.require("head")
        item_ranker = ItemRanker.from_pretrained(run.head)
    cut = run.recipe.data.max_history is not None
    preferences = run.read(PREFERENCES, ["user_id", "step", "preference"]).sort("user_id", "step")
    return Opened(
        name=run.recipe.name,
        revision=run.key("train")[:12],
        format=FORMAT,
        vectors_key=run.key("head") if item_ranker is not None else "",
        recipe=run.recipe,
        recommender=recommender,
        item_ranker=item_ranker,
        items=load_catalogue(run),
        titles=dict(run.read(ITEMS, ["item_id", "title"]).iter_rows()),
        summaries=dict(run.read(ITEM_SUMMARIES, ["item_id", "summary"]).iter_rows()),
        users=RunUsers(
            ListsByUser(run.read(INTERACTIONS, ["user_id", "item_id"]), "item_id"),
            ListsByUser(run.read(CUT_INTERACTIONS), "item_id") if cut else {},
            ListsByUser(preferences, "preference"),
        ),
        columns=read_columns(columns, run.read(ITEMS, ["item_id"])["item_id"].to_list()),
    )


def read_columns(path: Path | None, item_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The columns of a file by name and item, without its nulls.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, has no ``item_id``, or names no item of the catalogue.
    """
    if path is None:
        return {}
    if not path.is_file():
        raise FileNotFoundError(f"--item-columns {path}: there is no such file")
    table, bad = TableFile.find(path.name, path.parent), BadRows(remedy="Mend the row, or leave it out.")
    spelled = meant(["item_id"], table.columns())
    batches = list(table.batches([spelled.get(name, name) for name in table.columns()], (), "", bad))
    if not batches:
        raise ValueError(f"--item-columns {path}: has no rows")
    need_columns(batches[0].columns, ["item_id"], path)
    frame = joined_ids((batch.lazy() for batch in batches), ["item_id"], path, bad).collect()
    frame = frame.filter(pl.col("item_id").is_in(list(item_ids))).unique("item_id", keep="first", maintain_order=True)
    if frame.is_empty():
        raise ValueError(f"--item-columns {path}: no item_id is one of the catalogue, such as {item_ids[:1]}")
    names = [name for name in frame.columns if name not in ("item_id", ROW)]
    if table.kind != "parquet":  # whose fields are all texts
        frame = frame.with_columns(_typed(frame[name]) for name in names)
    frame = frame.with_columns((cs.temporal() | cs.categorical()).cast(pl.String), cs.decimal().cast(pl.Float64))
    return {name: dict(frame.select("item_id", name).drop_nulls().iter_rows()) for name in names}


def _typed(texts: pl.Series) -> pl.Series:
    """A column of texts as numbers or truths, if all of them are."""
    for kind in (pl.Int64, pl.Float64):
        if (numbers := texts.cast(kind, strict=False)).null_count() == texts.null_count():
            return numbers
    truths = texts.str.to_lowercase().replace_strict({"true": True, "false": False}, default=None)
    return truths if truths.null_count() == texts.null_count() else texts
