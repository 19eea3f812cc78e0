"""What a ranking looks like on a terminal."""

import polars as pl

from mllm_msr.rankings import ranking_table
from mllm_msr.records.schema import RANKINGS


def test_other_peoples_text_stays_on_its_line() -> None:
    row = {"user_id": "u", "rank": 1, "item_id": "a\r1", "title": "\x1b[31mred\n  2  9.9  fake", "preference": "a\nb"}
    frame = pl.DataFrame([{**dict.fromkeys(RANKINGS.columns), **row, "score": 1.0}], schema=RANKINGS.columns)
    lines = ranking_table(frame, after="x\u2028y").splitlines()
    assert lines[:2] == ["preference: a b", "after: x y"] and len(lines) == 4
    assert lines[3].split() == ["1", "1.000", "a", "1", "[31mred", "2", "9.9", "fake"]
