"""Item vectors of any origin, from a file or from a column of the items table."""

import hashlib
import re
import zipfile
from pathlib import Path

import numpy as np
import polars as pl

from mllm_msr.data.ids import joined_ids
from mllm_msr.data.parts import is_parts, table_format
from mllm_msr.data.raw import ROW, BadRows, need_columns, short
from mllm_msr.data.sources.registry import source_options
from mllm_msr.data.sources.tables import TablesSource
from mllm_msr.data.table_files import TableFile
from mllm_msr.records.schema import ITEM_VECTORS
from mllm_msr.records.sections import Source, VectorOptions

KINDS = "Parquet, CSV, or npz with item_id and vector"
SMALLEST = 2.0**-14  # below it float16 has fewer digits, and none in the end
NO_NAME = r"column \d+$|Unnamed: \d+$"  # as the reader, and pandas, call a column without one
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
    matrix = vector_matrix(frame)
    keys = [hashlib.sha256(vector.tobytes()).hexdigest()[:32] for vector in matrix]
    frame = frame.with_columns(pl.Series("key", keys, pl.String)).cast(pl.Schema(ITEM_VECTORS.columns))
    if large := frame.filter(pl.col("vector").list.eval(pl.element().is_infinite()).list.any())["item_id"].to_list():
        raise ValueError(f"{origin}: the vector of item {large[0]!r} has a number beyond 65,504: scale the vectors")
    largest = np.abs(matrix).max(axis=1)
    if (small := (largest > 0) & (largest < SMALLEST)).any():
        raise ValueError(
            f"{origin}: all numbers in the vector of item {frame['item_id'][int(small.argmax())]!r} are below 0.00006, "
            "which float16 rounds or loses: scale the vectors"
        )
    return frame


def check_own_vectors(source: Source, options: VectorOptions) -> None:
    """Raise an error if own vectors that a recipe names are not where it says, as far as that shows at once."""
    if options.file:
        check_vector_file(Path(options.file))
    if options.column:
        next(need_items_table(source, options.column).item_column(options.column), None)


def check_vector_file(path: Path) -> None:
    if not path.is_file() and not is_parts(path):
        raise FileNotFoundError(f"{path} is missing: a file ({KINDS})")


def need_items_table(source: Source, column: str) -> TablesSource:
    """The source as own tables; ValueError for any other, which has no further columns."""
    tables = source_options(source)
    if not isinstance(tables, TablesSource):
        raise ValueError(
            f"vectors.column={column!r}: only own tables (source `tables`) have further columns, not {source.type!r}; "
            "give the vectors as a file by --vectors"
        )
    return tables


def read_column(source: Source, column: str, items: pl.DataFrame) -> pl.DataFrame:
    """As :func:`read_vectors`, from a column of the source's items table.

    Its values are lists of numbers, or texts of them, such as ``[0.1, 0.2]``; of an item in several rows the first
    counts, as for its title.
    """
    tables = need_items_table(source, column)
    origin = f"{tables.items}, column {column!r}"
    batches = [_with_lists(batch, column, origin).lazy() for batch in tables.item_column(column)]
    frame = joined_ids(batches, ["item_id"], str(tables.items), BadRows("skip")).collect()
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
            missing, none or not finite; the message names the file and the row or the item.
    """
    check_vector_file(path)
    if path.suffix == ".npz":
        batches = [_of_arrays(path)]
    else:
        if table_format(path.name) is None:
            raise ValueError(f"{path}: item vectors are read from {KINDS}, and this name ends as none of them")
        batches = _of_table(path)
    bad = BadRows(remedy="Mend the row, or leave it out.")
    frame = joined_ids((batch.lazy() for batch in batches), ["item_id"], path, bad).collect()
    frame = frame.filter(pl.col("item_id").is_not_null())
    if twice := frame.filter(pl.col("item_id").is_duplicated())["item_id"].to_list():
        raise ValueError(f"{path}: item {twice[0]!r} has more than one vector: leave one of them")
    return _of_all(items, frame, str(path))


def vector_matrix(frame: pl.DataFrame) -> np.ndarray:
    """(I, F) float32: the vectors of a frame, one a row."""
    return frame["vector"].explode(empty_as_null=False).to_numpy().reshape(len(frame), -1).astype(np.float32)


def _of_all(items: pl.DataFrame, given: pl.DataFrame, origin: str) -> pl.DataFrame:
    """The vectors of all ``items``, by id, after a check that each has a sound one; ``origin`` is for messages."""
    frame = items.select(pl.col("item_id").sort()).join(given, on="item_id", how="left", maintain_order="left")
    lengths = frame["vector"].list.len()
    if absent := frame.filter(lengths.is_null())["item_id"].to_list():
        theirs = (
            f"; the ids there are such as {given['item_id'][0]!r}" if len(absent) == len(frame) and len(given) else ""
        )
        raise ValueError(
            f"{origin}: {len(absent)} of {len(frame)} items have no vector, among them {absent[0]!r}: give one to each "
            f"item{theirs}"
        )
    if empty := frame.filter(lengths == 0)["item_id"].to_list():
        raise ValueError(f"{origin}: the vector of item {empty[0]!r} is empty")
    if other := frame.filter(lengths != lengths[0])["item_id"].to_list():
        first = frame["item_id"][0]
        raise ValueError(f"{origin}: the vector of item {other[0]!r} is not as long as that of {first!r}")
    finite = frame["vector"].list.eval(pl.element().is_finite().fill_null(False)).list.all()
    if not finite.all():
        wrong = frame.filter(~finite)["item_id"][0]
        raise ValueError(f"{origin}: a number in the vector of item {wrong!r} is missing or not finite")
    return frame.select("item_id", "vector")


def _with_lists(batch: pl.DataFrame, column: str, origin: str) -> pl.DataFrame:
    """``ROW``, ``item_id`` and ``vector``, lists of float32, from a column of lists, or of texts that list numbers."""
    values, lists = batch[column], pl.List(pl.Float32)
    if values.dtype == pl.String:
        both = values.str.contains(",", literal=True) & values.str.contains(";", literal=True)  # 0,5;1,5 or 0.5, 1.5; 2
        if (unclear := batch.filter(both.fill_null(False))).height:
            row, item = unclear.select(ROW, "item_id").row(0)
            raise ValueError(
                f"{origin}: row {row}, item {item!r}, divides its numbers by commas and semicolons: write 0.5 and not "
                "0,5, and divide by one of the two"
            )
        values = values.str.extract_all(NUMBER)
    inner = values.dtype.inner if isinstance(values.dtype, pl.List | pl.Array) else values.dtype
    flat = isinstance(values.dtype, pl.List) or (isinstance(values.dtype, pl.Array) and len(values.dtype.shape) == 1)
    if values.dtype != pl.Null and not (flat and (inner.is_numeric() or inner in (pl.Boolean, pl.String, pl.Null))):
        raise ValueError(f'{origin}: holds no vectors (lists of numbers, or texts as "[0.1, 0.2]"), but {values.dtype}')
    if inner == pl.String:
        words = values.list.eval(pl.element().filter(pl.element().cast(pl.Float32, strict=False).is_null())).list
        _refuse_words(batch, words.first(), origin)
    return batch.select(ROW, "item_id", vector=values.cast(lists))


def _refuse_words(batch: pl.DataFrame, words: pl.Series, origin: str) -> None:
    """ValueError for the first row with a word (null if there is none) where a number is meant."""
    if (wrong := batch.with_columns(words.alias("(word)")).filter(pl.col("(word)").is_not_null())).height:
        row, item, word = wrong.select(ROW, "item_id", "(word)").row(0)
        raise ValueError(
            f'{origin}: holds no vectors (lists of numbers, or texts as "[0.1, 0.2]"): row {row}, item {item!r}, has '
            f"{short(word)!r}, which is no number"
        )


def _of_table(path: Path) -> list[pl.DataFrame]:
    """``ROW``, ``item_id``, ``vector`` of a table that is read as any other of its owner's, in batches."""
    batches = []
    bad = BadRows(remedy="Mend the row, or leave it out.")
    for batch in TableFile.find(path.name, path.parent).batches(["item_id"], ["vector"], "", bad):
        need_columns(batch.columns, ["item_id"], path)
        if "vector" in batch.columns:
            batches.append(_with_lists(batch, "vector", str(path)))
            continue
        names = [name for name in batch.columns if name not in (ROW, "item_id")]
        if not names or path.suffix == ".parquet":
            raise ValueError(f"{path}: no column 'vector'; item vectors are read from {KINDS}")
        if (unnamed := [name for name in names if re.match(NO_NAME, name)]) and len(unnamed) < len(names):
            raise ValueError(
                f"{path}: {unnamed[0]!r} has no name of its own, and every column after item_id is taken for a number "
                "of the vector; leave it out (pandas: to_csv(..., index=False))"
            )
        numbers = batch.select(pl.col(names).cast(pl.Float32, strict=False))
        for name in names:
            _refuse_words(batch, batch[name].set(numbers[name].is_not_null(), None), f"{path}, column {name!r}")
        batches.append(batch.select(ROW, "item_id").with_columns(numbers.select(vector=pl.concat_list(names))))
    if not batches:
        raise ValueError(f"{path}: holds no item vectors, as it has no rows")
    return batches


def _of_arrays(path: Path) -> pl.DataFrame:
    """The same of a npz archive."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            ids, vectors = arrays["item_id"], arrays["vector"]
    except (OSError, ValueError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        needed = "an npz archive has the arrays item_id, of numbers or texts, and vector, of numbers"
        raise ValueError(f"{path}: holds no item vectors; {needed} (no Python objects)") from error
    if ids.ndim != 1 or vectors.ndim != 2 or len(ids) != len(vectors):
        raise ValueError(
            f"{path}: item_id and vector have the shapes {ids.shape} and {vectors.shape}, not (I,), (I, F)"
        )
    if vectors.dtype.kind not in "biuf":
        raise ValueError(f"{path}: vector is an array of {vectors.dtype}, not of real numbers")
    frame = pl.DataFrame({"item_id": ids if ids.dtype.kind in "iuf" else ids.astype(str)})
    return frame.with_row_index(ROW, 1).with_columns(
        pl.Series("vector", vectors.astype(np.float32)).cast(pl.List(pl.Float32))
    )
