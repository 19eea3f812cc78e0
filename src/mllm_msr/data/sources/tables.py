"""Own data: a log and a catalogue as CSV, TSV, Parquet, JSON lines or a data set of the Hub, with any column names."""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import count, islice
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import polars as pl
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, load_dataset

from mllm_msr.data.raw import BadRows, RawData
from mllm_msr.data.readers import (
    image_files,
    interactions_from,
    local_file,
    open_text,
    read_csv,
    read_jsonl,
    spool,
    spool_folder,
)
from mllm_msr.records.sections import OnBadRows

LOG_COLUMNS = ("user_id", "item_id", "timestamp")
ITEM_COLUMNS = ("item_id", "title", "text", "image")
SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson")
PICTURES = 64  # rows with pictures in memory at a time


def read_tables(
    interactions: Path | str,
    items: Path | str | None = None,
    columns: Mapping[str, str] | None = None,
    images: Path | str | None = None,
    folder: Path | str = ".",
    on_bad_rows: OnBadRows = "error",
) -> RawData:
    """Read a log (user_id, item_id, timestamp) and, if given, a catalogue (item_id, title, text, image).

    Each is a file (.csv, .tsv, .jsonl, .ndjson, also .gz; .parquet), relative to ``folder``, or a file of a data set of
    the Hub, ``hf://datasets/<owner>/<name>[@<revision>]/<file>``, or a data set that ``load_dataset`` reads, on the Hub
    or in a folder: ``hf://datasets/<owner>/<name>[?name=<config>&split=<split>&revision=<revision>]``.

    ``columns`` maps our names to the files' names; "items.item_id" names the catalogue's id column where it differs
    from the log's. ``title``, ``text`` and ``image`` may be absent unless they are mapped. An image is a path (relative
    to ``images``, else to the catalogue's folder), a URL, bytes, or a Hugging Face image ``{bytes, path}``; without an
    image column, ``images/<item_id>.<suffix>``. Times are seconds or finer, or ISO dates.
    """
    bad = BadRows(on_bad_rows)
    columns = dict(columns or {})
    if strange := set(columns) - {*LOG_COLUMNS, *ITEM_COLUMNS, "items.item_id"}:
        raise ValueError(
            f"column mapping: unknown name {min(strange)!r}; known are {[*LOG_COLUMNS, *ITEM_COLUMNS[1:]]}"
        )
    folder = Path(folder)
    mapping = {name: columns.get(name, name) for name in LOG_COLUMNS}
    table = scan_table(str(interactions), folder, bad, list(mapping.values()))
    log, ticks = interactions_from(table, interactions, mapping, bad)
    if items is None:
        catalogue = log.select(pl.col("item_id").unique()).collect(engine="streaming").sort("item_id")
    else:
        catalogue = bad.unique_items(_catalogue(str(items), folder, columns, bad), items)
    if "image" in catalogue.columns:
        catalogue = _images(catalogue, folder / images if images else (folder / (items or "")).parent, bad)
    elif images is not None:
        found = image_files(folder / images)
        catalogue = catalogue.with_columns(image_path=pl.col("item_id").replace_strict(found, default=None))
    if "title" not in catalogue.columns:
        catalogue = catalogue.with_columns(title=pl.lit(None, pl.String))
    return RawData(log, catalogue, bad.skipped, ticks)


def scan_table(
    place: str, folder: Path, bad: BadRows, columns: list[str], optional: Iterable[str] = (), picture: str = ""
) -> pl.LazyFrame:
    """One table by its suffix, with ``row`` numbers added; of JSON lines only ``columns``, which must be there, and
    ``optional`` ones, as text. Where the column ``picture`` holds bytes, it has paths of temporary files instead."""
    name = place.lower().removesuffix(".gz")
    if not name.endswith(SUFFIXES):
        data = _data_set(place, folder)
        schema = pl.DataFrame(pl.from_arrow(data.features.arrow_schema.empty_table())).schema
        packed, kept = _packed(schema, picture)
        parts = data.select_columns(kept).with_format("arrow").iter(PICTURES if packed else 10_000)
        return _spooled(parts, picture if packed else "")
    path = local_file(place) if place.startswith("hf:") else folder / place
    if name.endswith((".csv", ".tsv")):
        return read_csv(path, bad, "\t" if name.endswith(".tsv") else ",")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if name.endswith(".parquet"):
        packed, kept = _packed(pl.read_parquet_schema(path), picture)
        if packed:
            file = pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)  # else it holds all it has read
            return _spooled(file.iter_batches(PICTURES, columns=kept), picture)
        return pl.scan_parquet(path, row_index_name="row", row_index_offset=1)
    return _jsonl(path, bad, columns, optional)


def _data_set(place: str, folder: Path) -> Dataset:
    name, _, query = place.removeprefix("hf://datasets/").partition("?")
    options = dict(parse_qsl(query))
    if name == place.partition("?")[0] and not (folder / name).is_dir():
        raise ValueError(
            f"{place}: neither a file ({', '.join(SUFFIXES)}) nor a folder of a data set; a data set of the Hub is "
            "written hf://datasets/<owner>/<name>"
        )
    if unknown := options.keys() - {"name", "split", "revision"}:
        raise ValueError(f"{place}: unknown {min(unknown)!r} after '?'; known are name, split, revision")
    if not place.startswith("hf:"):
        name = str(folder / name)
    name, _, revision = name.partition("@") if place.startswith("hf:") else (name, "", "")
    data = load_dataset(name, **({"revision": revision} if revision else {}), **options)
    if isinstance(data, DatasetDict):
        if len(data) > 1:
            raise ValueError(f"{place}: has the splits {', '.join(data)}; say which: ?split=...")
        (data,) = data.values()
    return data


def _packed(schema: Mapping[str, pl.DataType], picture: str) -> tuple[bool, list[str]]:
    """Whether the column ``picture`` holds bytes or Hugging Face images, and all columns but others that do."""
    packed = [name for name, kind in schema.items() if kind == pl.Binary or isinstance(kind, pl.Struct)]
    return picture in packed, [name for name in schema if name == picture or name not in packed]


def _spooled(parts: Iterable[Any], picture: str) -> pl.LazyFrame:
    """Arrow tables as one scan; the bytes of the column ``picture``, if it is given, in files, a part at a time."""
    folder, numbers = spool_folder(), count()

    def path(value: Any) -> str | None:
        data, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if data is None:
            return name
        file = folder / str(next(numbers))
        file.write_bytes(data)
        return str(file)

    def tables() -> Iterator[pl.DataFrame]:
        for part in parts:
            table = pl.DataFrame(pl.from_arrow(part))
            yield table.with_columns(pl.Series(picture, map(path, table[picture]), pl.String)) if picture else table

    return spool(tables()).with_row_index("row", offset=1)


def _jsonl(path: Path, bad: BadRows, columns: list[str], optional: Iterable[str]) -> pl.LazyFrame:
    keys: dict[str, Any] = {}
    with open_text(path, bad) as lines:
        for line in islice(lines, 100):
            try:
                keys |= json.loads(line)
            except (TypeError, ValueError):  # a bad line; the reader below names it
                continue
    if absent := [name for name in columns if name not in keys]:
        raise ValueError(f"{path}: no column {absent[0]!r}; it has {list(keys)}. Name yours by a column mapping.")
    return read_jsonl(path, dict.fromkeys([*columns, *optional], pl.String), bad)


def _catalogue(place: str, folder: Path, columns: dict[str, str], bad: BadRows) -> pl.DataFrame:
    names = {name: columns.get(name, name) for name in ITEM_COLUMNS}
    names["item_id"] = columns.get("items.item_id", names["item_id"])
    needed = [theirs for ours, theirs in names.items() if ours == "item_id" or ours in columns]
    others = [name for name in names.values() if name not in needed]
    table = scan_table(place, folder, bad, needed, others, picture=names["image"])
    have = table.collect_schema().names()
    for ours, theirs in list(names.items()):
        if theirs not in have:
            if theirs in needed:
                have.remove("row")
                raise ValueError(f"{place}: no column {theirs!r}; it has {have}. Name yours by a column mapping.")
            del names[ours]
    catalogue = table.select("row", *(pl.col(theirs).alias(ours) for ours, theirs in names.items())).collect()
    catalogue = catalogue.with_columns(pl.col("item_id").cast(pl.String).str.strip_chars())
    return bad.drop(catalogue, {"no item_id": pl.col("item_id").is_null() | (pl.col("item_id") == "")}, place)


def _images(items: pl.DataFrame, root: Path, bad: BadRows) -> pl.DataFrame:
    """Turn ``image`` into image_path; a path without a file behind it is noted and becomes null."""
    paths: list[str | None] = []
    missing: list[str] = []
    for name in items["image"].cast(pl.String):
        if not name:
            paths.append(None)
        elif name.startswith(("http://", "https://")) or (root / name).is_file():
            paths.append(name if name.startswith("http") else str(root / name))
        else:
            paths.append(None)
            missing.append(name)
    bad.note("images: no such file", len(missing), missing)
    return items.drop("image").with_columns(pl.Series("image_path", paths, dtype=pl.String))
