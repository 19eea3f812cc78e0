import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from datasets import load_dataset
from PIL import Image

from mllm_msr.data.leakage import check_leakage
from mllm_msr.data.prepare import prepare
from mllm_msr.data.raw import RawData
from mllm_msr.data.statistics import statistics_table
from mllm_msr.data.tasks import candidate_hash, make_tasks
from mllm_msr.evaluation.places import popularity_figures
from mllm_msr.records.sections import PrepareOptions


def png(colour: str, size: tuple[int, int] = (48, 48)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def raw(tmp_path: Path) -> RawData:
    (tmp_path / "file.png").write_bytes(png("green", (2000, 1000)))
    rows = [(f"u{user}", f"i{(user * 3 + 7 * step) % 20}", step) for user in range(12) for step in range(6)]
    images: list[dict[str, Any]] = [{"image_path": None, "image_bytes": png("red")} for _ in range(20)]
    images[1] = {"image_path": str(tmp_path / "file.png"), "image_bytes": None}
    images[2] = {"image_path": None, "image_bytes": b"<html>"}
    images[3] = {"image_path": str(tmp_path / "gone.png"), "image_bytes": None}
    images[4] = {"image_path": None, "image_bytes": None}
    items = [{"item_id": f"i{n}", "title": f"T{n}", "text": "", **image} for n, image in enumerate(images)]
    return RawData(
        pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row"),
        pl.DataFrame(items, schema_overrides={"image_bytes": pl.Binary}),
        [{"what": "log: oddity", "count": 3, "examples": []}],
    )


OPTIONS = PrepareOptions(n_negatives=6, k_core_users=2, k_core_items=2, max_image_edge=100)


def test_folder_is_read_by_datasets(raw: RawData, tmp_path: Path) -> None:
    out = tmp_path / "data"
    report = prepare(raw, out, OPTIONS, "made up", popularity_figures)
    cache = str(tmp_path / "cache")
    items = {row["item_id"]: row for row in load_dataset(str(out), "items", split="train", cache_dir=cache)}
    assert items["i0"]["image"].getpixel((5, 5)) == (255, 0, 0)
    assert items["i1"]["image"].size == (100, 50)
    assert [items[f"i{n}"]["image"] for n in (2, 3, 4)] == [None] * 3
    plain = load_dataset("parquet", data_files=str(out / "items.parquet"), split="train", cache_dir=cache)
    assert isinstance(plain[0]["image"], Image.Image)
    log = load_dataset(str(out), "interactions", split="train", cache_dir=cache)
    assert log.column_names == ["user_id", "item_id", "timestamp"] and len(log) == 72
    tasks = load_dataset(str(out), "tasks", split="train", cache_dir=cache)
    assert set(tasks["split"]) == {"train", "validation", "test"}
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))


def test_thumbnails_are_made_once(raw: RawData, tmp_path: Path) -> None:
    prepare(raw, tmp_path / "data", OPTIONS, "made up", popularity_figures)
    small = pl.read_parquet(tmp_path / "data" / "thumbnails.parquet")
    assert set(small["item_id"]) == {f"i{n}" for n in range(20)} - {"i2", "i3", "i4"}
    wide = Image.open(io.BytesIO(small.filter(item_id="i1")["thumbnail"][0]))
    assert (wide.format, wide.size, wide.mode) == ("JPEG", (96, 48), "RGB")


def test_tasks_are_those_of_make_tasks_and_sound(raw: RawData, tmp_path: Path) -> None:
    report = prepare(raw, tmp_path / "data", OPTIONS, "made up", popularity_figures)
    tasks, log, counts = (
        pl.read_parquet(tmp_path / "data" / f"{name}.parquet") for name in ("tasks", "interactions", "popularity")
    )
    assert tasks.schema == make_tasks(log, n_negatives=6).schema and tasks.equals(make_tasks(log, n_negatives=6))
    assert report["protocol"]["candidate_hash"] == candidate_hash(tasks)
    assert report["protocol"]["candidate_hashes"]["test"] == candidate_hash(tasks.filter(split="test"))
    check_leakage(tasks, log, counts)
    assert report["protocol"]["popularity"]["test"] == popularity_figures(tasks.filter(split="test"), counts)


def test_users_without_a_task_count_as_training(raw: RawData, tmp_path: Path) -> None:
    log = raw.interactions.collect()
    for user in ("a", "z"):  # the first and the last; too short a history for a task, but popular what they chose
        lone = pl.DataFrame({"user_id": [user] * 3, "item_id": ["i0", "i1", "i2"], "timestamp": [0, 1, 2]})
        log = pl.concat([log, lone])
    options = PrepareOptions(n_negatives=2, k_core_users=1, k_core_items=1, min_history=3)
    report = prepare(RawData(log, raw.items), tmp_path / "data", options, "made up", popularity_figures)
    assert report["protocol"]["targets_with_short_history"] > 0
    tasks = pl.read_parquet(tmp_path / "data" / "tasks.parquet")
    assert not {"a", "z"} & set(tasks["user_id"])


def test_files_are_the_same_every_time(raw: RawData, tmp_path: Path) -> None:
    for name in "ab":
        prepare(raw, tmp_path / name, OPTIONS, "made up", popularity_figures)
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_threads_do_not_change_anything(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np, polars as pl\n"
        "from pathlib import Path\n"
        "from mllm_msr.data.prepare import prepare\n"
        "from mllm_msr.data.raw import RawData\n"
        "from mllm_msr.evaluation.places import popularity_figures\n"
        "from mllm_msr.records.sections import PrepareOptions\n"
        "assert pl.thread_pool_size() == int(sys.argv[2])\n"
        "rng = np.random.default_rng(0)\n"
        "table = rng.integers(0, [2000, 300, 50], (40000, 3))\n"
        "log = pl.DataFrame(table, schema=['user_id', 'item_id', 'timestamp'], orient='row')\n"
        "items = pl.DataFrame({'item_id': ['1'], 'title': ['One'], 'text': ['']})\n"
        "options = PrepareOptions(max_history=15)\n"
        "prepare(RawData(log, items), Path(sys.argv[1]), options, 'made up', popularity_figures)\n"
    )
    for threads in ("1", "7"):
        command = [sys.executable, "-c", code, str(tmp_path / threads), threads]
        subprocess.run(command, env={**os.environ, "POLARS_MAX_THREADS": threads}, check=True, capture_output=True)
    for file in sorted((tmp_path / "1").iterdir()):
        assert file.read_bytes() == (tmp_path / "7" / file.name).read_bytes(), file.name


def test_broken_images_are_counted_with_reasons(raw: RawData, tmp_path: Path) -> None:
    report = prepare(raw, tmp_path / "data", OPTIONS, "made up", popularity_figures)
    skipped = {row["what"]: row["examples"] for row in report["skipped"]}
    assert skipped["broken image: not an image"] == ["i2"]
    assert skipped["broken image: unreadable file (No such file or directory)"] == ["i3"]
    assert skipped["log: oddity"] == []
    assert report["statistics"]["share_without_image"] == 0.15


def test_a_file_far_larger_than_an_image_is_not_read(raw: RawData, tmp_path: Path) -> None:
    with (tmp_path / "film.png").open("wb") as file:
        file.truncate(2**40)
    path = pl.when(pl.col("item_id") == "i4").then(pl.lit(str(tmp_path / "film.png"))).otherwise("image_path")
    raw.items = raw.items.with_columns(path.alias("image_path"))
    report = prepare(raw, tmp_path / "data", OPTIONS, "made up", popularity_figures)
    skipped = {row["what"]: row["examples"] for row in report["skipped"]}
    assert skipped["broken image: file of more than 401,048,576 bytes"] == ["i4"]


def test_broken_images_are_dropped_like_missing_ones(raw: RawData, tmp_path: Path) -> None:
    options = PrepareOptions(n_negatives=4, k_core_users=2, k_core_items=1, missing_images="drop")
    report = prepare(raw, tmp_path / "data", options, "made up", popularity_figures)
    kept = set(pl.read_parquet(tmp_path / "data" / "items.parquet")["item_id"])
    assert kept == {f"i{n}" for n in range(20)} - {"i2", "i3", "i4"}
    assert report["statistics"]["share_without_image"] == 0
    assert "broken image, item dropped: not an image" in {row["what"] for row in report["skipped"]}


def test_statistics(raw: RawData, tmp_path: Path) -> None:
    report = prepare(raw, tmp_path / "data", OPTIONS, "made up", popularity_figures)
    statistics = report["statistics"]
    assert (statistics["users"], statistics["items"], statistics["interactions"]) == (12, 20, 72)
    assert (statistics["mean_length"], statistics["sparsity"], statistics["share_tied_times"]) == (6.0, 0.7, 0.0)
    shown = statistics_table(report)
    wanted = (
        "k-core",
        "sparsity",
        "12  targets refused: with short history",
        "70.00%",
        "share tied times",
        "log: oddity",
        report["protocol"]["candidate_hash"],
    )
    for part in wanted:
        assert part in shown


def test_a_popularity_below_chance_is_explained_under_strict_alone(raw: RawData, tmp_path: Path) -> None:
    report = prepare(raw, tmp_path / "data", OPTIONS, "made up", popularity_figures)
    figures = {"test": {**report["protocol"]["popularity"]["test"], "auc_user": 0.4}}
    for name, explained in (("strict", True), ("paper", False)):
        shown = statistics_table({**report, "protocol": {**report["protocol"], "name": name, "popularity": figures}})
        assert ("Popularity ranks below chance here" in shown) == explained
