"""One table in a folder of part files, as Spark, Dask and other engines write it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
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
LOGS = ("_delta_log", ".hoodie", "metadata/*.metadata.json")  # of Delta Lake, Hudi, Iceberg


def table_format(name: str) -> str | None:
    """csv, tsv, parquet or jsonl, by the end of a file's name (also packed); None if it is none of these."""
    path = Path(name.lower())
    return SUFFIXES.get(Path(path.stem).suffix if path.suffix in PACKED else path.suffix)


def part_format(path: Path) -> str | None:
    """That of a file; one whose name has no ending, as Hive, Trino and Flink write it, may be Parquet."""
    if "." in path.name:
        return table_format(path.name)
    with path.open("rb") as file:
        return "parquet" if file.read(4) == b"PAR1" else None


def is_hidden(name: str) -> bool:
    """Whether a name is one of marks, checksums and files that are not finished, as Spark and Hive see it."""
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


def is_of_log(name: str) -> bool:
    """Whether a file's name below a folder shows that the folder is a table with a log of changes."""
    return any(fnmatch(name, log) or fnmatch(name, f"{log}/*") for log in LOGS)


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
    if log := _log_of_changes(path):
        raise ValueError(f"{path}: a table with a log of changes ({log}); export it as plain Parquet first")
    walked = list(_walk(path, path))
    formats = [part_format(part.path) for part in walked]
    kind = table_format(path.name) or next(filter(None, formats), None)
    parts = []
    for part, its in zip(walked, formats, strict=True):
        if its == kind or part.path.suffix == ".part":
            parts.append(part)
        elif kind and re.match(PART, part.path.name):
            raise ValueError(
                f"{path}: its parts are of two formats, as {part.path.name} is none of {kind}: leave one, and no files "
                "that are not finished"
            )
    if kind is None or not parts:
        what = f"of the format {kind}" if kind else f"whose names end in one of {', '.join(SUFFIXES)}"
        raise ValueError(f"{path}: a folder without part files {what}")
    return kind, parts


def is_parts(path: Path) -> bool:
    """Whether a folder is one table in parts, and not a data set of several.

    It is if its name ends as a table's (Dask); if it has Spark's ``_SUCCESS``, or folders named by a column;
    if the names of all its files begin with a number or `part`, as Ray and others write them; or if it has a log of
    changes, which none can read who reads its files.
    """
    if not path.is_dir():
        return False
    names = [each.name for each in path.iterdir()]
    if table_format(path.name) is not None or "_SUCCESS" in names or _log_of_changes(path):
        return True
    files = [path / name for name in names if not is_hidden(name)]
    if any("=" in file.name and file.is_dir() for file in files):
        return True
    return bool(files) and all(file.is_file() and re.match(PART, file.name) and _is_of_table(file) for file in files)


def _is_of_table(file: Path) -> bool:
    """Whether it is a part, or was to be one (``part-0.parquet.tmp``)."""
    return part_format(file) is not None or any(suffix in SUFFIXES for suffix in file.suffixes)


def _log_of_changes(path: Path) -> str | None:
    return next((log.partition("/")[0] for log in LOGS if any(path.glob(log))), None)


def _walk(folder: Path, root: Path) -> Iterator[Part]:
    for path in sorted(folder.iterdir(), key=_natural):
        if is_hidden(path.name):
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
