"""Item vectors of any origin, from a file."""

from pathlib import Path

import numpy as np
import polars as pl
import torch


def read_vectors(path: Path, items: pl.DataFrame) -> torch.Tensor:
    """(I, F) float32: the vectors of a Parquet file with ``item_id`` and ``vector``, in the order of item codes.

    Args:
        items: ``item_id`` of the whole catalogue; codes are places in ``items.sort("item_id")``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column or an item is missing, an item comes twice, vectors differ in length, or a number in one is
            missing or not finite; the message names the file and the item.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a Parquet file with columns item_id and vector")
    frame = pl.read_parquet(path)
    if missing := [name for name in ("item_id", "vector") if name not in frame.columns]:
        raise ValueError(f"{path} needs a column {missing[0]!r}, but has {frame.columns}")
    frame = frame.select(pl.col("item_id").cast(pl.String), pl.col("vector").cast(pl.List(pl.Float32)))
    if twice := frame.filter(pl.col("item_id").is_duplicated())["item_id"].to_list():
        raise ValueError(f"{path}: item {twice[0]!r} has more than one vector")
    frame = items.select(pl.col("item_id").sort()).join(frame, on="item_id", how="left", maintain_order="left")
    lengths = frame["vector"].list.len()
    if absent := frame.filter(lengths.is_null())["item_id"].to_list():
        raise ValueError(f"{path}: {len(absent)} items have no vector, among them {absent[0]!r}: give one to each item")
    if other := frame.filter(lengths != lengths[0])["item_id"].to_list():
        raise ValueError(f"{path}: the vector of item {other[0]!r} is not as long as that of {frame['item_id'][0]!r}")
    vectors = frame["vector"].explode().to_numpy().reshape(len(frame), -1).astype(np.float32)
    if not (finite := np.isfinite(vectors).all(axis=1)).all():
        raise ValueError(
            f"{path}: a number in the vector of item {frame['item_id'][int(finite.argmin())]!r} is not finite"
        )
    return torch.from_numpy(vectors)
