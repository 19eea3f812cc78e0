"""A source's log: ids and times as their users mean them, of one kind, and bad rows by reason."""

from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import polars as pl
import pytest

from mllm_msr.data.ids import as_text, check_join, plain_id
from mllm_msr.data.logs import interactions_from
from mllm_msr.data.raw import ROW, BadRows

COLUMNS = {"user_id": "u", "item_id": "u", "timestamp": "t"}


def log_of(ids: list[Any], times: list[Any], bad: BadRows | None = None) -> tuple[pl.DataFrame, int]:
    table = pl.DataFrame({ROW: range(2, 2 + len(ids)), "u": ids, "t": times}).lazy()
    log, ticks = interactions_from([table], "log.csv", COLUMNS, bad or BadRows())
    return log.collect(), ticks


def ids_of(values: list[Any], bad: BadRows | None = None) -> list[str]:
    return log_of(values, [1] * len(values), bad)[0]["item_id"].to_list()


def seconds_of(values: list[Any], bad: BadRows | None = None) -> list[float]:
    log, ticks = log_of(["a"] * len(values), values, bad)
    return [time / ticks for time in log["timestamp"].to_list()]


@pytest.mark.parametrize(
    ("values", "ids"),
    [
        ([10, 11], ["10", "11"]),
        ([10.0, 11.0], ["10", "11"]),
        ([Decimal("10.00"), Decimal("11")], ["10", "11"]),
        (["10.0", "0011.00", " 007 "], ["10", "0011", "007"]),
        (["1.5", "v1.0", "1.0.0", "a.0"], ["1.5", "v1.0", "1.0.0", "a.0"]),
        ([2.0**53 - 1], ["9007199254740991"]),
        (["9007199254740991.0"], ["9007199254740991"]),
        ([b"ab", b"c"], ["ab", "c"]),
        (pl.Series([2.0**24 - 1], dtype=pl.Float32), ["16777215"]),
        ([2**63 - 1, 12], ["9223372036854775807", "12"]),
    ],
)
def test_ids_are_what_their_users_mean(values: list[Any], ids: list[str]) -> None:
    assert ids_of(values) == ids


@pytest.mark.parametrize(
    "values",
    [
        [1.5, 2.0],
        [1e17, 2.0],
        [2.0**53, 2.0],
        pl.Series([2.0**24 + 1, 2.0], dtype=pl.Float32),
        pl.Series([2.0**11 + 1, 2.0], dtype=pl.Float16),
        ["1e+16", "2"],
        ["12345678901234567.0", "2"],
    ],
)
def test_ids_that_a_float_has_spoilt_are_bad_rows(values: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"log\.csv, row 2: user_id is a fraction, or a number so large"):
        ids_of(values)
    assert ids_of(values, BadRows("skip")) == ["2"]


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (["a\ufffd", "b\ufffd", "2"], "has a character that is no valid text"),
        ([b"\xff", b"\xfe", b"2"], "is bytes that are no text"),
        ([bytes([1, *range(15)]), bytes(range(65, 81)) + b"\0", b"2"], "is bytes that are no text"),  # a UUID
    ],
)
def test_ids_that_could_not_be_read_are_bad_rows_as_two_may_have_become_one(values: list[Any], what: str) -> None:
    with pytest.raises(ValueError, match=rf"log\.csv, row 2: user_id {what}"):
        ids_of(values)
    assert ids_of(values, BadRows("skip")) == ["2"]


def test_what_nobody_sees_makes_no_other_id() -> None:
    bad = BadRows()
    values = ["caf\u00e9", "cafe\u0301", "\ufeffA1", "A1\u200b", "a\u00a0b", "a b", "\u202eA1\0", "a\tb", "👩\u200d👧"]
    assert ids_of(values, bad) == ["café", "café", "A1", "A1", "a b", "a b", "A1", "a b", "👩\u200d👧"]
    noted = next(each for each in bad.skipped if "user_id" in each["what"])
    assert "invisible" in noted["what"] and noted["count"] == 6 and noted["examples"][0] == r"'cafe\u0301'"
    with pytest.raises(ValueError, match="row 3: no user_id"):
        ids_of(["a", "\u200b"])
    assert [plain_id(value) for value in values] == ids_of(values)


@pytest.mark.parametrize("missing", [None, "", "  ", "NaN", "nan", "NULL", "<NA>", r"\N", "None", "NA", "#N/A"])
def test_missing_ids_are_bad_rows(missing: str | None) -> None:
    with pytest.raises(ValueError, match=r"log\.csv, row 3: no user_id"):
        ids_of(["a", missing])
    bad = BadRows("skip")
    assert ids_of(["a", missing], bad) == ["a"]
    assert {row["what"]: row["count"] for row in bad.skipped} == {"log.csv: no user_id": 1, "log.csv: no item_id": 1}
    assert ids_of([1.0, float("nan")], BadRows("skip")) == ["1"]


def test_columns_of_lists_are_named() -> None:
    with pytest.raises(ValueError, match=r"log\.csv, row 2: ids are numbers or texts, but user_id is a column of List"):
        ids_of([["a"]])
    with pytest.raises(
        ValueError, match=r"log\.csv, row 2: times are numbers, dates or texts, but timestamp is a column of"
    ):
        seconds_of([[1]])
    with pytest.raises(ValueError, match=r"timestamp is a column of Duration"):
        seconds_of([timedelta(days=1)])


CEST = timezone(timedelta(hours=2))


@pytest.mark.parametrize(
    ("times", "seconds"),
    [
        ([5], [5]),
        ([5.9], [5.9]),
        (["12", " 13"], [12, 13]),
        (["12.9"], [12.9]),
        (["1e3"], [1000]),
        ([datetime(1970, 1, 1, 0, 0, 1, 500_000)], [1.5]),
        ([datetime(1970, 1, 1, 3, tzinfo=CEST)], [3600]),
        ([date(1970, 1, 2)], [86400]),
        ([" 1970-01-02", "1970-01-01T01:00:00", "1970-01-01 00:01", "1970/1/1 0:01:00.250"], [86400, 3600, 60, 60.25]),
        (
            ["1970-01-01T01:00:00Z", "1970-01-01 03:00:00+02:00", "1969-12-31T20:00-0500", "1970-01-01 01:00:00+00"],
            3600,
        ),
        ([20200901, 20201231], [1598918400, 1609372800]),
        (["20200901112743"], [1598959663]),
        ([202009011127], [1598959620]),
        (["-0.5", "0.5", "-1.25", "-2.0"], [-0.5, 0.5, -1.25, -2]),
        ([0, 3], [0, 3]),
    ],
)
def test_times_of_every_kind(times: list[Any], seconds: list[float] | int) -> None:
    assert seconds_of(times) == (seconds if isinstance(seconds, list) else [seconds] * len(times))


@pytest.mark.parametrize("ticks", [1, 10**3, 10**6, 10**9])
@pytest.mark.parametrize("kind", [int, str, float])
def test_the_unit_of_time_shows_by_its_size(ticks: int, kind: type) -> None:
    times = [kind(0), kind(1_600_000_000 * ticks), kind(1_500_000_000 * ticks)]
    assert seconds_of(times) == [0, 1_600_000_000, 1_500_000_000]


@pytest.mark.parametrize(
    ("late", "early"),
    [
        ("2020-09-01 11:27:43.900", "2020-09-01 11:27:43.100"),
        ("2020-09-01 11:27:43.123456789Z", "2020-09-01 11:27:43.123456788Z"),
        ("1593878903.9", "1593878903.1"),
        ("1593878903.000000002", "1593878903.000000001"),
        ("1593878903123.5", "1593878903123.4"),
        (1593878903.9, 1593878903.1),
        (datetime(2020, 9, 1, microsecond=2, tzinfo=UTC), datetime(2020, 9, 1, microsecond=1, tzinfo=UTC)),
    ],
)
def test_parts_of_a_second_decide_the_order(late: Any, early: Any) -> None:
    log, _ = log_of(["late", "early"], [late, early])
    assert log.sort("timestamp")["item_id"].to_list() == ["early", "late"]


@pytest.mark.parametrize(
    ("times", "what"),
    [
        ([1_700_000_000_123, 1_700_000_000, 1_700_000_000_124], "times in seconds where most are in milliseconds"),
        (["1700000000", "2020-01-01", "1700000001"], "times in dates without a zone where most are in seconds"),
        (
            ["2020-01-01 10:00+02:00", "2020-01-01 10:00", "2020-01-01Z", "2020-01-01 11:00Z"],
            "timestamp is no number or date",
        ),
        (
            ["2020-01-01 10:00+02:00", "2020-01-01 10:00", "2020-01-01 11:00Z"],
            "times in dates without a zone where most are in dates with a zone",
        ),
        ([1_700_000_000_123, -1, 1_700_000_000_124], "times in seconds where most are in milliseconds"),
        (["5", "soon", "6"], "timestamp is no number or date"),
    ],
)
def test_mixtures_are_refused_with_rows(times: list[Any], what: str) -> None:
    with pytest.raises(ValueError, match=rf"log\.csv, row \d: {what}"):
        seconds_of(times)
    bad = BadRows("skip")
    seconds_of(times, bad)
    assert bad.skipped[0]["what"].startswith(f"log.csv: {what}") and bad.skipped[0]["count"] == 1


def test_unknown_columns_are_named_with_those_that_are_there() -> None:
    table = pl.LazyFrame({ROW: [1], "who": ["a"], **{f"column{n}": [1] for n in range(500)}})
    with pytest.raises(ValueError, match=r"log\.csv: no column 'u'; it has \['who', 'column0'") as error:
        interactions_from([table], "log.csv", COLUMNS, BadRows())
    assert len(str(error.value)) < 500


def test_texts_without_a_value_are_missing_and_lists_are_joined() -> None:
    texts = pl.DataFrame({"a": ["NaN", " b ", ""], "b": [["x", "y"], None, []]})
    made = texts.select(as_text(name, dtype) for name, dtype in texts.schema.items())
    assert made["a"].to_list() == [None, "b", None] and made["b"].to_list() == ["x y", None, None]


def test_a_catalogue_that_lacks_most_items_of_the_log_stops_with_ids_of_both() -> None:
    log = pl.LazyFrame({"item_id": ["12", "13", "14", "14"]})
    half = pl.DataFrame({"item_id": ["12", "13", "99"]})
    bad = BadRows()
    assert check_join(log, half, "goods.csv", bad).to_list() == ["12", "13", "14"]
    assert [(row["what"], row["examples"]) for row in bad.skipped] == [
        ("goods.csv: items of the log that this catalogue lacks", ["14"])
    ]
    with pytest.raises(
        ValueError, match=r"goods\.csv: of the 3 items in the log, this catalogue has only 1\. "
    ) as error:
        check_join(log, pl.DataFrame({"item_id": ["12", "00013", "00014"]}), "goods.csv", bad)
    assert "'13'" in str(error.value) and "'00013'" in str(error.value)


def test_times_that_a_float_has_rounded_are_noted() -> None:
    bad = BadRows()
    log_of(["a", "b"], pl.Series([1.6e9, 1.6e9 + 64], dtype=pl.Float32), bad)
    assert [row["what"] for row in bad.skipped] == [
        "log.csv: times kept as Float32, which has rounded them: some may tie"
    ]


@pytest.mark.parametrize(
    ("ours", "theirs"), [("007", "7"), ("A-1", "a1"), ("#12", "12"), ("\uff11", "1"), ("1,234", "1234")]
)
def test_ids_that_differ_only_in_their_writing_are_noted(ours: str, theirs: str) -> None:
    log, bad = pl.LazyFrame({"item_id": ["x", "y", ours]}), BadRows()
    check_join(log, pl.DataFrame({"item_id": ["x", "y", theirs, "z"]}), "goods.csv", bad)
    lacking, alike = bad.skipped
    assert lacking["examples"] == [ours]
    assert "writes otherwise" in alike["what"] and alike["examples"] == [f"{ours} and {theirs}"]


def test_times_that_a_spreadsheet_has_rounded_are_bad_rows() -> None:
    with pytest.raises(ValueError, match=r"log\.csv, row 2: a time that a spreadsheet has rounded"):
        seconds_of(["1.58E+09", "1.59E+09", "1583378629"])
    exact = ["1.583378629e+09", "1e+09", "1583378630"]
    assert seconds_of(exact) == [1583378629, 1_000_000_000, 1583378630]


def test_one_wrong_number_among_dates_does_not_make_seconds_of_all() -> None:
    days = [20200101 + day for day in range(19)]
    with pytest.raises(ValueError, match=r"row 21: timestamp is no date, where most are dates written as one number"):
        seconds_of([*days, 20201399])
    assert seconds_of([*days, None], BadRows("skip"))[0] == 1577836800


@pytest.mark.parametrize(
    ("times", "what", "count"),
    [
        ([-1, 1_600_000_000, 1_600_000_001], "times before 1971 or after 2100", 1),
        (["0", "1600000000000", "1600000000001"], "times before 1971 or after 2100", 1),
        ([datetime(9999, 12, 31), datetime(2020, 1, 1), datetime(2020, 1, 2)], "times before 1971 or after 2100", 1),
        ([2018, 2019, 2019], "times are read as seconds; if they are years", 3),
        (["201801", "201912"], "times are read as seconds; if they are months", 2),
        (["43831.5", "43832.25"], "times are read as seconds; if they are days of a spreadsheet", 2),
    ],
)
def test_doubtful_times_are_noted(times: list[Any], what: str, count: int) -> None:
    bad = BadRows()
    seconds_of(times, bad)
    (noted,) = bad.skipped
    assert noted["what"].startswith(f"log.csv: {what}") and noted["count"] == count
