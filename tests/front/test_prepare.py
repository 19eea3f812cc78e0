"""From raw files to a prepared run by the command line: every source, and what overrides the recipe."""

import json
from pathlib import Path

import polars as pl
import pytest
import yaml
from tiny_runs import CHOICES, Shop

from mllm_msr.cli import main
from mllm_msr.records.storage import file_digest

FLAGS = ["--negatives", "4", "--set", "data.k_core_users=2", "--set", "data.k_core_items=1"]


def report(folder: Path) -> dict:
    return json.loads((folder / "data/report.json").read_text(encoding="utf-8"))


def test_own_tables_need_no_recipe(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    run = shop.run
    main(["prepare", *shop.arguments, "--seed", "3", "--output", str(run)])
    shown = capsys.readouterr().out
    for entry in (
        "users",
        "items",
        "interactions",
        "mean length",
        "sparsity",
        "share tied times",
        "share without image",
    ):
        assert f"\n{entry} " in shown
    protocol = report(run)["protocol"]
    assert (protocol["name"], protocol["n_negatives"], protocol["seed"]) == ("strict", 4, 3)
    assert protocol["candidate_hash"] in shown
    assert report(run)["inputs"] == [[name, file_digest(shop.folder / name)] for name in ("log.csv", "goods.csv")]
    assert set(pl.read_parquet(run / "data/items.parquet")["title"]) == {f"Mug {n}" for n in range(16)}
    main(["prepare", str(run / "config.yaml"), "--output", str(run)])
    assert "prepare: up to date" in capsys.readouterr().out


def test_flags_override_the_recipe(shop: Shop) -> None:
    main(["prepare", *shop.arguments, "--output", str(shop.folder / "first")])
    recipe = str(shop.folder / "first/config.yaml")
    flags = ["--protocol", "paper", "--folds", "4", "--fold", "1", "--negative-sampling", "popularity"]
    main(["prepare", recipe, *flags, "--negatives", "5", "--output", str(shop.folder / "second")])
    protocol = report(shop.folder / "second")["protocol"]
    assert (protocol["name"], protocol["negatives"], protocol["n_negatives"]) == ("paper", "popularity", 5)
    assert (protocol["train_tasks"], protocol["validation_tasks"], protocol["test_tasks"]) == (7, 2, 3)
    main(
        ["prepare", recipe, "--protocol", "global-cutoff", "--negatives", "all", "--output", str(shop.folder / "third")]
    )
    assert report(shop.folder / "third")["protocol"]["negatives"] == "all"
    with pytest.raises(SystemExit, match="only protocol='paper' splits by user"):
        main(["prepare", recipe, "--folds", "5", "--output", str(shop.folder / "fourth")])


def test_bad_rows_stop_or_are_counted(shop: Shop) -> None:
    with shop.log.open("a") as file:
        file.write("1,2,soon\n")
    with pytest.raises(SystemExit, match=r"log\.csv, row 74: timestamp is no number or date.*--on-bad-rows skip"):
        main(["prepare", *shop.arguments, "--output", str(shop.run)])
    main(["prepare", *shop.arguments, "--on-bad-rows", "skip", "--output", str(shop.run)])
    assert report(shop.run)["skipped"][0] | {"examples": []} == {
        "what": "log.csv: timestamp is no number or date",
        "count": 1,
        "examples": [],
    }


def test_microlens_and_amazon_by_recipe(tmp_path: Path) -> None:
    micro, amazon = tmp_path / "micro", tmp_path / "amazon"
    micro.mkdir()
    amazon.mkdir()
    pl.DataFrame(CHOICES, schema=["user", "item", "timestamp"], orient="row").write_csv(micro / "x_pairs.csv")
    (micro / "x_titles.csv").write_text("item,title\n" + "".join(f"{n},Film {n}\n" for n in range(16)))
    (amazon / "Toys.jsonl").write_text(
        "".join(
            json.dumps({"user_id": f"A{u}", "parent_asin": f"B{i}", "timestamp": t * 1000}) + "\n"
            for u, i, t in CHOICES
        )
    )
    (amazon / "meta_Toys.jsonl").write_text(
        "".join(json.dumps({"parent_asin": f"B{n}", "title": f"Toy {n}"}) + "\n" for n in range(16))
    )
    prepared = {}
    for source, folder in (({"type": "microlens"}, micro), ({"type": "amazon", "category": "Toys"}, amazon)):
        recipe = tmp_path / f"{source['type']}.yaml"
        recipe.write_text(yaml.safe_dump({"name": "x", "source": source}))
        main(
            ["prepare", str(recipe), "--data", str(folder), *FLAGS, "--output", str(tmp_path / "run" / source["type"])]
        )
        prepared[source["type"]] = pl.read_parquet(tmp_path / "run" / source["type"] / "data/interactions.parquet")
    assert prepared["amazon"].height == prepared["microlens"].height == 72
    assert prepared["amazon"]["timestamp"].min() == 1_600_000_000  # milliseconds became seconds


def test_templates_print_no_ids(shop: Shop) -> None:
    for prompt, message in (
        ("recommendation='User {{ user_id }}: {{ title }}?'", "unknown variable 'user_id'"),
        ("recommendation='{{ title }} {{ label }}'", "unknown variable 'label'"),
        ("advice='{{ title }}'", "prompts: unknown key 'advice'"),
        ("recommendation=User: {{ title }}: ?", "not valid YAML; put a text in"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["prepare", *shop.arguments, "--set", f"prompts.{prompt}", "--output", str(shop.run)])


def test_ids_as_titles_stop(shop: Shop) -> None:
    flags = [*shop.arguments, "--column", "title=sku", "--output", str(shop.run)]
    with pytest.raises(SystemExit, match="titles or descriptions that are the item's id"):
        main(["prepare", *flags])
    assert not (shop.folder / "run/data").exists()


def test_what_would_stop_a_later_stage_stops_the_first(shop: Shop) -> None:
    for setting, message in {
        "data.n_negatives=1000": r"no test task is left \(.*\d+ targets with too few unseen items\)",
        "vectors.file=/nowhere.npz": r"/nowhere\.npz is missing",
        "vectors.column=emb": r"goods\.csv: no column 'emb'",
        "prompts.recommendation=Buy it?": "prompts.recommendation: prints none of",
    }.items():
        with pytest.raises(SystemExit, match=message):
            main(["prepare", *shop.arguments, "--set", setting, "--output", str(shop.run)])
        assert not (shop.run / "data").exists()
