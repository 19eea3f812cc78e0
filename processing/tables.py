"""Own data: a log and a catalogue as CSV, TSV, Parquet or JSON lines, with any column names."""

from collections.abc import Mapping
from pathlib import Path

import polars as pl

from mllm_msr.processing.raw import (
    BadRows,
    OnBadRows,
    RawData,
    image_files,
    interactions_from,
    local_file,
    read_csv,
    read_text,
)

LOG_COLUMNS = ("user_id", "item_id", "timestamp")
ITEM_COLUMNS = ("item_id", "title", "text", "image")


def read_tables(
    interactions: Path | str,
    items: Path | str | None = None,
    columns: Mapping[str, str] | None = None,
    images: Path | None = None,
    on_bad_rows: OnBadRows = "error",
) -> RawData:
    """Read a log (user_id, item_id, timestamp) and, if given, a catalogue (item_id, title, text, image);
    either may be ``hf://datasets/<owner>/<name>/<file>``.

    ``columns`` maps our names to the files' names; "items.item_id" names the catalogue's id column where it differs
    from the log's. ``title``, ``text`` and ``image`` may be absent unless they are mapped. An image is a path (relative
    to ``images``, else to the catalogue's folder), a URL, bytes, or a Hugging Face image ``{bytes, path}``; without an
    image column, ``images/<item_id>.<suffix>``. Times are seconds, milliseconds or ISO dates.
    """
    bad = BadRows(on_bad_rows)
    columns = dict(columns or {})
    if strange := set(columns) - {*LOG_COLUMNS, *ITEM_COLUMNS, "items.item_id"}:
        raise ValueError(
            f"column mapping: unknown name {min(strange)!r}; known are {[*LOG_COLUMNS, *ITEM_COLUMNS[1:]]}"
        )
    interactions = local_file(interactions)
    mapping = {name: columns.get(name, name) for name in LOG_COLUMNS}
    log = interactions_from(read_table(interactions, bad), interactions, mapping, bad)
    if items is None:
        catalogue = log.select(pl.col("item_id").unique(maintain_order=True))
        root = Path(".")
    else:
        items = local_file(items)
        catalogue = bad.unique_items(_catalogue(items, columns, bad), items)
        root = Path(images) if images else items.parent
    if "image" in catalogue.columns:
        catalogue = _images(catalogue, root, bad)
    elif images is not None:
        found = image_files(Path(images))
        catalogue = catalogue.with_columns(image_path=pl.col("item_id").replace_strict(found, default=None))
    for name in ("title", "image_path", "image_bytes"):
        if name not in catalogue.columns:
            catalogue = catalogue.with_columns(
                pl.lit(None, pl.Binary if name == "image_bytes" else pl.String).alias(name)
            )
    return RawData(log, catalogue, bad.skipped)


def read_table(path: Path, bad: BadRows) -> pl.DataFrame:
    """One table by its suffix (.csv, .tsv, .parquet, .jsonl, .ndjson; text also .gz), with ``row`` numbers added."""
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".csv", ".tsv")):
        return read_csv(path, bad, "\t" if name.endswith(".tsv") else ",")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if name.endswith((".jsonl", ".ndjson")):
        return _jsonl(path, bad)
    if name.endswith(".parquet"):
        return pl.read_parquet(path).with_row_index("row", offset=1)
    raise ValueError(f"{path}: unknown kind of table; use .csv, .tsv, .parquet or .jsonl")


def _jsonl(path: Path, bad: BadRows) -> pl.DataFrame:
    try:
        return pl.read_ndjson(path, infer_schema_length=None).with_row_index("row", offset=1)
    except pl.exceptions.PolarsError as error:
        lines = [line for line in read_text(path, bad).splitlines() if line.strip()]
        raise ValueError(f"{path}: not a table of {len(lines)} JSON objects of one shape ({error})") from error


def _catalogue(path: Path, columns: dict[str, str], bad: BadRows) -> pl.DataFrame:
    table = read_table(path, bad)
    names = {name: columns.get(name, name) for name in ITEM_COLUMNS}
    names["item_id"] = columns.get("items.item_id", names["item_id"])
    for ours, theirs in list(names.items()):
        if theirs not in table.columns:
            if ours == "item_id" or ours in columns:
                have = [name for name in table.columns if name != "row"]
                raise ValueError(f"{path}: no column {theirs!r}; it has {have}. Name yours by a column mapping.")
            del names[ours]
    table = table.select("row", *(pl.col(theirs).alias(ours) for ours, theirs in names.items()))
    table = table.with_columns(pl.col("item_id").cast(pl.String).str.strip_chars())
    return bad.drop(table, pl.col("item_id").is_null() | (pl.col("item_id") == ""), "no item_id", path).drop("row")


def _images(items: pl.DataFrame, root: Path, bad: BadRows) -> pl.DataFrame:
    """Turn ``image`` into image_path and image_bytes; a path without a file behind it is noted and becomes null."""
    kind = items.schema["image"]
    if kind == pl.Binary:
        return items.rename({"image": "image_bytes"})
    if isinstance(kind, pl.Struct):
        items = items.with_columns(pl.col("image").struct.field("bytes").alias("image_bytes"))
        items = items.with_columns(pl.col("image").struct.field("path").alias("image"))
    paths: list[str | None] = []
    missing: list[str] = []
    embedded = items["image_bytes"].is_not_null() if "image_bytes" in items.columns else [False] * len(items)
    for name, has_bytes in zip(items["image"].cast(pl.String), embedded, strict=True):
        if has_bytes or not name:
            paths.append(None)
        elif name.startswith(("http://", "https://")) or (root / name).is_file():
            paths.append(name if name.startswith("http") else str(root / name))
        else:
            paths.append(None)
            missing.append(name)
    bad.note("images: no such file", len(missing), missing)
    return items.drop("image").with_columns(pl.Series("image_path", paths, dtype=pl.String))
