"""JSON lines: whatever way a block is read, the outcome is the same."""

import gzip
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from mllm_msr.data.json_lines import json_blocks
from mllm_msr.data.raw import ROW, BadRows

SLOW = '{"id": "last", "other": NaN}\n'  # which the fast reader does not take


def read(path: Path, schema: dict[str, Any], bad: BadRows | None = None) -> pl.DataFrame:
    return pl.concat(json_blocks(path, schema, bad or BadRows()))


@pytest.mark.parametrize("zipped", [False, True])
def test_fields_and_row_numbers(tmp_path: Path, zipped: bool) -> None:
    data = b'{"id": "1", "n": ["2"], "other": []}\n\n{"id": 3}\n'
    path = tmp_path / ("a.jsonl.gz" if zipped else "a.jsonl")
    path.write_bytes(gzip.compress(data) if zipped else data)
    table = read(path, {"id": pl.String, "n": pl.List(pl.String)})
    assert table.rows() == [(1, "1", ["2"]), (3, "3", None)]


def test_bad_line_is_named_or_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": "1", "n": "x"}\nnot json\n[1]\n' + "[" * 5000 + '\n{"id": "2", "n": ["5"]}\n')
    schema = {"id": pl.String, "n": pl.List(pl.String)}
    with pytest.raises(ValueError, match=r"a\.jsonl, row 2: not a JSON object: not json"):
        read(path, schema)
    bad = BadRows("skip")
    assert read(path, schema, bad).rows() == [(1, "1", ["x"]), (5, "2", ["5"])]
    assert bad.skipped[0]["count"] == 3


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("10", "10"),
        ("10.0", "10"),
        ("1e5", "100000"),
        ("12345678901234567890123", "12345678901234567890123"),
        ("0.1", "0.1"),
        ("true", "true"),
        ("null", None),
        ('["a", 1]', '["a", 1]'),
        ('{"url": "x", "bytes": null}', '{"url": "x", "bytes": null}'),
        (json.dumps("é\n"), "é\n"),
        (json.dumps("😀"), "😀"),
    ],
)
def test_a_text_field_takes_whatever_is_there_on_both_ways(tmp_path: Path, written: str, text: str | None) -> None:
    for name, more in (("fast", ""), ("slow", SLOW)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(f'{{"id": {written}}}\n' + more)
        assert read(path, {"id": pl.String})["id"][0] == text, name


@pytest.mark.parametrize("half", [r"\ud83d", r"\uDE00", r"\ude00\ud83d"])
def test_half_a_character_is_replaced(tmp_path: Path, half: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"id": "Mug {half} cut"}}\n')
    assert set(read(path, {"id": pl.String})["id"][0]) == set("Mug \ufffd cut")


def test_not_a_number_is_missing_and_wrong_types_are_null(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": NaN}\n{"id": Infinity}\n{"id": 1e400}\n{"tags": {"no": "list"}}\n{"tags": [null]}\n')
    bad = BadRows()
    table = read(path, {"id": pl.String, "tags": pl.List(pl.String)}, bad)
    assert table.drop(ROW).rows() == [(None, None)] * 4 + [(None, [None])]
    assert [(row["what"], row["count"]) for row in bad.skipped] == [
        ("a.jsonl: tags is of another type than in this data set, left out", 1)
    ]


def test_lists_are_read_as_people_and_data_sets_write_them(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"tags": "one", "images": {"large": ["a", "b"], "variant": ["PT01", "MAIN"]}}\n{"images": {}}\n')
    image = {"large": pl.String, "variant": pl.String}
    table = read(path, {"tags": pl.List(pl.String), "images": pl.List(pl.Struct(image))})
    images = [{"large": "a", "variant": "PT01"}, {"large": "b", "variant": "MAIN"}]
    assert table.drop(ROW).rows() == [(["one"], images), (None, [])]


def test_other_encodings_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"id": "é"}\r\n{"id": "b"}\r\n'.encode("utf-16"))
    assert read(path, {"id": pl.String}).rows() == [(1, "é"), (2, "b")]


def test_of_a_name_that_stands_twice_the_first_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for rest in ("", "\n\n"):  # fast, and line by line
        path.write_text('{"a": "1", "a": "2"}\n' + rest)
        assert pl.concat(json_blocks(path, {"a": pl.String}, BadRows()))["a"].to_list() == ["1"]
