"""Studies from the file to the table; baselines from the command line, on a run that has no model."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from mllm_msr import cli
from mllm_msr.evaluation.metrics import ranking_metrics
from mllm_msr.records.recipe import Recipe, demo_recipe, load_content, parse_recipe, with_settings
from mllm_msr.records.results import Results
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import EXAMPLES, ITEMS, SCORES
from mllm_msr.study import Study, collect, run_study

STUDIES = Path(__file__).parents[2] / "recipes/studies"
SMALL = {"source.n_users": 12, "source.n_items": 40, "training.num_train_epochs": 1, "training.eval_strategy": "no"}


def demo_under(settings: dict) -> Recipe:
    """The demo's recipe under other values."""
    return parse_recipe(with_settings(load_content(demo_recipe()), settings))


def write(path: Path, **content) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def test_the_grid_is_every_combination_after_the_named_cells(tmp_path):
    grid = {"summaries.block_size": [2, 3], "data.n_train_negatives": [1, 4]}
    study = Study.load(write(tmp_path / "s.yaml", recipe="demo", cells={"full": None}, grid=grid))
    assert list(study.settings()) == [
        "full",
        "block_size 2, n_train_negatives 1",
        "block_size 2, n_train_negatives 4",
        "block_size 3, n_train_negatives 1",
        "block_size 3, n_train_negatives 4",
    ]
    recipe = demo_under(study.settings()["block_size 2, n_train_negatives 4"])
    assert recipe.summaries.block_size == 2 and recipe.data.n_train_negatives == 4
    assert recipe.data.n_negatives == 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"cells": {"a": {}}}, "study: .*'recipe'"),
        ({"recipe": "demo", "cels": {}}, "study: unknown key 'cels'; did you mean 'cells'?"),
        ({"recipe": "demo"}, "study.cells: name at least one"),
        ({"recipe": "demo", "cells": {"a": ["x"]}}, "study.cells=.*: must be a mapping"),
        ({"recipe": "demo", "cells": {"a": {}}, "seeds": 3}, "study.seeds=3: must be a list of whole numbers"),
        ({"recipe": "demo", "grid": {"data.seed": 5}}, "study.grid=.*: must be a mapping"),
    ],
)
def test_a_wrong_study_says_what_it_lacks(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        Study.load(write(tmp_path / "s.yaml", **content))


def test_the_studies_we_ship_name_settings_that_recipes_have():
    for path in sorted(STUDIES.glob("ablations_*.yaml")):
        study = Study.load(path)
        content = load_content(demo_recipe() if study.recipe == "demo" else path.parent / study.recipe)
        for settings in study.settings().values():
            parse_recipe(with_settings(content, {**study.base, **settings}))


def test_cells_share_what_they_have_in_common_and_a_finished_one_is_not_done_again(tmp_path, capsys):
    cells = {
        "full": {"evaluation.rows": ["mllm_msr", "other_user", "shuffled_images", "popularity"]},
        "same model": {"evaluation.rows": ["mllm_msr"]},
        "TALLRec": Study.load(STUDIES / "ablations_demo.yaml").cells["TALLRec"] | {"evaluation.rows": ["mllm_msr"]},
        "broken": {"data.protocol": "http://inner.host/protocol"},
    }
    path = write(tmp_path / "s.yaml", recipe="demo", base=SMALL, cells=cells)
    with pytest.raises(RuntimeError, match="1 of 4 runs failed: broken seed0"):
        run_study(path, tmp_path / "out")
    assert "train: up to date" in capsys.readouterr().out
    full, same = (tmp_path / f"out/cells/{name}-seed0" for name in ("full", "same-model"))
    assert RunFolder.open(full).key("train") == RunFolder.open(same).key("train")
    scores = [RunFolder.open(cell).read(SCORES).filter(variant="mllm_msr") for cell in (full, same)]
    assert scores[0].equals(scores[1])
    study = json.loads((tmp_path / "out/study.json").read_text(encoding="utf-8"))
    assert [(entry["cell"], entry["variant"]) for entry in study["entries"]] == [
        ("full", "mllm_msr"),
        ("full", "other_user"),
        ("full", "shuffled_images"),
        ("full", "popularity"),
        ("same model", "mllm_msr"),
        ("TALLRec", "mllm_msr"),
    ]
    figures = RunFolder.open(full).results().variants["mllm_msr"]
    for name, figure in study["entries"][0]["metrics"].items():
        assert figure["value"] == pytest.approx(figures[name].value)
    assert study["entries"][-2]["metrics"]["auc"]["against_first"]["difference"] == 0.0
    assert "broken" in (tmp_path / "out/study.md").read_text(encoding="utf-8")
    written = [path.read_text(encoding="utf-8") for path in (tmp_path / "out").glob("study.*")]
    assert study["failures"] and not any("inner.host" in text for text in written)
    assert (tmp_path / "out/study.svg").read_text(encoding="utf-8").startswith("<svg")
    tallrec = RunFolder.open(tmp_path / "out/cells/TALLRec-seed0")
    titles = dict(tallrec.read(ITEMS, ["item_id", "title"]).iter_rows())
    histories = dict(tallrec.tasks("train").select("task_id", "history").iter_rows())
    for row in tallrec.read(EXAMPLES, split="train").iter_rows(named=True):
        said = "".join(f"Then {titles[item]}\n" for item in histories[row["task_id"]])
        asked = f"{said}{titles[row['item_id']]}\nWould they choose it?"
        assert row["prompt"][0]["content"] == [{"type": "text", "text": asked}]  # no image, no preference
    before = (full / "provenance.json").read_text(encoding="utf-8")
    run_study(path, tmp_path / "out", only=["full"])
    assert (full / "provenance.json").read_text(encoding="utf-8") == before
    with pytest.raises(ValueError, match="no cell 'ful'"):
        run_study(path, tmp_path / "out", only=["ful"])


def test_a_folder_of_a_run_or_of_another_study_is_refused(tmp_path):
    path = write(tmp_path / "mine.yaml", recipe="demo", cells={"a": None})
    (tmp_path / "other").mkdir()
    (tmp_path / "other/study.json").write_text('{"study": "theirs"}', encoding="utf-8")
    with pytest.raises(ValueError, match="holds the study 'theirs': name another folder"):
        run_study(path, tmp_path / "other")
    run = RunFolder.create(tmp_path / "run", demo_under({}))
    with pytest.raises(ValueError, match="holds a run: name another folder"):
        run_study(path, run.path)


def test_seeds_are_averaged_and_folds_put_together(tmp_path):
    rng, runs, by_seed = np.random.default_rng(0), [], []
    for seed in (0, 1, 2):
        frames = []
        for fold in (0, 1):
            recipe = demo_under({"training.seed": seed, "data.protocol": "paper", "data.fold": fold})
            run = RunFolder.create(tmp_path / f"{seed}-{fold}", recipe)
            users = [f"u{fold}{user}" for user in range(6) for _ in range(5)]
            items, labels = [f"i{item}" for item in range(5)] * 6, [1, 0, 0, 0, 0] * 6
            logits = rng.normal(size=30).astype(np.float32)
            rows = zip(["mllm_msr"] * 30, users, items, labels, logits, logits, strict=True)
            frames.append(SCORES.frame(list(rows)))
            run.write(SCORES, frames[-1])
            Results("demo", "paper", "test", 6, 5, 0, "", {"mllm_msr": {}}).write(run.metrics)
            runs.append(run)
        whole = pl.concat(frames)
        by_seed.append(ranking_metrics(whole["user_id"], whole["label"], whole["logit"], n_bootstrap=2))
    (entry,) = collect({"full": runs})
    assert entry.runs == 6 and entry.users == 12
    for name, figure in entry.metrics.items():
        values = [metrics[name]["value"] for metrics in by_seed]
        assert figure.estimate.value == pytest.approx(np.mean(values))
        assert figure.seed_deviation == pytest.approx(np.std(values, ddof=1))
        assert figure.estimate.low <= figure.estimate.value <= figure.estimate.high


def test_baselines_are_variants_of_a_run_even_before_it_has_a_model(tmp_path, capsys):
    from mllm_msr import stages

    run = RunFolder.create(tmp_path / "run", demo_under({**SMALL, "evaluation.rows": ["popularity"]}))
    stages.prepare(run)
    stages.evaluate(run)
    popularity = run.read(SCORES)
    names = ["popularity", "knn", "svd", "tfidf", "sasrec"]
    cli.main(["evaluate", str(run.path), "--baselines", "knn, svd,tfidf,sasrec"])
    out = capsys.readouterr().out
    assert "item-kNN" in out and "SASRec" in out
    results = run.results()
    assert list(results.variants) == names and not results.against
    assert "history_length" in {part.by for part in results.slices}
    scores = run.read(SCORES)
    assert scores.filter(variant="popularity").equals(popularity)
    keys = ["user_id", "item_id", "label"]
    for (_,), frame in scores.group_by("variant"):
        assert frame.select(keys).equals(popularity.select(keys))
    assert RunFolder.open(run.path).recipe.evaluation.rows == names
    cli.main(["evaluate", str(run.path), "--full-catalogue", "all"])
    full = run.results().full_catalogue
    assert full is not None and full.n_users == 12 and list(full.variants) == names
    with pytest.raises(SystemExit, match=r"unknown baseline 'nonsense'; known are .*popularity"):
        cli.main(["evaluate", str(run.path), "--baselines", "nonsense"])
