"""Raw data -> the data folder of a run: log, catalogue with pictures, ranking tasks, popularity, and a report."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, Value
from tqdm import tqdm

from mllm_msr.data.cleaning import CleanData, clean
from mllm_msr.data.coded_log import Array, CodedLog, user_starts
from mllm_msr.data.downloads import Downloads
from mllm_msr.data.images import BrokenImage, normalise, thumbnail
from mllm_msr.data.leakage import (
    LeakageError,
    check_leakage,
    check_own_words,
    check_popularity,
    check_shown_counts,
    countable,
)
from mllm_msr.data.readers import EXAMPLES, RawData
from mllm_msr.data.tasks import SPLITS, TaskPlan, hash_lines
from mllm_msr.records.sections import PrepareOptions

__all__ = ["PrepareOptions", "popularity_figures", "prepare", "statistics_table"]

URL = "^https?://"
IMAGE_ROWS = 64  # pictures held at a time, and rows of a row group
README = """---
configs:
- config_name: tasks
  default: true
  data_files: tasks.parquet
- config_name: items
  data_files: items.parquet
- config_name: interactions
  data_files: interactions.parquet
- config_name: popularity
  data_files: popularity.parquet
---
"""
TASK_SCHEMA = pa.schema(
    {
        "task_id": pa.string(),
        "split": pa.string(),
        "user_id": pa.string(),
        "history": pa.list_(pa.string()),
        "cutoff": pa.int64(),
        "candidates": pa.list_(pa.string()),
        "labels": pa.list_(pa.int64()),
        "history_length": pa.int64(),
        "target_train_count": pa.int64(),
    }
)
LOG_SCHEMA = pa.schema({"user_id": pa.string(), "item_id": pa.string(), "timestamp": pa.int64()})
SEEN_SCHEMA = pa.schema({"user_id": pa.string(), "item_id": pa.string()})
THUMBNAIL_SCHEMA = pa.schema({"item_id": pa.string(), "thumbnail": pa.binary()})
POPULARITY_SCHEMA = pa.schema({"item_id": pa.string(), "count": pa.int64()})
ITEM_FEATURES = Features(
    {"item_id": Value("string"), "title": Value("string"), "text": Value("string"), "image": Image()}
)


def prepare(
    raw: RawData, output: Path, config: PrepareOptions, source: str, inputs: Sequence[Any] = ()
) -> dict[str, Any]:
    """Clean, split, sample and write; returns the report that is also written as ``report.json``.

    Writes interactions, items (pictures embedded, read by ``datasets`` as an ``Image`` column), tasks and popularity as
    Parquet into the folder ``output``, under ``max_history`` also ``seen``, the pairs that it cut off, and a README.md
    that makes ``load_dataset(output, "items")`` work. The caller moves the folder into place when it is whole.
    ``source`` names the data in the report, ``inputs`` are its files and their hashes. Pictures given by URL are
    fetched into the folder ``image_cache`` beside ``output``. Memory: the log and one batch of pictures or tasks.
    Raises ValueError when nothing is left, LeakageError when the tasks are not sound.
    """
    output.mkdir(parents=True, exist_ok=True)
    dropping = config.missing_images == "drop"  # then the pictures of all that may stay must be known before cleaning
    data = clean(raw, _keeping(config) if dropping else config, output)
    files, lost = _download(data.items, output.parent / "image_cache")
    data.items = _local(data.items, files)
    if dropping:
        unusable, broken = _broken(data.items, config)
        lost += broken
        data.log.close()
        usable = _without_pictures(_local(raw.items, files), unusable)
        data = clean(replace(raw, items=usable), config, output)
    check_own_words(data.items)
    with _writer(output / "interactions.parquet", LOG_SCHEMA) as write:
        for rows in data.log.parts():
            write(data.log.frame(rows))
    if config.max_history is not None:  # so that the negatives can be proved again without the raw data
        with _writer(output / "seen.parquet", SEEN_SCHEMA) as write:
            for rows in data.log.parts("seen"):
                write(data.log.frame(rows))
    broken_ids: dict[str, list[str]] = {}
    n_images = _write_items(output, data.items, config, broken_ids)
    protocol = _write_tasks(output, data.log, config)
    report = {
        "source": source,
        "inputs": list(inputs),
        "version": version("mllm-msr"),
        "options": asdict(config),
        "cleaning": data.table,
        "skipped": raw.skipped + lost + _noted("broken image", broken_ids),
        "statistics": _statistics(data, n_images),
        "protocol": protocol,
    }
    data.log.close()
    (output / "README.md").write_text(README, encoding="utf-8")
    (output / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def _noted(what: str, by_reason: dict[str, list[str]]) -> list[dict[str, Any]]:
    return [
        {"what": f"{what}: {reason}", "count": len(ids), "examples": ids[:EXAMPLES]}
        for reason, ids in sorted(by_reason.items())
    ]


def _download(items: pl.DataFrame, cache: Path) -> tuple[dict[str, str | None], list[dict[str, Any]]]:
    """Fetch the pictures of ``items``: url -> file, or None with the reason noted."""
    wanted = items.filter(pl.col("image_path").str.contains(URL)).select("item_id", "image_path")
    found = Downloads(cache).fetch(wanted["image_path"]) if len(wanted) else {}
    failed: dict[str, list[str]] = {}
    for item_id, url in wanted.iter_rows():
        if isinstance(reason := found[url], str):
            failed.setdefault(reason, []).append(item_id)
    files = {url: str(path) if isinstance(path, Path) else None for url, path in found.items()}
    return files, _noted("not downloaded", failed)


def _local(items: pl.DataFrame, files: dict[str, str | None]) -> pl.DataFrame:
    """The same items with files in the place of URLs."""
    if not files:
        return items
    urls = pl.DataFrame({"image_path": list(files), "file": list(files.values())}, schema_overrides={"file": pl.String})
    items = items.join(urls, on="image_path", how="left", maintain_order="left")
    is_url = pl.col("image_path").str.contains(URL)
    return items.with_columns(image_path=pl.when(is_url).then("file").otherwise("image_path")).drop("file")


def _keeping(config: PrepareOptions) -> PrepareOptions:
    return replace(config, missing_images="keep", limit_users=None, max_history=None)


def _broken(items: pl.DataFrame, config: PrepareOptions) -> tuple[list[str], list[dict[str, Any]]]:
    """The items whose pictures cannot be decoded, and the reasons."""
    broken: dict[str, list[str]] = {}
    for _ in _pictures(items, config, broken):
        pass
    return [item for ids in broken.values() for item in ids], _noted("broken image, item dropped", broken)


def _without_pictures(items: pl.DataFrame, unusable: list[str]) -> pl.DataFrame:
    """Forget these pictures, so that cleaning counts their items as without image."""
    lost = pl.col("item_id").is_in(unusable)
    return items.with_columns(pl.when(~lost).then(name).alias(name) for name in ("image_path", "image_bytes"))


def _pictures(items: pl.DataFrame, config: PrepareOptions, broken: dict[str, list[str]]) -> Iterator[pl.DataFrame]:
    """Batches of the catalogue with ``image``: bytes fit to store, or null; ``broken``: reason -> item ids, filled."""

    def picture(path: str | None, data: bytes | None) -> tuple[bytes, bytes] | BrokenImage | None:
        try:
            if data is None and path is not None:
                data = Path(path).read_bytes()
            if data is None:
                return None
            data = normalise(data, config.max_image_pixels, config.max_image_edge)
            return data, thumbnail(data)
        except OSError as error:
            return BrokenImage(f"unreadable file ({error.strerror or error})")
        except BrokenImage as error:
            return error

    with ThreadPoolExecutor() as pool, tqdm(total=len(items), desc="images", unit="item") as bar:
        for batch in items.iter_slices(IMAGE_ROWS):
            made: list[tuple[bytes | None, bytes | None]] = []
            for item_id, result in zip(
                batch["item_id"], pool.map(picture, batch["image_path"], batch["image_bytes"]), strict=True
            ):
                if isinstance(result, BrokenImage):
                    broken.setdefault(str(result), []).append(item_id)
                made.append(result if isinstance(result, tuple) else (None, None))
            bar.update(len(batch))
            columns = {"image": [image for image, _ in made], "thumbnail": [small for _, small in made]}
            yield batch.select(
                "item_id", "title", "text", *(pl.Series(name, column, pl.Binary) for name, column in columns.items())
            )


def _write_items(output: Path, items: pl.DataFrame, config: PrepareOptions, broken: dict[str, list[str]]) -> int:
    """Write items.parquet and thumbnails.parquet; returns how many items have a picture."""
    n_images = 0
    schema = ITEM_FEATURES.arrow_schema
    with (
        pq.ParquetWriter(output / "items.parquet", schema) as writer,
        _writer(output / "thumbnails.parquet", THUMBNAIL_SCHEMA) as write_thumbnails,
    ):
        for batch in _pictures(items, config, broken):
            images = [None if data is None else {"bytes": data, "path": None} for data in batch["image"]]
            n_images += len(images) - images.count(None)
            columns = [batch[name].to_list() for name in ("item_id", "title", "text")]
            arrays = [pa.array(values, field.type) for values, field in zip([*columns, images], schema, strict=True)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            write_thumbnails(batch.drop_nulls("thumbnail"))
    return n_images


def _write_tasks(output: Path, log: CodedLog, config: PrepareOptions) -> dict[str, Any]:
    """Write tasks chunk by chunk, each checked for leakage; returns the protocol part of the report."""
    plan = TaskPlan.of_log(log, config)
    total = sum(plan.report[f"{split}_tasks"] for split in SPLITS)
    whole = hashlib.sha256()
    by_split = {split: hashlib.sha256() for split in SPLITS}
    figures = {split: Counter[str]() for split in ("validation", "test")}
    items = pa.array(log.items.to_list(), pa.string())
    counts = pl.DataFrame({"item_id": pl.Series(range(len(log.items)), dtype=pl.UInt32), "count": plan.counts})
    allowed = np.zeros(len(log.items), dtype=np.int64)
    schema = pa.schema([_dictionary(field) for field in TASK_SCHEMA])
    with (
        # ids go in as a dictionary and come out as text: the schema as Arrow sees it is not stored
        pq.ParquetWriter(
            output / "tasks.parquet",
            schema,
            store_schema=False,
            use_dictionary=["split", *(f"{name}.list.element" for name in ("history", "candidates", "labels"))],
            dictionary_pagesize_limit=1 << 26,
            write_statistics=False,
        ) as writer,
        tqdm(total=total, desc="tasks", unit="task") as bar,
    ):
        for tasks, rows, seen in plan.coded_chunks():
            _prove(plan, tasks, rows, seen, counts)
            ours = countable(tasks, _coded(rows), config.protocol)
            allowed[ours["item_id"].to_numpy()] += ours["countable"].to_numpy()
            readable = plan.decode(tasks)
            lines = hash_lines(readable)
            whole.update(lines.str.join("").item().encode())
            for split, digest in by_split.items():
                digest.update(lines.filter(tasks["split"] == split).str.join("").item().encode())
            for split, sums in figures.items():
                sums.update(_popularity_sums(tasks.filter(split=split), plan.counts))
            table = readable.select(pl.exclude("history", "candidates")).to_arrow(compat_level=pl.CompatLevel.oldest())
            for name in ("history", "candidates"):
                table = table.append_column(name, _as_dictionary(tasks[name], items))
            writer.write_table(table.select(schema.names).cast(schema))
            bar.update(len(tasks))
    check_popularity(
        pl.DataFrame({"item_id": counts["item_id"], "countable": allowed}),
        counts,
    )
    with _writer(output / "popularity.parquet", POPULARITY_SCHEMA) as write:
        write(plan.popularity)
    return {
        "name": config.protocol,
        "negatives": config.negatives,
        "n_negatives": config.n_negatives,
        "seed": config.seed,
        "candidate_hash": whole.hexdigest()[:16],
        "candidate_hashes": {split: digest.hexdigest()[:16] for split, digest in by_split.items()},
        **plan.report,
        "popularity": {split: _means(sums) for split, sums in figures.items() if sums["tasks"]},
    }


def _coded(rows: Array) -> pl.DataFrame:
    return pl.DataFrame({"user_id": rows["user"], "item_id": rows["item"], "timestamp": rows["time"]})


def _prove(plan: TaskPlan, tasks: pl.DataFrame, rows: Array, seen: Array, counts: pl.DataFrame) -> None:
    """The proof against leakage on numbers, which is fast; if it fails, again on ids, which a person can look up."""
    try:
        check_leakage(tasks, _coded(rows), seen=_coded(seen), protocol=plan.options.protocol)
        check_shown_counts(tasks, counts)
    except LeakageError:
        log, readable = plan.log, plan.decode(tasks)
        check_leakage(readable, log.frame(rows), seen=log.frame(seen), protocol=plan.options.protocol)
        check_shown_counts(readable, plan.popularity)
        raise


def _dictionary(field: pa.Field) -> pa.Field:
    is_ids = field.name in ("history", "candidates")
    return pa.field(field.name, pa.list_(pa.dictionary(pa.int32(), pa.string()))) if is_ids else field


def _as_dictionary(codes: pl.Series, ids: pa.Array) -> pa.Array:
    """Lists of numbers -> Arrow lists of ids, stored once each."""
    offsets = np.concatenate([[0], np.cumsum(codes.list.len())]).astype(np.int32)
    values = codes.explode(empty_as_null=False).to_numpy().astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.DictionaryArray.from_arrays(pa.array(values), ids))


@contextmanager
def _writer(path: Path, schema: pa.Schema) -> Iterator[Callable[[pl.DataFrame], None]]:
    """Append frames to a Parquet file of plain Arrow types, which every reader knows."""
    with pq.ParquetWriter(path, schema) as writer:

        def write(frame: pl.DataFrame) -> None:
            for part in frame.select(schema.names).iter_slices(100_000):
                writer.write_table(part.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(schema))

        yield write


def popularity_figures(tasks: pl.DataFrame, popularity: pl.DataFrame) -> dict[str, float]:
    """What ranking by training counts alone scores: hr@1, hr@5, hr@10, mrr@5, auc_user; means over tasks.

    Ties count as their expectation under random order, so an all-tied list is no hit.
    """
    numbers = pl.col("candidates").cast(pl.List(pl.Enum(popularity["item_id"])))
    codes = tasks.select(numbers.list.eval(pl.element().to_physical()), "labels")
    return _means(Counter(_popularity_sums(codes, popularity["count"].to_numpy())))


def _popularity_sums(tasks: pl.DataFrame, counts: Array) -> dict[str, float]:
    if tasks.is_empty():
        return {}
    width = tasks["candidates"].list.len().to_numpy().astype(np.int64)
    starts = np.cumsum(width) - width
    count = counts[tasks["candidates"].explode().to_numpy()]
    target = np.repeat(count[tasks["labels"].explode().to_numpy() == 1], width)
    above = np.add.reduceat(count > target, starts, dtype=np.int64)
    tied = np.add.reduceat(count == target, starts, dtype=np.int64) - 1
    place = 1 / (tied + 1)  # each of the places above + 1 ... above + tied + 1 is equally likely
    sums = {f"hr@{k}": np.clip(np.maximum(k - above, 0) * place, 0, 1).sum() for k in (1, 5, 10)}
    sums["mrr@5"] = sum(
        np.where((above < rank) & (rank <= above + tied + 1), place / rank, 0).sum() for rank in range(1, 6)
    )
    sums["auc_user"] = (1 - (above + tied / 2) / (width - 1)).sum()
    return {**{name: float(value) for name, value in sums.items()}, "tasks": len(tasks)}


def _means(sums: Counter[str]) -> dict[str, float]:
    return {name: round(value / sums["tasks"], 4) for name, value in sums.items() if name != "tasks"}


def _statistics(data: CleanData, n_images: int) -> dict[str, Any]:
    lengths: list[Array] = []
    tied = pairs = 0
    first, last = [], []
    for rows in data.log.parts():
        if len(rows):
            lengths.append(np.diff(user_starts(rows["user"])))
            moments = np.diff(rows["time"]).astype(bool) | np.diff(rows["user"]).astype(bool)
            alone = np.concatenate([[True], moments]) & np.concatenate([moments, [True]])
            tied += int(len(rows) - alone.sum())
            pairs += len(np.unique(rows["user"].astype(np.int64) * len(data.items) + rows["item"]))
            first.append(rows["time"].min())
            last.append(rows["time"].max())
    length = np.concatenate(lengths)
    users, items, interactions = len(length), len(data.items), int(length.sum())
    return {
        "users": users,
        "items": items,
        "interactions": interactions,
        "mean_length": round(interactions / users, 2),
        "median_length": float(np.median(length)),
        "longest": int(length.max()),
        "sparsity": round(1 - pairs / (users * items), 5),
        "share_tied_times": round(tied / interactions, 4),
        "share_without_image": round(1 - n_images / items, 4),
        "share_without_text": round((data.items["text"] == "").sum() / items, 4),
        "first_timestamp": int(min(first)),
        "last_timestamp": int(max(last)),
    }


def statistics_table(report: dict[str, Any]) -> str:
    """The report as plain text: what cleaning left, the data's statistics, the protocol, and what popularity scores."""
    steps = [(row["step"], row["interactions"], row["users"], row["items"], row["why"]) for row in report["cleaning"]]
    lines = [f"{'step':<14}{'interactions':>13}{'users':>10}{'items':>10}  why"]
    lines += [f"{step:<14}{n:>13,}{users:>10,}{items:>10,}  {why}" for step, n, users, items, why in steps]
    lines.append("")
    shares = ("sparsity", "share_tied_times", "share_without_image", "share_without_text")
    for name, value in report["statistics"].items():
        shown = f"{value:.2%}" if name in shares else str(value) if "timestamp" in name else f"{value:,}"
        lines.append(f"{name.replace('_', ' '):<22}{shown:>16}")
    protocol = report["protocol"]
    lines += ["", f"protocol {protocol['name']}, candidates {protocol['candidate_hash']}"]
    for split in ("train", "validation", "test"):
        tied = protocol[f"{split}_targets_tied_in_time"]
        lines.append(
            f"{split:<12}{protocol[f'{split}_tasks']:>10,} tasks, {tied:,} targets tied in time with the item before"
        )
    for name, count in protocol.items():
        if name.startswith("targets_") and count:
            lines.append(f"{count:>8,}  targets refused: {name.removeprefix('targets_').replace('_', ' ')}")
    for split, figures in protocol["popularity"].items():
        lines.append(f"popularity, {split}: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    lines += [f"{row['count']:>8,}  {row['what']}" for row in report["skipped"]]
    return "\n".join(lines)
