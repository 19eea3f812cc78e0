"""What ``mllm-msr rank`` says: a table to read, or CSV, JSON and Parquet for programs."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from mllm_msr.data.raw import one_line
from mllm_msr.records.schema import RANKING_MEMBERS, RANKINGS
from mllm_msr.records.storage import write_bytes

FORMATS = {".csv": "csv", ".json": "json", ".parquet": "parquet"}  # by the end of a file's name
TITLE = 48  # characters of a title in the table


def format_of(output: Path | None, form: str | None) -> str:
    """The format that is asked for, by its name or by the end of the file's; ValueError where both are and differ."""
    by_name = FORMATS.get(output.suffix.lower()) if output else None
    if form and by_name and form != by_name:
        raise ValueError(f"--format {form}, but --output {output} ends as {by_name}: leave one of them out")
    if output and not by_name and not form:
        raise ValueError(f"--output {output}: let its name end in {', '.join(FORMATS)}, or name the format by --format")
    if output and output.exists() and not _is_ranking(output, form or by_name):
        raise ValueError(f"--output {output}: is there already, and is no ranking: name another file")
    return form or by_name or "table"


def _is_ranking(path: Path, form: str | None) -> bool:
    """Whether a file holds what :func:`say` writes, which it may take the place of."""
    if not path.is_file():
        return False
    if form not in ("csv", "json", "parquet") or not path.stat().st_size:
        return True
    readers: dict[str, Callable[..., Any]] = {"csv": pl.scan_csv, "json": pl.read_json, "parquet": pl.scan_parquet}
    try:
        return set(RANKINGS.columns) <= set(readers[form](path).lazy().collect_schema())
    except (pl.exceptions.PolarsError, UnicodeDecodeError):
        return False


def say(frame: pl.DataFrame, output: Path | None, form: str | None, after: str = "") -> None:
    """Print rankings, or write them to a file.

    Args:
        frame: ``schema.RANKINGS``.
        form: "table", "csv", "json" (a list of rows), "parquet"; None: as the file's name ends, a table without one.
        after: what the history ended with, for the table.
    """
    form = format_of(output, form)
    if form == "table":
        content = f"{ranking_table(frame, after)}\n".encode()
    elif form == "csv":
        content = frame.write_csv().encode()
    elif form == "json":
        content = frame.write_json().encode() + b"\n"
    else:
        buffer = io.BytesIO()
        frame.select(*RANKINGS.columns).write_parquet(buffer)
        content = buffer.getvalue()
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(output, content)
        print(f"{frame.height} rows: {output}")
    elif form == "parquet":
        sys.stdout.flush()
        sys.stdout.buffer.write(content)
    else:
        print(content.decode(), end="")


def ranking_table(frame: pl.DataFrame, after: str = "") -> str:
    """Each user's preference and ranking as text; of the members' scores those that are there."""
    members = [name for name in RANKING_MEMBERS if frame[name].count()]
    parts = []
    for (user,), part in frame.group_by("user_id", maintain_order=True):
        by_answer = part["score"].equals(part["answer"], check_names=False)
        shown = "probability" if by_answer else "score"
        own = [] if by_answer else members
        rows = [("rank", shown, "item", *own, "title")]
        for row in part.iter_rows(named=True):
            said = ["" if row[name] is None else f"{row[name]:.2f}" for name in own]
            title = one_line(row["title"])
            title = title if len(title) <= TITLE else f"{title[: TITLE - 3]}..."
            rows.append((str(row["rank"]), f"{row[shown]:.3f}", one_line(row["item_id"]), *said, title))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        sides = [str.rjust, str.rjust, str.ljust, *[str.rjust] * len(own), str.ljust]
        lines = [
            "  ".join(side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)).rstrip()
            for row in rows
        ]
        preference = part["preference"][0] if part.height else ""
        words = [f"preference: {one_line(preference) or '(none)'}"] if preference or by_answer else []
        head = [f"user {one_line(user)}"] if user and frame["user_id"].n_unique() > 1 else []
        parts.append("\n".join([*head, *words, *([f"after: {one_line(after)}"] if after else []), *lines]))
    return "\n\n".join(parts)
