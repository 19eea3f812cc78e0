"""Files of other people's making, read as they are: CSV, JSON lines, times of any kind."""

import codecs
import csv
import gzip
import io
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import count, islice
from pathlib import Path
from typing import Any

import polars as pl
from huggingface_hub import hf_hub_download

from mllm_msr.data.raw import BadRows, Wrong

CHUNK = 200_000  # rows held at a time where a file must be read slowly


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


def batches(rows: Iterable[Any], size: int = CHUNK) -> Iterator[list[Any]]:
    """Lists of at most ``size`` of ``rows``."""
    rows = iter(rows)
    return iter(lambda: list(islice(rows, size)), [])


@cache
def _spools() -> tuple[tempfile.TemporaryDirectory, Iterator[int]]:
    return tempfile.TemporaryDirectory(prefix="mllm_msr_"), count()  # removed when the process ends


def spool_folder() -> Path:
    """An empty folder among the system's temporary files (``TMPDIR``), gone when the process ends."""
    root, numbers = _spools()
    folder = Path(root.name) / str(next(numbers))
    folder.mkdir()
    return folder


def spool(tables: pl.LazyFrame | Iterable[pl.DataFrame]) -> pl.LazyFrame:
    """A scan of what was parsed once into Parquet, in the system's folder for temporary files (``TMPDIR``)."""
    folder = spool_folder()
    if isinstance(tables, pl.LazyFrame):
        tables.sink_parquet(folder / "all.parquet", compression="lz4")
    else:
        for number, table in enumerate(tables):
            table.write_parquet(folder / f"{number:06d}.parquet", compression="lz4")
    return pl.scan_parquet(sorted(folder.glob("*.parquet")))


def read_csv(path: Path, bad: BadRows, separator: str = ",") -> pl.LazyFrame:
    """Read a delimited file (gzipped or not) with a header as strings; empty fields are null.

    Adds ``row``, the number of the row in the file with the header as row 1. A file that is not UTF-8 is read as
    Windows-1252 and noted; rows with too many fields are bad rows. Empty files are an error.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        table = spool(
            pl.scan_csv(path, separator=separator, infer_schema=False, row_index_name="row", row_index_offset=2)
        )
    except pl.exceptions.NoDataError as error:
        raise ValueError(f"{path}: the file is empty; a header row is needed") from error
    except pl.exceptions.PolarsError:  # ragged, badly quoted or not UTF-8: read it slowly, naming the rows
        table = spool(_read_csv_slowly(path, bad, separator))
    return table.rename(str.strip)


def _read_csv_slowly(path: Path, bad: BadRows, separator: str) -> Iterator[pl.DataFrame]:
    wrong = Wrong()
    with open_text(path, bad) as text:
        rows = csv.reader(text, delimiter=separator)
        header = next(rows)
        schema = {"row": pl.UInt32, **dict.fromkeys(header, pl.String)}
        yield pl.DataFrame(schema=schema)
        for chunk in batches(enumerate(rows, start=2)):
            good = []
            for number, row in chunk:
                if len(row) <= len(header):
                    good.append([number, *(value or None for value in row), *[None] * (len(header) - len(row))])
                else:
                    wrong.add(number, row)
            yield pl.DataFrame(good, schema=schema, orient="row")
    wrong.report(bad, path, f"more than the header's {len(header)} fields")


def open_text(path: Path, bad: BadRows) -> io.TextIOWrapper:
    """A text file as UTF-8 (with or without a mark), else as Windows-1252, which is noted; gzipped or not."""

    def opened() -> Any:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        return gzip.open(path) if zipped else path.open("rb")

    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with opened() as file:
            while block := file.read(1 << 20):
                decoder.decode(block)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        bad.note(f"{path.name}: not UTF-8, read as Windows-1252", 1, [str(error)])
        return io.TextIOWrapper(opened(), "cp1252", errors="replace", newline="")
    return io.TextIOWrapper(opened(), "utf-8-sig", newline="")


def read_jsonl(path: Path, schema: dict[str, Any], bad: BadRows) -> pl.LazyFrame:
    """Read the fields of ``schema`` (name -> Polars type) from a JSON-lines file, gzipped or not; plus ``row``.

    Fields that are absent are null; lines that are no JSON object are bad rows; a value of another type than declared
    becomes null (a text field takes numbers as text).
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return spool(pl.scan_ndjson(path, schema=schema).with_row_index("row", offset=1))
    except pl.exceptions.PolarsError:  # one bad line is enough: read slowly, naming the rows
        return spool(_read_jsonl_slowly(path, schema, bad))


def _read_jsonl_slowly(path: Path, schema: dict[str, Any], bad: BadRows) -> Iterator[pl.DataFrame]:
    wrong = Wrong()
    with open_text(path, bad) as lines:
        for chunk in batches(enumerate(lines, start=1)):
            columns: dict[str, list[Any]] = {"row": [], **{name: [] for name in schema}}
            for number, line in chunk:
                try:
                    record = json.loads(line) if line.strip() else None
                except ValueError:
                    record = line
                if isinstance(record, dict):
                    columns["row"].append(number)
                    for name in schema:
                        columns[name].append(record.get(name))
                elif record is not None:
                    wrong.add(number, line.strip())
            yield pl.DataFrame(
                [pl.Series("row", columns["row"], dtype=pl.UInt32)]
                + [_lenient(name, columns[name], dtype) for name, dtype in schema.items()]
            )
    wrong.report(bad, path, "not a JSON object")


def _lenient(name: str, values: list[Any], dtype: Any) -> pl.Series:
    if dtype == pl.String:
        values = [
            value if isinstance(value, str) else None if value is None or isinstance(value, dict | list) else str(value)
            for value in values
        ]
    return pl.Series(name, values, dtype=dtype, strict=False)


def parse_time(column: str, dtype: pl.DataType) -> pl.Expr:
    """Number, date or text of either -> int64 in the column's own unit (dates: microseconds, in text seconds); null
    where it cannot be read."""
    if dtype.is_integer():
        return pl.col(column).cast(pl.Int64, strict=False)
    if isinstance(dtype, pl.Datetime | pl.Date):
        return pl.col(column).dt.epoch("us")
    text = pl.col(column).cast(pl.String).str.strip_chars()
    number = text.cast(pl.Int64, strict=False)
    number = number.fill_null(text.cast(pl.Float64, strict=False).cast(pl.Int64, strict=False))
    # ISO dates, with or without a time of day; a zone is honoured, otherwise UTC
    date = text.str.replace("T", " ").str.replace(r"(\.\d+)?(Z|\+00:?00)?$", "")
    for form in ("%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M", "%Y-%m-%d"):
        parsed = date.str.to_datetime(form, strict=False, time_unit="ms").dt.epoch("s")
        number = number.fill_null(parsed)
    return number.alias(column)


def ticks_a_second(log: pl.LazyFrame) -> int:
    """The unit of ``timestamp``: milli-, micro- and nanoseconds show by the size of most (later than 1973)."""
    limits = {10**9: 1e17, 10**6: 1e14, 10**3: 1e11}
    size = pl.col("timestamp").abs()
    shares = log.select((size >= limit).mean().alias(str(ticks)) for ticks, limit in limits.items())
    row = shares.collect(engine="streaming").to_dicts()[0]
    return next((ticks for ticks in limits if (row[str(ticks)] or 0) >= 0.5), 1)


def interactions_from(
    table: pl.LazyFrame, path: Path | str, columns: dict[str, str], bad: BadRows
) -> tuple[pl.LazyFrame, int]:
    """The log in ``table``, whose columns are named by ``columns`` (user_id, item_id, timestamp -> their names), and
    how many of its time units are a second."""
    have = table.collect_schema()
    if missing := [name for name in columns.values() if name not in have]:
        names = [name for name in have if name != "row"]
        raise ValueError(
            f"{path}: no column {missing[0]!r}; it has {names} as its header. Add the header if that is data, or "
            "name yours by a column mapping (--column; own tables only)."
        )
    log = table.select("row", *(pl.col(name).alias(ours) for ours, name in columns.items()))
    log = log.with_columns(
        pl.col("user_id", "item_id").cast(pl.String).str.strip_chars(),
        parse_time("timestamp", have[columns["timestamp"]]).alias("time"),
    )
    checks = {f"no {name}": pl.col(name).is_null() | (pl.col(name) == "") for name in ("user_id", "item_id")}
    log = bad.drop(log, {**checks, "timestamp is no number or date": pl.col("time").is_null()}, path)
    log = log.select("user_id", "item_id", timestamp="time")
    return log, ticks_a_second(log)


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
