import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mllm_msr.data.sources.amazon import read_amazon
from mllm_msr.data.table_files import local_file


def review(user: str, parent: str, time: int, **other: Any) -> dict[str, Any]:
    return {
        "rating": 5.0, "title": "Great", "text": "Loved it", "images": [], "asin": "B0VARIANT", "parent_asin": parent,
        "user_id": user, "timestamp": time, "helpful_vote": 0, "verified_purchase": True, **other,
    }  # fmt: skip


def draw_image(variant: str, large: str | None) -> dict[str, Any]:
    return {"thumb": f"https://x/{variant}_t.jpg", "large": large, "hi_res": None, "variant": variant}


REVIEWS = [review("AE1", "B1", 1588687728923), review("AE1", "B2", 1588687729000), review("AE2", "B3", 1588687730000)]
META = [
    {
        "main_category": "Video Games", "title": "A Game", "average_rating": 4.1, "rating_number": 900, "price": "None",
        "features": ["Fast", "Fun"], "description": [], "categories": ["Video Games", "PC"], "store": "S",
        "images": [draw_image("PT01", "https://x/side.jpg"), draw_image("MAIN", "https://x/main.jpg")],
        "videos": [], "details": {"Rank": {"PC": 1}}, "parent_asin": "B1", "bought_together": None,
    },
    {"title": "Bare", "features": [], "description": ["Plain."], "categories": [], "price": 9.99, "parent_asin": "B2",
     "images": [draw_image("MAIN", None)]},
    {"title": "Never reviewed", "parent_asin": "B9", "images": []},
]  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]], more: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows) + more
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.mark.parametrize(
    ("reviews", "meta"),
    [
        ("Video_Games.jsonl", "meta_Video_Games.jsonl"),
        ("raw/review_categories/Video_Games.jsonl.gz", "raw/meta_categories/meta_Video_Games.jsonl.gz"),
    ],
)
def test_reviews_join_metadata_on_parent_asin(tmp_path: Path, reviews: str, meta: str) -> None:
    write(tmp_path / reviews, REVIEWS)
    write(tmp_path / meta, META)
    raw = read_amazon(tmp_path, "Video_Games")
    assert raw.interactions.collect().rows() == [
        (row["user_id"], row["parent_asin"], row["timestamp"]) for row in REVIEWS
    ]
    assert raw.ticks == 1000  # cleaning brings milliseconds to seconds
    assert raw.items.drop("image_bytes").rows() == [
        ("B1", "A Game", "Video Games PC Fast Fun", "https://x/main.jpg"),
        ("B2", "Bare", "Plain.", "https://x/MAIN_t.jpg"),
    ]
    assert raw.skipped[0]["what"].endswith("items of the log that this catalogue lacks") and raw.skipped[0][
        "examples"
    ] == ["B3"]


def test_bad_lines_stop_or_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "Baby.jsonl", REVIEWS, '{"user_id": "AE9"\n{"user_id": "AE9", "timestamp": 1}\n')
    write(tmp_path / "meta_Baby.jsonl", META, '{"parent_asin": "B3", "title": 3, "images": "none", "features": "x"}\n')
    with pytest.raises(ValueError, match=r"Baby\.jsonl, row 4: not a JSON object"):
        read_amazon(tmp_path, "Baby")
    raw = read_amazon(tmp_path, "Baby", on_bad_rows="skip")
    assert len(raw.interactions.collect()) == 3
    counts = {row["what"]: row["count"] for row in raw.skipped}
    assert counts["Baby.jsonl: not a JSON object"] == 1 and counts["Baby.jsonl: no item_id"] == 1
    assert raw.items.filter(item_id="B3")["title"].to_list() == ["3"]


def test_metadata_names_no_file_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "private.jpg").write_bytes(b"image")
    write(tmp_path / "Baby.jsonl", REVIEWS)
    images = [draw_image("MAIN", str(tmp_path / "private.jpg"))]
    write(tmp_path / "meta_Baby.jsonl", [*META, {"parent_asin": "B3", "title": "C", "images": images}])
    places = dict(read_amazon(tmp_path, "Baby").items.select("item_id", "image_path").iter_rows())
    assert places["B3"] == "https://x/MAIN_t.jpg"


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no Baby\.jsonl or Baby\.jsonl\.gz"):
        read_amazon(tmp_path, "Baby")
    with pytest.raises(ValueError, match="expected hf://datasets/<owner>/<name>"):
        local_file("hf://datasets/owner/name")


def test_hub_paths_are_resolved_from_the_cache(tmp_path: Path) -> None:
    repo = tmp_path / "datasets--owner--reviews"
    snapshot = repo / "snapshots" / ("a" * 40)
    write(snapshot / "raw/review_categories/Baby.jsonl", REVIEWS)
    write(snapshot / "raw/meta_categories/meta_Baby.jsonl", META)
    (repo / "refs").mkdir()
    (repo / "refs" / "v1").write_text("a" * 40)
    code = (
        "from mllm_msr.data.sources.amazon import read_amazon\n"
        "print(len(read_amazon('hf://datasets/owner/reviews@v1', 'Baby').interactions.collect()))"
    )
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "3\n", done.stderr
