"""Item vectors of any origin, from a file."""

from pathlib import Path

import numpy as np
import polars as pl

KINDS = "Parquet, CSV, or npz with item_id and vector"


def read_vectors(path: Path, items: pl.DataFrame) -> pl.DataFrame:
    """``item_id``, ``vector`` (list of float32) of every item, by item id, from a file that has them.

    Args:
        path: Parquet with a column ``vector`` of lists; CSV in which every column after ``item_id`` is one number, or
            ``vector`` has them between brackets; npz with the arrays ``item_id`` (I,) and ``vector`` (I, F).
        items: ``item_id`` of the whole catalogue; further items in the file are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column or an item is missing, an item comes twice, vectors differ in length, or a number in one is
            missing or not finite; the message names the file and the item.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a file ({KINDS})")
    try:
        frame = _read(path)
        if missing := [name for name in ("item_id", "vector") if name not in frame.columns]:
            raise ValueError(f"needs a column {missing[0]!r}, but has {frame.columns}")
        frame = frame.select(pl.col("item_id").cast(pl.String), pl.col("vector").cast(pl.List(pl.Float32)))
    except (pl.exceptions.PolarsError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} holds no item vectors ({KINDS}): {error}") from error
    if twice := frame.filter(pl.col("item_id").is_duplicated())["item_id"].to_list():
        raise ValueError(f"{path}: item {twice[0]!r} has more than one vector")
    frame = items.select(pl.col("item_id").sort()).join(frame, on="item_id", how="left", maintain_order="left")
    lengths = frame["vector"].list.len()
    if absent := frame.filter(lengths.is_null())["item_id"].to_list():
        raise ValueError(f"{path}: {len(absent)} items have no vector, among them {absent[0]!r}: give one to each item")
    if empty := frame.filter(lengths == 0)["item_id"].to_list():
        raise ValueError(f"{path}: the vector of item {empty[0]!r} is empty")
    if other := frame.filter(lengths != lengths[0])["item_id"].to_list():
        raise ValueError(f"{path}: the vector of item {other[0]!r} is not as long as that of {frame['item_id'][0]!r}")
    finite = frame["vector"].list.eval(pl.element().is_finite().fill_null(False)).list.all()
    if not finite.all():
        wrong = frame.filter(~finite)["item_id"][0]
        raise ValueError(f"{path}: a number in the vector of item {wrong!r} is not finite")
    return frame


def vector_matrix(frame: pl.DataFrame) -> np.ndarray:
    """(I, F) float32: the vectors of a frame, one a row."""
    return frame["vector"].explode(empty_as_null=False).to_numpy().reshape(len(frame), -1).astype(np.float32)


def _read(path: Path) -> pl.DataFrame:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            vectors = np.asarray(arrays["vector"], dtype=np.float32)
            if vectors.ndim != 2:
                raise ValueError(f"vector has the shape {vectors.shape}, not (items, numbers)")
            return pl.DataFrame({"item_id": arrays["item_id"].astype(str), "vector": vectors}).with_columns(
                pl.col("vector").arr.to_list()
            )
    if path.suffix != ".csv":
        return pl.read_parquet(path)
    frame = pl.read_csv(path, schema_overrides={"item_id": pl.String})
    if "vector" in frame.columns:
        numbers = pl.col("vector").str.strip_chars("[] ").str.split(",")
        return frame.with_columns(numbers.list.eval(pl.element().str.strip_chars().cast(pl.Float32)))
    columns = [pl.col(name).cast(pl.Float32) for name in frame.columns if name != "item_id"]
    return frame.select("item_id", vector=pl.concat_list(columns))
