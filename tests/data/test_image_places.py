"""Where the images of a catalogue are, however its image column is written."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from PIL import Image

from mllm_msr.data.image_places import ImageColumn, images_by_id
from mllm_msr.data.raw import BadRows


def png() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((40, 40), 50).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()
TEXT = base64.b64encode(PNG).decode()
URL = "https://shop.example/1.jpg"


def places(
    root: Path, values: list[Any], dtype: Any = None, inside: Path | None = None
) -> tuple[list[Any], list[dict]]:
    column, bad = ImageColumn(root, inside), BadRows()
    made = column.places(pl.Series(values, dtype=dtype or pl.Object)).to_list()
    column.report(bad)
    return made, bad.skipped


@pytest.mark.parametrize(
    "value",
    [
        PNG,
        {"bytes": PNG, "path": "elsewhere.png"},
        {"bytes": TEXT},
        [PNG, b"other"],
        [{"bytes": PNG, "path": None}],
        f"data:image/png;base64,{TEXT}",
        f"DATA:image/png;BASE64,{TEXT.replace('+', '%2B')}",
        list(PNG),
        [byte - 256 if byte > 127 else byte for byte in PNG],
        TEXT,
        TEXT.rstrip("=").replace("+", "-").replace("/", "_"),
        json.dumps({"bytes": TEXT}),
    ],
)
def test_bytes_go_into_a_file(tmp_path: Path, value: Any) -> None:
    (path,), _ = places(tmp_path, [value])
    assert Path(path).read_bytes() == PNG


@pytest.mark.parametrize(
    "value",
    [
        "1.png",
        {"path": "1.png"},
        {"bytes": None, "path": "1.png"},
        ["1.png", "2.png"],
        [None, "1.png"],
        {"src": "1.png"},
        '["1.png", "2.png"]',
        "['1.png', '2.png']",
        '{"file_name": "1.png"}',
        " 1.png ",
        "./sub/../1.png",
        "sub\\..\\1.png",
    ],
)
def test_files_are_relative_to_the_catalogue(tmp_path: Path, value: Any) -> None:
    (tmp_path / "1.png").write_bytes(PNG)
    assert places(tmp_path, [value])[0] == [str(tmp_path / "1.png")]


def test_a_file_url_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(PNG)
    assert places(tmp_path, [(tmp_path / "a b.png").as_uri()])[0] == [str(tmp_path / "a b.png")]


@pytest.mark.parametrize("value", [URL, {"url": URL, "width": 40}, [{"uri": URL}], "HTTPS://shop.example/1.jpg"])
def test_urls_stay(tmp_path: Path, value: Any) -> None:
    assert places(tmp_path, [value])[0] == [URL if value != "HTTPS://shop.example/1.jpg" else value]


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("gone.png", "images: no such file"),
        ("x." * 5000, "images: no such file"),
        ("a\0b", "images: no such file"),
        ("s3://bucket/1.png", "images: no such file"),
        ("[gone].png", "images: no such file"),
        (7, "images: no such file"),
        ({"width": 40}, "images: neither bytes nor a file nor a URL"),
        ([[[1, 2, 3]]], "images: neither bytes nor a file nor a URL"),
        (1.5, "images: neither bytes nor a file nor a URL"),
        (["gone.png", "gone2.png"], "images: no such file"),
    ],
)
def test_what_cannot_be_used_is_counted(tmp_path: Path, value: Any, what: str) -> None:
    made, skipped = places(tmp_path, [value])
    assert made == [None] and skipped[0]["what"] == what and len(str(skipped)) < 1000


@pytest.mark.parametrize("value", [None, "", " ", "nan", float("nan"), [], {"bytes": None, "path": None}, "null"])
def test_a_missing_image_is_no_oddity(tmp_path: Path, value: Any) -> None:
    assert places(tmp_path, [value]) == ([None], [])


def test_several_images_of_an_item_are_noted(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(PNG)
    assert places(tmp_path, [["1.png", "2.png"], ["1.png"]])[1][0]["count"] == 1


def test_a_file_name_that_looks_like_a_url_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "https_logo.png").write_bytes(PNG)
    assert places(tmp_path, ["https_logo.png"])[0] == [str(tmp_path / "https_logo.png")]


def test_other_peoples_catalogues_name_files_of_their_own_folder_only(tmp_path: Path) -> None:
    own, private = tmp_path / "own", tmp_path / "private.png"
    (own / "data").mkdir(parents=True)
    for file in (private, own / "1.png", tmp_path / "own.png"):
        file.write_bytes(PNG)
    values: list[Any] = [str(private), "../../private.png", "../" * 40 + str(private).lstrip("/"), f"file://{private}"]
    values += [{"bytes": None, "path": value} for value in values] + [[value] for value in values]
    values += ["~/private.png", "../../own.png", f"{own}/data/../../private.png"]
    made, skipped = places(own / "data", values, inside=own)
    assert not any(made) and sum(row["count"] for row in skipped) == len(values)
    assert places(own / "data", ["../1.png", str(own / "1.png")], inside=own)[0] == [str(own / "1.png")] * 2


def test_a_folder_of_images_by_id(tmp_path: Path) -> None:
    for name in ("1.PNG", "2.jpeg", "sub/3.tif", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(PNG)
    ids = pl.Series("item_id", ["1", "2", "3", "4", "notes"])
    assert images_by_id(ids, tmp_path).is_not_null().to_list() == [True, True, True, False, False]
    assert images_by_id(ids, None).null_count() == images_by_id(ids, tmp_path / "none").null_count() == 5
    with pytest.raises(ValueError, match=r"none of its 3 images is called by the id of an item.*'001', '002'"):
        images_by_id(pl.Series("item_id", ["001", "002"]), tmp_path)


def test_files_called_by_ids_that_went_through_floats_or_another_system_are_found(tmp_path: Path) -> None:
    for name in ("10.0.png", "cafe\u0301.png", "007.png"):
        (tmp_path / name).write_bytes(png())
    found = images_by_id(pl.Series(["10", "caf\u00e9", "007", "7"]), tmp_path).to_list()
    assert [Path(place).name if place else None for place in found] == ["10.0.png", "cafe\u0301.png", "007.png", None]
