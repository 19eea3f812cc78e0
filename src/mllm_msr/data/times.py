"""Times as logs have them: numbers of any unit, dates, ISO texts with or without a zone; of one kind in a column."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from mllm_msr.data.ids import EXACT, is_text
from mllm_msr.data.raw import EXAMPLES, ROW, BadRows, short
from mllm_msr.data.spool import spool

UNITS = {  # what a column of times may hold -> how many of its units are a second
    "seconds": 1,
    "milliseconds": 10**3,
    "microseconds": 10**6,
    "nanoseconds": 10**9,
    "dates without a zone": 1,
    "dates with a zone": 1,
}
KINDS = tuple(UNITS)
ANY = len(KINDS)  # zero is the same moment in every unit
LIMITS = (1e11, 1e14, 1e17)  # from here on a number counts milli-, micro- or nanoseconds: later than March 1973
COMPACT = {  # dates as one number
    "%Y%m%d": (19000101, 21001231),
    "%Y%m%d%H%M": (190001010000, 210012312359),
    "%Y%m%d%H%M%S": (19000101000000, 21001231235959),
}
ISO = (
    r"^(?<date>\d{4}[-/.]\d{1,2}[-/.]\d{1,2})(?:[T ]+(?<time>\d{1,2}:\d{2})(?::(?<second>\d{2})(?:[.,](?<part>\d+))?)?"
    r"\s*(?<zone>Z|z|UTC|GMT|[+-]\d{2}(?::?\d{2})?)?)?$"
)
COUNTS = {"years": (1900, 2100), "months": (190001, 210012), "days of a spreadsheet": (30000, 60000)}
EARLIEST, LATEST = 366 * 86400, 4102444800  # 1971 and 2100: times beyond these stand for missing ones
TIME, KIND, PART = pl.col("(time)"), pl.col("(kind)"), pl.col("(part)")
ROUNDED = pl.col("(rounded)")
Problems = dict[str, pl.Expr]


def alike(logs: Sequence[pl.LazyFrame], path: Path | str) -> list[pl.LazyFrame]:
    """Parts of a log whose times go together: beside numbers, days are moments and no counts of days.

    Raises:
        ValueError: a column of lists, structures or spans of time.
    """
    types = [log.collect_schema()["timestamp"] for log in logs]
    for log, dtype in zip(logs, types, strict=True):
        if dtype.is_nested() or not is_text(dtype):
            row = log.select(pl.col(ROW).first()).collect().item()
            raise ValueError(
                f"{path}, row {row}: times are numbers, dates or texts, but timestamp is a column of {short(dtype)}: "
                "write them so, or name another column (--column; own tables only)"
            )
    if any(dtype.is_numeric() for dtype in types):
        days = pl.col("timestamp").cast(pl.Datetime("us", "UTC"))
        return [log.with_columns(days) if dtype == pl.Date else log for log, dtype in zip(logs, types, strict=True)]
    return list(logs)


def with_times(log: pl.LazyFrame, path: Path | str, bad: BadRows) -> tuple[pl.LazyFrame, int, Problems]:
    """Read the column ``timestamp`` into whole numbers, in the column ``(time)``.

    The unit of numbers shows by the size of most. A time without a zone is one in UTC. Parts of a second are kept.

    Returns:
        The log; how many of the numbers are a second; and what makes a row a bad one: no time, or one of another kind
        than most rows have.
    """
    dtype = log.collect_schema()["timestamp"]
    if isinstance(dtype, pl.Datetime | pl.Date):
        unit = dtype.time_unit if isinstance(dtype, pl.Datetime) else "ms"
        log = log.with_columns(pl.col("timestamp").cast(pl.Datetime(unit)).dt.epoch(unit).alias("(time)"))
        ticks = {"ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
        _note_doubtful(log, ticks, path, bad)
        return log, ticks, {"timestamp is no number or date": TIME.is_null()}
    log = _parsed(log, dtype)
    facts = {"low": TIME.min(), "high": TIME.max(), "part": PART.max(), "rounded": (ROUNDED & (TIME >= 1e8)).sum()}
    facts |= {form: TIME.is_between(*ends).sum() for form, ends in COMPACT.items()}
    kinds = {row["(kind)"]: row for row in _collect(log.group_by(KIND).agg(pl.len(), **facts)).to_dicts()}
    readable = {kind: row for kind, row in kinds.items() if kind is not None and kind != ANY}
    main = max(sorted(readable), key=lambda kind: readable[kind]["len"], default=0)
    problems = {"timestamp is no number or date": KIND.is_null()}
    for kind in readable.keys() - {main}:
        usual = _collect(log.filter(main == KIND).head(1)).to_dicts()[0]
        example = f"{short(usual['timestamp'])} in row {usual[ROW]}"
        problems[f"times in {KINDS[kind]} where most are in {KINDS[main]}, such as {example}"] = kind == KIND
    if main not in readable:
        return log, 1, problems
    largest = max(abs(row[end]) for row in readable.values() for end in ("low", "high"))
    if dtype.is_float() and largest >= EXACT[dtype.base_type()]:
        bad.note(f"{Path(path).name}: times kept as {dtype}, which has rounded them: some may tie", 1, [largest])
    most, ticks, scale = readable[main], UNITS[KINDS[main]], 1
    if 2 * most["rounded"] > most["len"]:  # a few are what R makes of round numbers
        problems["a time that a spreadsheet has rounded: save it with all its digits"] = ROUNDED
    for form in COMPACT:
        date = TIME.cast(pl.String).str.to_datetime(form, strict=False, time_unit="ms").dt.epoch("s")
        if 10 * most[form] >= 9 * most["len"]:
            valid = _collect(log.select(date.is_not_null().sum())).item()
            if 10 * valid >= 9 * most["len"]:
                bad.note(f"{Path(path).name}: times are dates written as one number", valid, [most["high"]])
                what = "is no date, where most are dates written as one number"
                problems[f"timestamp {what}"] = TIME.is_null() & (main == KIND)
                return log.with_columns(date.alias("(time)")), 1, problems
    if most["part"]:
        finer = (10**9 // ticks, 10**6 // ticks, 10**3 // ticks)
        scale = next((times for times in finer if times and largest * times < 2**62), 1)
        log = log.with_columns(TIME * scale + PART // (10**9 // scale))
    for what, (low, high) in COUNTS.items():
        if low <= most["low"] <= most["high"] <= high:
            told = f"times are read as seconds; if they are {what}, write dates, or those within one tie"
            bad.note(f"{Path(path).name}: {told}", most["len"], [most["low"], most["high"]])
    _note_doubtful(log.filter(KIND.is_in([main, ANY])), ticks * scale, path, bad)
    return log, ticks * scale, problems


def _note_doubtful(log: pl.LazyFrame, ticks: int, path: Path | str, bad: BadRows) -> None:
    """Note times before 1971 or after 2100 among others, such as -1, 0 or the year 9999."""
    doubtful = ~TIME.is_between(EARLIEST * ticks, LATEST * ticks)
    some = pl.col("timestamp").filter(doubtful).head(EXAMPLES).implode()
    count, rows, examples = _collect(log.select(doubtful.sum(), TIME.count().alias("rows"), some)).row(0)
    if 2 * count < rows:
        what = "times before 1971 or after 2100, read as they stand"
        bad.note(f"{Path(path).name}: {what}", count, examples)


def _parsed(log: pl.LazyFrame, dtype: pl.DataType) -> pl.LazyFrame:
    """With ``(time)`` in its own unit, ``(part)`` in billionths of that, and ``(kind)``, a place in ``KINDS``."""
    time = pl.col("timestamp")
    if dtype.is_integer():
        return _with(log, time.cast(pl.Int64, strict=False))
    if dtype.is_float():
        finite = pl.when(time.is_finite()).then(time.cast(pl.Float64))
        return _with(log, finite.floor().cast(pl.Int64, strict=False), (finite - finite.floor()) * 1e9)
    log = log.with_columns(time.cast(pl.String, strict=False).str.strip_chars())
    number = time.cast(pl.Int64, strict=False)
    if _all(log, number.is_not_null() | time.is_null()):
        return _with(log, number)
    decimal = pl.when(time.cast(pl.Float64, strict=False).is_finite()).then(time.cast(pl.Float64, strict=False))
    number = number.fill_null(time.str.extract(r"^([+-]?\d+)\.\d*$").cast(pl.Int64, strict=False))
    number = number.fill_null(decimal.floor().cast(pl.Int64, strict=False))
    groups = time.str.extract_groups(ISO).struct
    date, clock, second, zone = (groups.field(name) for name in ("date", "time", "second", "zone"))
    moment = pl.concat_str(
        date.str.replace_all("[/.]", "-"),
        pl.lit(" "),
        clock.fill_null("00:00"),
        pl.lit(":"),
        second.fill_null("00"),
    )
    moment = moment.str.to_datetime("%Y-%m-%d %H:%M:%S", strict=False, time_unit="ms").dt.epoch("s")
    digits = zone.str.replace(":", "").str.extract(r"^[+-](\d+)$").str.pad_end(4, "0").cast(pl.Int64)
    offset = (digits // 100 * 3600 + digits % 100 * 60) * pl.when(zone.str.starts_with("-")).then(-1).otherwise(1)
    part = pl.coalesce(time.str.extract(r"^[+-]?\d+\.(\d+)$"), groups.field("part"))
    part = part.str.slice(0, 9).str.pad_end(9, "0").cast(pl.Int64).fill_null(0)
    below = time.str.starts_with("-") & time.str.contains(".", literal=True) & (part > 0)  # -1.25 is -2 and .75
    part = pl.when(below).then(10**9 - part).otherwise(part)
    log = _with(log, number.fill_null(moment - offset.fill_null(0)) - below.cast(pl.Int64), part)
    kind = pl.when(moment.is_null()).then(KIND).when(zone.is_null()).then(KINDS.index("dates without a zone"))
    digits = time.str.extract(r"^[+-]?\d(?:\.(\d+))?[eE]\+?\d+$").fill_null("").str.len_chars()
    rounded = digits < time.str.extract(r"^[+-]?\d(?:\.\d+)?[eE]\+?(\d+)$").cast(pl.Int64, strict=False)
    kinds = kind.otherwise(KINDS.index("dates with a zone")).alias("(kind)")
    return spool(log.with_columns(kinds, rounded.fill_null(False).alias("(rounded)")))


def _with(log: pl.LazyFrame, number: pl.Expr, part: pl.Expr | None = None) -> pl.LazyFrame:
    size = number.abs()
    unit = pl.sum_horizontal((size >= limit).cast(pl.Int8) for limit in LIMITS)
    kind = pl.when(number == 0).then(ANY).when(number.is_not_null()).then(unit)
    parts = pl.lit(0, pl.Int64) if part is None else part.cast(pl.Int64)
    named = {"(time)": number, "(kind)": kind.cast(pl.Int8), "(part)": parts, "(rounded)": pl.lit(False)}
    return log.with_columns(**named)


def _all(log: pl.LazyFrame, condition: pl.Expr) -> bool:
    return _collect(log.select(condition.all())).item()


def _collect(table: pl.LazyFrame) -> pl.DataFrame:
    return table.collect(engine="streaming")
