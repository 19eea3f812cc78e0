"""One table in a folder of part files, as Spark, Dask and other engines write it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}
PACKED = (".gz", ".bz2", ".xz", ".zst")
PART = r"part|\d"  # how the name of a part begins


def table_format(name: str) -> str | None:
    """csv, tsv, parquet or jsonl, by the end of a file's name (also packed); None if it is none of these."""
    path = Path(name.lower())
    return SUFFIXES.get(Path(path.stem).suffix if path.suffix in PACKED else path.suffix)


@dataclass(frozen=True)
class Part:
    """A file of a table, and the values of the columns that the folders above it are named by (``date=2020-01-01``)."""

    path: Path
    values: dict[str, str | None] = field(default_factory=dict)


def table_parts(path: Path) -> tuple[str, list[Part]]:
    """The format of a folder's part files, and these in their natural order; marks such as ``_SUCCESS`` are left out.

    Raises:
        ValueError: no part file, or a table of Delta Lake, Iceberg or Hudi, whose files alone do not say what counts.
    """
    if log := next((name for name in ("_delta_log", "metadata", ".hoodie") if (path / name).is_dir()), None):
        raise ValueError(f"{path}: a table with a log of changes ({log}); export it as plain Parquet first")
    parts = list(_walk(path, path))
    kind = table_format(path.name) or next(filter(None, (table_format(part.path.name) for part in parts)), None)
    for part in parts:
        if table_format(part.path.name) != kind and part.path.suffix != ".part" and re.match(PART, part.path.name):
            raise ValueError(f"{path}: its parts are of two formats, as {part.path.name} is none of {kind}: leave one")
    parts = [part for part in parts if table_format(part.path.name) == kind or part.path.suffix == ".part"]
    if kind is None or not parts:
        raise ValueError(f"{path}: a folder without part files{f' of the format {kind}' if kind else ''}")
    return kind, parts


def is_parts(path: Path) -> bool:
    """Whether a folder is one table in parts, and not a data set of several.

    It is if its name ends as a table's (Dask); if it has Spark's ``_SUCCESS``, or folders named by a column;
    or if the names of all its files begin with a number or `part`, as Ray and others write them.
    """
    if not path.is_dir():
        return False
    names = [each.name for each in path.iterdir()]
    if table_format(path.name) is not None or "_SUCCESS" in names:
        return True
    names = [name for name in names if not name.startswith((".", "_"))]
    if any("=" in name and (path / name).is_dir() for name in names):
        return True
    return bool(names) and all(table_format(name) and re.match(PART, name) for name in names)


def _walk(folder: Path, root: Path) -> Iterator[Part]:
    for path in sorted(folder.iterdir(), key=_natural):
        if path.name.startswith((".", "_")):
            continue
        if path.is_dir():
            yield from _walk(path, root)
        elif path.stat().st_size:
            pairs = [name.split("=", 1) for name in path.relative_to(root).parts[:-1] if "=" in name]
            yield Part(path, {unquote(name): _value(value) for name, value in pairs})


def _natural(path: Path) -> list[tuple[int, str]]:
    """Part 10 stands after part 9."""
    return [(int(digits or 0), text) for text, digits in re.findall(r"(\D*)(\d*)", path.name)]


def _value(text: str) -> str | None:
    return None if text == "__HIVE_DEFAULT_PARTITION__" else unquote(text)
