"""The ``sft`` config as published: chat messages beside their images, as stock TRL trains on them."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
from datasets import Features, Image, List, Value

SLICE = 500  # rows, with their images, that are in memory at once and form one row group


def write_chat_table(examples: pl.DataFrame, items: Sequence[Path], target: Path) -> None:
    """Write examples with the images that their prompts show, as the column ``images``.

    Args:
        examples: rows of the table ``sft``.
        items: the files of the table of items, with ``item_id`` and ``image``; none: no image is embedded, and the
            prompts lose their places.
    """
    part = List({"type": Value("string"), "text": Value("string")})
    messages = List({"role": Value("string"), "content": part})
    features = Features(
        {
            **{name: Value("string") for name in examples.columns},
            "label": Value("int64"),
            "recent": List(Value("string")),
            "prompt": messages,
            "completion": messages,
        }
    )
    content, kind = pl.element().struct.field("content"), pl.element().struct.field("type")
    if not items:
        words = pl.struct(pl.element().struct.field("role"), content.list.filter(kind != "image"))
        examples = examples.with_columns(pl.col("prompt").list.eval(words))
        pq.write_table(examples.select(list(features)).to_arrow().cast(features.arrow_schema), target)
        return
    features["images"] = List(Image())
    has_image = pl.col("prompt").list.eval(content.list.eval(kind == "image").list.any()).list.any()
    examples = examples.with_columns(has_image.alias("has_image"))
    images, schema = pl.scan_parquet(list(items)).select("item_id", "image"), features.arrow_schema
    with pq.ParquetWriter(target, schema) as writer:
        for start in range(0, examples.height, SLICE):
            rows = examples.slice(start, SLICE)
            wanted = rows.filter("has_image")["item_id"].unique().to_list()
            needed = images.filter(pl.col("item_id").is_in(wanted)).collect()
            none = pl.lit([], dtype=pl.List(needed.schema["image"]))
            rows = rows.join(needed, on="item_id", how="left", maintain_order="left").with_columns(
                pl.when("has_image").then(pl.concat_list("image")).otherwise(none).alias("images")
            )
            writer.write_table(rows.select(schema.names).to_arrow().cast(schema))
