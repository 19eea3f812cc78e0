"""Ids as their users mean them: 10.0 is 10, leading zeros stay, NaN is missing; and whether two tables' ids meet."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from mllm_msr.data.raw import EXAMPLES, BadRows, short

MISSING = ("", "NaN", "nan", "NaT", "NULL", "null", "<NA>", r"\N")  # as pandas and databases write a missing value
EXACT = 2.0**53  # floats hold every whole number up to here
AS_FLOAT = r"^([+-]?\d+)\.0+$"
ROUNDED = r"^[+-]?\d+(?:\.\d+)?[eE]\+\d+$|^[+-]?\d{17,}\.0+$"  # as Python writes floats beyond that


def as_text(column: str, dtype: pl.DataType) -> pl.Expr:
    """A column as trimmed text; null where a value is missing, or is a structure. Lists of texts are joined."""
    value = pl.col(column)
    if dtype == pl.List(pl.String):
        value = value.list.join(" ", ignore_nulls=True)
    elif dtype.is_nested() or dtype == pl.Object:
        return pl.lit(None, pl.String).alias(column)
    text = value.cast(pl.String, strict=False).str.strip_chars()
    return pl.when(~text.is_in(MISSING)).then(text).alias(column)


def as_ids(table: pl.LazyFrame, columns: Sequence[str], path: Path | str, bad: BadRows) -> pl.LazyFrame:
    """The table with ids as text in some columns, null where they are missing.

    Whole numbers that were kept as floats lose their ".0". A fraction in a column of numbers, or a number so large that
    a float has rounded it, is a bad row.

    Raises:
        ValueError: a column of lists or structures; a bad row, unless bad rows are skipped.
    """
    schema = table.collect_schema()
    for name in columns:
        if schema[name].is_nested() or schema[name] == pl.Object:
            raise ValueError(f"{path}: ids are numbers or texts, but {name} is a column of {short(schema[name])}")
    texts = [name for name in columns if not (schema[name].is_integer() or schema[name].is_float())]
    table = table.with_columns(as_text(name, schema[name]) for name in texts)
    marks = [pl.col(name).str.contains(r"\.0+$|[eE]\+\d+$").any() for name in texts]
    counts = table.select(marks).collect(engine="streaming").row(0) if texts else ()
    rounded, exact = {}, []
    for name in columns:
        value = pl.col(name)
        if schema[name].is_float():
            whole = value.is_finite() & (value == value.floor()) & (value.abs() <= EXACT)
            rounded[name] = value.is_not_nan() & ~whole
            exact.append(value.cast(pl.Int64, strict=False).cast(pl.String))
        elif schema[name].is_integer():
            exact.append(value.cast(pl.String))
        elif counts[texts.index(name)]:
            rounded[name] = value.str.contains(ROUNDED)
            exact.append(value.str.replace(AS_FLOAT, "$1"))
    if rounded:
        what = "is a fraction, or a number so large that a float has rounded it"
        table = bad.drop(table, {f"{name} {what}": wrong for name, wrong in rounded.items()}, path)
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
