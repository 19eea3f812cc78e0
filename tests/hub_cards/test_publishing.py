"""The folders that would be pushed: what is in them, what is not, and that a dry run sends nothing."""

import json
import shutil

import polars as pl
import pytest
import yaml
from datasets import load_dataset
from huggingface_hub import DatasetCard, HfApi, ModelCard

from mllm_msr.hub_cards.publishing import build_hub
from mllm_msr.hub_cards.release import plan, publish


def test_model_folder_has_the_allowed_files_and_no_others(make_run):
    run = make_run()
    (run / "model/adapter").mkdir()
    (run / "model/adapter/adapter_model.safetensors").write_bytes(b"")
    (run / "model/checkpoint-5").mkdir()
    (run / "model/checkpoint-5/model.safetensors").write_bytes(b"")
    folder = build_hub(run)["model"]
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "README.md",
        "adapter/adapter_model.safetensors",
        "config.json",
        "model.safetensors",
        "modeling_mllm_msr.py",
        "processor_config.json",
        "recipe.yaml",
        "tokenizer.json",
    ]
    assert (folder / "model.safetensors").read_bytes() == (run / "model/model.safetensors").read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert config == {"model_type": "mllm_msr", "interaction": "joint", "vlm_config": {"model_type": "llava"}}
    assert ModelCard.load(folder / "README.md").data.library_name == "transformers"


@pytest.mark.parametrize("streaming", [False, True])
def test_every_config_loads_as_its_card_says(finished_run, tmp_path, streaming):
    folder = build_hub(finished_run)["dataset"]
    rows = {}
    for config in DatasetCard.load(folder / "README.md").data.configs:
        for files in config["data_files"]:
            table = load_dataset(
                str(folder), config["config_name"], split=files["split"], streaming=streaming, cache_dir=str(tmp_path)
            )
            rows[config["config_name"], files["split"]] = list(table)
    assert {key: len(value) for key, value in rows.items() if key[0] != "preferences"} == {
        ("items", "train"): 30,
        ("item_summaries", "train"): 30,
        ("tasks", "train"): 8,
        ("tasks", "validation"): 8,
        ("tasks", "test"): 8,
        ("sft", "train"): 8,
        ("sft", "validation"): 8,
    }
    assert rows["items", "train"][0]["image"] is None
    assert rows["items", "train"][1]["image"].size == (96, 96)
    assert {row["split"] for row in rows["tasks", "test"]} == {"test"}
    assert rows["preferences", "train"][0]["user_id"] == "u0"  # drawn users have nothing to hide


def test_real_users_are_hashed_alike_in_every_table_and_restricted_texts_left_out(make_run):
    run = make_run()
    recipe = yaml.safe_load((run / "config.yaml").read_text()) | {"source": {"type": "movielens"}}
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    folder = build_hub(run)["dataset"]
    tables = {path.parent.name + path.name[:4]: pl.read_parquet(path) for path in folder.rglob("*.parquet")}
    users = [set(frame["user_id"]) for frame in tables.values() if "user_id" in frame.columns]
    assert len(users) == 6 and len(users[0]) == 8
    assert all(one == users[0] for one in users)
    assert set(tables["taskstest"]["task_id"]).isdisjoint(f"test-{i}" for i in range(8))
    items = tables["itemstrai"]
    assert items["image"].null_count() == 30 and set(items["text"]) == {""}
    assert "do not let its texts and pictures be passed on" in (folder / "README.md").read_text()
    assert b"u0" not in b"".join(
        frame.write_json().encode() for name, frame in tables.items() if "user_id" in frame.columns
    )
    key = run / "user_hash.key"
    assert key.stat().st_mode & 0o077 == 0
    again = pl.read_parquet(build_hub(run)["dataset"] / "tasks/test-00000-of-00001.parquet")
    assert again.equals(tables["taskstest"])  # the key is kept, so a second release has the same users
    assert not list((run / "hub").rglob("*.key"))


def test_a_build_that_fails_leaves_the_former_folder(make_run):
    run = make_run()
    before = (build_hub(run)["dataset"] / "README.md").read_text()
    (run / "data/tasks.parquet").write_bytes(b"broken")
    with pytest.raises(pl.exceptions.PolarsError):
        build_hub(run)
    assert (run / "hub/dataset/README.md").read_text() == before
    shutil.rmtree(run / "model")
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing: run `mllm-msr train`"):
        build_hub(run)


def test_the_plan_is_what_lies_in_the_folders(make_run):
    run = make_run()
    repositories = plan(run, "org", "v1")
    assert [(one.repo_id, one.repo_type, one.folder) for one in repositories] == [
        ("org/mllm-msr-demo-data", "dataset", run / "hub/dataset"),
        ("org/ranking_metrics", "space", run / "hub/ranking_metrics"),
        ("org/mllm-msr-demo-app", "space", run / "hub/space"),
        ("org/mllm-msr-demo", "model", run / "hub/model"),
    ]
    for one in repositories:
        assert one.files == sorted(path for path in one.folder.rglob("*") if path.is_file())
        assert [addition.path_in_repo for addition in one.additions] == [one.path(file) for file in one.files]
    assert '"revision": "v1"' in (run / "hub/model/README.md").read_text()
    assert [one.part for one in plan(run, "org", parts=("model", "metric"))] == ["metric", "model"]


def test_a_dry_run_shows_everything_and_sends_nothing(make_run, capsys):
    nowhere = HfApi(endpoint="http://127.0.0.1:9")  # nobody listens: any request would fail
    assert publish(make_run(), "org", api=nowhere) == {}
    said = capsys.readouterr().out
    for part in (
        "model org/mllm-msr-demo (private)",
        "tasks/test-00000-of-00001.parquet",
        "| # mllm-msr-demo",
        "dry run",
    ):
        assert part in said
    assert "optimizer.pt" not in said and ".env" not in said and "hf_secret" not in said


def test_an_unreachable_hub_is_said_so(make_run):
    with pytest.raises(RuntimeError, match=r"the Hub at http://127\.0\.0\.1:9 cannot be reached"):
        publish(make_run(), "org", dry_run=False, api=HfApi(endpoint="http://127.0.0.1:9", token="hf_any"), tries=1)
