"""`mllm-msr rank` and `index` as typed, on a run whose model is `late`: many users into files, by several processes."""

import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import yaml

from mllm_msr.records.recipe import backbone_path

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(*arguments: str, processes: int = 1) -> subprocess.CompletedProcess:
    many = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    command = [sys.executable, *many, "-m", "mllm_msr.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENV)


@pytest.fixture(scope="module")
def late(tmp_path_factory) -> Path:
    content = yaml.safe_load((Path(backbone_path("demo")).parent / "recipe.yaml").read_text(encoding="utf-8"))
    content["source"].update(n_users=70, n_items=45)
    content["summaries"] = {"engine": "extractive", "block_size": 3}
    content["training"].update(max_steps=3, eval_strategy="no", interaction="late", user_limit=96, item_limit=48)
    content["prompts"].update(late_user="{{ preference }}", late_item="{{ title }} {{ image }}")
    content["evaluation"]["rows"] = ["mllm_msr", "popularity"]
    path, folder = tmp_path_factory.mktemp("recipes") / "late.yaml", tmp_path_factory.mktemp("runs") / "late"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    done = run("run", str(path), "--output", str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def ranking(folder: Path) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(path) for path in sorted(folder.glob("*.parquet"))])


def test_many_users_are_ranked_into_files_that_processes_share(late, tmp_path):
    first = run("index", str(late))
    assert "45 items computed, 0 were there, 0 dropped" in first.stdout, first.stderr[-3000:]
    assert "0 items computed, 45 were there, 0 dropped" in run("index", str(late)).stdout
    together, alone = tmp_path / "together", tmp_path / "alone"
    done = run("rank", str(late), "--users", "all", "--top-k", "4", "--output", str(together), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "70 users x 45 candidates" in done.stdout
    assert run("rank", str(late), "--users", "all", "--top-k", "4", "--output", str(alone)).returncode == 0
    names = sorted(path.name for path in alone.glob("*.parquet"))
    assert names == ["ranking-00000-of-00002.parquet", "ranking-00001-of-00002.parquet"]
    frame = ranking(together)
    assert frame.select("user_id", "rank", "item_id").equals(ranking(alone).select("user_id", "rank", "item_id"))
    assert frame.height == 70 * 4 and frame["user_id"].n_unique() == 70
    for _, part in frame.group_by("user_id"):
        assert part["rank"].to_list() == [1, 2, 3, 4] and part["logit"].is_sorted(descending=True)
    seen = pl.read_parquet(late / "data/interactions.parquet")
    assert frame.join(seen, on=["user_id", "item_id"]).is_empty()

    kept = (alone / names[0]).stat().st_mtime_ns
    (alone / names[1]).unlink()
    assert run("rank", str(late), "--users", "all", "--top-k", "4", "--output", str(alone)).returncode == 0
    assert (alone / names[0]).stat().st_mtime_ns == kept and ranking(alone).equals(ranking(alone))
    other = run("rank", str(late), "--users", "all", "--top-k", "5", "--output", str(alone))
    assert other.returncode == 1 and "holds another ranking" in other.stderr

    user = frame["user_id"][0]
    shown = run("rank", str(late), "--user", user, "--top-k", "4").stdout.strip().splitlines()[1:]
    assert [line.split()[2] for line in shown] == frame.filter(user_id=user)["item_id"].to_list()


def test_what_cannot_be_ranked_says_why(late, tmp_path):
    nowhere = run("rank", str(late), "--users", "all")
    assert nowhere.returncode == 1 and "--output DIR" in nowhere.stderr
    unknown = run("rank", str(late), "--users", "nobody", "--output", str(tmp_path / "x"))
    assert unknown.returncode == 1 and "'nobody' has no interactions" in unknown.stderr
