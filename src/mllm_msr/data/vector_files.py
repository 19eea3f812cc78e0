"""Item vectors of any origin, from a file or from a column of the items table."""

import hashlib
from pathlib import Path

import numpy as np
import polars as pl

from mllm_msr.data.ids import as_ids
from mllm_msr.data.raw import BadRows
from mllm_msr.data.sources.registry import source_options
from mllm_msr.data.sources.tables import TablesSource
from mllm_msr.records.schema import ITEM_VECTORS
from mllm_msr.records.sections import Source, VectorOptions

KINDS = "Parquet, CSV, or npz with item_id and vector"
NUMBER = r"[^\s,;\[\]()]+"  # in a text that lists numbers


def own_vectors(source: Source, options: VectorOptions, items: pl.DataFrame) -> pl.DataFrame:
    """The table ``ITEM_VECTORS`` from ``vectors.file`` or ``vectors.column``, by item id; a key is its vector's hash.

    Args:
        source: the recipe's, whose items table has the column.
        items: as in :func:`read_vectors`, which says what is raised, too.
    """
    if options.file:
        frame, origin = read_vectors(Path(options.file), items), options.file
    else:
        frame, origin = read_column(source, str(options.column), items), f"vectors.column={options.column}"
    keys = [hashlib.sha256(vector.tobytes()).hexdigest()[:32] for vector in vector_matrix(frame)]
    frame = frame.with_columns(pl.Series("key", keys, pl.String)).cast(pl.Schema(ITEM_VECTORS.columns))
    if large := frame.filter(pl.col("vector").list.eval(pl.element().is_infinite()).list.any())["item_id"].to_list():
        raise ValueError(f"{origin}: the vector of item {large[0]!r} has a number beyond 65,504: scale the vectors")
    return frame


def read_column(source: Source, column: str, items: pl.DataFrame) -> pl.DataFrame:
    """As :func:`read_vectors`, from a column of the source's items table.

    Its values are lists of numbers, or texts of them, such as ``[0.1, 0.2]``; of an item in several rows the first
    counts, as for its title.
    """
    tables = source_options(source)
    if not isinstance(tables, TablesSource):
        raise ValueError(
            f"vectors.column={column!r}: only own tables (source `tables`) have further columns, not {source.type!r}; "
            "give the vectors as a file by --vectors"
        )
    origin = f"{tables.items}, column {column!r}"
    batches = tables.item_column(column)
    try:
        frame = pl.concat(
            [
                batch.with_columns(_numbers(column, batch.schema[column]).alias("vector")).drop(column)
                for batch in batches
            ],
            how="diagonal_relaxed",
        )
    except (pl.exceptions.PolarsError, ValueError) as error:
        raise ValueError(f'{origin}: holds no vectors (lists of numbers, or texts as "[0.1, 0.2]"): {error}') from error
    frame = as_ids(frame.lazy(), ["item_id"], str(tables.items), BadRows("skip")).collect()
    return _of_all(items, frame.unique("item_id", keep="first", maintain_order=True), origin)


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
        vectors = _numbers("vector", frame.schema["vector"]).alias("vector")
        frame = frame.select(pl.col("item_id").cast(pl.String), vectors)
    except (pl.exceptions.PolarsError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} holds no item vectors ({KINDS}): {error}") from error
    if twice := frame.filter(pl.col("item_id").is_duplicated())["item_id"].to_list():
        raise ValueError(f"{path}: item {twice[0]!r} has more than one vector")
    return _of_all(items, frame, str(path))


def vector_matrix(frame: pl.DataFrame) -> np.ndarray:
    """(I, F) float32: the vectors of a frame, one a row."""
    return frame["vector"].explode(empty_as_null=False).to_numpy().reshape(len(frame), -1).astype(np.float32)


def _of_all(items: pl.DataFrame, frame: pl.DataFrame, origin: str) -> pl.DataFrame:
    """The vectors of all ``items``, by id, after a check that each has a sound one; ``origin`` is for messages."""
    frame = items.select(pl.col("item_id").sort()).join(frame, on="item_id", how="left", maintain_order="left")
    lengths = frame["vector"].list.len()
    if absent := frame.filter(lengths.is_null())["item_id"].to_list():
        raise ValueError(
            f"{origin}: {len(absent)} items have no vector, among them {absent[0]!r}: give one to each item"
        )
    if empty := frame.filter(lengths == 0)["item_id"].to_list():
        raise ValueError(f"{origin}: the vector of item {empty[0]!r} is empty")
    if other := frame.filter(lengths != lengths[0])["item_id"].to_list():
        first = frame["item_id"][0]
        raise ValueError(f"{origin}: the vector of item {other[0]!r} is not as long as that of {first!r}")
    finite = frame["vector"].list.eval(pl.element().is_finite().fill_null(False)).list.all()
    if not finite.all():
        wrong = frame.filter(~finite)["item_id"][0]
        raise ValueError(f"{origin}: a number in the vector of item {wrong!r} is not finite")
    return frame.select("item_id", "vector")


def _numbers(column: str, dtype: pl.DataType) -> pl.Expr:
    """A column of lists or arrays, or of texts that list numbers, as lists of float32."""
    values = pl.col(column)
    if dtype == pl.String:
        values = values.str.extract_all(NUMBER)
    return values.cast(pl.List(pl.Float32))


def _read(path: Path) -> pl.DataFrame:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            vectors = np.asarray(arrays["vector"], dtype=np.float32)
            if vectors.ndim != 2:
                raise ValueError(f"vector has the shape {vectors.shape}, not (items, numbers)")
            return pl.DataFrame({"item_id": arrays["item_id"].astype(str), "vector": vectors})
    if path.suffix != ".csv":
        return pl.read_parquet(path)
    frame = pl.read_csv(path, schema_overrides={"item_id": pl.String})
    if "vector" in frame.columns:
        return frame
    columns = [pl.col(name).cast(pl.Float32) for name in frame.columns if name != "item_id"]
    return frame.select("item_id", vector=pl.concat_list(columns))
