import gzip
from datetime import datetime
from pathlib import Path

import polars as pl
import pytest

from mllm_msr.data.raw import BadRows, RawData
from mllm_msr.data.readers import interactions_from, parse_time, read_csv, read_jsonl, ticks_a_second

LOG = pl.DataFrame({"user_id": ["u"], "item_id": ["a"], "timestamp": [1]})
ITEMS = pl.DataFrame({"item_id": ["a"], "title": [" A "], "text": [None]}, schema_overrides={"text": pl.String})


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_raw_data_fills_missing_columns_and_trims() -> None:
    raw = RawData(LOG, ITEMS)
    assert raw.items.to_dicts() == [{"item_id": "a", "title": "A", "text": "", "image_path": None, "image_bytes": None}]


def test_raw_data_refuses_what_cannot_be_used() -> None:
    with pytest.raises(ValueError, match="no column 'timestamp'"):
        RawData(LOG.drop("timestamp"), ITEMS)
    with pytest.raises(ValueError, match="unique"):
        RawData(LOG, pl.concat([ITEMS, ITEMS]))
    with pytest.raises(ValueError, match="1 rows lack"):
        RawData(LOG.with_columns(user_id=pl.lit(None, pl.String)), ITEMS)


def test_csv_mark_gzip_and_row_numbers(tmp_path: Path) -> None:
    data = "\ufeffuser,item\n1,ä\n2,\n".encode()
    for path in (write(tmp_path / "a.csv", data), write(tmp_path / "a.csv.gz", gzip.compress(data))):
        table = read_csv(path, BadRows()).collect()
        assert table.to_dicts() == [{"row": 2, "user": "1", "item": "ä"}, {"row": 3, "user": "2", "item": None}]


def test_csv_in_windows_encoding_is_read_and_noted(tmp_path: Path) -> None:
    bad = BadRows()
    table = read_csv(write(tmp_path / "a.csv", "id,title\n1,Misérables\n".encode("cp1252")), bad).collect()
    assert table["title"].to_list() == ["Misérables"]
    assert bad.skipped[0]["what"] == "a.csv: not UTF-8, read as Windows-1252"


def test_csv_row_with_too_many_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'id,title\n1,A\n2,B,oops\n3,"C, c"\n')
    with pytest.raises(ValueError, match=r"a\.csv, row 3: more than the header's 2 fields.*--on-bad-rows skip"):
        read_csv(path, BadRows())
    bad = BadRows("skip")
    assert read_csv(path, bad).collect().rows() == [(2, "1", "A"), (4, "3", "C, c")]
    assert bad.skipped[0]["count"] == 1


def test_csv_missing_or_empty(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_csv(tmp_path / "none.csv", BadRows())
    with pytest.raises(ValueError, match="the file is empty"):
        read_csv(write(tmp_path / "a.csv", b""), BadRows())


@pytest.mark.parametrize("zipped", [False, True])
def test_jsonl(tmp_path: Path, zipped: bool) -> None:
    data = b'{"id": "1", "n": 2, "other": []}\n\n{"id": 3}\n'
    path = write(tmp_path / ("a.jsonl.gz" if zipped else "a.jsonl"), gzip.compress(data) if zipped else data)
    table = read_jsonl(path, {"id": pl.String, "n": pl.Int64}, BadRows()).collect()
    assert table.select("id", "n").rows() == [("1", 2), ("3", None)]


def test_jsonl_bad_line_is_named_or_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"id": "1", "n": "x"}\nnot json\n[1]\n{"id": "2", "n": 5}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, row 2: not a JSON object: not json"):
        read_jsonl(path, {"id": pl.String, "n": pl.Int64}, BadRows())
    bad = BadRows("skip")
    assert read_jsonl(path, {"id": pl.String, "n": pl.Int64}, bad).collect().rows() == [(1, "1", None), (4, "2", 5)]
    assert bad.skipped[0]["count"] == 2


def test_times_of_every_kind() -> None:
    given = ["12", "12.9", " 1970-01-02", "1970-01-01T01:00:00Z", "1970-01-01 00:01:00.250", "soon", None, "nan"]
    read = pl.DataFrame({"t": given}).select(parse_time("t", pl.String()))["t"].to_list()
    assert read == [12, 12, 86400, 3600, 60, None, None, None]
    for values, expected in (([5], 5), ([5.9], 5), ([datetime(1970, 1, 1, 0, 0, 1)], 1_000_000)):
        frame = pl.DataFrame({"t": values})
        assert frame.select(parse_time("t", frame.schema["t"])).item() == expected


@pytest.mark.parametrize("ticks", [1, 10**3, 10**6, 10**9])
def test_the_unit_of_time_shows_by_its_size(ticks: int) -> None:
    log = pl.LazyFrame({"timestamp": [0, 1_600_000_000 * ticks, 1_500_000_000 * ticks]})
    assert ticks_a_second(log) == ticks


def test_bad_rows_of_a_scan_are_dropped_and_counted_by_reason() -> None:
    log = pl.LazyFrame({"row": [2, 3, 4, 5], "u": ["a", None, "b", None], "t": ["1", "2", "soon", "later"]})
    columns = {"user_id": "u", "item_id": "u", "timestamp": "t"}
    with pytest.raises(ValueError, match=r"log\.csv, row 3: no user_id: .*--on-bad-rows skip"):
        interactions_from(log, "log.csv", columns, BadRows())
    bad = BadRows("skip")
    kept, ticks = interactions_from(log, "log.csv", columns, bad)
    assert kept.collect().rows() == [("a", "a", 1)] and ticks == 1
    assert {row["what"]: row["count"] for row in bad.skipped} == {
        "log.csv: no user_id": 2,
        "log.csv: no item_id": 2,
        "log.csv: timestamp is no number or date": 2,
    }
