"""The sources that a recipe may name: its section ``source`` as options of one of them, checked and read."""

from pathlib import Path
from typing import Any

from mllm_msr.data.image_places import image_suffixes
from mllm_msr.data.raw import RawData
from mllm_msr.data.remote_files import is_remote, remote_fact
from mllm_msr.data.sources.amazon import AmazonSource
from mllm_msr.data.sources.demo import DemoSource
from mllm_msr.data.sources.interface import SourceOptions
from mllm_msr.data.sources.microlens import MicroLensSource
from mllm_msr.data.sources.movielens import MovieLensSource
from mllm_msr.data.sources.tables import TablesSource
from mllm_msr.records.sections import OnBadRows, Source
from mllm_msr.records.storage import digest, file_digest
from mllm_msr.records.typed import build, did_you_mean

SOURCES: dict[str, type[SourceOptions]] = {
    "demo": DemoSource,
    "movielens": MovieLensSource,
    "microlens": MicroLensSource,
    "amazon": AmazonSource,
    "tables": TablesSource,
}


def source_options(source: Source) -> SourceOptions:
    """The typed options of a recipe's source; ValueError for an unknown type or key, with the nearest known one."""
    if source.type not in SOURCES:
        raise ValueError(f"source.type={source.type!r} is unknown{did_you_mean(str(source.type), SOURCES)}")
    return build(SOURCES[source.type], source.options, "source")


def effective_source(source: Source) -> Source:
    """The source with all its options, defaults included; raises like :func:`source_options`."""
    return Source(source.type, vars(source_options(source)))


def read_source(source: Source, on_bad_rows: OnBadRows = "error") -> RawData:
    """The raw data of a recipe's section ``source``; see :func:`check_source` for what it raises."""
    check_source(source)
    return source_options(source).read(on_bad_rows)


def check_source(source: Source) -> None:
    """Raise, with the remedy, unless all that the source needs is named and what is named on this machine exists.

    Raises:
        ValueError: an option that is unknown, or one that the source cannot do without is not given.
        FileNotFoundError: a file or folder that does not exist.
    """
    options = source_options(source)
    for name in options.required:
        if getattr(options, name) is None:
            raise ValueError(
                f"source {source.type!r} needs a folder: give --data DIR or `folder` in the recipe"
                if name == "folder"
                else f"source {source.type!r} needs {name!r}: name it in the recipe's source section"
            )
    for root in options.roots():
        if isinstance(root, Path) and not root.exists():
            raise FileNotFoundError(f"data {'file' if root.suffix else 'folder'} {root} does not exist")


def source_fingerprint(source: Source) -> list[Any]:
    """The source's options and its files: ``[name, hash of the content]`` a table, and one entry for all images.

    What is on the Hub counts by its address, which may have a revision; files of fsspec by size, time or checksum.
    """
    check_source(source)
    options = source_options(source)
    facts: list[Any] = [{name: value for name, value in vars(options).items() if name not in options.places and value}]
    images = set(options.named_images())
    for root in options.roots():
        if isinstance(root, str):
            facts.append(remote_fact(root) if is_remote(root) else root)
            continue
        for path in [root] if root.is_file() else sorted(path for path in root.rglob("[!.]*") if path.is_file()):
            if path.suffix.lower() in image_suffixes():
                images.add(path)
            elif options.reads(path):
                facts.append([path.name if path == root else path.relative_to(root).as_posix(), file_digest(path)])
    if images:
        facts.append([f"{len(images)} images", digest(*((path.name, _image_digest(path)) for path in sorted(images)))])
    return facts


def _image_digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError:  # counted as an unreadable one when it is decoded
        return ""
