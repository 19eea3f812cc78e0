"""The derived data set as it is published."""

import io
from pathlib import Path

import polars as pl
import pytest
from PIL import Image

from mllm_msr.data.hub_tables import load_table
from mllm_msr.records.schema import IMAGE

README = """---
configs:
- {config_name: items, data_files: items/*.parquet}
dataset_info:
- config_name: items
  features: [{name: item_id, dtype: string}, {name: image, dtype: image}]
---
"""


def publish(folder: Path, *images: dict | None) -> str:
    (folder / "items").mkdir(parents=True, exist_ok=True)
    rows = {"item_id": [str(n) for n in range(len(images))], "image": list(images)}
    table = pl.DataFrame(rows, schema={"item_id": pl.String, "image": IMAGE})
    table.write_parquet(folder / "items/train.parquet")
    (folder / "README.md").write_text(README)
    return str(folder)


def test_a_published_table_holds_its_images(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(buffer, "PNG")
    own = publish(tmp_path / "own", {"bytes": buffer.getvalue(), "path": "1.png"}, None)
    items = load_table(own, "items", "train")
    assert items[0]["image"].size == (40, 40) and items[1]["image"] is None


def test_a_published_table_names_no_file_of_this_machine(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), "red").save(tmp_path / "private.png")
    own = publish(tmp_path / "own", None, {"bytes": None, "path": str(tmp_path / "private.png")})
    with pytest.raises(ValueError, match="'image' of 'items' names files"):
        load_table(own, "items", "train")


def test_a_folder_is_read_as_it_is_now_and_not_as_one_of_its_name_was(tmp_path: Path) -> None:
    for count, folder in enumerate(("a/own", "b/own", "b/own"), start=1):
        assert len(load_table(publish(tmp_path / folder, *[None] * count), "items", "train")) == count


def test_a_folder_of_something_else_is_refused_at_once(tmp_path: Path) -> None:
    pl.DataFrame({"item_id": ["a"]}).write_parquet(tmp_path / "items.parquet")
    with pytest.raises(FileNotFoundError, match=r"neither a run .* nor a data set"):
        load_table(str(tmp_path), "items", "train")
