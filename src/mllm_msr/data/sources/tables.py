"""Own data: a log and a catalogue as CSV, TSV, Parquet, JSON lines or a data set of the Hub, with any column names."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import polars as pl

from mllm_msr.data.ids import as_text, check_join, is_text, joined_ids
from mllm_msr.data.image_places import ImageColumn, images_by_id, opened
from mllm_msr.data.logs import interactions_from
from mllm_msr.data.raw import ROW, BadRows, RawData, Wrong, need_columns, short
from mllm_msr.data.sources.interface import SourceOptions, local_or_hub
from mllm_msr.data.table_files import TableFile
from mllm_msr.records.sections import OnBadRows

LOG_COLUMNS = ("user_id", "item_id", "timestamp")
ITEM_COLUMNS = ("item_id", "title", "text", "image")


@dataclass(frozen=True)
class TablesSource(SourceOptions):
    """Own tables: files relative to ``folder``, or data sets of the Hub; ``columns`` maps our names to theirs."""

    interactions: str | None = None
    items: str | None = None
    images: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    folder: str = "."

    required = ("interactions",)
    places = ("folder", "interactions", "items", "images")
    language = None

    def read(self, on_bad_rows: OnBadRows) -> RawData:
        return read_tables(str(self.interactions), self.items, self.columns, self.images, self.folder, on_bad_rows)

    def item_column(self, name: str) -> Iterator[pl.DataFrame]:
        """``item_id`` and a further column ``name`` of the catalogue, as they are in its file, in batches."""
        if self.items is None:
            raise ValueError(f"there is no items table that could have a column {name!r}: name one by --items")
        table = TableFile.find(self.items, Path(self.folder))
        theirs = self.columns.get("items.item_id", self.columns.get("item_id", "item_id"))
        for batch in table.batches([theirs, name], (), "", BadRows("skip")):
            need_columns(batch.columns, [theirs, name], self.items)
            yield batch.select(ROW, pl.col(theirs).alias("item_id"), name)

    def roots(self) -> list[Path | str]:
        """Only what is named below ``folder``, and not all of it."""
        named = (self.interactions, self.items, self.images)
        return [local_or_hub(place, Path(self.folder)) for place in named if place is not None]

    def named_images(self) -> Iterator[Path]:
        """The files of this machine that a catalogue's image column names as texts."""
        table = TableFile.find(self.items, Path(self.folder)) if self.items else None
        if table is None or table.inside:
            return
        places = ImageColumn(Path(self.folder) / self.images if self.images else table.root)
        column = self.columns.get("image", "image")
        batches = table.batches((), (column,), column, BadRows("skip"))
        for batch in takewhile(lambda batch: batch.schema.get(column) == pl.String, batches):
            yield from (Path(path) for value in batch[column].drop_nulls() if (path := places.file(value)))


def read_tables(
    interactions: Path | str,
    items: Path | str | None = None,
    columns: Mapping[str, str] | None = None,
    images: Path | str | None = None,
    folder: Path | str = ".",
    on_bad_rows: OnBadRows = "error",
) -> RawData:
    """Read a log (user_id, item_id, timestamp) and, if given, a catalogue (item_id, title, text, image).

    Each is a file (.csv, .tsv, .jsonl, .ndjson, also .gz; .parquet), a folder of such files that Spark or Dask wrote,
    relative to ``folder``, or a file of a data set of the Hub, ``hf://datasets/<owner>/<name>[@<revision>]/<file>``, or
    a data set that ``load_dataset`` reads, on the Hub or in a folder:
    ``hf://datasets/<owner>/<name>[?name=<config>&split=<split>&revision=<revision>]``.

    Args:
        columns: our names to the files' names; "items.item_id" names the catalogue's id column where it differs from
            the log's. ``title``, ``text`` and ``image`` may be absent unless they are mapped.
        images: the folder that paths of images are relative to, else the catalogue's; without an image column, the
            folder of ``<item_id>.<suffix>``.

    An image is a path, a URL, bytes, base64 text, a Hugging Face image ``{bytes, path}`` or a list of these. A
    catalogue from the Hub can only name files of its own data set. Times are numbers of any unit, dates, or ISO texts.

    Raises:
        ValueError: an unknown column, a bad row (unless they are skipped), a log of which less than half of the items
            are in the catalogue.
        OSError: a file that is not there, or damaged.
    """
    bad = BadRows(on_bad_rows)
    columns, folder = dict(columns or {}), Path(folder)
    if strange := set(columns) - {*LOG_COLUMNS, *ITEM_COLUMNS, "items.item_id"}:
        raise ValueError(
            f"column mapping: unknown name {min(strange)!r}; known are {[*LOG_COLUMNS, *ITEM_COLUMNS[1:]]}"
        )
    mapping = {name: columns.get(name, name) for name in LOG_COLUMNS}
    if twice := [name for name in mapping.values() if list(mapping.values()).count(name) > 1]:
        raise ValueError(f"column mapping: {twice[0]!r} cannot be two of user_id, item_id and timestamp")
    table, names = TableFile.find(str(interactions), folder), list(mapping.values())
    with table.naming_parts(names):
        log, ticks = interactions_from(table.scans(names, bad), interactions, mapping, bad)
    if items is None:
        catalogue = log.select(pl.col("item_id").unique()).collect(engine="streaming").sort("item_id")
    else:
        catalogue = read_catalogue(str(items), columns, folder, folder / images if images else None, bad)
        check_join(log, catalogue, items, bad)
    if images is not None and "image_path" not in catalogue.columns:
        catalogue = catalogue.with_columns(images_by_id(catalogue["item_id"], folder / images))
    if "title" not in catalogue.columns:
        catalogue = catalogue.with_columns(title=pl.lit(None, pl.String))
    return RawData(log, catalogue, bad.skipped, ticks)


def read_catalogue(
    place: str, columns: Mapping[str, str], folder: Path, images: Path | None, bad: BadRows
) -> pl.DataFrame:
    """``item_id``, and of ``title``, ``text``, ``image_path`` what is there; arguments as for :func:`read_tables`."""
    table = TableFile.find(place, folder)
    names = {name: columns.get(name, name) for name in ITEM_COLUMNS}
    names["item_id"] = columns.get("items.item_id", names["item_id"])
    needed = [theirs for ours, theirs in names.items() if ours == "item_id" or ours in columns]
    optional = [theirs for theirs in names.values() if theirs not in needed]
    places = ImageColumn(images or table.root, table.inside and (images or table.inside))
    batches, no_text = [], defaultdict[str, Wrong](Wrong)
    for batch in table.batches(needed, optional, names["image"], bad):
        need_columns(batch.columns, needed, place)  # a CSV file shows its header only now
        batch = batch.select(ROW, *(pl.col(theirs).alias(ours) for ours, theirs in names.items() if theirs in batch))
        if "image" in batch:
            batch = batch.with_columns(places.places(batch["image"])).drop("image")
        for name in ("title", "text"):
            if name in batch:
                if not is_text(batch.schema[name]):
                    what = f"{names[name]!r} is a column of {short(batch.schema[name])}, not of texts: left out"
                    for value in batch[name].drop_nulls().to_list():
                        no_text[what].add(0, value)
                batch = batch.with_columns(as_text(name, batch.schema[name]))
                batch = batch.with_columns(_joined(batch[name]))
        batches.append(batch)
    if not batches:
        raise ValueError(f"{place}: this catalogue has no rows")
    if not any("title" in batch for batch in batches):
        bad.note(f"{place}: no column {names['title']!r}, so no item has a title", 1, [table.columns()])
    for what, values in no_text.items():
        bad.note(f"{place}: {what}", values.count, values.examples)
    places.report(bad)
    items = joined_ids((batch.lazy() for batch in batches), ["item_id"], place, bad).collect()
    items = bad.drop(items, {"no item_id": pl.col("item_id").is_null()}, place)
    return bad.unique_items(items.drop(ROW, *([] if places.given else ["image_path"]), strict=False), place)


def _joined(texts: pl.Series) -> pl.Series:
    """A list of texts that is written as JSON or as Python prints it, joined as one that is a list; others as they
    are."""

    def join(text: str) -> str:
        parts = opened(text)
        return " ".join(parts) if isinstance(parts, list) and all(isinstance(part, str) for part in parts) else text

    listed = texts.str.contains(r"^\[.*\]$").fill_null(False)
    if not listed.any():
        return texts
    return pl.Series(texts.name, [join(text) if is_list else text for text, is_list in zip(texts, listed, strict=True)])
