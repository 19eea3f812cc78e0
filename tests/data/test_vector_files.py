"""Item vectors from a file, of three kinds, and what is wrong with one."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mllm_msr.data.vector_files import own_vectors, read_column, read_vectors, vector_matrix
from mllm_msr.records.schema import ITEM_VECTORS
from mllm_msr.records.sections import Source, VectorOptions

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
        (["a", "z"], [[1.0], [1.0]], "1 of 2 items have no vector, among them 'b'"),
        (["a", "b"], [[1.0], [1.0, 2.0]], "item 'b' is not as long"),
        (["a", "b"], [[], []], "item 'a' is empty"),
        (["a", "b"], [[1.0], [float("nan")]], "item 'b' is missing or not finite"),
        (["a", "b"], [[1.0], [None]], "item 'b' is missing or not finite"),
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
    with pytest.raises(ValueError, match=r"own\.parquet: cannot be read, it is damaged or of another kind"):
        read_vectors(tmp_path / "own.parquet", ITEMS)
    pl.DataFrame({"item_id": ["a"], "vec": [1.0]}).write_parquet(tmp_path / "own.parquet")
    with pytest.raises(ValueError, match="no column 'vector'"):
        read_vectors(tmp_path / "own.parquet", ITEMS)


@pytest.mark.parametrize(
    "text",
    [
        "item_id;x;y\na;1;2\nb;3;4\n",
        "item_id\tvector\na\t[1, 2]\nb\t[3, 4]\n",
        "\ufeffitem_id,x,y\na,1,2\n\nb,3,4\n",
    ],
)
def test_csv_is_read_as_people_write_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "own.csv").write_text(text)
    np.testing.assert_array_equal(vector_matrix(read_vectors(tmp_path / "own.csv", ITEMS)), VECTORS[:2])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("item_id,x,y\na,1,2\nb,3,wide\n", r"own.csv, column 'y': .* row 3, item 'b', has 'wide'"),
        ("item_id,vector\na,[1]\nb,n/a\n", r"own.csv: .* row 3, item 'b', has 'n/a'"),
        ("item_id;vector\na;1\nb;0,5;1\n", r"own.csv, row 3: more than the header's 2 fields"),
        ('item_id,vector\na,1\nb,"0,5;1,5"\n', r"row 3, item 'b', divides its numbers by commas and semicolons"),
        (",item_id,x\n0,a,1\n1,b,2\n", "'column 1' has no name of its own, .*index=False"),
        ("item_id,x,y\na,1,2\nb,3,\n", "item 'b' is missing or not finite"),
        ("item_id\na\nb\n", "no column 'vector'"),
        ("id,x\na,1\n", "no column 'item_id'; it has"),
        ("item_id,x\n", "no rows|have no vector"),
        ("item_id,x\n1,1\n2,2\n", "2 of 2 items have no vector, .* such as '1'"),
        ("", "is empty"),
    ],
)
def test_a_bad_csv_names_row_item_and_value(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "own.csv").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        read_vectors(tmp_path / "own.csv", ITEMS)
    assert str(tmp_path / "own.csv") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [([1.0, 2.0], "but Float64"), ([b"x", b"y"], "but Binary"), ([[[1.0]], [[2.0]]], r"but List\(List")],
)
def test_a_column_that_lists_no_numbers_names_its_type(tmp_path: Path, values, words: str) -> None:
    pl.DataFrame({"item_id": ["a", "b"], "vector": values}).write_parquet(tmp_path / "own.parquet")
    with pytest.raises(ValueError, match=words):
        read_vectors(tmp_path / "own.parquet", ITEMS)


def test_numbers_as_ids_are_read_as_the_log_has_them(tmp_path: Path) -> None:
    items = pl.DataFrame({"item_id": ["10", "2"]})
    pl.DataFrame({"item_id": [2.0, 10.0, None], "vector": VECTORS}).write_parquet(tmp_path / "own.parquet")
    np.savez(tmp_path / "own.npz", item_id=np.array([2.0, 10.0]), vector=VECTORS[:2])
    for name in ("own.parquet", "own.npz"):
        np.testing.assert_array_equal(vector_matrix(read_vectors(tmp_path / name, items)), VECTORS[[1, 0]])


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"ids": IDS, "vector": VECTORS}, "has the arrays item_id"),
        ({"item_id": np.array(IDS, object), "vector": VECTORS}, "no Python objects"),
        ({"item_id": IDS, "vector": VECTORS[:, 0]}, r"shapes \(3,\) and \(3,\)"),
        ({"item_id": IDS[:2], "vector": VECTORS}, r"shapes \(2,\) and \(3, 2\)"),
        ({"item_id": IDS, "vector": VECTORS.astype(np.complex64)}, "array of complex64"),
        ({"item_id": IDS, "vector": VECTORS.astype(str)}, "array of <U"),
        (None, "has the arrays item_id"),
    ],
)
def test_a_bad_archive_is_refused(tmp_path: Path, arrays, words: str) -> None:
    path = tmp_path / "own.npz"
    path.write_text("no archive") if arrays is None else np.savez(path, **arrays)
    with pytest.raises(ValueError, match=words) as error:
        read_vectors(path, ITEMS)
    assert str(path) in str(error.value) and "pickle" not in str(error.value)


def test_a_name_that_ends_otherwise_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "own.npy", VECTORS)
    with pytest.raises(ValueError, match="ends as none of them"):
        read_vectors(tmp_path / "own.npy", ITEMS)


def catalogue(folder: Path, name: str, vectors: object) -> Source:
    """Own tables whose items, b in two rows, have a column ``emb``."""
    ids = ["b", "a", "b", "z"]
    if name.endswith(".jsonl"):
        rows = zip(ids, vectors, strict=True)
        (folder / name).write_text("".join(json.dumps({"sku": i, "emb": vector}) + "\n" for i, vector in rows))
    else:
        frame = pl.DataFrame({"sku": ids, "emb": vectors})
        frame.write_csv(folder / name) if name.endswith(".csv") else frame.write_parquet(folder / name)
    columns = {"items.item_id": "sku"}
    return Source("tables", {"interactions": "log.csv", "items": name, "folder": str(folder), "columns": columns})


LISTS = [[3.0, 4.0], [1.0, 2.0], [9.0, 9.0], [5.0, 6.0]]


@pytest.mark.parametrize(
    ("name", "vectors"),
    [
        ("goods.parquet", LISTS),
        ("goods.parquet", np.array(LISTS, np.float64)),
        ("goods.parquet", ["[3.0, 4.0]", "[1,2]", "[9, 9]", "[5, 6]"]),
        ("goods.csv", ["[3.0, 4e0]", "[1. 2.]", "9 9", "5;6"]),
        ("goods.jsonl", LISTS),
    ],
)
def test_a_column_of_the_items_table_has_vectors_as_lists_or_texts(tmp_path: Path, name: str, vectors) -> None:
    frame = read_column(catalogue(tmp_path, name, vectors), "emb", ITEMS)
    assert frame["item_id"].to_list() == ["a", "b"]
    np.testing.assert_array_equal(vector_matrix(frame), [[1.0, 2.0], [3.0, 4.0]])


@pytest.mark.parametrize(
    ("vectors", "column", "words"),
    [
        (["[1]", "[x]", "[1]", "[1]"], "emb", "goods.csv, column 'emb': holds no vectors .* row 3, item 'a', has 'x'"),
        (["[1]", "[1, 2]", "[1]", "[1]"], "emb", "column 'emb': the vector of item 'b' is not as long as that of 'a'"),
        (["[1]", "", "[1]", "[1]"], "emb", "column 'emb': 1 of 2 items have no vector, among them 'a'"),
        (["[1]", "[1]", "[1]", "[1]"], "vec", "goods.csv: no column 'vec'; it has .*emb"),
    ],
)
def test_what_is_wrong_in_a_column_is_said_with_the_item(tmp_path: Path, vectors, column: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_column(catalogue(tmp_path, "goods.csv", vectors), column, ITEMS)


def test_only_own_tables_have_further_columns(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"only own tables .* not 'demo'; give the vectors as a file by --vectors"):
        read_column(Source("demo"), "emb", ITEMS)
    with pytest.raises(ValueError, match=r"no items table .* name one by --items"):
        read_column(Source("tables", {"interactions": "log.csv"}), "emb", ITEMS)


def test_the_key_of_own_vectors_is_their_content(tmp_path: Path) -> None:
    source = catalogue(tmp_path, "goods.parquet", LISTS)
    by_column = own_vectors(source, VectorOptions(column="emb"), ITEMS)
    ITEM_VECTORS.check(by_column, "vectors")
    by_file = own_vectors(source, VectorOptions(file=str(parquet(tmp_path))), ITEMS)
    assert by_column.equals(by_file) and by_file["key"].n_unique() == 2
    changed = own_vectors(
        catalogue(tmp_path, "goods.parquet", [[3.0, 5.0], *LISTS[1:]]), VectorOptions(column="emb"), ITEMS
    )
    assert (changed["key"] == by_column["key"]).to_list() == [True, False]
    with pytest.raises(ValueError, match="item 'b' has a number beyond 65,504"):
        own_vectors(catalogue(tmp_path, "goods.parquet", [[1e6, 5.0], *LISTS[1:]]), VectorOptions(column="emb"), ITEMS)


def test_numbers_that_float16_would_lose_are_refused(tmp_path: Path) -> None:
    def vectors_of(*values: float) -> list[list[float]]:
        source = catalogue(tmp_path, "g.parquet", [[value, 0.0] for value in values])
        return own_vectors(source, VectorOptions(column="emb"), ITEMS)["vector"].to_list()

    with pytest.raises(ValueError, match=r"vector of item 'a' are below 0\.00006, which float16 rounds or loses"):
        vectors_of(1.0, 1e-6, 1.0, 1.0)
    assert vectors_of(1.0, 0.0, 1.0, 1.0) == [[0.0, 0.0], [1.0, 0.0]]


def test_a_folder_of_parts_is_a_table(tmp_path: Path) -> None:
    folder = tmp_path / "own.parquet"
    folder.mkdir()
    for number in range(2):
        row = {"item_id": IDS[number : number + 1], "vector": VECTORS[number : number + 1]}
        pl.DataFrame(row).write_parquet(folder / f"part-{number}.parquet")
    np.testing.assert_array_equal(vector_matrix(read_vectors(folder, ITEMS)), VECTORS[:2])
