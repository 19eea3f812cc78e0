"""MicroLens: ``*_pairs.csv`` or ``*_pairs.tsv``, ``*_titles.csv``, and covers in a folder as ``<item>.jpg``."""

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from mllm_msr.data.delimited import csv_blocks, csv_rows
from mllm_msr.data.ids import as_ids, as_text, check_join
from mllm_msr.data.image_places import images_by_id
from mllm_msr.data.logs import interactions_from
from mllm_msr.data.raw import ROW, BadRows, RawData
from mllm_msr.data.sources.interface import SourceOptions, Terms
from mllm_msr.data.spool import spool
from mllm_msr.data.text_files import text_blocks
from mllm_msr.records.sections import OnBadRows

COLUMNS = {"user_id": "user", "item_id": "item", "timestamp": "timestamp"}
IDS = ("user_id", "item_id")
TITLES = ("item", "title")


@dataclass(frozen=True)
class MicroLensSource(SourceOptions):
    """A MicroLens release. ``folder`` has the pairs and titles; ``covers`` defaults to a folder named so within it."""

    folder: str | None = None
    covers: str | None = None

    required = ("folder",)
    terms = Terms(
        name="MicroLens (Westlake University)",
        allows="use in research, citing the paper; its page names no licence",
        forbids="offering changed copies of the data set for download; share the code that makes them instead",
        link="https://github.com/westlake-repl/MicroLens",
        images="titles, covers and videos belong to the authors of the videos",
        log="a split of it is a changed copy: not to be passed on",
        read="readme of its repository, as of commit 033cac7, November 2026",
    )

    def read(self, on_bad_rows: OnBadRows) -> RawData:
        return read_microlens(Path(str(self.folder)), Path(self.covers) if self.covers else None, on_bad_rows)


def read_microlens(folder: Path, covers: Path | None = None, on_bad_rows: OnBadRows = "error") -> RawData:
    """Read the folder of a release; ``covers`` is found in it unless given (a folder with "cover" in its name).

    Pairs as CSV (header ``user,item,timestamp``) are preferred to the TSV (``user<TAB>item item …``, oldest first),
    which has no times: the place in the sequence stands for the time, and that is noted. Titles may lack a header.
    """
    folder = Path(folder)
    bad = BadRows(on_bad_rows)
    if pairs := _only(folder, "*pairs.csv"):
        log, ticks = interactions_from([spool(csv_blocks(pairs, bad))], pairs, COLUMNS, bad)
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
    met = check_join(log, items, titles, bad)
    ids = pl.concat([items["item_id"], met]).unique(maintain_order=True)
    items = pl.DataFrame({"item_id": ids}).join(items, on="item_id", how="left", maintain_order="left")
    items = items.with_columns(images_by_id(ids, covers), text=pl.lit(""))
    for what, column in (("without a title", "title"), ("without a cover", "image_path")):
        lacking = items.filter(pl.col(column).is_null())["item_id"]
        bad.note(f"items {what}", len(lacking), lacking.to_list())
    return RawData(log, items, bad.skipped, ticks)


def _only(folder: Path, pattern: str) -> Path | None:
    files = sorted(folder.glob(pattern))
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise ValueError(f"{folder}: several files match {pattern} ({names}); leave the one that is meant")
    return files[0] if files else None


def _sequences(path: Path, bad: BadRows) -> pl.LazyFrame:
    lines = spool(pl.DataFrame({"line": block.split("\n")[:-1]}) for block in text_blocks(path, bad))
    table = lines.with_row_index(ROW, offset=1).filter(pl.col("line").str.strip_chars() != "")
    parts = pl.col("line").str.split_exact("\t", 1).struct
    table = table.select(ROW, "line", user_id=parts.field("field_0"), item_id=parts.field("field_1"))
    wrong = pl.any_horizontal(pl.col("user_id", "item_id").str.strip_chars().fill_null("") == "")
    problems = {
        "not user<TAB>item item …": wrong,
        "another line of the same user": ~pl.col("user_id").is_first_distinct(),
    }
    table = bad.drop(table, problems, path)
    table = table.with_columns(pl.col("item_id").str.extract_all(r"\S+"))
    users = table.select(pl.len()).collect(engine="streaming").item()
    bad.note(f"{path.name}: no times; the place in the sequence stands for the time", users, [])
    places = pl.int_ranges(pl.col("item_id").list.len()).alias("timestamp")
    table = as_ids(table.select(ROW, "user_id", "item_id", places).explode("item_id", "timestamp"), IDS, path, bad)
    missing = {f"no {name}": pl.col(name).is_null() for name in IDS}
    return bad.drop(table, missing, path).drop(ROW)


def _titles(path: Path, bad: BadRows) -> pl.DataFrame:
    """item_id, title; commas in a title need not be quoted."""
    rows = [(line, fields[0], ",".join(fields[1:])) for line, fields in csv_rows(path, bad, TITLES) if any(fields)]
    if rows and (rows[0][1].strip().lower(), rows[0][2].strip().lower()) == TITLES:
        rows = rows[1:]
    table = pl.DataFrame(rows, schema={ROW: pl.Int64, "item_id": pl.String, "title": pl.String}, orient="row")
    table = as_ids(table.with_columns(as_text("title", pl.String())).lazy(), ["item_id"], path, bad).collect()
    return bad.drop(table, {"no item": pl.col("item_id").is_null()}, path).drop(ROW)
