"""`mllm-msr publish` on a small run that every stage has made; a refusal in a process of its own, as it is typed."""

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path

import polars as pl
import pytest
import yaml
from commands import printed
from hub_run import change_recipe, finish
from hub_server import Hub
from hub_storage import WRITE

from mllm_msr.records.recipe import demo_recipe
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import ITEM_SUMMARIES, PREFERENCES

COMMAND = str(Path(sys.executable).with_name("mllm-msr"))
MODEL, DATA, METRIC, SPACE = (
    ("model", "org/mllm-msr-small"),
    ("dataset", "org/mllm-msr-small-data"),
    ("space", "org/ranking_metrics"),
    ("space", "org/mllm-msr-small-app"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("typed")
    recipe = yaml.safe_load(demo_recipe().read_text(encoding="utf-8"))
    recipe["name"] = "small"
    recipe["source"].update(n_users=12, n_items=40)
    recipe["training"].update(max_steps=1, per_device_train_batch_size=4, eval_strategy="no", save_strategy="no")
    recipe["evaluation"]["rows"] = ["mllm_msr", "popularity"]
    (home / "small.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    printed("run", str(home / "small.yaml"), "--output", str(home / "small"))
    return home / "small"


def publish(run: Path, hub: Hub, *flags: str) -> str:
    """What the command prints where the Hub is this one and its token in the environment."""
    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(errors):
        patch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        files = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", WRITE)
        output = printed("publish", str(run), "--namespace", "org", *flags)
    assert WRITE not in output + errors.getvalue() and hub.leaks == []
    return output


def test_a_dry_run_shows_all_four_and_asks_the_hub_nothing(run):
    with Hub() as hub:
        output = publish(run, hub, "--collection", "--public", "--create-pr", "--dry-run")
        assert hub.log == []
    for title in (f"model {MODEL[1]} (public)", f"dataset {DATA[1]}", f"space {SPACE[1]}", f"metric {METRIC[1]}"):
        assert title in output
    assert "model.safetensors" in output and "    | # mllm-msr-small" in output
    assert "dry run: nothing was sent" in output


def test_the_whole_command_then_parts_of_it(run):
    with Hub() as hub:
        publish(run, hub, "--model", "--datasets", "--metric", "--space", "--collection", "--public")
        assert set(hub.repos) == {MODEL, DATA, METRIC, SPACE}
        assert not any(repo["private"] for repo in hub.repos.values())
        assert all("refs/tags/v0.1.0" in repo["refs"] for repo in hub.repos.values())
        (collection,) = hub.collections.values()
        assert collection["title"] == "small v0.1.0" and len(collection["items"]) == 4 and not collection["private"]

        publish(run, hub, "--datasets", "--tag", "v2", "--without-images", "--anonymise")
        assert [name for name, repo in hub.repos.items() if "refs/tags/v2" in repo["refs"]] == [DATA]
        items = next(path for path in hub.files(*DATA) if path.startswith("items/"))
        assert pl.read_parquet(hub.files(*DATA)[items])["image"].null_count() == 40
        users = pl.read_parquet(hub.files(*DATA)["preferences/train-00000-of-00001.parquet"])["user_id"]
        assert users.str.len_chars().unique().to_list() == [20]

        publish(run, hub, "--model", "--create-pr", "--tag", "v3")
        assert [pull["title"] for pull in hub.repos[MODEL]["pulls"]] == ["Release v3"]
        assert not any(repo["pulls"] for name, repo in hub.repos.items() if name != MODEL)
        assert hub.history(*MODEL) == ["Release v0.1.0", "initial commit"]


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "mllm-msr: not logged in to the Hub: run `hf auth login` or set HF_TOKEN"),
        ("hf_" + "z" * 34, "mllm-msr: org: the Hub does not accept the token"),
    ],
)
def test_a_refusal_is_one_line(run, token, message):
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    environment |= {"HF_HOME": str(run.parent / "hf"), **({"HF_TOKEN": token} if token else {})}
    with Hub() as hub:
        environment["HF_ENDPOINT"] = hub.url
        command = [COMMAND, "publish", str(run), "--namespace", "org", "--metric"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert hub.repos == {}
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(message)
    assert "Traceback" not in done.stderr and "z" * 34 not in done.stdout + done.stderr


def test_the_licence_of_the_backbone_is_looked_up_at_its_pinned_revision(run, tmp_path):
    copy = RunFolder.open(shutil.copytree(run, tmp_path / "copy"))
    with Hub() as hub:
        hub.create("model", "org/base", private=False)
        pinned = hub.push("model", "org/base", "README.md", b"---\nlicense: gemma\n---\n")
        hub.push("model", "org/base", "README.md", b"---\nlicense: mit\n---\n")
        backbone = {"model_name_or_path": "org/base", "model_revision": pinned}
        change_recipe(copy, training=copy.recipe.training | backbone)
        output = publish(copy.path, hub, "--model", "--dry-run")
        assert f"/api/models/org/base/revision/{pinned}" in [path for _, path, _ in hub.log]
        assert set(hub.repos) == {("model", "org/base")}
    warning = "the backbone's licence is gemma, which apache-2.0 on this model cannot widen: state gemma"
    assert f"warning: {warning}" in output
    card = (copy.hub / "model/README.md").read_text(encoding="utf-8")
    assert f"> **Conflict:** {warning}." in card and "The backbone's is `gemma`" in card


def test_a_writer_in_a_folder_of_this_machine_is_named_without_it(run, tmp_path):
    """The summariser of this run is put where somebody's models lie."""
    copy = RunFolder.open(shutil.copytree(run, tmp_path / "copy"))
    there = pl.lit("/home/someone/models/writer").alias("generator")
    for table in (ITEM_SUMMARIES, PREFERENCES):
        copy.write(table, copy.read(table).with_columns(there))
    finish(change_recipe(copy, summaries=copy.recipe.to_dict()["summaries"] | {"model": "/home/someone/models/writer"}))
    with Hub() as hub:
        publish(copy.path, hub)
        files = {f"{name[1]}/{path}": content for name in hub.repos for path, content in hub.files(*name).items()}
    tables = {path: pl.read_parquet(content) for path, content in files.items() if path.endswith(".parquet")}
    plain = {path: content.decode(errors="replace") for path, content in files.items() if path not in tables}
    texts = plain | {path: str(frame.rows()) for path, frame in tables.items()}
    assert not [path for path, text in texts.items() if "/home/someone" in text or str(copy.path) in text]
    written = [frame["generator"].unique().to_list() for frame in tables.values() if "generator" in frame.columns]
    assert written == [["writer"], ["writer"]]
    assert json.loads(plain[f"{SPACE[1]}/space.json"])["revision"] == "v0.1.0"


def test_the_published_recipe_prepares_the_same_tasks(run, tmp_path):
    with Hub() as hub:
        publish(run, hub, "--dry-run")
    for part in ("model", "dataset"):
        recipe, again = run / "hub" / part / "recipe.yaml", tmp_path / part
        printed("prepare", str(recipe), "--output", str(again))
        candidates = json.loads((again / "data/report.json").read_text(encoding="utf-8"))["protocol"]["candidate_hash"]
        assert candidates in (run / "hub" / part / "README.md").read_text(encoding="utf-8")
        assert pl.read_parquet(again / "data/tasks.parquet").equals(pl.read_parquet(run / "data/tasks.parquet"))
