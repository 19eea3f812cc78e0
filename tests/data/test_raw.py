"""What every source yields, and how it tells of bad rows."""

import polars as pl
import pytest

from mllm_msr.data.raw import LONGEST, ROW, BadRows, RawData, oddity

LOG = pl.DataFrame({"user_id": ["u"], "item_id": ["a"], "timestamp": [1]})
ITEMS = pl.DataFrame({"item_id": ["a"], "title": [" A "], "text": [None]}, schema_overrides={"text": pl.String})


def test_raw_data_fills_missing_columns_and_trims() -> None:
    raw = RawData(LOG, ITEMS)
    assert raw.items.to_dicts() == [{"item_id": "a", "title": "A", "text": "", "image_path": None, "image_bytes": None}]


def test_words_lose_characters_that_no_text_means() -> None:
    words = RawData(LOG, ITEMS.with_columns(title=pl.lit("A\0B\x1b[1m\n\u2028C👩\u200d👧"))).items["title"].item()
    assert words == "A B [1m\n\u2028C👩\u200d👧"


def test_raw_data_refuses_what_cannot_be_used() -> None:
    with pytest.raises(ValueError, match="no column 'timestamp'"):
        RawData(LOG.drop("timestamp"), ITEMS)
    with pytest.raises(ValueError, match="unique"):
        RawData(LOG, pl.concat([ITEMS, ITEMS]))
    with pytest.raises(ValueError, match="1 rows lack"):
        RawData(LOG.with_columns(user_id=pl.lit(None, pl.String)), ITEMS)


def test_the_first_bad_row_stops_or_all_are_counted_by_reason() -> None:
    table = pl.LazyFrame({ROW: [2, 3, 4], "name": ["a", None, "b"], "(made)": [1, 2, 3]})
    reasons = {"no name": pl.col("name").is_null(), "late": pl.col("(made)") > 1}
    with pytest.raises(ValueError, match=r"log\.csv, row 3: no name: \{'name': None\}\. .*--on-bad-rows skip"):
        BadRows().drop(table, reasons, "log.csv")
    bad = BadRows("skip")
    assert bad.drop(table, reasons, "log.csv").collect()["name"].to_list() == ["a"]
    assert [(row["what"], row["count"]) for row in bad.skipped] == [("log.csv: no name", 1), ("log.csv: late", 2)]


def test_long_values_are_cut_and_stand_on_one_line() -> None:
    (example,) = oddity("long", 1, ["a\nb" + "x" * 10_000])["examples"]
    assert len(example) == LONGEST and example.startswith("a b")
