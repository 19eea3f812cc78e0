"""A whole small run from the command line: what it leaves, that it survives kill -9, that its model travels."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import yaml
from commands import printed, ranking_rows
from tiny_runs import tiny_recipe

from mllm_msr import stages
from mllm_msr.evaluation.metrics import ranking_metrics
from mllm_msr.evaluation.ways import WAYS
from mllm_msr.records.recipe import demo_recipe
from mllm_msr.records.run import RunFolder

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
# The command line, which kill -9 ends as it touches its folder for the first time after a trace is there.
KILLED = """
import os, signal, sys
from pathlib import Path
folder, trace, least, *arguments = sys.argv[1:]

def watch(event, given):
    if event in ("open", "os.rename") and str(given[0]).startswith(folder):
        if len(list(Path(folder).glob(trace))) >= int(least):
            os.kill(os.getpid(), signal.SIGKILL)

from mllm_msr.cli import main
sys.addaudithook(watch)
main(arguments)
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    content = yaml.safe_load(demo_recipe().read_text(encoding="utf-8"))
    content["source"].update(n_users=12, n_items=40)
    content["summaries"]["batch_size"] = 10
    content["training"].update(num_train_epochs=1, per_device_train_batch_size=8, save_steps=3, eval_strategy="no")
    path = tmp_path_factory.mktemp("recipes") / "small.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    out = printed("run", str(recipe), "--output", str(folder))
    assert "MLLM-MSR" in out and "popularity" in out
    return folder


def test_a_run_leaves_what_it_promises(whole):
    metrics = json.loads((whole / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["n_users"] == 12 and metrics["n_candidates"] == 21
    rows = set(yaml.safe_load(demo_recipe().read_text(encoding="utf-8"))["evaluation"]["rows"])
    assert {"mllm_msr", "sequence_head", "fused", "sasrec", "popularity", "oracle"} <= rows
    assert set(metrics["rows"]) == rows
    scores = pl.read_parquet(whole / "scores.parquet")
    for row in rows:
        part = scores.filter(variant=row)
        again = ranking_metrics(part["user_id"].to_numpy(), part["label"].to_numpy(), part["logit"].to_numpy())
        assert again == metrics["rows"][row]
    probabilities = scores.filter(variant="mllm_msr")["score"]
    assert probabilities.is_between(0, 1).all()
    assert metrics["rows"]["oracle"]["auc"]["value"] > 0.8
    assert "<html" in (whole / "report.html").read_text(encoding="utf-8")
    assert {path.name for path in (whole / "hub").iterdir()} == {"model", "dataset"}


def test_a_finished_run_is_not_done_again(recipe, whole):
    before = (whole / "provenance.json").read_text(encoding="utf-8")
    out = printed("run", str(recipe), "--output", str(whole))
    assert out.count("up to date") == 8
    assert (whole / "provenance.json").read_text(encoding="utf-8") == before


def test_killed_in_the_midst_of_each_stage_and_run_again_it_ends_the_same(recipe, whole, tmp_path):
    folder = tmp_path / "run"
    for trace, least in (
        ("data", 1),
        ("cache/item_summary/*.parquet", 2),
        ("cache/preference/*.parquet", 3),
        ("training/*/checkpoint-*/trainer_state.json", 1),
        ("scores/*/*.parquet", 2),
    ):
        command = [sys.executable, "-c", KILLED, str(folder), trace, str(least)]
        killed = subprocess.run([*command, "run", str(recipe), "--output", str(folder)], capture_output=True, env=ENV)
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
        assert not (folder / "report.html").exists()
    printed("run", str(recipe), "--output", str(folder))
    for name in ("metrics.json", "scores.parquet", "summaries/preferences.parquet", "data/tasks.parquet"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_changed_recipe_redoes_only_what_depends_on_it(recipe, whole, tmp_path):
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    content["evaluation"]["rows"] = ["mllm_msr", "popularity", "no_sft"]
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump(content), encoding="utf-8")
    out = printed("run", str(changed), "--output", str(whole))
    assert out.count("up to date") == 6
    printed("run", str(recipe), "--output", str(whole))


def test_rank_shows_unseen_items_by_falling_score(whole):
    seen = set(pl.read_parquet(whole / "data/interactions.parquet").filter(user_id="u0003")["item_id"])
    for way in ((), ("--by", "answer")):
        out = printed("rank", str(whole), "--user", "u0003", "--top-k", "5", *way)
        assert out.startswith("preference: ") and "\nafter: " in out
        rows = ranking_rows(out)
        scores = [float(row[1]) for row in rows]
        assert len(scores) == 5 and scores == sorted(scores, reverse=True)
        assert not seen & {row[2] for row in rows}
    rows = ranking_rows(printed("rank", str(whole), "--preference", "Likes red", "--items", "i0001,i0002"))
    assert {row[2] for row in rows} == {"i0001", "i0002"}


def test_publish_shows_what_would_go(whole):
    out = printed("publish", str(whole), "--namespace", "someone", "--dry-run")
    assert "someone/mllm-msr-demo" in out
    assert "model.safetensors" in out and "README.md" in out


WITHOUT_PACKAGE = """
import sys
sys.modules["mllm_msr"] = None  # as if it were not installed
import json, torch
from types import SimpleNamespace as Item
from PIL import Image
from transformers import AutoModel, AutoProcessor
folder, image = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
image = Image.open(image).convert("RGB")
users = [Item(preference="Likes red, blue; striped; mug; star; jazz", recent=[]), Item(preference="", recent=[])]
candidates = [Item(title="Alder Jazz", text="", image=image), Item(title="Orwin Tide", text="", image=None)]
batch = processor(users, candidates)
print("LOGITS", json.dumps(model.score(**batch).logits.tolist()))
"""


def test_the_model_scores_the_same_without_the_package(whole, tmp_path):
    from PIL import Image

    from mllm_msr import Candidate, MllmMsrForRecommendation, MllmMsrProcessor, User
    from mllm_msr.data.sources.world import draw, make_world

    draw(make_world(3, 1, 30).items[0]).save(tmp_path / "image.png")
    script = tmp_path / "script.py"
    script.write_text(WITHOUT_PACKAGE, encoding="utf-8")
    env = {**ENV, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(script), str(whole / "hub/model"), str(tmp_path / "image.png")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(done.stdout.split("LOGITS")[1])
    processor = MllmMsrProcessor.from_pretrained(whole / "model")
    model = MllmMsrForRecommendation.from_pretrained(whole / "model").eval()
    image = Image.open(tmp_path / "image.png").convert("RGB")
    users = [User("Likes red, blue; striped; mug; star; jazz"), User()]
    batch = processor(users, [Candidate(title="Alder Jazz", image=image), Candidate(title="Orwin Tide")])
    ours = model.score(**batch).logits.tolist()
    assert theirs == pytest.approx(ours, abs=1e-5)


def test_training_reads_the_published_layout(whole, tmp_path):
    flags = yaml.safe_load((whole / "config.yaml").read_text(encoding="utf-8"))["training"]
    flags.update(max_steps=2, per_device_train_batch_size=4, save_strategy="no")
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({"name": "x", "source": {"type": "demo"}, "training": flags}), encoding="utf-8"
    )
    from mllm_msr.training import sft

    line = ["--config", str(tmp_path / "recipe.yaml"), "--dataset_name", str(whole / "hub/dataset")]
    sft.main(*sft.parse([*line, "--output_dir", str(tmp_path / "out")]))
    assert (tmp_path / "out/model.safetensors").is_file()


def test_tasks_of_one_run_are_ranked_by_the_model_of_another(whole):
    before = (whole / "metrics.json").read_text(encoding="utf-8")
    printed("evaluate", str(whole), "--model", str(whole / "model"))
    own, other = json.loads(before), json.loads((whole / "transfer/model/metrics.json").read_text(encoding="utf-8"))
    assert other["rows"]["mllm_msr"] == own["rows"]["mllm_msr"] and other["candidate_hash"] == own["candidate_hash"]
    assert set(own["rows"]) - set(other["rows"]) == {"no_sft"}
    for row in ("popularity", "random", "oracle"):  # not scored again
        (mine,), (taken,) = (
            list(folder.glob(f"scores/*/{row}.parquet")) for folder in (whole, whole / "transfer/model")
        )
        assert mine.stat().st_ino == taken.stat().st_ino
    assert (whole / "metrics.json").read_text(encoding="utf-8") == before
    assert "evaluate: up to date" in printed("evaluate", str(whole), "--model", str(whole / "model"))


def test_the_model_of_another_run_is_fine_tuned_a_little_on_the_tasks_of_this_one(whole):
    before = (whole / "metrics.json").read_text(encoding="utf-8")
    printed("evaluate", str(whole), "--model", str(whole), "--fine-tune", "20")
    tuned = whole / "transfer/demo-20"
    examples = pl.read_parquet(tuned / "sft/train.parquet")
    assert examples["task_id"].n_unique() == 20
    assert examples.equals(
        pl.read_parquet(whole / "sft/train.parquet").join(examples.select("task_id").unique(), on="task_id", how="semi")
    )
    scores = pl.read_parquet(tuned / "scores.parquet")
    assert scores.filter(variant="no_sft")["logit"].to_list() == pytest.approx(
        pl.read_parquet(whole / "scores.parquet").filter(variant="mllm_msr")["logit"].to_list(), abs=1e-4
    )  # before it goes on, it is the other run's
    moved = scores.filter(variant="mllm_msr")["logit"] - scores.filter(variant="no_sft")["logit"]
    assert moved.abs().max() > 0.01
    assert "trained on demo, fine-tuned on 20 tasks" in (tuned / "metrics.json").read_text(encoding="utf-8")
    config = json.loads((tuned / "model/config.json").read_text(encoding="utf-8"))
    assert config["adapter"] is None and config["vlm_config"]["model_type"] == "llava"
    assert (whole / "metrics.json").read_text(encoding="utf-8") == before
    out = printed("evaluate", str(whole), "--model", str(whole), "--fine-tune", "20")
    assert "train: up to date" in out and "evaluate: up to date" in out


def test_ways_of_computing_and_the_whole_catalogue_are_evaluated_beside_the_table(recipe, whole):
    out = printed("evaluate", str(whole), "--agreement", "4", "--full-catalogue", "5", "--baselines", "knn")
    metrics = json.loads((whole / "metrics.json").read_text(encoding="utf-8"))
    ways = metrics["agreement"]["others"]
    assert set(ways) == {way for way, how in WAYS.items() if how.cache_dtype is None}  # of a joint model
    assert metrics["agreement"]["n_users"] == 4
    for way, found in ways.items():
        assert found["rank_correlation"] > 0.99 and (found["max_difference"] < 1e-3 or way == "bfloat16"), way
    full = metrics["full_catalogue"]
    heads = {"sequence_head", "fused", "sasrec"}
    assert full["n_users"] == 5 and set(full["rows"]) == {"mllm_msr", "popularity", "random", "knn", "oracle"} | heads
    chosen = pl.read_parquet(whole / "data/interactions.parquet").group_by("user_id").len()["len"]
    assert 41 - chosen.max() <= full["n_candidates"] <= 41 - chosen.min()
    for row, found in full["rows"].items():  # more candidates put nobody higher
        assert row == "random" or found["full"]["map"]["value"] <= found["sampled"]["map"]["value"] + 1e-9
    assert "5 users, sampled candidates and all " in out
    before = (whole / "metrics.json").read_bytes()
    (whole / "metrics.json").unlink()
    again = printed("evaluate", str(whole))
    assert "item-kNN ..." in out and "item-kNN ..." not in again  # nothing is fitted to score what is scored
    assert (whole / "metrics.json").read_bytes() == before
    printed("report", str(whole))
    page, results = ((whole / name).read_text(encoding="utf-8") for name in ("report.html", "results.md"))
    for said in ("Among all items", "Do other ways of computing agree?", "bfloat16"):
        assert said in page and said in results
    printed("run", str(recipe), "--output", str(whole))


def test_a_report_of_baselines_alone_needs_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder.create(tmp_path / "run", tiny_recipe({"evaluation.rows": ["popularity", "random"]}))
    for stage in (stages.prepare, stages.evaluate, stages.report):
        stage(run)
    assert run.report.is_file() and run.results_page.is_file() and not run.hub.exists()
    stages.print_next(run)
    out = capsys.readouterr().out
    assert "no trained model" in out and out.endswith(f"next: mllm-msr summarize items {run.path}\n")
