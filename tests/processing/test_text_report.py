"""What a stage says of the texts it has written."""

import polars as pl

from mllm_msr.processing.text_report import text_report


def test_texts_are_counted_and_those_that_are_not_ok_are_listed():
    rows = {"item_id": [f"i{n}" for n in range(30)], "summary": ["fine", *[""] * 29]}
    said = text_report(pl.DataFrame({**rows, "status": ["ok", *["failed:http-500"] * 29]}))
    assert "29 failed, 1 ok" in said and "i1: failed:http-500" in said and "and 9 more" in said
    assert "run the same command again" in said


def test_three_samples_of_what_was_written_are_shown_each_on_one_line():
    rows = {
        "user_id": ["u"] * 9,
        "step": list(range(1, 10)),
        "preference": [f"likes\n{'a' * n * 50}" for n in range(9)],
    }
    lines = text_report(pl.DataFrame({**rows, "status": ["ok"] * 9})).splitlines()
    assert lines[0].strip() == "9 ok" and [line.split(":")[0].strip() for line in lines[1:]] == ["u 1", "u 4", "u 7"]
    assert lines[1] == "  u 1: likes ".rstrip() and lines[3].endswith("aaa...") and len(lines[3]) < 140
