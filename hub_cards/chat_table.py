"""The ``sft`` config as published: chat messages beside their pictures, as stock TRL trains on them."""

from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
from datasets import Features, Image, List, Value

SLICE = 500  # rows, with their pictures, that are in memory at once and form one row group


def write_chat_table(frame: pl.DataFrame, items: Path, target: Path, images: bool) -> None:
    """Write ``frame`` with the pictures its prompts show.

    Args:
        frame: a table of ``run/sft`` with ``item_id``, ``prompt`` and ``completion``.
        items: the table of items, with ``item_id`` and ``image``.
        images: whether to embed them, as the column ``images``; otherwise the prompts lose their places as well.
    """
    part = List({"type": Value("string"), "text": Value("string")})
    messages = List({"role": Value("string"), "content": part})
    features = Features(
        {
            **{name: Value("string") for name in frame.columns},
            "label": Value("int64"),
            "recent": List(Value("string")),
            "prompt": messages,
            "completion": messages,
        }
    )
    content, kind = pl.element().struct.field("content"), pl.element().struct.field("type")
    if images:
        features["images"] = List(Image())
        shows = pl.col("prompt").list.eval(content.list.eval(kind == "image").list.any()).list.any()
        frame = frame.with_columns(shows.alias("shows"))
    else:
        words = pl.struct(pl.element().struct.field("role"), content.list.filter(kind != "image"))
        frame = frame.with_columns(pl.col("prompt").list.eval(words))
    pictures, schema = pl.scan_parquet(items).select("item_id", "image"), features.arrow_schema
    with pq.ParquetWriter(target, schema) as writer:
        for start in range(0, frame.height, SLICE):
            rows = frame.slice(start, SLICE)
            if images:
                wanted = rows.filter("shows")["item_id"].unique().to_list()
                shown = pictures.filter(pl.col("item_id").is_in(wanted)).collect()
                none = pl.lit([], dtype=pl.List(shown.schema["image"]))
                rows = rows.join(shown, on="item_id", how="left", maintain_order="left").with_columns(
                    pl.when("shows").then(pl.concat_list("image")).otherwise(none).alias("images")
                )
            writer.write_table(rows.select(schema.names).to_arrow().cast(schema))
