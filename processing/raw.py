"""What every source yields, and how files of other people's making are read.

A source (``movielens.py``, ``microlens.py``, ``amazon.py``, ``tables.py``) returns :class:`RawData`: a log and a
catalogue as they are in the files, and a list of everything that was left out or looked odd. Cleaning comes later.
"""

import csv
import gzip
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import polars as pl
from huggingface_hub import hf_hub_download

OnBadRows = Literal["error", "skip"]
INTERACTION_SCHEMA: dict[str, pl.DataType] = {
    "user_id": pl.String(),
    "item_id": pl.String(),
    "timestamp": pl.Int64(),
}
ITEM_SCHEMA: dict[str, pl.DataType] = {
    "item_id": pl.String(),
    "title": pl.String(),
    "text": pl.String(),
    "image_path": pl.String(),
    "image_bytes": pl.Binary(),
}
EXAMPLES = 5  # how many cases of one oddity a report shows


@dataclass
class RawData:
    """A log and its catalogue, before cleaning.

    ``interactions``: user_id str, item_id str, timestamp int64 (seconds); the order of rows breaks ties in time.
    ``items``: item_id str (unique), title str, text str, image_path str or null (a file or a URL), image_bytes binary
    or null; a missing column is filled with "" or null. ``skipped``: ``{"what", "count", "examples"}`` an oddity.
    """

    interactions: pl.DataFrame
    items: pl.DataFrame
    skipped: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.interactions = _conform(self.interactions, INTERACTION_SCHEMA, "interactions")
        optional = [pl.lit(None, ITEM_SCHEMA[c]).alias(c) for c in ITEM_SCHEMA if c not in self.items.columns]
        self.items = _conform(self.items.with_columns(optional), ITEM_SCHEMA, "items").with_columns(
            pl.col("title", "text").fill_null("").str.strip_chars()
        )
        if self.interactions.is_empty():
            raise ValueError("no interactions: the log is empty, or every row of it was bad")
        for table, columns in ((self.interactions, list(INTERACTION_SCHEMA)), (self.items, ["item_id"])):
            if (nulls := table.select(pl.any_horizontal(pl.col(columns).is_null()).sum()).item()) > 0:
                raise ValueError(f"{nulls} rows lack one of {columns}; drop them first")
        if self.items["item_id"].is_duplicated().any():
            raise ValueError("items: item_id must be unique; keep one row an item (see BadRows.unique_items)")


def _conform(table: pl.DataFrame, schema: dict[str, pl.DataType], what: str) -> pl.DataFrame:
    if missing := [name for name in schema if name not in table.columns]:
        raise ValueError(f"{what}: no column {missing[0]!r}, only {table.columns}")
    return table.select(pl.col(name).cast(dtype) for name, dtype in schema.items())


@dataclass
class BadRows:
    """The bad rows of one source: the first one stops, or all are dropped and counted."""

    on_bad_rows: OnBadRows = "error"
    skipped: list[dict[str, Any]] = field(default_factory=list)

    def note(self, what: str, count: int, examples: list[Any]) -> None:
        """Count something odd that does no harm; examples are shortened for the report."""
        if count:
            shown = [text if len(text := str(example)) <= 200 else text[:199] + "…" for example in examples[:EXAMPLES]]
            self.skipped.append({"what": what, "count": count, "examples": shown})

    def reject(self, path: Path | str, row: int | str, what: str, count: int, examples: list[Any]) -> None:
        """Raise for the first bad row, or count them all, as ``on_bad_rows`` says."""
        if self.on_bad_rows == "error":
            raise ValueError(
                f"{path}, row {row}: {what}: {examples[0]}. Mend the row, or leave such rows out and count them with "
                "on_bad_rows='skip' (--on-bad-rows skip)."
            )
        self.note(f"{Path(path).name}: {what}", count, examples)

    def drop(self, table: pl.DataFrame, bad: pl.Expr, what: str, path: Path | str) -> pl.DataFrame:
        """Drop the rows where ``bad`` holds; ``table`` has their numbers in the file in a column ``row``."""
        rows = table.filter(bad)
        if rows.is_empty():
            return table
        self.reject(path, rows["row"][0], what, len(rows), rows.head(EXAMPLES).to_dicts())
        return table.filter(~bad)

    def unique_items(self, items: pl.DataFrame, path: Path | str) -> pl.DataFrame:
        """Keep the first row of every item_id; surplus rows are counted, not an error (real catalogues have them)."""
        surplus = items.filter(~pl.col("item_id").is_first_distinct())
        self.note(
            f"{Path(path).name}: surplus rows of an item (first one kept)", len(surplus), list(surplus["item_id"])
        )
        return items.filter(pl.col("item_id").is_first_distinct())


def local_file(path: Path | str) -> Path:
    """The file on this machine; ``hf://datasets/<owner>/<name>[@<revision>]/<file>`` is fetched from the Hub once."""
    if not str(path).startswith("hf:"):
        return Path(path)
    # Path() turns hf:// into hf:/
    match = re.fullmatch(r"hf:/+datasets/([^/]+/[^/@]+)(?:@([^/]+))?/(.+)", str(path))
    if match is None:
        raise ValueError(
            f"{path}: expected hf://datasets/<owner>/<name>/<file>, with @<revision> after the name if wanted"
        )
    repo, revision, file = match.groups()
    return Path(hf_hub_download(repo, file, repo_type="dataset", revision=revision))


def read_csv(path: Path, bad: BadRows, separator: str = ",") -> pl.DataFrame:
    """Read a delimited file (gzipped or not) with a header as strings; empty fields are null.

    Adds ``row``, the number of the row in the file with the header as row 1. A file that is not UTF-8 is read as
    Windows-1252 and noted; rows with too many fields are bad rows. Empty files are an error.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        table = pl.read_csv(path, separator=separator, infer_schema=False)
    except pl.exceptions.NoDataError as error:
        raise ValueError(f"{path}: the file is empty; a header row is needed") from error
    except pl.exceptions.PolarsError:  # ragged, badly quoted or not UTF-8: read it slowly, naming the rows
        table = _read_csv_slowly(path, bad, separator)
    else:
        table = table.with_row_index("row", offset=2)
    return table.rename(str.strip)


def _read_csv_slowly(path: Path, bad: BadRows, separator: str) -> pl.DataFrame:
    rows = csv.reader(read_text(path, bad).splitlines(keepends=True), delimiter=separator)
    header = next(rows)
    good, wrong = [], []
    for number, row in enumerate(rows, start=2):
        if len(row) <= len(header):
            good.append([str(number), *(value or None for value in row), *[None] * (len(header) - len(row))])
        else:
            wrong.append((number, row))
    if wrong:
        what = f"more than the header's {len(header)} fields"
        bad.reject(path, wrong[0][0], what, len(wrong), [row for _, row in wrong])
    schema = {name: pl.String for name in ["row", *header]}
    return pl.DataFrame(good, schema=schema, orient="row").with_columns(pl.col("row").cast(pl.UInt32))


def read_text(path: Path, bad: BadRows) -> str:
    """A text file as UTF-8 (with or without a mark), else as Windows-1252, which is noted; gzipped or not."""
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad.note(f"{path.name}: not UTF-8, read as Windows-1252", 1, [str(error)])
        return data.decode("cp1252", errors="replace")


def read_jsonl(path: Path, schema: dict[str, Any], bad: BadRows) -> pl.DataFrame:
    """Read the fields of ``schema`` (name -> Polars type) from a JSON-lines file, gzipped or not; plus ``row``.

    Fields that are absent are null; lines that are no JSON object are bad rows; a value of another type than declared
    becomes null (a text field takes numbers as text).
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return pl.scan_ndjson(path, schema=schema).with_row_index("row", offset=1).collect()
    except pl.exceptions.PolarsError:  # one bad line is enough: read slowly, naming the rows
        return _read_jsonl_slowly(path, schema, bad)


def _read_jsonl_slowly(path: Path, schema: dict[str, Any], bad: BadRows) -> pl.DataFrame:
    columns: dict[str, list[Any]] = {"row": [], **{name: [] for name in schema}}
    wrong = []
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line) if line.strip() else None
            except ValueError:
                record = line
            if isinstance(record, dict):
                columns["row"].append(number)
                for name in schema:
                    columns[name].append(record.get(name))
            elif record is not None:
                wrong.append((number, line.strip()))
    if wrong:
        bad.reject(path, wrong[0][0], "not a JSON object", len(wrong), [line for _, line in wrong])
    return pl.DataFrame(
        [pl.Series("row", columns["row"], dtype=pl.UInt32)]
        + [_lenient(name, columns[name], dtype) for name, dtype in schema.items()]
    )


def _lenient(name: str, values: list[Any], dtype: Any) -> pl.Series:
    if dtype == pl.String:
        values = [
            value if isinstance(value, str) else None if value is None or isinstance(value, dict | list) else str(value)
            for value in values
        ]
    return pl.Series(name, values, dtype=dtype, strict=False)


def parse_time(column: str) -> pl.Expr:
    """Text, number or date -> int64 in the column's own unit (dates: seconds); null where it cannot be read."""
    text = pl.col(column).cast(pl.String).str.strip_chars()
    number = text.cast(pl.Int64, strict=False)
    number = number.fill_null(text.cast(pl.Float64, strict=False).cast(pl.Int64, strict=False))
    # ISO dates, with or without a time of day; a zone is honoured, otherwise UTC
    date = text.str.replace("T", " ").str.replace(r"(\.\d+)?(Z|\+00:?00)?$", "")
    for form in ("%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M", "%Y-%m-%d"):
        parsed = date.str.to_datetime(form, strict=False, time_unit="ms").dt.epoch("s")
        number = number.fill_null(parsed)
    return number.alias(column)


def to_seconds(log: pl.DataFrame) -> pl.DataFrame:
    """Bring ``timestamp`` to seconds; milli- and microseconds are recognised by their size (later than 1973 each).

    Rounding down can make ties, so the finer order is first made the order of rows.
    """
    middle = log["timestamp"].median()
    size = abs(middle) if isinstance(middle, int | float) else 0.0
    for limit, divisor in ((1e17, 10**9), (1e14, 10**6), (1e11, 10**3)):
        if size >= limit:
            log = log.sort("timestamp", maintain_order=True)
            return log.with_columns(pl.col("timestamp") // divisor)
    return log


def interactions_from(table: pl.DataFrame, path: Path | str, columns: dict[str, str], bad: BadRows) -> pl.DataFrame:
    """The log in ``table``, whose columns are named by ``columns`` (user_id, item_id, timestamp -> their names)."""
    if missing := [name for name in columns.values() if name not in table.columns]:
        have = [name for name in table.columns if name != "row"]
        raise ValueError(f"{path}: no column {missing[0]!r}; it has {have}. Name yours by a column mapping.")
    log = table.select("row", *(pl.col(name).alias(ours) for ours, name in columns.items()))
    log = log.with_columns(pl.col("user_id", "item_id").cast(pl.String).str.strip_chars())
    for name in ("user_id", "item_id"):
        log = bad.drop(log, pl.col(name).is_null() | (pl.col(name) == ""), f"no {name}", path)
    log = log.with_columns(parse_time("timestamp").alias("time"))
    log = bad.drop(log, pl.col("time").is_null(), "timestamp is no number or date", path)
    return to_seconds(log.select("user_id", "item_id", timestamp="time"))


def join_text(*parts: pl.Expr) -> pl.Expr:
    """Join text parts with a blank, leaving out what is missing or empty."""
    clean = [pl.when(part.str.strip_chars() != "").then(part.str.strip_chars()) for part in parts]
    return pl.concat_str(clean, separator=" ", ignore_nulls=True)


def image_files(folder: Path | None) -> dict[str, str]:
    """Name without suffix -> path, for the pictures of a folder (searched one level deep); {} when there is none."""
    if folder is None or not folder.is_dir():
        return {}
    found = (path for pattern in ("*", "*/*") for path in sorted(folder.glob(pattern)))
    suffixes = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".avif"}
    return {path.stem: str(path) for path in found if path.suffix.lower() in suffixes}
