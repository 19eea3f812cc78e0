"""Ids as their users mean them: 10.0 is 10, leading zeros stay, NaN is missing; and whether two tables' ids meet."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from mllm_msr.data.raw import EXAMPLES, BadRows, short

# As pandas, R, Excel and databases write a missing value; pandas takes the same for one.
MISSING = ("", "NaN", "nan", "NaT", "NULL", "null", "<NA>", "None", "NA", "N/A", "n/a", "#N/A", r"\N")
EXACT: dict[Any, float] = {
    pl.Float16: 2.0**11,
    pl.Float32: 2.0**24,
    pl.Float64: 2.0**53,
}  # floats hold every whole number below
AS_FLOAT = r"^([+-]?\d+)\.0+$"
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


def as_ids(table: pl.LazyFrame, columns: Sequence[str], path: Path | str, bad: BadRows) -> pl.LazyFrame:
    """The table with ids as text in some columns, null where they are missing.

    Whole numbers that were kept as floats lose their ".0". A fraction in a column of numbers, a number so large that a
    float has rounded it, or a character that could not be read (U+FFFD, which would make two ids one) is a bad row.

    Raises:
        ValueError: a column of lists or structures; a bad row, unless bad rows are skipped.
    """
    schema = table.collect_schema()
    for name in columns:
        if schema[name].is_nested() or not is_text(schema[name]):
            raise ValueError(f"{path}: ids are numbers or texts, but {name} is a column of {short(schema[name])}")
    texts = [name for name in columns if not (schema[name].is_integer() or schema[name].is_float())]
    table = table.with_columns(as_text(name, schema[name]) for name in texts)
    marks = [pl.col(name).str.contains(r"\.0+$|[eE]\+\d+$").any() for name in texts]
    lost = [pl.col(name).str.contains("\ufffd", literal=True).any().alias(f"{name} lost") for name in texts]
    counts = table.select(*marks, *lost).collect(engine="streaming").row(0) if texts else ()
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
    for name, any_lost in zip(texts, counts[len(texts) :], strict=True):
        if any_lost:
            unread = pl.col(name).str.contains("\ufffd", literal=True)
            problems[f"{name} has a character that is no valid text (U+FFFD), so it may be another's"] = unread
    if problems:
        table = bad.drop(table, problems, path)
    return table.with_columns(exact)


def check_join(log: pl.LazyFrame, items: pl.DataFrame, path: Path | str) -> pl.Series:
    """The ids of the log's items, after a check that the catalogue has at least half of them.

    Raises:
        ValueError: it has fewer; with ids of both sides.
    """
    chosen = log.select(pl.col("item_id").unique()).collect(engine="streaming")["item_id"].sort()
    absent = chosen.filter(~chosen.is_in(items["item_id"].implode()))
    if 2 * len(absent) > len(chosen):
        surplus = items["item_id"].filter(~items["item_id"].is_in(chosen.implode()))
        sides = [short([short(item_id) for item_id in ids.head(EXAMPLES)]) for ids in (absent, surplus)]
        raise ValueError(
            f"{path}: of the {len(chosen)} items in the log, this catalogue has only {len(chosen) - len(absent)}. "
            f"Without it are {sides[0]}; the catalogue has {sides[1]}. Write ids alike in both tables, or map the "
            "columns that hold the same ids (--column; own tables only), or leave the catalogue out."
        )
    return chosen
