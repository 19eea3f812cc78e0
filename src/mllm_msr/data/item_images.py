"""The images of a catalogue, from bytes, files and URLs to what is stored; what cannot be used is counted by reason."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polars as pl
from tqdm import tqdm

from mllm_msr.data.downloads import Downloads
from mllm_msr.data.image_places import URL
from mllm_msr.data.images import BrokenImage, normalise, thumbnail
from mllm_msr.data.raw import Skipped, oddity
from mllm_msr.records.schema import IMAGE, ITEMS, THUMBNAILS
from mllm_msr.records.sections import PrepareOptions

IMAGE_ROWS = 64  # images held at a time, and rows of a row group

ByReason = dict[str, list[str]]  # why images cannot be used -> the items they belong to


def counted(what: str, by_reason: ByReason) -> list[Skipped]:
    """What a report says of images that cannot be used."""
    return [oddity(f"{what}: {reason}", len(ids), ids) for reason, ids in sorted(by_reason.items())]


def download(items: pl.DataFrame, cache: Path) -> tuple[dict[str, str | None], ByReason]:
    """Fetch the images of ``items`` that are URLs: url -> file, or None where there is a reason why not."""
    wanted = items.filter(pl.col("image_path").str.contains(URL)).select("item_id", "image_path")
    fetched = Downloads(cache).fetch(wanted["image_path"]) if len(wanted) else {}
    failed: ByReason = {}
    for item_id, url in wanted.iter_rows():
        if isinstance(reason := fetched[url], str):
            failed.setdefault(reason, []).append(item_id)
    return {url: str(path) if isinstance(path, Path) else None for url, path in fetched.items()}, failed


def with_files(items: pl.DataFrame, files: dict[str, str | None]) -> pl.DataFrame:
    """The same items with downloaded files in the place of URLs."""
    if not files:
        return items
    is_url = pl.col("image_path").str.contains(URL)
    file = pl.col("image_path").replace_strict(files, default=None, return_dtype=pl.String)
    return items.with_columns(image_path=pl.when(is_url).then(file).otherwise("image_path"))


def broken_images(items: pl.DataFrame, options: PrepareOptions) -> ByReason:
    """The items whose images cannot be decoded."""
    broken: ByReason = {}
    for _ in decoded_items(items, options, broken):
        pass
    return broken


def without_images(items: pl.DataFrame, unusable: list[str]) -> pl.DataFrame:
    """Forget the images of some items, so that cleaning counts these as items without image."""
    lost = pl.col("item_id").is_in(unusable)
    return items.with_columns(pl.when(~lost).then(name).alias(name) for name in ("image_path", "image_bytes"))


def write_items(output: Path, items: pl.DataFrame, options: PrepareOptions) -> tuple[int, ByReason]:
    """Write the tables of items and thumbnails; returns how many items have an image, and which images are broken."""
    n_images, broken = 0, ByReason()
    with (
        ITEMS.writer(output / Path(ITEMS.file).name) as write,
        THUMBNAILS.writer(output / Path(THUMBNAILS.file).name) as write_thumbnails,
    ):
        for batch in decoded_items(items, options, broken):
            write(batch.drop("thumbnail"))
            small = batch.select("item_id", "thumbnail").drop_nulls("thumbnail")
            write_thumbnails(small)
            n_images += len(small)
    return n_images, broken


def decoded_items(items: pl.DataFrame, options: PrepareOptions, broken: ByReason) -> Iterator[pl.DataFrame]:
    """Batches of the items table with ``thumbnail`` beside it; fills ``broken``."""
    most = 2**20 + 8 * options.max_image_pixels  # as many bytes as four channels of 16 bits take

    def read(path: str | None, data: bytes | None) -> tuple[bytes, bytes] | BrokenImage | None:
        try:
            if data is None and path is not None:
                if Path(path).stat().st_size > most:
                    return BrokenImage(f"file of more than {most:,} bytes")
                data = Path(path).read_bytes()
            if data is None:
                return None
            data = normalise(data, options.max_image_pixels, options.max_image_edge)
            return data, thumbnail(data)
        except OSError as error:
            return BrokenImage(f"unreadable file ({error.strerror or error})")
        except BrokenImage as error:
            return error

    with ThreadPoolExecutor() as pool, tqdm(total=len(items), desc="images", unit="item", leave=False) as bar:
        for batch in items.iter_slices(IMAGE_ROWS):
            images: list[dict[str, bytes | None] | None] = []
            thumbnails: list[bytes | None] = []
            for item_id, result in zip(
                batch["item_id"], pool.map(read, batch["image_path"], batch["image_bytes"]), strict=True
            ):
                if isinstance(result, BrokenImage):
                    broken.setdefault(str(result), []).append(item_id)
                image, small = result if isinstance(result, tuple) else (None, None)
                images.append(None if image is None else {"bytes": image, "path": None})
                thumbnails.append(small)
            bar.update(len(batch))
            yield batch.select(
                "item_id",
                "title",
                "text",
                pl.Series("image", images, IMAGE),
                pl.Series("thumbnail", thumbnails, pl.Binary),
            )
