"""Raw data -> the data folder of a run: log, catalogue with pictures, ranking tasks, popularity, and a report."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, Value
from tqdm import tqdm

from mllm_msr.processing.cleaning import CleanData, clean
from mllm_msr.processing.downloads import Downloads
from mllm_msr.processing.images import BrokenImage, normalise
from mllm_msr.processing.leakage import check_leakage, check_popularity, targets_of
from mllm_msr.processing.options import PrepareOptions
from mllm_msr.processing.raw import EXAMPLES, RawData
from mllm_msr.processing.tasks import TaskPlan, update_hash

__all__ = ["PrepareOptions", "popularity_figures", "prepare", "print_statistics", "statistics_table"]

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
POPULARITY_SCHEMA = pa.schema({"item_id": pa.string(), "count": pa.int64()})
ITEM_FEATURES = Features(
    {"item_id": Value("string"), "title": Value("string"), "text": Value("string"), "image": Image()}
)


def prepare(
    raw: RawData, output: Path, config: PrepareOptions, source: str, image_cache: Path | None = None
) -> dict[str, Any]:
    """Clean, split, sample and write; returns the report that is also written as ``report.json``.

    Writes interactions, items (pictures embedded, read by ``datasets`` as an ``Image`` column), tasks and popularity as
    Parquet into the folder ``output``, and a README.md that makes ``load_dataset(output, "items")`` work. The caller
    moves the folder into place when it is whole. ``source`` names the data in the report. Pictures given by URL are
    fetched into ``image_cache`` (default: a folder of that name beside ``output``). Memory: the log and one batch of
    pictures or tasks. Raises ValueError when nothing is left, LeakageError when the tasks are not sound.
    """
    output.mkdir(parents=True, exist_ok=True)
    data = clean(raw, config)
    dropping = config.missing_images == "drop"  # then broken pictures must be known before cleaning drops
    every = clean(raw, _keeping(config)).items if dropping else data.items
    if every["image_path"].str.contains(URL).any():
        raw, every = _download(raw, every, image_cache or output.parent / "image_cache")
        data = clean(raw, config)
    if dropping:
        raw = _without_broken(raw, every, config)
        data = clean(raw, config)
    with _writer(output / "interactions.parquet", LOG_SCHEMA) as write:
        write(data.interactions)
    broken: dict[str, list[str]] = {}
    n_images = _write_items(output / "items.parquet", data.items, config, broken)
    protocol = _write_tasks(output, data, config)
    report = {
        "source": source,
        "options": asdict(config),
        "cleaning": data.table,
        "skipped": raw.skipped + _noted("broken image", broken),
        "statistics": _statistics(data, n_images),
        "protocol": protocol,
    }
    (output / "README.md").write_text(README, encoding="utf-8")
    (output / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def _noted(what: str, by_reason: dict[str, list[str]]) -> list[dict[str, Any]]:
    return [
        {"what": f"{what}: {reason}", "count": len(ids), "examples": ids[:EXAMPLES]}
        for reason, ids in sorted(by_reason.items())
    ]


def _download(raw: RawData, items: pl.DataFrame, cache: Path) -> tuple[RawData, pl.DataFrame]:
    """Fetch the pictures of ``items``; their URLs become files, or null with the reason noted. Both tables follow."""
    wanted = items.filter(pl.col("image_path").str.contains(URL)).select("item_id", "image_path")
    found = Downloads(cache).fetch(wanted["image_path"])
    failed: dict[str, list[str]] = {}
    for item_id, url in wanted.iter_rows():
        if isinstance(reason := found[url], str):
            failed.setdefault(reason, []).append(item_id)
    files = {url: str(path) if isinstance(path, Path) else None for url, path in found.items()}
    fetched = pl.DataFrame(
        {"url": list(files), "file": list(files.values())}, schema={"url": pl.String, "file": pl.String}
    )

    def local(table: pl.DataFrame) -> pl.DataFrame:
        table = table.join(fetched, left_on="image_path", right_on="url", how="left", maintain_order="left")
        is_url = pl.col("image_path").str.contains(URL)
        return table.with_columns(image_path=pl.when(is_url).then("file").otherwise("image_path")).drop("file")

    return RawData(raw.interactions, local(raw.items), raw.skipped + _noted("not downloaded", failed)), local(items)


def _keeping(config: PrepareOptions) -> PrepareOptions:
    return PrepareOptions(**{**asdict(config), "missing_images": "keep", "limit_users": None, "max_history": None})


def _without_broken(raw: RawData, items: pl.DataFrame, config: PrepareOptions) -> RawData:
    """Forget the pictures that cannot be decoded, so that cleaning counts their items as without image."""
    broken: dict[str, list[str]] = {}
    for _ in _pictures(items, config, broken):
        pass
    lost = pl.col("item_id").is_in([item for ids in broken.values() for item in ids])
    kept = [pl.when(~lost).then(name).alias(name) for name in ("image_path", "image_bytes")]
    return RawData(
        raw.interactions, raw.items.with_columns(kept), raw.skipped + _noted("broken image, item dropped", broken)
    )


def _pictures(items: pl.DataFrame, config: PrepareOptions, broken: dict[str, list[str]]) -> Iterator[pl.DataFrame]:
    """Batches of the catalogue with ``image``: bytes fit to store, or null; ``broken``: reason -> item ids, filled."""

    def picture(path: str | None, data: bytes | None) -> bytes | BrokenImage | None:
        try:
            if data is None and path is not None:
                data = Path(path).read_bytes()
            return data and normalise(data, config.max_image_pixels, config.max_image_edge)
        except OSError as error:
            return BrokenImage(f"unreadable file ({error.strerror or error})")
        except BrokenImage as error:
            return error

    with ThreadPoolExecutor() as pool, tqdm(total=len(items), desc="images", unit="item") as bar:
        for batch in items.iter_slices(IMAGE_ROWS):
            made: list[bytes | None] = []
            for item_id, result in zip(
                batch["item_id"], pool.map(picture, batch["image_path"], batch["image_bytes"]), strict=True
            ):
                if isinstance(result, BrokenImage):
                    broken.setdefault(str(result), []).append(item_id)
                made.append(result if isinstance(result, bytes) and result else None)
            bar.update(len(batch))
            yield batch.select("item_id", "title", "text", pl.Series("image", made, dtype=pl.Binary))


def _write_items(path: Path, items: pl.DataFrame, config: PrepareOptions, broken: dict[str, list[str]]) -> int:
    n_images = 0
    schema = ITEM_FEATURES.arrow_schema
    with pq.ParquetWriter(path, schema) as writer:
        for batch in _pictures(items, config, broken):
            images = [None if data is None else {"bytes": data, "path": None} for data in batch["image"]]
            n_images += len(images) - images.count(None)
            columns = [batch[name].to_list() for name in ("item_id", "title", "text")]
            arrays = [pa.array(values, field.type) for values, field in zip([*columns, images], schema, strict=True)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
    return n_images


def _write_tasks(output: Path, data: CleanData, config: PrepareOptions) -> dict[str, Any]:
    """Write tasks chunk by chunk, each checked for leakage; returns the protocol part of the report."""
    plan = TaskPlan.of(data.interactions, config, data.seen)
    total = sum(plan.report[f"{split}_tasks"] for split in ("train", "validation", "test"))
    whole = hashlib.sha256()
    by_split = {split: hashlib.sha256() for split in ("train", "validation", "test")}
    figures = {split: Counter[str]() for split in ("validation", "test")}
    targets = []
    with (
        _writer(output / "tasks.parquet", TASK_SCHEMA) as write,
        tqdm(total=total, desc="tasks", unit="task") as bar,
    ):
        for tasks in plan.chunks():
            check_leakage(
                tasks, _of_users(data.interactions, tasks["user_id"]), seen=_of_users(data.seen, tasks["user_id"])
            )
            targets.append(targets_of(tasks))
            update_hash(whole, tasks)
            for split, digest in by_split.items():
                update_hash(digest, tasks.filter(split=split))
            for split, sums in figures.items():
                sums.update(_popularity_sums(tasks.filter(split=split), plan.popularity))
            write(tasks)
            bar.update(len(tasks))
    check_popularity(pl.concat(targets), data.interactions, plan.popularity)
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


def _of_users(table: pl.DataFrame, users: pl.Series) -> pl.DataFrame:
    """The rows between the first and the last of ``users``; both are in the order of user_id."""
    column = table["user_id"]
    start, end = column.search_sorted(users[0], "left"), column.search_sorted(users[-1], "right")
    return table[start:end]


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
    return _means(Counter(_popularity_sums(tasks, popularity)))


def _popularity_sums(tasks: pl.DataFrame, popularity: pl.DataFrame) -> dict[str, float]:
    codes = pl.col("candidates").cast(pl.Enum(popularity["item_id"])).to_physical()
    pairs = tasks.select("candidates", "labels").with_row_index("task").explode("candidates", "labels")
    pairs = pairs.with_columns(popularity["count"].gather(pairs.select(codes).to_series()))
    pairs = pairs.join(pairs.filter(labels=1).select("task", target="count"), on="task")
    ranks = (
        pairs.filter(labels=0)
        .group_by("task")
        .agg(
            (pl.col("count") > pl.col("target")).sum().cast(pl.Int64).alias("above"),
            (pl.col("count") == pl.col("target")).sum().cast(pl.Int64).alias("tied"),
            pl.len().alias("n"),
        )
    )
    above, tied = pl.col("above"), pl.col("tied")
    place = 1 / (tied + 1)  # each of the places above + 1 ... above + tied + 1 is equally likely
    hits = {f"hr@{k}": ((k - above).clip(0) * place).clip(0, 1) for k in (1, 5, 10)}
    mrr = pl.sum_horizontal(
        pl.when((above < rank) & (rank <= above + tied + 1)).then(place / rank).otherwise(0.0) for rank in range(1, 6)
    )
    figures = ranks.select(
        **{name: hit.sum() for name, hit in hits.items()},
        **{"mrr@5": mrr.sum(), "auc_user": (1 - (above + tied / 2) / pl.col("n")).sum(), "tasks": pl.len()},
    )
    return figures.to_dicts()[0]


def _means(sums: Counter[str]) -> dict[str, float]:
    return {name: round(value / sums["tasks"], 4) for name, value in sums.items() if name != "tasks"}


def _statistics(data: CleanData, n_images: int) -> dict[str, Any]:
    log = data.interactions
    users, items = log["user_id"].n_unique(), len(data.items)
    lengths = log.group_by("user_id").len()["len"]
    tied = int(log.select(pl.struct("user_id", "timestamp").is_duplicated().sum()).item())
    return {
        "users": users,
        "items": items,
        "interactions": len(log),
        "mean_length": round(len(log) / users, 2),
        "median_length": lengths.median(),
        "longest": lengths.max(),
        "sparsity": round(1 - log.select("user_id", "item_id").n_unique() / (users * items), 5),
        "share_tied_times": round(tied / len(log), 4),
        "share_without_image": round(1 - n_images / items, 4),
        "share_without_text": round((data.items["text"] == "").sum() / items, 4),
        "first_timestamp": log["timestamp"].min(),
        "last_timestamp": log["timestamp"].max(),
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
    for split, figures in protocol["popularity"].items():
        lines.append(f"popularity, {split}: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    lines += [f"{row['count']:>8,}  {row['what']}" for row in report["skipped"]]
    return "\n".join(lines)


def print_statistics(report: dict[str, Any]) -> None:
    """Print :func:`statistics_table`."""
    print(statistics_table(report))
