"""A log as a source has it -> user_id, item_id and timestamp, with bad rows named or counted."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from mllm_msr.data.ids import joined_ids
from mllm_msr.data.raw import ROW, BadRows, need_columns
from mllm_msr.data.text_files import reading
from mllm_msr.data.times import alike, with_times


def interactions_from(
    tables: Sequence[pl.LazyFrame], path: Path | str, columns: Mapping[str, str], bad: BadRows
) -> tuple[pl.LazyFrame, int]:
    """The log in the parts ``tables``, and how many of its time units are a second.

    Args:
        columns: user_id, item_id, timestamp -> their names in the tables.
    """
    with reading(path):
        need_columns(tables[0].collect_schema().names(), list(columns.values()), path)
        parts = [table.select(ROW, *(pl.col(name).alias(ours) for ours, name in columns.items())) for table in tables]
        log = joined_ids(alike(parts, path), ["user_id", "item_id"], path, bad)
        log, ticks, problems = with_times(log, path, bad)
        missing = {f"no {name}": pl.col(name).is_null() for name in ("user_id", "item_id")}
        log = bad.drop(log, {**missing, **problems}, path)
        log = log.select("user_id", "item_id", timestamp="(time)")
        if log.head(1).collect(engine="streaming").is_empty():
            raise ValueError(f"{path}: no interactions: the log is empty, or every row of it was bad")
        return log, ticks


def join_text(*parts: pl.Expr) -> pl.Expr:
    """Join text parts with a blank, leaving out what is missing or empty."""
    clean = [pl.when(part.str.strip_chars() != "").then(part.str.strip_chars()) for part in parts]
    return pl.concat_str(clean, separator=" ", ignore_nulls=True)
