"""Items that a run has never seen, from a file: read as its catalogue was, with vectors if the file has them."""

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from mllm_msr.data.image_places import URL
from mllm_msr.data.images import decode
from mllm_msr.data.item_images import decoded_items, download, with_files
from mllm_msr.data.raw import BadRows, RawData
from mllm_msr.data.sources.tables import read_catalogue
from mllm_msr.data.table_files import TableFile
from mllm_msr.data.vector_files import read_vectors, vector_matrix
from mllm_msr.modeling.inputs import Candidate
from mllm_msr.records.schema import INTERACTIONS
from mllm_msr.records.sections import PrepareOptions

HARMLESS = "fields are divided by|read as|no column"  # notes on how a file was read


@dataclass(frozen=True)
class NewItems:
    """New items.

    Args:
        path: the file.
        candidates: by id, in the order of the file.
        vectors: (N, F) float32 in that order, if the file has them.
    """

    path: Path
    candidates: Mapping[str, Candidate]
    vectors: np.ndarray | None


def read_new_items(path: Path, known: Container[str], options: PrepareOptions, cache: Path) -> NewItems:
    """Read a table of any kind that a catalogue may be (CSV, TSV, JSON lines, Parquet; packed or not).

    It has ``item_id`` and of ``title``, ``text``, ``image`` and ``vector`` what there is.

    Args:
        path: images are paths relative to its folder, URLs or bytes; vectors as in
            :func:`~mllm_msr.data.vector_files.read_vectors`.
        known: ids that are taken.
        options: of the run, by which its images were made.
        cache: folder of images that are fetched by URL.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a row is bad, an id comes twice or is taken, an image or a vector cannot be used, or an item has
            nothing that tells it from others; the message names the file, the row or the item, and the remedy.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of new items")
    bad = BadRows(remedy="Mend the row, or leave it out.")
    catalogue = read_catalogue(path.name, {}, path.parent, None, bad)
    if refused := [each for each in bad.skipped if not re.search(HARMLESS, each["what"])]:
        first = refused[0]
        raise ValueError(f"{path}: {first['what']}: {', '.join(first['examples'])}: mend the file, or leave these out")
    if "title" not in catalogue.columns:
        catalogue = catalogue.with_columns(title=pl.lit("", pl.String))
    items = RawData(INTERACTIONS.frame().lazy(), catalogue).items
    if not len(items):
        raise ValueError(f"{path}: has no rows: add the new items")
    if taken := [item_id for item_id in items["item_id"] if item_id in known]:
        raise ValueError(f"{path}: item {taken[0]!r} is in the catalogue already: leave it out here")
    vectors = None
    if _has_vectors(path):
        by_id = read_vectors(path, items)
        vectors = vector_matrix(items.select("item_id").join(by_id, on="item_id", maintain_order="left"))
    empty = (pl.col("title") == "") & (pl.col("text") == "") & pl.col("image_path").is_null()
    if vectors is None and (ids := items.filter(empty)["item_id"].to_list()):
        raise ValueError(f"{path}: item {ids[0]!r} has neither title, text, image nor vector: give one of them")
    return NewItems(path, _candidates(path, items, options, cache), vectors)


def _candidates(path: Path, items: pl.DataFrame, options: PrepareOptions, cache: Path) -> dict[str, Candidate]:
    broken: dict[str, list[str]] = {}
    if items["image_path"].str.contains(URL).any():
        files, broken = download(items, cache)
        items = with_files(items, files)
    candidates = {}
    for batch in decoded_items(items, options, broken):
        for item_id, title, text, image, _ in batch.iter_rows():
            pixels = decode(image["bytes"], options.max_image_pixels, options.max_image_edge) if image else None
            candidates[item_id] = Candidate(item_id, title, text, pixels)
    for reason, ids in broken.items():
        raise ValueError(f"{path}: the image of item {ids[0]!r} cannot be used ({reason}): mend it or leave it out")
    return candidates


def _has_vectors(path: Path) -> bool:
    batches = TableFile.find(path.name, path.parent).batches(["item_id"], ["vector"], "", BadRows("skip"))
    return any(batch["vector"].is_not_null().any() for batch in batches if "vector" in batch.columns)
