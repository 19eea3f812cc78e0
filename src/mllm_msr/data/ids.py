"""Ids as their users mean them: 10.0 is 10, leading zeros stay, NaN is missing; and whether two tables' ids meet."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import polars as pl

from mllm_msr.data.raw import EXAMPLES, ROW, BadRows, short

# As pandas, R, Excel and databases write a missing value; pandas takes the same for one.
MISSING = ("", "NaN", "nan", "NaT", "NULL", "null", "<NA>", "None", "NA", "N/A", "n/a", "#N/A", r"\N")
EXACT: dict[Any, float] = {
    pl.Float16: 2.0**11,
    pl.Float32: 2.0**24,
    pl.Float64: 2.0**53,
}  # floats hold every whole number below
AS_FLOAT = r"^([+-]?\d+)\.0+$"
INVISIBLE = "[\x00-\x08\x0e-\x1f\x7f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]"
BLANK = "[\t-\r\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]"  # a space of another kind
NO_TEXT = "[\x00-\x08\x0e-\x1f\ufffd]"  # of bytes, as in a UUID that is no text
ROUNDED = r"^[+-]?\d+(?:\.\d+)?[eE]\+\d+$|^[+-]?\d{17,}\.0+$"  # as Python writes floats beyond that


def is_text(dtype: pl.DataType) -> bool:
    """Whether values of a type can be written as a text, as :func:`as_text` does."""
    return dtype == pl.List(pl.String) or not (dtype.is_nested() or dtype in (pl.Object, pl.Duration))


def as_text(column: str, dtype: pl.DataType) -> pl.Expr:
    """A column as trimmed text; null where a value is missing, or of a type that is none (see :func:`is_text`).

    Lists of texts are joined, whole numbers that were kept as floats lose their ".0", and bytes that are no UTF-8
    become U+FFFD.
    """
    value = pl.col(column)
    if not is_text(dtype):
        return pl.lit(None, pl.String).alias(column)
    if dtype == pl.List(pl.String):
        value = value.list.join(" ", ignore_nulls=True)
    elif dtype == pl.Binary:
        value = value.map_batches(_decoded, return_dtype=pl.String)
    text = value.cast(pl.String, strict=False).str.strip_chars()
    if dtype.is_float():
        text = text.str.replace(AS_FLOAT, "$1")
    return pl.when(~text.is_in(MISSING)).then(text).alias(column)


def _decoded(values: pl.Series) -> pl.Series:
    texts = [None if value is None else value.decode("utf-8", "replace") for value in values]
    return pl.Series(values.name, texts, pl.String)


def plain(value: pl.Expr) -> pl.Expr:
    """Ids without what nobody sees: invisible characters, other kinds of spaces, letters composed of two characters."""
    return value.str.normalize("NFC").str.replace_all(INVISIBLE, "").str.replace_all(BLANK, " ").str.strip_chars()


def plain_id(text: str) -> str:
    """A text as the id that it means, as in a column of ids.

    >>> plain_id(" cafe\\u0301\\u200b"), plain_id("10.0"), plain_id("007")
    ('café', '10', '007')
    """
    text = re.sub(BLANK, " ", re.sub(INVISIBLE, "", unicodedata.normalize("NFC", text))).strip()
    return re.sub(AS_FLOAT, r"\1", text)


def as_ids(table: pl.LazyFrame, columns: Sequence[str], path: Path | str, bad: BadRows) -> pl.LazyFrame:
    """The table with ids as text in some columns, null where they are missing.

    Whole numbers that were kept as floats lose their ".0", and ids what nobody sees (see :func:`plain`), which is
    noted. A fraction in a column of numbers, a number so large that a float has rounded it, bytes that are no text, or
    a character that could not be read (U+FFFD, which would make two ids one) is a bad row.

    Raises:
        ValueError: a column of lists or structures; a bad row, unless bad rows are skipped.
    """
    schema = table.collect_schema()
    for name in columns:
        if schema[name].is_nested() or not is_text(schema[name]):
            first = f", row {table.select(pl.col(ROW).first()).collect().item()}" if ROW in schema else ""
            raise ValueError(
                f"{path}{first}: ids are numbers or texts, but {name} is a column of {short(schema[name])}: write them "
                "so, or name another column (--column; own tables only)"
            )
    texts = [name for name in columns if not (schema[name].is_integer() or schema[name].is_float())]
    table = table.with_columns(as_text(name, schema[name]) for name in texts)
    marks = [pl.col(name).str.contains(r"\.0+$|[eE]\+\d+$").any() for name in texts]
    unread = {name: pl.col(name).str.contains(NO_TEXT if schema[name] == pl.Binary else "\ufffd") for name in texts}
    lost = [unread[name].any().alias(f"{name} lost") for name in texts]
    odd = [pl.col(name).str.contains(r"[^\x20-\x7e]").any().alias(f"{name} odd") for name in texts]
    counts = table.select(*marks, *lost, *odd).collect(engine="streaming").row(0) if texts else ()
    rounded, exact = {}, []
    for name in columns:
        value = pl.col(name)
        if schema[name].is_float():
            whole = value.is_finite() & (value == value.floor()) & (value.abs() < EXACT[schema[name].base_type()])
            rounded[name] = value.is_not_nan() & ~whole
            exact.append(value.cast(pl.Int64, strict=False).cast(pl.String))
        elif schema[name].is_integer():
            exact.append(value.cast(pl.String))
        elif counts[texts.index(name)]:
            rounded[name] = value.str.contains(ROUNDED)
            exact.append(value.str.replace(AS_FLOAT, "$1"))
    what = "is a fraction, or a number so large that a float has rounded it"
    problems = {f"{name} {what}": wrong for name, wrong in rounded.items()}
    for name, any_lost in zip(texts, counts[len(texts) : 2 * len(texts)], strict=True):
        if any_lost:
            what = "has a character that is no valid text (U+FFFD), so it may be another's"
            if schema[name] == pl.Binary:
                what = "is bytes that are no text: write it as one (such as CAST(id AS VARCHAR))"
            problems[f"{name} {what}"] = unread[name]
    if problems:
        table = bad.drop(table, problems, path)
    table = table.with_columns(exact)
    for name in (name for name, any_odd in zip(texts, counts[2 * len(texts) :], strict=True) if any_odd):
        changed = table.filter(pl.col(name) != plain(pl.col(name))).select(
            pl.len(), pl.col(name).head(EXAMPLES).implode()
        )
        count, examples = changed.collect(engine="streaming").row(0)
        if count:
            what = f"{name} with invisible or composed characters, read as without"
            bad.note(f"{Path(path).name}: {what}", count, [ascii(each) for each in examples])
            value = plain(pl.col(name))
            table = table.with_columns(pl.when(value != "").then(value).alias(name))
    return table


def joined_ids(tables: Iterable[pl.LazyFrame], columns: Sequence[str], path: Path | str, bad: BadRows) -> pl.LazyFrame:
    """The parts of a table as one, with ids as :func:`as_ids` makes them of each run of parts with the same types: one
    type for all might round some, or make texts of lists.

    Raises:
        ValueError: as there; or another column has types that do not go together.
    """

    def types(table: pl.LazyFrame) -> list[pl.DataType]:
        schema = table.collect_schema()
        return [schema[name] for name in columns]

    runs = [pl.concat(run, how="diagonal_relaxed") for _, run in groupby(tables, types)]
    return pl.concat([as_ids(run, columns, path, bad) for run in runs], how="diagonal_relaxed")


def check_join(log: pl.LazyFrame, items: pl.DataFrame, path: Path | str, bad: BadRows) -> pl.Series:
    """The ids of the log's items, after a check that the catalogue has at least half of them; others are noted, and so
    is that ids differ only in how they are written.

    Raises:
        ValueError: it has fewer; with ids of both sides.
    """
    chosen = log.select(pl.col("item_id").unique()).collect(engine="streaming")["item_id"].sort()
    absent = chosen.filter(~chosen.is_in(items["item_id"].implode()))
    if not len(items):
        raise ValueError(f"{path}: this catalogue has no rows, or every row of it was bad")
    if not len(absent):
        return chosen
    surplus = items["item_id"].filter(~items["item_id"].is_in(chosen.implode()))
    if 2 * len(absent) > len(chosen):
        sides = [short([short(item_id) for item_id in ids.head(EXAMPLES)]) for ids in (absent, surplus)]
        raise ValueError(
            f"{path}: of the {len(chosen)} items in the log, this catalogue has only {len(chosen) - len(absent)}. "
            f"Without it are {sides[0]}; the catalogue has {sides[1]}. Write ids alike in both tables, or map the "
            "columns that hold the same ids (--column; own tables only), or leave the catalogue out."
        )
    name = Path(path).name
    bad.note(f"{name}: items of the log that this catalogue lacks", len(absent), absent.to_list())
    pairs = _letters(absent).join(_letters(surplus), on="letters", how="inner", maintain_order="left")
    what = f"{name}: of these, ids that the catalogue writes otherwise (case, leading zeros, punctuation)"
    bad.note(what, pairs["id"].n_unique(), [f"{ours} and {theirs}" for ours, _, theirs in pairs.iter_rows()])
    return chosen


def _letters(ids: pl.Series) -> pl.DataFrame:
    """Ids with their letters and digits alone, which are alike where only the way of writing differs."""
    letters = pl.col("id").str.normalize("NFKC").str.to_lowercase().str.replace_all(r"[^\p{L}\p{N}]", "")
    frame = ids.alias("id").to_frame().with_columns(letters=letters.str.replace(r"^0+(.)", "$1"))
    return frame.filter(pl.col("letters") != "")
