"""Where a run's raw data comes from: the readers of the sources that a recipe may name."""

from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from mllm_msr.records.sections import OnBadRows, Source, source_type
from mllm_msr.records.storage import file_digest

READERS = {
    "demo": ("mllm_msr.data.sources.demo", "read_demo"),
    "movielens": ("mllm_msr.data.sources.movielens", "read_movielens"),
    "microlens": ("mllm_msr.data.sources.microlens", "read_microlens"),
    "amazon": ("mllm_msr.data.sources.amazon", "read_amazon"),
    "tables": ("mllm_msr.data.sources.tables", "read_tables"),
}
PLACES = ("folder", "interactions", "items", "images")
REQUIRED = {
    "movielens": ("folder",),
    "microlens": ("folder",),
    "amazon": ("folder", "category"),
    "tables": ("interactions",),
}


def read_source(source: Source, on_bad_rows: OnBadRows = "error"):
    """The raw data of a recipe's section ``source``."""
    check_source(source)
    module, function = READERS[source_type(source)]
    options = {name: value for name, value in asdict(source).items() if value is not None}
    if source_type(source) != "demo":
        options["on_bad_rows"] = on_bad_rows
    return getattr(import_module(module), function)(**options)


def check_source(source: Source) -> None:
    """Raise, with the remedy, unless all that the source needs is named and what is named on this machine exists.

    Raises:
        ValueError: a field that the source cannot do without is not given.
        FileNotFoundError: a file or folder that does not exist.
    """
    kind = source_type(source)
    for name in REQUIRED.get(kind, ()):
        if getattr(source, name) is None:
            raise ValueError(
                f"source {kind!r} needs a folder: give --data DIR or `folder` in the recipe"
                if name == "folder"
                else f"source {kind!r} needs {name!r}: name it in the recipe's source section"
            )
    for root in source_places(source):
        if isinstance(root, Path) and not root.exists():
            raise FileNotFoundError(f"data {'file' if root.suffix else 'folder'} {root} does not exist")


def source_places(source: Source) -> list[Path | str]:
    """The files and folders that a source reads, and as text the addresses on the Hub."""
    named = {name: getattr(source, name, None) for name in PLACES}
    folder = Path(named.pop("folder") or ".") if named["interactions"] else Path()  # own tables: only what is named
    return [place if ":" in place else folder / place.split("?")[0] for place in named.values() if place is not None]


def source_fingerprint(source: Source) -> list[Any]:
    """The source's options and, of its files, names and sizes; of the tables among them the content as well."""
    check_source(source)
    options = {name: value for name, value in asdict(source).items() if name not in PLACES and value is not None}
    facts: list[Any] = [options]
    for root in source_places(source):
        if isinstance(root, str):  # on the Hub
            facts.append(root)
            continue
        files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
        for path in files:
            if options.get("category", "") in path.name:
                table = path.suffix in {".csv", ".tsv", ".parquet", ".jsonl", ".ndjson", ".gz"}
                content = file_digest(path) if table else path.stat().st_size
                facts.append([path.name if path == root else path.relative_to(root).as_posix(), content])
    return facts
