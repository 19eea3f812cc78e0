"""Where a run's raw data comes from: the readers of the sources that a recipe may name, and what they read."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from mllm_msr.data.raw import RawData
from mllm_msr.records.sections import (
    AmazonSource,
    DemoSource,
    MicroLensSource,
    MovieLensSource,
    OnBadRows,
    Source,
    TablesSource,
    source_type,
)
from mllm_msr.records.storage import digest, file_digest

PLACES = ("folder", "interactions", "items", "images")
REQUIRED = {
    "movielens": ("folder",),
    "microlens": ("folder",),
    "amazon": ("folder", "category"),
    "tables": ("interactions",),
}


def read_source(source: Source, on_bad_rows: OnBadRows = "error") -> RawData:
    """The raw data of a recipe's section ``source``; see :func:`check_source` for what it raises."""
    check_source(source)
    match source:
        case DemoSource(seed=seed, n_users=n_users, n_items=n_items):
            from mllm_msr.data.sources.demo import read_demo

            return read_demo(seed, n_users, n_items)
        case MovieLensSource(folder=str(folder)):
            from mllm_msr.data.sources.movielens import read_movielens

            return read_movielens(Path(folder), on_bad_rows)
        case MicroLensSource(folder=str(folder), covers=covers):
            from mllm_msr.data.sources.microlens import read_microlens

            return read_microlens(Path(folder), covers and Path(covers), on_bad_rows)
        case AmazonSource(folder=str(folder), category=str(category)):
            from mllm_msr.data.sources.amazon import read_amazon

            return read_amazon(folder, category, on_bad_rows)
        case TablesSource(interactions=str(interactions), items=items, images=images, columns=columns, folder=folder):
            from mllm_msr.data.sources.tables import read_tables

            return read_tables(interactions, items, columns, images, folder, on_bad_rows)
    raise ValueError(f"source {source_type(source)!r} has no reader")


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
    """The source's options and its files: ``[name, hash of the content]`` a table, and one entry for all images.

    What is on the Hub counts by its address, which may have a revision.
    """
    from mllm_msr.data.image_places import image_suffixes

    check_source(source)
    facts: list[Any] = [{name: value for name, value in asdict(source).items() if name not in PLACES and value}]
    images: set[Path] = set()
    if isinstance(source, TablesSource):
        from mllm_msr.data.sources.tables import named_images

        images.update(named_images(source))
    for root in source_places(source):
        if isinstance(root, str):  # on the Hub
            facts.append(root)
            continue
        for path in [root] if root.is_file() else sorted(path for path in root.rglob("[!.]*") if path.is_file()):
            if path.suffix.lower() in image_suffixes():
                images.add(path)
            elif not isinstance(source, AmazonSource) or str(source.category) in path.name:
                facts.append([path.name if path == root else path.relative_to(root).as_posix(), file_digest(path)])
    if images:
        facts.append([f"{len(images)} images", digest(*((path.name, file_digest(path)) for path in sorted(images)))])
    return facts
