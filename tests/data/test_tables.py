import io
import json
import re
from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from table_kinds import WRITE

from mllm_msr.data.sources.tables import read_tables

LOG = pl.DataFrame({"who": ["u", "u"], "what": [7, 8], "when": ["2020-01-01", "2020-01-02T10:00:00"]})
MAPPING = {"user_id": "who", "item_id": "what", "timestamp": "when", "items.item_id": "sku", "title": "name"}


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), "blue").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "jsonl"])
def test_every_kind_of_file_reads_the_same(tmp_path: Path, kind: str) -> None:
    (tmp_path / "7.png").write_bytes(png())
    items = pl.DataFrame({"sku": [7, 8, 8], "name": ["Seven", "Eight", "Acht"], "image": ["7.png", "gone.png", None]})
    for name, table in (("log", LOG), ("items", items)):
        WRITE[kind](table, tmp_path / f"{name}.{kind}")
    raw = read_tables(tmp_path / f"log.{kind}", tmp_path / f"items.{kind}", MAPPING)
    assert raw.interactions.collect().rows() == [("u", "7", 1577836800), ("u", "8", 1577959200)]
    assert raw.items.rows() == [("7", "Seven", "", str(tmp_path / "7.png"), None), ("8", "Eight", "", None, None)]
    assert {row["what"]: row["count"] for row in raw.skipped} == {
        f"items.{kind}: surplus rows of an item (first one kept)": 1,
        "images: no such file": 1,
    }


def test_images_as_bytes_and_as_hugging_face_column(tmp_path: Path) -> None:
    LOG.write_parquet(tmp_path / "log.parquet")
    plain = pl.DataFrame({"sku": ["7"], "name": ["Seven"], "image": [png()]})
    struct = plain.with_columns(image=pl.struct(bytes=pl.col("image"), path=pl.lit("7.png")))
    for table in (plain, struct):
        table.write_parquet(tmp_path / "items.parquet")
        raw = read_tables(tmp_path / "log.parquet", tmp_path / "items.parquet", MAPPING)
        assert [Path(path).read_bytes() for path in raw.items["image_path"]] == [png()]


def test_without_catalogue_or_with_a_folder_of_images(tmp_path: Path) -> None:
    LOG.write_csv(tmp_path / "log.csv")
    (tmp_path / "covers").mkdir()
    (tmp_path / "covers" / "8.jpg").write_bytes(png())
    mapping = {key: MAPPING[key] for key in ("user_id", "item_id", "timestamp")}
    assert read_tables(tmp_path / "log.csv", None, mapping).items["title"].to_list() == ["", ""]
    raw = read_tables(tmp_path / "log.csv", None, mapping, images=tmp_path / "covers")
    assert raw.items["image_path"].to_list() == [None, str(tmp_path / "covers" / "8.jpg")]


def test_mistakes_are_named(tmp_path: Path) -> None:
    LOG.write_csv(tmp_path / "log.csv")
    with pytest.raises(ValueError, match=r"log\.csv: no column 'user_id'; it has \['who', 'what', 'when'\]"):
        read_tables(tmp_path / "log.csv")
    with pytest.raises(ValueError, match="unknown name 'usr'"):
        read_tables(tmp_path / "log.csv", columns={"usr": "who"})
    (tmp_path / "items.jsonl").write_text(json.dumps({"sku": 7}) + "\n")
    with pytest.raises(ValueError, match=r"items\.jsonl: no column 'name'"):
        read_tables(tmp_path / "log.csv", tmp_path / "items.jsonl", MAPPING)
    with pytest.raises(ValueError, match=r"log: neither a file .* nor a folder of a data set"):
        read_tables(tmp_path / "log")
    with pytest.raises(ValueError, match="'who' cannot be two of user_id, item_id and timestamp"):
        read_tables(tmp_path / "log.csv", columns={**MAPPING, "item_id": "who"})


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("u.data", b"1\t2\t3\n", r"a file whose name ends in none of \.csv, .*: rename it"),
        ("log.xlsx", b"PK\x03\x04", "an Excel workbook: unpack it, or save the sheet as CSV"),
        ("log.feather", b"ARROW1\0\0", "an Arrow or Feather file: write it as Parquet"),
    ],
)
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: this is .*{what}"):
        read_tables(name, folder=tmp_path)


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_columns_that_are_spelled_otherwise_are_read_and_noted(tmp_path: Path, ending: str) -> None:
    log = pl.DataFrame({"User ID": ["u"], "itemId": ["7"], " timestamp": [1]})
    items = pl.DataFrame({"\ufeffItem-ID": ["7"], "Title": ["Seven"], "TEXT": ["blue"], "(row)": ["x"]})
    WRITE[ending](log, tmp_path / f"log.{ending}")
    WRITE[ending](items, tmp_path / f"goods.{ending}")
    raw = read_tables(f"log.{ending}", f"goods.{ending}", folder=tmp_path)
    assert raw.interactions.collect().rows() == [("u", "7", 1)]
    assert raw.items.select("item_id", "title", "text").rows() == [("7", "Seven", "blue")]
    noted = [row["what"] for row in raw.skipped]
    assert f"goods.{ending}: column 'Title', read as 'title'" in noted and len(noted) == len(set(noted))


def test_of_two_columns_that_could_be_meant_none_is_and_a_catalogue_without_titles_is_noted(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\nu,7,1\n")
    (tmp_path / "goods.csv").write_text("item_id,Title,TITLE\n7,A,B\n")
    raw = read_tables("log.csv", "goods.csv", folder=tmp_path)
    assert raw.items["title"].to_list() == [""]
    assert [row["what"] for row in raw.skipped] == ["goods.csv: no column 'title', so no item has a title"]
    (tmp_path / "goods.csv").write_text("item_id,title\n7,A,B\n")
    with pytest.raises(ValueError, match=r"goods\.csv: this catalogue has no rows, or every row of it was bad"):
        read_tables("log.csv", "goods.csv", folder=tmp_path, on_bad_rows="skip")


def test_a_data_set_is_read_as_load_dataset_reads_it(tmp_path: Path) -> None:
    image = [{"bytes": png(), "path": "7.png"}, None]
    items = Dataset.from_dict({"item_id": ["7", "8"], "title": ["Seven", "Eight"], "image": image})
    items = items.cast_column("image", ImageFeature())
    (tmp_path / "shop").mkdir()
    LOG.rename({"who": "user_id", "what": "item_id", "when": "timestamp"}).write_parquet(tmp_path / "shop/log.parquet")
    items.to_parquet(tmp_path / "shop/items.parquet")
    (tmp_path / "shop/README.md").write_text(
        "---\nconfigs:\n- {config_name: log, data_files: log.parquet}\n"
        "- {config_name: items, data_files: items.parquet}\n---\n"
    )
    raw = read_tables("shop?name=log", "shop?name=items&split=train", folder=tmp_path)
    assert raw.interactions.collect().rows() == [("u", "7", 1577836800), ("u", "8", 1577959200)]
    (seven, file), eight = raw.items.select("title", "image_path").rows()
    assert (seven, Path(file).read_bytes(), eight) == ("Seven", png(), ("Eight", None))
    with pytest.raises(ValueError, match="unknown 'config' after"):
        read_tables("shop?config=log", folder=tmp_path)


def test_json_lines_of_mixed_types_and_bad_lines(tmp_path: Path) -> None:
    lines = [
        '{"user_id": 1, "item_id": "a", "timestamp": 5}',
        "oops",
        '{"user_id": "u2", "item_id": 3, "timestamp": "7"}',
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"log\.jsonl, row 2: not a JSON object: oops"):
        read_tables(tmp_path / "log.jsonl")
    raw = read_tables(tmp_path / "log.jsonl", on_bad_rows="skip")
    assert raw.interactions.collect().rows() == [("1", "a", 5), ("u2", "3", 7)]
    assert raw.skipped == [{"what": "log.jsonl: not a JSON object", "count": 1, "examples": ["oops"]}]


def test_a_catalogue_of_json_lines_with_bad_lines(tmp_path: Path) -> None:
    LOG.write_csv(tmp_path / "log.csv")
    lines = ['{"sku": 7, "name": 1984}', "oops", '{"sku": "8", "name": "Eight", "text": ["a", "b"]}', '{"name": "?"}']
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"items\.jsonl, row 2: not a JSON object: oops"):
        read_tables(tmp_path / "log.csv", tmp_path / "items.jsonl", MAPPING)
    raw = read_tables(tmp_path / "log.csv", tmp_path / "items.jsonl", MAPPING, on_bad_rows="skip")
    assert raw.items.select("item_id", "title").rows() == [("7", "1984"), ("8", "Eight")]
    assert [row["what"] for row in raw.skipped] == ["items.jsonl: not a JSON object", "items.jsonl: no item_id"]


def test_words_of_any_type_are_texts_or_noted(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\nu,1,1\n")
    for values, titles, noted in (
        ([["a", "b"]], ["a b"], []),
        (['["a", "b"]', "['c', 'd']", "[REC]", "[1]"], ["a b", "c d", "[REC]", "[1]"], []),
        ([1984.0, 1.5], ["1984", "1.5"], []),
        ([b"caf\xe9"], ["caf\ufffd"], []),
        (["None", "N/A", None], ["", "", ""], []),
        ([[1, 2]], [""], ["g.parquet: 'title' is a column of List(Int64), not of texts: left out"]),
        ([timedelta(1)], [""], ["g.parquet: 'title' is a column of Duration(time_unit='us'), not of texts: left out"]),
    ):
        ids = [str(number) for number in range(1, len(titles) + 1)]
        pl.DataFrame({"item_id": ids, "title": values}).write_parquet(tmp_path / "g.parquet")
        raw = read_tables("log.csv", "g.parquet", folder=tmp_path)
        assert raw.items["title"].to_list() == titles
        assert [row["what"] for row in raw.skipped] == noted


def test_a_zone_that_is_an_offset_is_one_of_any_table(tmp_path: Path) -> None:
    moments = pa.array([datetime(2020, 1, 1, 10)] * 2, pa.timestamp("us", "+05:30"))
    log = {"user_id": ["u", "u"], "item_id": ["7", "8"], "timestamp": moments}
    pq.write_table(pa.table(log), tmp_path / "log.parquet")
    pq.write_table(pa.table({"item_id": ["7", "8"], "title": moments}), tmp_path / "items.parquet")
    raw = read_tables("log.parquet", "items.parquet", folder=tmp_path)
    assert raw.interactions.collect()["timestamp"].to_list() == [1577872800 * raw.ticks] * 2
    assert raw.items["title"][0].startswith("2020-01-01 10:00:00")


def test_json_that_is_not_one_object_a_line_says_what_to_write(tmp_path: Path) -> None:
    for text in ('[{"user_id": "u", "item_id": "1", "timestamp": 1}]', "[\n {\n", '{"a": 1}{"b": 2}'):
        (tmp_path / "log.json").write_text(text)
        with pytest.raises(ValueError, match=r"log\.json: JSON with one object a line is read.*lines=True"):
            read_tables("log.json", folder=tmp_path)
