from pathlib import Path

import pytest
from PIL import Image

from mllm_msr.data.sources.microlens import read_microlens


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "MicroLens-50k_pairs.csv").write_text(
        "user,item,timestamp\n1,10,1583378629552\n1,11,1583378628000\n2,10,1583378629000\n"
    )
    (tmp_path / "MicroLens-50k_titles.csv").write_text('item,title\n10,"Cats, and dogs"\n12,Nobody saw this\n')
    (tmp_path / "MicroLens-50k_covers").mkdir()
    Image.new("RGB", (40, 60)).save(tmp_path / "MicroLens-50k_covers" / "10.jpg")
    return tmp_path


def test_pairs_as_csv(folder: Path) -> None:
    raw = read_microlens(folder)
    assert sorted(raw.interactions.collect().rows()) == [
        ("1", "10", 1583378629552),
        ("1", "11", 1583378628000),
        ("2", "10", 1583378629000),
    ]
    assert raw.ticks == 1000
    items = {row["item_id"]: row for row in raw.items.to_dicts()}
    assert items["10"]["title"] == "Cats, and dogs"
    assert items["10"]["image_path"] == str(folder / "MicroLens-50k_covers" / "10.jpg")
    assert (items["11"]["title"], items["11"]["image_path"]) == ("", None)
    assert {row["what"]: row["examples"] for row in raw.skipped} == {
        "MicroLens-50k_titles.csv: items of the log that this catalogue lacks": ["11"],
        "items without a title": ["11"],
        "items without a cover": ["12", "11"],
    }


def test_pairs_as_tsv_and_titles_without_header(folder: Path) -> None:
    (folder / "MicroLens-50k_pairs.csv").unlink()
    (folder / "MicroLens-50k_pairs.tsv").write_text("7\t10 12 11\n8\t11\n")
    (folder / "MicroLens-50k_titles.csv").write_text("10,Cats, and dogs\n11,Fish\n12,\n")
    raw = read_microlens(folder, covers=folder / "none")
    assert raw.interactions.collect().rows() == [("7", "10", 0), ("7", "12", 1), ("7", "11", 2), ("8", "11", 0)]
    assert raw.items.select("item_id", "title").rows() == [("10", "Cats, and dogs"), ("11", "Fish"), ("12", "")]
    assert any("no times" in row["what"] for row in raw.skipped)


def test_ids_that_were_floats_and_titles_with_open_marks(folder: Path) -> None:
    (folder / "MicroLens-50k_pairs.csv").unlink()
    (folder / "MicroLens-50k_pairs.tsv").write_text("7.0\t10.0 12.0\n8\t11\n")
    (folder / "MicroLens-50k_titles.csv").write_text('item,title\n10,"Cats, and dogs\n11.0,NaN\n12,"A ""B"", C"\n')
    raw = read_microlens(folder)
    assert raw.interactions.collect().rows() == [("7", "10", 0), ("7", "12", 1), ("8", "11", 0)]
    assert raw.items.select("item_id", "title").rows() == [("10", '"Cats, and dogs'), ("11", ""), ("12", 'A "B", C')]


def test_bad_rows(folder: Path) -> None:
    with (folder / "MicroLens-50k_pairs.csv").open("a") as file:
        file.write("3,11\n")
    with pytest.raises(ValueError, match=r"pairs\.csv, row 5: timestamp is no number or date"):
        read_microlens(folder)
    assert len(read_microlens(folder, on_bad_rows="skip").interactions.collect()) == 3
    (folder / "MicroLens-50k_pairs.csv").unlink()
    (folder / "MicroLens-50k_pairs.tsv").write_text("7\t10 12\n8\t11\n7\t11\n")
    with pytest.raises(ValueError, match=r"pairs\.tsv, row 3: another line of the same user"):
        read_microlens(folder)
    (folder / "MicroLens-50k_pairs.tsv").write_text("7\t10 12\n8 11\n")
    with pytest.raises(ValueError, match=r"pairs\.tsv, row 2: not user<TAB>item"):
        read_microlens(folder)


def test_missing_or_ambiguous_files_are_named(folder: Path) -> None:
    (folder / "MicroLens-50k_titles_cn.csv").write_text("item,title\n")
    with pytest.raises(ValueError, match="several files match"):
        read_microlens(folder)
    with pytest.raises(FileNotFoundError, match="neither"):
        read_microlens(folder / "MicroLens-50k_covers")
