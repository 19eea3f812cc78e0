"""Item vectors from a file, of three kinds, and what is wrong with one."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mllm_msr.data.vector_files import read_vectors, vector_matrix

ITEMS = pl.DataFrame({"item_id": ["b", "a"]})
VECTORS = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], np.float32)  # of a, b and c
IDS = ["a", "b", "c"]


def parquet(path: Path) -> Path:
    pl.DataFrame({"item_id": IDS, "vector": VECTORS}).write_parquet(path / "own.parquet")
    return path / "own.parquet"


def csv(path: Path) -> Path:
    (path / "own.csv").write_text('item_id,vector\na,"[1.0, 2.0]"\nb,"[3, 4]"\nc,"[5,6]"\n')
    return path / "own.csv"


def columns(path: Path) -> Path:
    (path / "own.csv").write_text("item_id,x,y\na,1,2\nb,3,4\nc,5,6\n")
    return path / "own.csv"


def npz(path: Path) -> Path:
    np.savez(path / "own.npz", item_id=np.array(IDS), vector=VECTORS)
    return path / "own.npz"


@pytest.mark.parametrize("kind", [parquet, csv, columns, npz])
def test_vectors_come_in_the_order_of_item_ids(tmp_path: Path, kind) -> None:
    frame = read_vectors(kind(tmp_path), ITEMS)
    assert frame["item_id"].to_list() == ["a", "b"]
    np.testing.assert_array_equal(vector_matrix(frame), VECTORS[:2])


@pytest.mark.parametrize(
    ("ids", "vectors", "words"),
    [
        (["a", "a"], [[1.0], [1.0]], "'a' has more than one"),
        (["a", "z"], [[1.0], [1.0]], "1 items have no vector, among them 'b'"),
        (["a", "b"], [[1.0], [1.0, 2.0]], "item 'b' is not as long"),
        (["a", "b"], [[], []], "item 'a' is empty"),
        (["a", "b"], [[1.0], [float("nan")]], "item 'b' is not finite"),
        (["a", "b"], [[1.0], [None]], "item 'b' is not finite"),
    ],
)
def test_what_is_wrong_is_said_with_the_file_and_the_item(tmp_path: Path, ids, vectors, words: str) -> None:
    path = tmp_path / "own.parquet"
    pl.DataFrame({"item_id": ids, "vector": vectors}).write_parquet(path)
    with pytest.raises(ValueError, match=words) as error:
        read_vectors(path, ITEMS)
    assert str(path) in str(error.value)


def test_a_file_that_is_none_of_these_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="npz"):
        read_vectors(tmp_path / "none.parquet", ITEMS)
    (tmp_path / "own.parquet").write_text("not a table")
    with pytest.raises(ValueError, match="holds no item vectors"):
        read_vectors(tmp_path / "own.parquet", ITEMS)
    pl.DataFrame({"item_id": ["a"], "vec": [1.0]}).write_parquet(tmp_path / "own.parquet")
    with pytest.raises(ValueError, match="needs a column 'vector'"):
        read_vectors(tmp_path / "own.parquet", ITEMS)
