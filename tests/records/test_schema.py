"""Tables: checked where they are read and written, with an error that names file and column."""

from pathlib import Path

import polars as pl
import pytest

from mllm_msr.records import schema
from mllm_msr.records.schema import EXAMPLES, INTERACTIONS, SCORES, Table

TABLES = [table for table in vars(schema).values() if isinstance(table, Table)]
LOG = INTERACTIONS.frame([("u1", "i1", 5), ("u1", "i2", 6)])


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_an_empty_table_is_written_and_read_back(table: Table, tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    table.write(table.frame(), path)
    frame = table.read(path)
    assert frame.is_empty() and frame.columns == list(table.columns)


def test_columns_come_in_their_order_or_as_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "data/interactions.parquet"
    INTERACTIONS.write(LOG.select("timestamp", "user_id", "item_id"), path)
    assert INTERACTIONS.read(path).equals(LOG)
    assert INTERACTIONS.read(path, ["item_id"]).to_series().to_list() == ["i1", "i2"]
    assert INTERACTIONS.scan([path, path]).collect().height == 4


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (LOG.drop("item_id"), r"log\.parquet: the table 'interactions' needs a column 'item_id', but this file has"),
        (LOG.cast({"timestamp": pl.String}), r"log\.parquet: column 'timestamp' .* is String, not Int64"),
    ],
)
def test_a_file_of_another_origin_is_refused(frame: pl.DataFrame, message: str, tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    frame.write_parquet(path)
    for read in (INTERACTIONS.read, INTERACTIONS.scan):
        with pytest.raises(ValueError, match=message):
            read(path)
    with pytest.raises(ValueError, match=message):
        INTERACTIONS.write(frame, path)


def test_a_column_that_the_table_has_not_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'interactions' has no column 'stars'"):
        INTERACTIONS.write(LOG.with_columns(stars=1), tmp_path / "log.parquet")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"scores\.parquet is missing"):
        SCORES.read(tmp_path / "scores.parquet")


def test_a_file_whose_end_alone_is_sound_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    INTERACTIONS.write(LOG, path)
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"log\.parquet is no whole Parquet file"):
        INTERACTIONS.read(path)


def test_a_table_with_a_file_for_each_split_has_to_be_told_which(tmp_path: Path) -> None:
    assert EXAMPLES.path(tmp_path, "validation") == tmp_path / "sft/validation.parquet"
    with pytest.raises(ValueError, match="has a file for each split: say which"):
        EXAMPLES.path(tmp_path)


def test_no_two_tables_share_a_name_or_a_file() -> None:
    for values in ([table.name for table in TABLES], [table.file for table in TABLES if table.file]):
        assert len(values) == len(set(values))
