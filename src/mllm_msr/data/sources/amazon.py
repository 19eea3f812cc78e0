"""Amazon Reviews 2023: ``<Category>.jsonl[.gz]`` and ``meta_<Category>.jsonl[.gz]``, on disk or on the Hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from mllm_msr.data.ids import as_ids, as_text, check_join
from mllm_msr.data.image_places import URL
from mllm_msr.data.json_lines import json_blocks
from mllm_msr.data.logs import interactions_from, join_text
from mllm_msr.data.raw import ROW, BadRows, RawData
from mllm_msr.data.sources.interface import SourceOptions, Terms
from mllm_msr.data.spool import spool
from mllm_msr.data.table_files import local_file
from mllm_msr.records.sections import OnBadRows

COLUMNS = {"user_id": "user_id", "item_id": "parent_asin", "timestamp": "timestamp"}
REVIEWS: dict[str, Any] = {"user_id": pl.String, "parent_asin": pl.String, "timestamp": pl.String}
META: dict[str, Any] = {
    "parent_asin": pl.String,
    "title": pl.String,
    "features": pl.List(pl.String),
    "description": pl.List(pl.String),
    "categories": pl.List(pl.String),
    "images": pl.List(pl.Struct({"thumb": pl.String, "large": pl.String, "hi_res": pl.String, "variant": pl.String})),
}


@dataclass(frozen=True)
class AmazonSource(SourceOptions):
    """A category of Amazon Reviews 2023, in a folder or on the Hub."""

    folder: str | None = None
    category: str | None = None

    required = ("folder", "category")
    terms = Terms(
        name="Amazon Reviews (McAuley Lab, UCSD)",
        allows="research, citing the paper; the lab says that it cannot assign a licence",
        forbids="nothing beyond that is granted: texts and images belong to reviewers, sellers and Amazon",
        link="https://amazon-reviews-2023.github.io",
        images="product images belong to sellers and Amazon",
        log="no licence, so no permission to pass it on",
        read="the lab's answers to questions about the licence, as quoted by others, November 2026",
    )

    def read(self, on_bad_rows: OnBadRows) -> RawData:
        return read_amazon(str(self.folder), str(self.category), on_bad_rows)

    def reads(self, path: Path) -> bool:
        return str(self.category) in path.name


def read_amazon(folder: Path | str, category: str, on_bad_rows: OnBadRows = "error") -> RawData:
    """Read one category, e.g. ``read_amazon("hf://datasets/McAuley-Lab/Amazon-Reviews-2023", "Video_Games")``.

    ``folder`` has the two files (directly, or under ``raw/…_categories`` as on the Hub) or is a data set on the Hub.
    Reviews join metadata on ``parent_asin``; every review is an interaction. An item's text is its categories,
    features and description, its image the URL of the main one; ratings and review texts are not used.
    """
    bad = BadRows(on_bad_rows)
    reviews = _find(folder, "review_categories", category)
    log, ticks = interactions_from([spool(json_blocks(reviews, REVIEWS, bad))], reviews, COLUMNS, bad)
    path = _find(folder, "meta_categories", f"meta_{category}")
    table = as_ids(spool(json_blocks(path, META, bad)).rename({"parent_asin": "item_id"}), ["item_id"], path, bad)
    table = bad.drop(table, {"no parent_asin": pl.col("item_id").is_null()}, path)
    met = check_join(log, table.select("item_id").collect(engine="streaming"), path, bad)
    table = table.join(met.to_frame().lazy(), on="item_id", how="semi")
    meta = bad.unique_items(table.collect(engine="streaming").sort(ROW), path)
    main = pl.col("images").list.eval(
        pl.element().sort_by(pl.element().struct.field("variant") != "MAIN", maintain_order=True, nulls_last=True)
    )
    urls = [pl.when(pl.col(size).str.contains(URL)).then(pl.col(size)) for size in ("large", "hi_res", "thumb")]
    items = (
        meta.with_columns(main.list.first().alias("main"))
        .unnest("main")
        .select(
            "item_id",
            as_text("title", pl.String()),
            join_text(*(pl.col(name).list.join(" ") for name in ("categories", "features", "description"))).alias(
                "text"
            ),
            pl.coalesce(urls).alias("image_path"),
        )
    )
    return RawData(log, items, bad.skipped, ticks)


def _find(root: Path | str, folder: str, name: str) -> Path:
    if str(root).startswith("hf:"):
        return local_file(f"{root}/raw/{folder}/{name}.jsonl")
    places = [Path(root), Path(root) / folder, Path(root) / "raw" / folder]
    for place in places:
        for path in (place / f"{name}.jsonl", place / f"{name}.jsonl.gz"):
            if path.is_file():
                return path
    raise FileNotFoundError(f"{root}: no {name}.jsonl or {name}.jsonl.gz, here or in raw/{folder}")
