"""Studies from the file to the table; baselines from the command line, on a run that has no model."""

import json
from pathlib import Path

import polars as pl
import pytest
import yaml

from mllm_msr import cli
from mllm_msr.processing.recipe import backbone_path, load_recipe
from mllm_msr.run import Run
from mllm_msr.study import Study, run_study, with_settings

DEMO = Path(backbone_path("demo")).parent / "recipe.yaml"
SMALL = {"source.n_users": 12, "source.n_items": 40, "training.num_train_epochs": 1, "training.eval_strategy": "no"}


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
    recipe = with_settings(load_recipe(DEMO), study.settings()["block_size 2, n_train_negatives 4"])
    assert recipe.summaries["block_size"] == 2 and recipe.data["n_train_negatives"] == 4
    assert recipe.data["n_negatives"] == 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"cells": {"a": {}}}, "a study is a mapping with `recipe`"),
        ({"recipe": "demo", "cels": {}}, "a study is a mapping with `recipe`"),
        ({"recipe": "demo"}, "name at least one cell"),
    ],
)
def test_a_wrong_study_says_what_it_lacks(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        Study.load(write(tmp_path / "s.yaml", **content))


def test_the_studies_we_ship_name_settings_that_recipes_have():
    for path in sorted(Path(__file__).parents[2].glob("recipes/studies/ablations_*.yaml")):
        study = Study.load(path)
        recipe = load_recipe(DEMO if study.recipe == "demo" else path.parent / study.recipe)
        for settings in study.settings().values():
            with_settings(recipe, {**study.base, **settings})


def test_cells_share_what_they_have_in_common_and_a_finished_one_is_not_done_again(tmp_path, capsys):
    cells = {
        "full": {"evaluation.rows": ["mllm_msr", "other_user", "shuffled_images", "popularity"]},
        "same model": {"evaluation.rows": ["mllm_msr"]},
        "broken": {"data.protocol": "nonsense"},
    }
    path = write(tmp_path / "s.yaml", recipe="demo", base=SMALL, cells=cells)
    with pytest.raises(RuntimeError, match="1 of 3 cells failed: broken seed0"):
        run_study(path, tmp_path / "out")
    assert "train: up to date" in capsys.readouterr().out
    full, same = (tmp_path / f"out/cells/{name}-seed0" for name in ("full", "same-model"))
    assert Run.open(full).key("train") == Run.open(same).key("train")
    scores = [pl.read_parquet(one / "scores.parquet").filter(row="mllm_msr") for one in (full, same)]
    assert scores[0].equals(scores[1])
    study = json.loads((tmp_path / "out/study.json").read_text(encoding="utf-8"))
    assert [(one["cell"], one["row"]) for one in study["cells"]] == [
        ("full", "mllm_msr"),
        ("full", "other_user"),
        ("full", "shuffled_images"),
        ("full", "popularity"),
        ("same model", "mllm_msr"),
    ]
    figures = json.loads((full / "metrics.json").read_text(encoding="utf-8"))["rows"]["mllm_msr"]
    for name, result in study["cells"][0]["metrics"].items():
        assert result["value"] == pytest.approx(figures[name]["value"])
    assert study["cells"][-1]["metrics"]["auc"]["difference"] == 0.0
    assert "broken" in (tmp_path / "out/study.md").read_text(encoding="utf-8")
    assert (tmp_path / "out/study.svg").read_text(encoding="utf-8").startswith("<svg")
    before = (full / "provenance.json").read_text(encoding="utf-8")
    run_study(path, tmp_path / "out", only=["full"])
    assert (full / "provenance.json").read_text(encoding="utf-8") == before
    with pytest.raises(ValueError, match="no cell 'ful'"):
        run_study(path, tmp_path / "out", only=["ful"])


def test_baselines_are_rows_of_a_run_even_before_it_has_a_model(tmp_path, capsys):
    settings = {**SMALL, "evaluation.rows": ["popularity"]}
    recipe = with_settings(load_recipe(DEMO), settings)
    Run.create(tmp_path / "run", recipe)
    from mllm_msr import stages

    stages.prepare(Run.open(tmp_path / "run"))
    stages.evaluate(Run.open(tmp_path / "run"))
    popularity = pl.read_parquet(tmp_path / "run/scores.parquet")
    cli.main(["evaluate", str(tmp_path / "run"), "--baselines", "knn, svd,tfidf,sasrec"])
    out = capsys.readouterr().out
    assert "item-kNN" in out and "SASRec" in out
    metrics = json.loads((tmp_path / "run/metrics.json").read_text(encoding="utf-8"))
    assert list(metrics["rows"]) == ["popularity", "knn", "svd", "tfidf", "sasrec"]
    assert "against" not in metrics and {one["by"] for one in metrics["slices"]} >= {"history_length"}
    scores = pl.read_parquet(tmp_path / "run/scores.parquet")
    assert scores.filter(row="popularity").equals(popularity)
    keys = ["user_id", "item_id", "label"]
    for (_,), frame in scores.group_by("row"):
        assert frame.select(keys).equals(popularity.select(keys))
    assert Run.open(tmp_path / "run").recipe.evaluation["rows"] == list(metrics["rows"])
    with pytest.raises(SystemExit, match="unknown baseline 'nonsense'; known are popularity"):
        cli.main(["evaluate", str(tmp_path / "run"), "--baselines", "nonsense"])
