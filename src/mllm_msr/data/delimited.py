"""CSV and its relatives, as people and programs write them: any common separator, any quoting, marks left open."""

import csv
import io
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import polars as pl

from mllm_msr.data.raw import ROW, BadRows, Wrong
from mllm_msr.data.text_files import text_blocks

SEPARATORS = (",", ";", "\t", "|")
SAMPLE = 20  # rows by which a separator is recognised
LONGEST_ROW = 10_000  # lines of one row, the rest of which are line breaks within quotation marks
ESCAPED = ('""', '\\"')  # a mark within marks: as is usual, and as Spark and MySQL write it
Row = tuple[int, list[str]]  # line in the file, fields


def csv_blocks(path: Path, bad: BadRows, separator: str = ",") -> Iterator[pl.DataFrame]:
    """A delimited file with a header, in blocks; all columns are text, empty fields null.

    Adds ``ROW``, the line in the file. Blank rows are left out. ``separator`` is what the file's name suggests; another
    one is recognised and noted. A quotation mark that is never closed, or closed amid a field, belongs to the text,
    which is noted; rows with more fields than the header are bad rows.

    Raises:
        FileNotFoundError, OSError, ValueError: as :func:`~mllm_msr.data.text_files.text_blocks`; two columns of one
            name; a bad row, unless bad rows are skipped.
    """
    reader: _Reader | None = None
    for block in text_blocks(path, bad):
        if reader is None:
            lines = block.split("\n")
            start = 1 if lines[0].startswith("sep=") else 0  # a hint for Excel
            start = next((number for number in range(start, len(lines)) if lines[number].strip()), start)
            reader = _Reader(path, bad, _separator(lines[start:], separator, path, bad))
            block = reader.take_header(lines, start)
        yield reader.read(block)
    if reader is None:
        raise ValueError(f"{path}: the file is empty; a header row is needed")
    yield reader.finish()


def _separator(lines: list[str], usual: str, path: Path, bad: BadRows) -> str:
    """The separator by which the header has several fields and most rows as many as the header."""

    csv.field_size_limit(sys.maxsize)

    def fit(separator: str) -> tuple[float, int]:
        widths = [len(fields) for _, fields in zip(range(SAMPLE), csv.reader(lines, delimiter=separator), strict=False)]
        return (widths.count(widths[0]) / len(widths), widths[0]) if widths and widths[0] > 1 else (0.0, 0)

    fits = {separator: fit(separator) for separator in dict.fromkeys((usual, *SEPARATORS))}
    best = max(fits, key=lambda separator: fits[separator])
    if fits[usual][0] >= min(0.5, fits[best][0]) and fits[usual][1]:
        return usual
    if fits[best][1]:
        bad.note(f"{path.name}: fields are divided by {best!r}, not by {usual!r}", 1, [lines[0]])
        return best
    return usual


def csv_rows(path: Path, bad: BadRows, header: Sequence[str]) -> Iterator[Row]:
    """The rows of a comma-separated file whose header may be missing, as lines and fields, however many these are."""
    reader = _Reader(path, bad, ",", header)
    for block in text_blocks(path, bad):
        yield from reader.rows(block)
    yield from reader.rows("", final=True)
    reader.finish()


class _Reader:
    """Reads block after block; a row that a block's end cuts waits for the next."""

    def __init__(self, path: Path, bad: BadRows, separator: str, header: Sequence[str] = ()) -> None:
        csv.field_size_limit(sys.maxsize)  # a description may be a whole page
        self.path, self.bad, self.separator, self.header = path, bad, separator, list(header)
        self.line, self.waiting = 1, ""
        mark = re.escape(separator)  # below: every mark encloses a field, and no field has a line break
        self.sound = re.compile(rf'(?:(?:"[^"\n]*+"|[^"{mark}\n]*+)[{mark}\n])*+')
        self.wide, self.marks = Wrong(), Wrong()

    def take_header(self, lines: list[str], start: int) -> str:
        """Read the header at line ``start`` (from 0) of the first block; returns what follows it."""
        fields, used = self._row(lines, start, final=True)
        self.header = [name.strip() or f"column {number}" for number, name in enumerate(fields, start=1)]
        if twice := next((name for name in self.header if self.header.count(name) > 1), None):
            raise ValueError(f"{self.path}: two columns are called {twice!r}; rename one of them")
        self.line = start + used + 1
        return "\n".join(lines[start + used :])

    def read(self, block: str) -> pl.DataFrame:
        """The rows of a block of whole lines."""
        if not self.waiting and self.sound.fullmatch(block):
            try:
                return self._fast(block)
            except pl.exceptions.PolarsError:  # a row with too many fields
                pass
        return self._frame(self.rows(block))

    def finish(self) -> pl.DataFrame:
        """The rows that wait for more lines when there are none; tells of all that was odd."""
        rest = self._frame(self.rows("", final=True))
        self.wide.report(self.bad, self.path, f"more than the header's {len(self.header)} fields")
        what = f"{self.path.name}: quotation marks that enclose no field, read as they stand"
        self.bad.note(what, self.marks.count, self.marks.examples)
        return rest

    def _fast(self, block: str) -> pl.DataFrame:
        names = [f"c{number}" for number in range(len(self.header))]
        text = io.BytesIO("\n".join([self.separator.join(names), block]).encode())
        table = pl.read_csv(text, separator=self.separator, infer_schema=False)
        table = table.with_columns(pl.when(pl.all() != "").then(pl.all()))
        table = table.rename(dict(zip(names, self.header, strict=True))).with_row_index(ROW, self.line)
        self.line += block.count("\n")
        return _without_blank(table)

    def _frame(self, rows: Iterator[Row]) -> pl.DataFrame:
        width, good = len(self.header), []
        for number, fields in rows:
            if len(fields) <= width or not any(fields[width:]):  # some programs end every row with a separator
                fields = fields[:width]
                good.append([number, *(value or None for value in fields), *[None] * (width - len(fields))])
            else:
                self.wide.add(number, self.separator.join(fields))
        schema = {ROW: pl.UInt32, **dict.fromkeys(self.header, pl.String)}
        return _without_blank(pl.DataFrame(good, schema=schema, orient="row"))

    def rows(self, block: str, final: bool = False) -> Iterator[Row]:
        """Lines and fields of a block's rows; a row that may go on in the next block waits, unless this is the last."""
        lines, self.waiting, at = (self.waiting + block).split("\n")[:-1], "", 0
        while at < len(lines):
            fields, used = self._row(lines, at, final)
            if not used:
                self.waiting = "\n".join(lines[at:]) + "\n"
                return
            yield self.line, fields
            self.line += used
            at += used

    def _row(self, lines: list[str], at: int, final: bool) -> tuple[list[str], int]:
        """The fields of the row that begins at a line, and how many lines it takes; 0 if it may go on in the next
        block."""
        first = lines[at]
        if '"' not in first:
            return first.split(self.separator), 1
        for escaped in ESCAPED:
            for end in range(at + 1, min(len(lines), at + LONGEST_ROW) + 1):
                if end > at + 1 and '"' not in lines[end - 1].replace(escaped, ""):
                    continue  # this line closes nothing
                try:
                    fields = self._parse("\n".join(lines[at:end]), escaped)
                except csv.Error as error:
                    if "unexpected end" in str(error):  # the mark is not closed yet
                        continue
                    break
                if end > at + 1 and all(map(self._looks_whole, lines[at:end])):
                    break  # two marks left open, and rows between them
                return fields, end - at
            else:
                if not final and len(lines) < at + LONGEST_ROW:
                    return [], 0
        self.marks.add(self.line, first)
        return first.split(self.separator), 1

    def _parse(self, text: str, escaped: str) -> list[str]:
        if escaped == '\\"':
            text = re.sub(r'\\(["\\])', lambda match: '""' if match[1] == '"' else "\\", text)
        fields = self._read(text)
        if any(field.startswith(" ") and field.lstrip().startswith('"') for field in fields):  # a, "b", "c"
            with suppress(csv.Error):
                closed = self._read(text, skipinitialspace=True)
                return closed if len(closed) == len(self.header or closed) else fields
        return fields

    def _read(self, text: str, **options: Any) -> list[str]:
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=self.separator, strict=True, **options), [])

    def _looks_whole(self, line: str) -> bool:
        fields = line.split(self.separator)
        return len(fields) == len(self.header) and bool(fields[0]) and not any(map(str.isspace, fields[0]))


def _without_blank(table: pl.DataFrame) -> pl.DataFrame:
    return table.filter(~pl.all_horizontal(pl.exclude(ROW).is_null()))
