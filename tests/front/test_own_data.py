"""From own tables to a ranked table with the lines that the docs have: init, check, run, status, rank."""

import io
import json
import re
from pathlib import Path

import polars as pl
import pytest
import yaml
from own_tables import write_shop

from mllm_msr.cli import main
from mllm_msr.new_recipe import field_comments
from mllm_msr.opening import check_recipe
from mllm_msr.records.recipe import load_content
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import PREFERENCES, RANKING_MEMBERS, RANKINGS
from mllm_msr.records.sections import FUSED, PrepareOptions
from mllm_msr.sizing import Backbone, Machine, sized_for

SETTINGS = [
    "training.max_steps=2",
    "training.logging_steps=1",
    "training.per_device_train_batch_size=4",
    "training.eval_strategy=no",
]
SETTINGS += ["head.max_epochs=2", "head.answer_tasks=2", "evaluation.rows=[mllm_msr, fused, popularity]"]
FEW = ["--negatives", "4", *(part for setting in SETTINGS for part in ("--set", setting))]
CPU = Machine("cpu", "", 2, 8.0, False)


def test_own_tables_reach_a_ranked_table_by_the_lines_of_the_docs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_shop(tmp_path / "shop", users=24, items=30)
    main(["init", "shop"])
    out = capsys.readouterr().out
    assert "user_id: 'customer' of orders.csv, by its name" in out and "3 images: no such file" in out
    assert "wrote shop.yaml" in out and out.endswith("next: mllm-msr check shop.yaml\n")

    main(["check", "shop.yaml", "--users", "6", *FEW])
    out = capsys.readouterr().out
    assert "every value is sound" in out and " tasks, 3 variants " in out and not (tmp_path / "runs").exists()
    stages = ["prepare", "summarize items", "summarize users", "vectors", "train", "head", "evaluate", "report", "all"]
    table = out[out.index("stage  ") :].splitlines()[1:]
    assert [line.split("  ")[0] for line in table[: len(stages)]] == stages

    main(["run", "shop.yaml", "--limit-users", "12", *FEW])
    out = capsys.readouterr().out
    assert re.search(r"All 2\d users, estimated from these 12:", out) and "in all, without --limit-users" in out
    user = RunFolder.open(Path("runs/shop")).read(PREFERENCES)["user_id"][0]
    assert "  or: mllm-msr publish runs/shop" in out and "next: mllm-msr rank runs/shop --user C" in out
    for made in ("item vectors of width 128", "2 steps of training", " is nearest to ", ": loss ", "place "):
        assert made in out

    main(["status", "runs/shop"])
    out = capsys.readouterr().out
    assert out.count("  done  ") == 8 and "stale" not in out
    main(["rank", "runs/shop", "--user", user, "--top-k", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("preference: ") and lines[1].startswith("after: No ")
    members = [name for name in RANKING_MEMBERS if name in ("answer", *FUSED)]
    assert lines[2].split() == ["rank", "score", "item", *members, "title"]
    assert [line.split()[0] for line in lines[3:]] == ["1", "2", "3"]

    main(["rank", "runs/shop", "--user", user, "--top-k", "3", "--output", "best.parquet"])
    frame = RANKINGS.read(Path("best.parquet"))
    assert frame["item_id"].to_list() == [line.split()[2] for line in lines[3:]]
    assert frame["answer"].null_count() == 0 and frame["preference"][0] == lines[0].removeprefix("preference: ")
    capsys.readouterr()
    main(["rank", "runs/shop", "--user", user, "--top-k", "3", "--format", "csv", "--rerank", "0"])
    table = pl.read_csv(io.StringIO(capsys.readouterr().out))
    assert table.columns == list(RANKINGS.columns) and table["answer"].null_count() == 3
    main(["rank", "runs/shop", "--users", f"{user},{user}", "--by", "head", "--top-k", "2", "--format", "json"])
    assert [row["rank"] for row in json.loads(capsys.readouterr().out)] == [1, 2]

    content = yaml.safe_load(Path("runs/shop/config.yaml").read_text(encoding="utf-8"))
    content["head"]["seed"] = 3
    Path("runs/shop/config.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    main(["status", "runs/shop"])
    out = capsys.readouterr().out
    assert "stale: the recipe has changed" in out and out.endswith("next: mllm-msr head runs/shop\n")


def test_the_recipe_says_all_that_is_in_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_shop(tmp_path / "shop", users=12, items=30)
    with (tmp_path / "shop/orders.csv").open("a", encoding="utf-8") as file:
        file.write("C0001;;2025-01-01;3\n")
    main(["init", "shop", "--output", "own.yaml"])
    text = Path("own.yaml").read_text(encoding="utf-8")
    content = load_content(Path("own.yaml"))
    recipe = check_recipe(content)
    assert content["data"] == {name: value for name, value in vars(recipe.data).items()}
    assert content["data"]["on_bad_rows"] == "skip" and "bad rows are left out" in text
    assert recipe.item_noun == "article" and recipe.training["bf16"] is False
    assert field_comments(PrepareOptions)["limit_users"] == "a seeded sample of users" in text
    with pytest.raises(SystemExit, match=r"own\.yaml is there already"):
        main(["init", "shop", "--output", "own.yaml"])


@pytest.mark.parametrize(
    ("backbone", "machine", "expected"),
    [
        (Backbone("demo"), CPU, {"dtype": "float32", "bf16": False, "per_device_train_batch_size": 32}),
        (Backbone("x/y", 256e6, 8192, 576, 30), CPU, {"dtype": "float32", "bf16": False, "prompt_max_length": 4096}),
        (
            Backbone("x/y", 7e9, 2048, 4096, 32),
            Machine("cuda", "H100", 16, 80.0, True),
            {"dtype": "bfloat16", "bf16": True, "prompt_max_length": 2048},
        ),
        (Backbone("x/y"), CPU, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 32}),
    ],
)
def test_values_fit_machine_and_backbone(backbone: Backbone, machine: Machine, expected: dict) -> None:
    sized = sized_for(backbone, machine)
    training = sized.sections["training"]
    assert {name: training[name] for name in expected} == expected
    check_recipe({"name": "x", "source": {"type": "tables", "interactions": "log.csv"}, **sized.sections})


def test_recipes_of_the_package_are_listed_printed_and_called_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes"])
    out = capsys.readouterr().out
    assert "movielens_100k  " in out and "studies/ablations_demo  " in out
    main(["recipes", "movielens_100k"])
    assert "source: {type: movielens}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="movielens_10k: no such file, nor a recipe of the package; did you mean 'mov"):
        main(["run", "movielens_10k"])
    with pytest.raises(SystemExit, match="source 'movielens' needs a folder: give --data DIR"):
        main(["run", "movielens_100k"])


def test_version_and_completion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and "mllm-msr 0." in capsys.readouterr().out
    main(["completion", "bash"])
    script = capsys.readouterr().out
    assert "movielens" not in script and "--new-items" in script and "_shtab_compgen_files" in script
