"""MicroLens: ``*_pairs.csv`` or ``*_pairs.tsv``, ``*_titles.csv``, and covers in a folder as ``<item>.jpg``."""

import csv
from pathlib import Path

import polars as pl

from mllm_msr.data.raw import BadRows, RawData
from mllm_msr.data.readers import batches, image_files, interactions_from, open_text, read_csv, spool
from mllm_msr.records.sections import OnBadRows

COLUMNS = {"user_id": "user", "item_id": "item", "timestamp": "timestamp"}


def read_microlens(folder: Path, covers: Path | None = None, on_bad_rows: OnBadRows = "error") -> RawData:
    """Read the folder of a release; ``covers`` is found in it unless given (a folder with "cover" in its name).

    Pairs as CSV (header ``user,item,timestamp``) are preferred to the TSV (``user<TAB>item item …``, oldest first),
    which has no times: the place in the sequence stands for the time, and that is noted. Titles may lack a header.
    """
    folder = Path(folder)
    bad = BadRows(on_bad_rows)
    if pairs := _only(folder, "*pairs.csv"):
        log, ticks = interactions_from(read_csv(pairs, bad), pairs, COLUMNS, bad)
    elif pairs := _only(folder, "*pairs.tsv"):
        log, ticks = _sequences(pairs, bad), 1
    else:
        raise FileNotFoundError(f"{folder}: neither *_pairs.csv nor *_pairs.tsv is there")
    if titles := _only(folder, "*title*.csv"):
        items = bad.unique_items(_titles(titles, bad), titles)
    else:
        raise FileNotFoundError(f"{folder}: no *_titles.csv is there")
    if covers is None:
        covers = next(
            (path for path in sorted(folder.iterdir()) if path.is_dir() and "cover" in path.name.lower()), None
        )
    images = image_files(covers)
    met = log.select(pl.col("item_id").unique(maintain_order=True)).collect(engine="streaming")["item_id"]
    ids = pl.concat([items["item_id"], met]).unique(maintain_order=True)
    items = pl.DataFrame({"item_id": ids}).join(items, on="item_id", how="left", maintain_order="left")
    items = items.with_columns(text=pl.lit(""), image_path=pl.col("item_id").replace_strict(images, default=None))
    for what, column in (("without a title", "title"), ("without a cover", "image_path")):
        lacking = items.filter(pl.col(column).is_null())["item_id"]
        bad.note(f"items {what}", len(lacking), lacking.to_list())
    return RawData(log, items, bad.skipped, ticks)


def _only(folder: Path, pattern: str) -> Path | None:
    found = sorted(folder.glob(pattern))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{folder}: several files match {pattern} ({names}); leave the one that is meant")
    return found[0] if found else None


def _sequences(path: Path, bad: BadRows) -> pl.LazyFrame:
    with open_text(path, bad) as text:
        chunks = batches(line.rstrip("\r\n") for line in text)
        table = spool(pl.DataFrame({"line": chunk}) for chunk in chunks).with_row_index("row", offset=1)
    table = table.filter(pl.col("line").str.strip_chars() != "")
    parts = pl.col("line").str.split_exact("\t", 1)
    table = table.with_columns(
        user_id=parts.struct.field("field_0").str.strip_chars(),
        item_id=parts.struct.field("field_1").str.strip_chars(),
    )
    wrong = pl.any_horizontal(pl.col("user_id", "item_id").fill_null("") == "")
    table = bad.drop(table, {"not user<TAB>item item …": wrong}, path)
    table = table.with_columns(pl.col("item_id").str.extract_all(r"\S+"))
    users = table.select(pl.len()).collect(engine="streaming").item()
    bad.note(f"{path.name}: no times; the place in the sequence stands for the time", users, [])
    places = pl.int_ranges(pl.col("item_id").list.len()).alias("timestamp")
    return table.select("user_id", "item_id", places).explode("item_id", "timestamp")


def _titles(path: Path, bad: BadRows) -> pl.DataFrame:
    """item_id, title; commas in a title need not be quoted."""
    with open_text(path, bad) as text:
        rows = [(n, row) for n, row in enumerate(csv.reader(text), start=1) if row]
    if rows and [cell.strip().lower() for cell in rows[0][1]] == ["item", "title"]:
        rows = rows[1:]
    table = pl.DataFrame(
        {"row": [n for n, _ in rows], "item_id": [row[0].strip() for _, row in rows]}
        | {"title": [",".join(row[1:]).strip() or None for _, row in rows]},
        schema={"row": pl.Int64, "item_id": pl.String, "title": pl.String},
    )
    return bad.drop(table, {"no item": pl.col("item_id") == ""}, path).drop("row")
