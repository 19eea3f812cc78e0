"""What every source yields: a log and a catalogue as they are in the files, and a list of all that was left out.

A source (the files of ``data/sources``) returns :class:`RawData`. Cleaning comes later. A log may be far larger than
memory: it is scanned, never collected.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import polars as pl

from mllm_msr.records.schema import INTERACTIONS
from mllm_msr.records.sections import OnBadRows

Frame = TypeVar("Frame", pl.DataFrame, pl.LazyFrame)
CATALOGUE: dict[str, Any] = {
    "item_id": pl.String,
    "title": pl.String,
    "text": pl.String,
    "image_path": pl.String,
    "image_bytes": pl.Binary,
}
ROW = "(row in its file)"  # the column with each row's number; no file has one of this name
EXAMPLES = 5  # how many cases of one oddity a report shows
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]+")  # what moves or colours a terminal's text
CONTROLS = "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"  # which no title or text means, and some stores do not take
LONGEST = 200  # characters of a value in a message


class Skipped(TypedDict):
    """Something odd in the raw data: what it is, how often it occurs, and some of the rows."""

    what: str
    count: int
    examples: list[str]


def oddity(what: str, count: int, examples: Iterable[Any]) -> Skipped:
    """An entry of a report's list of oddities, its first few examples shortened."""
    return {"what": what, "count": count, "examples": [short(example) for example in islice(examples, EXAMPLES)]}


def short(value: Any) -> str:
    """A value for a message: its text on one line, cut where it is too long to be read."""
    text = one_line(str(value))
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def one_line(text: str) -> str:
    """Other people's text on one line of a terminal, without what would break the line, or move or colour others."""
    return CONTROL.sub(" ", text)


def meant(wanted: Iterable[str], have: Sequence[str]) -> dict[str, str]:
    """Columns that are there under another spelling: their names -> the wanted ones, where just one fits.

    >>> meant(["item_id", "title", "text"], ["Item ID", "title", "Text", "TEXT"])
    {'Item ID': 'item_id'}
    """
    wanted, letters = list(wanted), [_letters(name) for name in have]
    found = {}
    for name in wanted:
        if name not in have and letters.count(_letters(name)) == 1:
            theirs = have[letters.index(_letters(name))]
            if theirs not in wanted:
                found[theirs] = name
    return found


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", name)).casefold()


def need_columns(have: Sequence[str], columns: Sequence[str], path: Path | str) -> None:
    """Raise ValueError, naming what is there, unless a table has all ``columns``."""
    if missing := [name for name in columns if name not in have]:
        raise ValueError(
            f"{path}: no column {missing[0]!r}; it has {short([name for name in have if name != ROW])} as its header. "
            "Add the header if that is data, or name yours by a column mapping (--column; own tables only)."
        )


@dataclass
class RawData:
    """A log and its catalogue, before cleaning.

    Args:
        interactions: ``user_id``, ``item_id``, ``timestamp`` (a DataFrame is taken too); the order of rows breaks ties
            in time.
        items: ``item_id`` (unique), ``title``, ``text``, ``image_path`` (a file or a URL), ``image_bytes``; a missing
            column is filled with "" or null.
        skipped: what was left out or looked odd.
        ticks: what ``timestamp`` counts, so many a second; cleaning brings it to seconds.
    """

    interactions: pl.LazyFrame
    items: pl.DataFrame
    skipped: list[Skipped] = field(default_factory=list)
    ticks: int = 1

    def __post_init__(self) -> None:
        in_memory = isinstance(self.interactions, pl.DataFrame)
        log = _conform(self.interactions.lazy(), INTERACTIONS.columns, "interactions")
        optional = [pl.lit(None, CATALOGUE[c]).alias(c) for c in CATALOGUE if c not in self.items.columns]
        self.items = _conform(self.items.lazy().with_columns(optional), CATALOGUE, "items").collect()
        words = pl.col("title", "text").fill_null("").str.replace_all(CONTROLS, " ").str.strip_chars()
        self.items = self.items.with_columns(words)
        if in_memory:  # readers check what they scan
            _no_nulls(log.collect(), list(INTERACTIONS.columns))
        self.interactions = log
        _no_nulls(self.items, ["item_id"])
        if self.items["item_id"].is_duplicated().any():
            raise ValueError("items: item_id must be unique; keep one row an item (see BadRows.unique_items)")


def _conform(table: pl.LazyFrame, columns: Mapping[str, Any], what: str) -> pl.LazyFrame:
    need_columns(table.collect_schema().names(), list(columns), what)
    return table.select(pl.col(name).cast(dtype) for name, dtype in columns.items())


def _no_nulls(table: pl.DataFrame, columns: list[str]) -> None:
    if lacking := max(table.select(columns).null_count().row(0)):
        raise ValueError(f"{lacking} rows lack one of {columns}; drop them first")


@dataclass
class BadRows:
    """The bad rows of one source: the first one stops, with a ``remedy``, or all are dropped and counted."""

    on_bad_rows: OnBadRows = "error"
    skipped: list[Skipped] = field(default_factory=list)
    remedy: str = "Mend the row, or leave such rows out and count them with on_bad_rows='skip' (--on-bad-rows skip)."

    def note(self, what: str, count: int, examples: list[Any]) -> None:
        """Count something odd that does no harm."""
        if count:
            self.skipped.append(oddity(what, count, examples))

    def reject(self, path: Path | str, row: int | str, what: str, count: int, examples: list[Any]) -> None:
        """Raise for the first bad row, or count them all, as ``on_bad_rows`` says."""
        if self.on_bad_rows == "error":
            raise ValueError(f"{path}, row {row}: {what}: {short(examples[0])}. {self.remedy}")
        self.note(f"{Path(path).name}: {what}", count, examples)

    def drop(self, table: Frame, bad: dict[str, pl.Expr], path: Path | str) -> Frame:
        """Drop the rows where one of ``bad`` (reason -> condition) holds; ``table`` has their numbers in the file in a
        column ``ROW``. Of a scan only the bad rows' examples are collected."""
        conditions = {what: condition.fill_null(False) for what, condition in bad.items()}
        sums = [condition.sum().alias(what) for what, condition in conditions.items()]
        counts = table.lazy().select(sums).collect(engine="streaming").to_dicts()[0]
        for what, condition in conditions.items():
            if counts[what]:
                rows = table.lazy().filter(condition).head(EXAMPLES).collect(engine="streaming")
                public = rows.select(pl.exclude(r"^\(.*\)$"))  # what a reader has added stands in parentheses
                self.reject(path, rows[ROW][0], what, counts[what], public.to_dicts())
        return table.filter(~pl.any_horizontal(conditions.values())) if any(counts.values()) else table

    def unique_items(self, items: pl.DataFrame, path: Path | str) -> pl.DataFrame:
        """Keep the first row of every item_id; surplus rows are counted, not an error (real catalogues have them)."""
        surplus = items.filter(~pl.col("item_id").is_first_distinct())
        self.note(
            f"{Path(path).name}: surplus rows of an item (first one kept)", len(surplus), list(surplus["item_id"])
        )
        return items.filter(pl.col("item_id").is_first_distinct())


@dataclass
class Wrong:
    """Rows that could not be read, counted while the rest goes on."""

    count: int = 0
    row: int = 0
    examples: list[Any] = field(default_factory=list)

    def add(self, row: int, example: Any) -> None:
        self.row = self.row or row
        self.count += 1
        self.examples += [example] * (self.count <= EXAMPLES)

    def report(self, bad: BadRows, path: Path, what: str) -> None:
        if self.count:
            bad.reject(path, self.row, what, self.count, self.examples)
