"""Logs as Spark and Ray leave them: folders by date, and addresses that fsspec reads."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import polars as pl
import pytest

from mllm_msr.data.remote_files import fetch, remote_fact, without_user
from mllm_msr.data.sources.registry import source_fingerprint
from mllm_msr.data.sources.tables import read_tables
from mllm_msr.records.sections import Source

DAYS = {"date=2020-01-01": [("u", 1), ("v", 2)], "date=2020-01-02": [("u", 2)], "date=2020-01-10": [("w", 1)]}
MAPPING = {"user_id": "who", "item_id": "what", "timestamp": "date"}
ROWS = [("u", "1", 1577836800), ("v", "2", 1577836800), ("u", "2", 1577923200), ("w", "1", 1578614400)]


def write_days(root: Path, name: str = "part-00000-4f9c.c000.snappy.parquet") -> Path:
    """A log by date; the dates are in the names of folders alone."""
    for day, rows in DAYS.items():
        (root / day).mkdir(parents=True)
        pl.DataFrame(rows, schema=["who", "what"], orient="row").write_parquet(root / day / name)
    return root


def rows_of(place: str | Path) -> list[tuple]:
    return sorted(read_tables(place, columns=MAPPING).interactions.collect().rows(), key=lambda row: (row[2], row[0]))


def test_a_folder_by_date_is_one_table_whoever_wrote_it(tmp_path: Path) -> None:
    spark = write_days(tmp_path / "spark")
    (spark / "_SUCCESS").touch()
    (spark / "date=2020-01-01/.part-00000.crc").write_bytes(b"crc")
    ray = write_days(tmp_path / "ray", "0_000000_000000.parquet")
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, (day, rows) in enumerate(DAYS.items()):
        table = pl.DataFrame(rows, schema=["who", "what"], orient="row").with_columns(date=pl.lit(day[5:]))
        table.write_parquet(flat / f"{number}_000000_000000.parquet")
    assert rows_of(spark) == rows_of(ray) == rows_of(flat) == ROWS


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[fsspec.AbstractFileSystem]:
    system = fsspec.filesystem("memory")
    system.put(str(write_days(tmp_path / "log")), "/bucket/log", recursive=True)
    system.pipe("/bucket/log/_SUCCESS", b"")
    yield system
    system.rm("/bucket", recursive=True)


def test_an_address_reads_as_the_folder_does(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    assert rows_of("memory://bucket/log/") == rows_of((tmp_path / "log").as_uri()) == ROWS
    memory.pipe("/bucket/goods.csv", b"what,title,image\n1,One,../../etc/passwd\n2,Two,\n")
    raw = read_tables("memory://bucket/log", "memory://bucket/goods.csv", {**MAPPING, "title": "title"})
    assert raw.items["title"].to_list() == ["One", "Two"] and raw.items["image_path"].to_list() == [None, None]


def test_no_key_of_a_bucket_leads_out_of_the_folder_that_it_is_copied_to(memory: fsspec.AbstractFileSystem) -> None:
    memory.store["/bucket/log/day/../../stranger.parquet"] = memory.store["/bucket/log/_SUCCESS"]
    fetch.cache_clear()
    folder = fetch("memory://bucket/log/")
    assert len(list(folder.rglob("*.parquet"))) == 3 and not list(folder.parent.glob("stranger*"))


def test_a_change_behind_an_address_is_seen_without_reading_it(memory: fsspec.AbstractFileSystem) -> None:
    source = Source("tables", {"interactions": "memory://bucket/log", "columns": MAPPING})
    before = source_fingerprint(source)
    assert before == source_fingerprint(source) and before[-1] == remote_fact("memory://bucket/log")
    memory.pipe("/bucket/log/date=2020-01-02/part-1.parquet", b"more")
    assert source_fingerprint(source) != before


def test_mistakes_are_named_and_no_password(memory: fsspec.AbstractFileSystem) -> None:
    with pytest.raises(FileNotFoundError, match="memory://bucket/none: no such file or folder"):
        read_tables("memory://bucket/none", columns=MAPPING)
    with pytest.raises(ValueError, match=r"nosuch://bucket/log: cannot be read here .*nosuch"):
        read_tables("nosuch://me:secret@bucket/log?key=secret", columns=MAPPING)
    memory.pipe("/bucket/lake/_delta_log/0.json", b"{}")
    memory.pipe("/bucket/lake/part-0.parquet", b"")
    memory.pipe("/bucket/lake2/.hoodie/hoodie.properties", b"")
    memory.pipe("/bucket/lake2/2024/part-0.parquet", b"")
    for lake in ("lake", "lake2"):
        with pytest.raises(ValueError, match="a table with a log of changes"):
            read_tables(f"memory://bucket/{lake}", columns=MAPPING)
    assert without_user("s3://key:secret@bucket/log?x=1") == "s3://bucket/log"
