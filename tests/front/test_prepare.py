"""From raw files to a prepared run by the command line: every source, and what overrides the recipe."""

import json
from pathlib import Path

import polars as pl
import pytest
import yaml

from mllm_msr.cli import main
from mllm_msr.data.leakage import LeakageError
from mllm_msr.opening import Overrides, open_recipe
from mllm_msr.proof import prove
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import INTERACTIONS, ITEM_SUMMARIES
from mllm_msr.records.storage import file_digest

PAIRS = [
    (user, (user * 3 + 5 * step) % 16, 1_600_000_000 + user + 100 * step) for user in range(12) for step in range(6)
]
FLAGS = ["--negatives", "4", "--set", "data.k_core_users=2", "--set", "data.k_core_items=1"]


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    log = pl.DataFrame(PAIRS, schema=["who", "sku", "when"], orient="row")
    log.write_csv(tmp_path / "log.csv")
    pl.DataFrame({"sku": range(16), "name": [f"Mug {n}" for n in range(16)]}).write_csv(tmp_path / "goods.csv")
    return tmp_path


def own_tables(shop: Path) -> list[str]:
    columns = ["user_id=who", "item_id=sku", "timestamp=when", "title=name"]
    named = [part for column in columns for part in ("--column", column)]
    return ["--interactions", str(shop / "log.csv"), "--items", str(shop / "goods.csv"), *named]


def report(folder: Path) -> dict:
    return json.loads((folder / "data/report.json").read_text(encoding="utf-8"))


def test_own_tables_need_no_recipe(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shop / "run"
    main(["prepare", *own_tables(shop), *FLAGS, "--seed", "3", "--output", str(run)])
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
    assert report(run)["inputs"] == [[name, file_digest(shop / name)] for name in ("log.csv", "goods.csv")]
    assert set(pl.read_parquet(run / "data/items.parquet")["title"]) == {f"Mug {n}" for n in range(16)}
    main(["prepare", str(run / "config.yaml"), "--output", str(run)])
    assert "prepare: up to date" in capsys.readouterr().out


def test_flags_override_the_recipe(shop: Path) -> None:
    main(["prepare", *own_tables(shop), *FLAGS, "--output", str(shop / "first")])
    recipe = str(shop / "first/config.yaml")
    flags = ["--protocol", "paper", "--folds", "4", "--fold", "1", "--negative-sampling", "popularity"]
    main(["prepare", recipe, *flags, "--negatives", "5", "--output", str(shop / "second")])
    protocol = report(shop / "second")["protocol"]
    assert (protocol["name"], protocol["negatives"], protocol["n_negatives"]) == ("paper", "popularity", 5)
    assert (protocol["train_tasks"], protocol["validation_tasks"], protocol["test_tasks"]) == (7, 2, 3)
    main(["prepare", recipe, "--protocol", "global-cutoff", "--negatives", "all", "--output", str(shop / "third")])
    assert report(shop / "third")["protocol"]["negatives"] == "all"
    with pytest.raises(SystemExit, match="only protocol='paper' splits by user"):
        main(["prepare", recipe, "--folds", "5", "--output", str(shop / "fourth")])


def test_bad_rows_stop_or_are_counted(shop: Path) -> None:
    with (shop / "log.csv").open("a") as file:
        file.write("1,2,soon\n")
    with pytest.raises(SystemExit, match=r"log\.csv, row 74: timestamp is no number or date.*--on-bad-rows skip"):
        main(["prepare", *own_tables(shop), *FLAGS, "--output", str(shop / "run")])
    main(["prepare", *own_tables(shop), *FLAGS, "--on-bad-rows", "skip", "--output", str(shop / "run")])
    assert report(shop / "run")["skipped"][0] | {"examples": []} == {
        "what": "log.csv: timestamp is no number or date",
        "count": 1,
        "examples": [],
    }


def test_microlens_and_amazon_by_recipe(tmp_path: Path) -> None:
    micro, amazon = tmp_path / "micro", tmp_path / "amazon"
    micro.mkdir()
    amazon.mkdir()
    pl.DataFrame(PAIRS, schema=["user", "item", "timestamp"], orient="row").write_csv(micro / "x_pairs.csv")
    (micro / "x_titles.csv").write_text("item,title\n" + "".join(f"{n},Film {n}\n" for n in range(16)))
    (amazon / "Toys.jsonl").write_text(
        "".join(
            json.dumps({"user_id": f"A{u}", "parent_asin": f"B{i}", "timestamp": t * 1000}) + "\n" for u, i, t in PAIRS
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


def test_nothing_to_prepare_is_said() -> None:
    with pytest.raises(ValueError, match="give a recipe file, or own tables"):
        open_recipe(None, Overrides())
    with pytest.raises(ValueError, match="--backbone"):
        open_recipe(None, Overrides(interactions="log.csv"), trains=True)


def test_proof_of_a_run_sees_ids_and_stale_tasks(shop: Path) -> None:
    main(["prepare", *own_tables(shop), *FLAGS, "--output", str(shop / "run")])
    run = RunFolder.open(shop / "run")
    prove(run)
    log = run.read(INTERACTIONS)
    texts = ["a red mug", "like user-00042"]
    run.write(ITEM_SUMMARIES, ITEM_SUMMARIES.frame([(str(n), text, "ok", "", "", "") for n, text in enumerate(texts)]))
    prove(run)
    run.write(INTERACTIONS, log.with_columns(pl.lit("user-00042").alias("user_id")))
    with pytest.raises(LeakageError):
        prove(run)
    run.write(INTERACTIONS, log.vstack(log.head(1).with_columns(user_id=pl.lit("user-00042"))))
    with pytest.raises(LeakageError, match="raw ids in a text"):
        prove(run)


def test_proof_of_a_run_reads_what_max_history_cut_off(shop: Path) -> None:
    main(["prepare", *own_tables(shop), *FLAGS, "--set", "data.max_history=4", "--output", str(shop / "run")])
    run = RunFolder.open(shop / "run")
    prove(run)
    tasks, seen = (pl.read_parquet(run.path / f"data/{name}.parquet") for name in ("tasks", "seen"))
    assert seen.height == 24
    user, item = seen.row(0)
    one = (pl.col("user_id") == user) & (pl.col("split") == "test")
    target = tasks.filter(one).explode("candidates", "labels").filter(labels=1)["candidates"][0]
    pair = pl.lit(pl.Series([[item, target]]))
    spoilt = tasks.with_columns(
        pl.when(one).then(pair).otherwise("candidates").alias("candidates"),
        pl.when(one).then(pl.lit(pl.Series([[0, 1]]))).otherwise("labels").alias("labels"),
    )
    spoilt.write_parquet(run.path / "data/tasks.parquet")
    with pytest.raises(LeakageError, match="negatives that the user has met"):
        prove(run)


def test_proof_of_a_run_reads_the_finished_prompts(shop: Path) -> None:
    run = shop / "run"
    main(["prepare", *own_tables(shop), *FLAGS, "--output", str(run)])
    main(["summarize", "items", str(run)])
    main(["summarize", "users", str(run)])
    opened, path = RunFolder.open(run), run / "sft/train.parquet"
    prove(opened)
    rows = pl.read_parquet(path)
    (message,) = rows["prompt"][0]
    message["content"][0]["text"] += " 7"  # an id too short to be told from a number
    changed = pl.Series("prompt", [[message], *rows["prompt"][1:]], dtype=rows.schema["prompt"])
    rows.with_columns(changed).write_parquet(path)
    with pytest.raises(LeakageError, match=r"(?s)prompts that are not made of.* 1 rows"):
        prove(opened)


def test_templates_print_no_ids(shop: Path) -> None:
    for prompt, message in (
        ("recommendation='User {{ user_id }}: {{ title }}?'", "unknown variable 'user_id'"),
        ("recommendation='{{ title }} {{ label }}'", "unknown variable 'label'"),
        ("advice='{{ title }}'", "unknown 'advice'"),
        ("recommendation=User: {{ title }}: ?", "not valid YAML; put a text in"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["prepare", *own_tables(shop), *FLAGS, "--set", f"prompts.{prompt}", "--output", str(shop / "run")])


def test_ids_as_titles_stop(shop: Path) -> None:
    flags = [*own_tables(shop), "--column", "title=sku", *FLAGS, "--output", str(shop / "run")]
    with pytest.raises(SystemExit, match="titles or descriptions that are the item's id"):
        main(["prepare", *flags])
    assert not (shop / "run/data").exists()
