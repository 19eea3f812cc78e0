"""New items from a file: read as a catalogue is, or refused with the file, the row and the remedy."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image
from table_kinds import WRITE

from mllm_msr.data.images import decode, normalise
from mllm_msr.data.new_items import read_new_items
from mllm_msr.records.sections import PrepareOptions

KNOWN = {"i1", "i2"}
ITEMS = pl.DataFrame(
    {"item_id": ["n2", "n1"], "title": ["The Sea", None], "text": [None, "ships"], "image": ["sea.png", None]}
)


def write(folder: Path, items: pl.DataFrame, kind: str = "csv") -> Path:
    path = folder / f"new.{kind}"
    WRITE[kind](items, path)
    return path


def read(path: Path):
    return read_new_items(path, KNOWN, PrepareOptions(), path.parent / "cache")


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl", "tsv"])
def test_items_come_in_their_order_with_words_and_images_as_prepared_ones(tmp_path: Path, kind: str) -> None:
    Image.effect_noise((300, 200), 80).convert("RGB").save(tmp_path / "sea.png")
    new = read(write(tmp_path, ITEMS, kind))
    assert list(new.candidates) == ["n2", "n1"] and new.vectors is None
    sea, other = new.candidates.values()
    assert (sea.item_id, sea.title, sea.text) == ("n2", "The Sea", "")
    assert np.array_equal(np.asarray(sea.image), np.asarray(decode(normalise((tmp_path / "sea.png").read_bytes()))))
    assert (other.title, other.text, other.image) == ("", "ships", None)


def test_vectors_of_the_file_are_in_the_order_of_its_items(tmp_path: Path) -> None:
    vectors = [[3.0, 4.0], [1.0, 2.0]]
    items = pl.DataFrame({"item_id": ["n2", "n1"], "vector": vectors})
    for kind in ("parquet", "jsonl"):
        assert read(write(tmp_path, items, kind)).vectors.tolist() == vectors
    text = items.with_columns(vector=pl.Series(["[3.0, 4.0]", "[1.0, 2.0]"]))
    assert read(write(tmp_path, text)).vectors.tolist() == vectors


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (ITEMS.rename({"item_id": "id"}), r"new\.csv: no column 'item_id'"),
        (
            ITEMS.with_columns(item_id=pl.Series(["n1", "i2"]), image=None),
            r"new\.csv: item 'i2' is in the catalogue",
        ),
        (
            ITEMS.with_columns(item_id=pl.lit("n1"), image=None),
            r"new\.csv: .*surplus rows of an item.*n1.*mend the file",
        ),
        (
            ITEMS.with_columns(item_id=pl.Series(["n1", None])),
            r"new\.csv, row \d+: no item_id.*Mend the row, or leave it",
        ),
        (ITEMS, r"images: no such file: sea\.png: mend the file"),
        (ITEMS.with_columns(image=None, text=None), r"new\.csv: item '\w+' has neither title, text, image nor vector"),
        (ITEMS.with_columns(image=pl.lit("broken.png")), r"image of item 'n2' cannot be used \(.*\): mend it"),
        (ITEMS.with_columns(image=None, vector=pl.Series(["[1, 2]", "[1]"])), "vector of item 'n2' is not as long"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, items: pl.DataFrame, message: str) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path, items))


def test_other_files_and_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "new.txt").write_text("item_id,title\nn1,The Sea\n")
    with pytest.raises(ValueError, match=r"new\.txt: this is a file whose name ends in none of \.csv, .*: rename it"):
        read(tmp_path / "new.txt")
    (tmp_path / "new.xlsx").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"new\.xlsx: this is .* an Excel workbook: .*save the sheet as CSV"):
        read(tmp_path / "new.xlsx")
    with pytest.raises(FileNotFoundError, match=r"new\.csv"):
        read(tmp_path / "new.csv")


def test_csv_is_read_as_people_write_it_and_one_without_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "new.csv"
    path.write_bytes("item_id;title;vector\nn1;Café;1 2\n".encode("cp1252"))
    new = read(path)
    assert new.candidates["n1"].title == "Café" and new.vectors.tolist() == [[1.0, 2.0]]
    path.write_text("item_id,title\n")
    with pytest.raises(ValueError, match=r"new\.csv: has no rows"):
        read(path)
