"""JSON lines, block by block: fast where a block is as it should be, else line by line, with the same outcome."""

import io
import json
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from itertools import zip_longest
from math import inf
from pathlib import Path
from typing import Any

import polars as pl

from mllm_msr.data.raw import ROW, BadRows, Wrong
from mllm_msr.data.text_files import text_blocks, whole

HALF = re.compile(r"\\u[dD][89a-fA-F]")  # of a surrogate pair, which may lack the other
BLANK = re.compile(r"\n\s*\n|^\s*\n")


def json_blocks(path: Path, schema: Mapping[str, Any], bad: BadRows) -> Iterator[pl.DataFrame]:
    """The fields of ``schema`` (name -> Polars type) of a JSON-lines file, in blocks, with the line as ``ROW``.

    A text field takes whatever is there: numbers without a needless ".0", lists and objects as JSON. A list of texts
    may be a single text, and a list of records a record of lists, as `datasets` has it. Any other value of another type
    than declared is null, which is noted; so are absent fields and NaN. Lines that are no JSON object are bad rows.

    Raises:
        FileNotFoundError, OSError, ValueError: as :func:`~mllm_msr.data.text_files.text_blocks`; a bad row, unless bad
            rows are skipped.
    """
    wrong, line, odd = Wrong(), 1, {name: Wrong() for name in schema}
    for block in text_blocks(path, bad):
        table = None if HALF.search(block) or BLANK.search(block) else _fast(block, schema)
        if table is None:
            yield _slowly(block, schema, line, wrong, odd)
        else:
            yield table.with_row_index(ROW, line)
        line += block.count("\n")
    for name, values in odd.items():
        bad.note(
            f"{path.name}: {name} is of another type than in this data set, left out", values.count, values.examples
        )
    wrong.report(bad, path, "not a JSON object")


def _fast(block: str, schema: Mapping[str, Any]) -> pl.DataFrame | None:
    try:
        return pl.read_ndjson(io.BytesIO(block.encode()), schema=dict(schema))
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException):  # a bad line, NaN, or a value of another type
        return None


def _slowly(block: str, schema: Mapping[str, Any], line: int, wrong: Wrong, odd: Mapping[str, Wrong]) -> pl.DataFrame:
    rows = []
    for number, text in enumerate(block.split("\n")[:-1], start=line):
        if not text.strip():
            continue
        try:
            record = json.loads(text, parse_constant=lambda _: None, object_pairs_hook=_first)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            values = {name: _typed(record.get(name), dtype) for name, dtype in schema.items()}
            rows.append([number, *values.values()])
            for name, value in values.items():
                if _is_lost(record.get(name), value):
                    odd[name].add(number, record[name])
        else:
            wrong.add(number, text.strip())
    return pl.DataFrame(rows, schema={ROW: pl.UInt32, **schema}, orient="row")


def _first(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A record; of a name that stands twice the first counts, as for the fast reader."""
    record: dict[str, Any] = {}
    for name, value in pairs:
        record.setdefault(name, value)
    return record


def _typed(value: Any, dtype: Any) -> Any:
    """A parsed value as the fast reader has it."""
    if dtype == pl.String:
        return None if value is None or value in (inf, -inf) else whole(_as_text(value))
    if dtype == pl.List(pl.String) and isinstance(value, str):
        value = [value]
    elif isinstance(dtype, pl.List) and isinstance(value, dict) and all(isinstance(v, list) for v in value.values()):
        value = [dict(zip(value, record, strict=True)) for record in zip_longest(*value.values())]
    if isinstance(dtype, pl.List) and isinstance(value, list):
        return [_typed(element, dtype.inner) for element in value]
    if isinstance(dtype, pl.Struct) and isinstance(value, dict):
        return {part.name: _typed(value.get(part.name), part.dtype) for part in dtype.fields}
    return None


def _as_text(value: Any) -> str:
    if isinstance(value, float):
        return format(Decimal(repr(value)), "f").removesuffix(".0")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _is_lost(value: Any, read: Any) -> bool:
    """Whether nothing is left of a value."""
    if isinstance(read, list):
        return bool(read) and set(map(type, read)) == {type(None)} and value != read
    return read is None and value not in (None, inf, -inf)
