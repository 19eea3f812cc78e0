"""From what the command line says to a checked recipe and its run; and whose folder is whose."""

import socket
from pathlib import Path

import pytest
from tiny_runs import TINY, Shop

from mllm_msr.cli import main
from mllm_msr.opening import Overrides, open_recipe, open_run
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import ITEMS
from mllm_msr.stages import check_serving


def test_nothing_is_overridden_unless_it_is_given() -> None:
    assert Overrides().apply(TINY) == TINY


def test_own_tables_take_the_place_of_another_source() -> None:
    content = Overrides(interactions="log.csv", columns={"user_id": "who"}).apply(TINY)
    place = str(Path("log.csv").resolve())
    assert content["source"] == {"type": "tables", "interactions": place, "columns": {"user_id": "who"}}
    more = Overrides(items="hf://datasets/o/n", columns={"item_id": "sku"}).apply(content)
    assert more["source"]["items"] == "hf://datasets/o/n" and more["source"]["interactions"] == place
    assert more["source"]["columns"] == {"user_id": "who", "item_id": "sku"}


@pytest.mark.parametrize(
    ("overrides", "section", "changes"),
    [
        (Overrides(negatives="all"), "data", {"negatives": "all"}),
        (Overrides(negatives=7), "data", {"negatives": "uniform", "n_negatives": 7}),
        (Overrides(negative_sampling="popularity"), "data", {"negatives": "popularity"}),
        (Overrides(limit_users=5, protocol="paper"), "data", {"limit_users": 5, "protocol": "paper"}),
        (Overrides(seed=3), "training", {"seed": 3}),
        (Overrides(seed=3), "evaluation", {"seed": 3}),
        (Overrides(seed=3), "data", {"seed": 3}),
        (Overrides(backbone="o/n"), "training", {"model_name_or_path": "o/n"}),
        (Overrides(settings={"summaries.block_size": 2}), "summaries", {"block_size": 2}),
    ],
)
def test_each_option_changes_its_values(overrides: Overrides, section: str, changes: dict) -> None:
    assert overrides.apply(TINY)[section] == {**TINY[section], **changes}


def test_a_number_of_negatives_ends_the_full_catalogue() -> None:
    everything = Overrides(negatives="all").apply(TINY)
    assert Overrides(negatives=7).apply(everything)["data"]["negatives"] == "uniform"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("summaries.engin=titles", "summaries: unknown key 'engin'; did you mean 'engine'?"),
        ("evaluation.rows=[mllm_msr, populrity]", "unknown variant 'populrity'; did you mean 'popularity'?"),
        (
            "evaluation.metrics=[auc, recall@5]",
            "evaluation.metrics: unknown metric 'recall@5': known are auc, auc_user",
        ),
        ("evaluation.splitt=validation", "evaluation: unknown key 'splitt'; did you mean 'split'?"),
        ("data.kcore=3", "data: unknown key 'kcore'; did you mean 'k_core_users'?"),
        ("prompts.recomendation=x", "prompts: unknown key 'recomendation'; did you mean 'recommendation'?"),
        ("prompts.recommendation='{{ titel }}'", "prompts.recommendation: unknown variable 'titel'"),
        ("prompts.recommendation='{{ title'", r"prompts\.recommendation, line 1: unexpected end of template"),
        ("training.lerning_rate=1", "training: unknown key 'lerning_rate'; did you mean 'learning_rate'?"),
        ("training.learning_rate=fast", "training.learning_rate='fast'"),
        ("source.type=dmo", "source.type='dmo' is unknown; did you mean 'demo'?"),
        ("source.n_user=5", "source: unknown key 'n_user'; did you mean 'n_users'?"),
        (
            "summaries.max_new_tokens={items: 5}",
            "summaries.max_new_tokens: unknown key 'items'; did you mean 'item",
        ),
        ("traning.seed=1", "'traning.seed' is not a section and a name.*did you mean 'training'?"),
    ],
)
def test_the_first_stage_checks_the_whole_recipe(recipe_file: Path, tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["prepare", str(recipe_file), "--set", setting, "--output", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


# ---- whose folder it is --------------------------------------------------------------------------------------------


def test_a_run_of_other_tables_is_refused_even_if_they_are_called_the_same(shop: Shop, tmp_path: Path) -> None:
    main(["prepare", *shop.arguments, "--output", str(shop.run)])
    before = shop.run.joinpath("config.yaml").read_text()
    other = Shop(tmp_path / "other")
    other.folder.mkdir()
    for mine, theirs in ((shop.log, other.log), (shop.goods, other.goods)):
        theirs.write_bytes(mine.read_bytes())
    with pytest.raises(SystemExit, match=rf"holds a run of {shop.log}, not of {other.log}: name another folder"):
        main(["prepare", *other.arguments, "--output", str(shop.run)])
    assert shop.run.joinpath("config.yaml").read_text() == before


def test_tables_that_have_moved_are_those_of_the_run(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    main(["prepare", *shop.arguments, "--output", str(shop.run)])
    moved = Shop(shop.folder / "moved")
    moved.folder.mkdir()
    shop.log.rename(moved.log)
    shop.goods.rename(moved.goods)
    main(["prepare", *moved.arguments, "--output", str(shop.run)])
    assert "prepare: up to date" in capsys.readouterr().out
    source = RunFolder.open(shop.run).recipe.source
    assert source.type == "tables" and source.options["interactions"] == str(moved.log)


def test_a_catalogue_may_be_added_to_a_run_of_the_same_log(shop: Shop) -> None:
    main(["prepare", *shop.arguments[:2], *shop.arguments[4:10], *shop.arguments[12:], "--output", str(shop.run)])
    main(["prepare", *shop.arguments, "--output", str(shop.run)])
    assert "Mug 3" in RunFolder.open(shop.run).read(ITEMS)["title"].to_list()


def test_later_stages_do_without_the_raw_data(shop: Shop) -> None:
    main(["prepare", *shop.arguments, "--output", str(shop.run)])
    shop.log.unlink()
    main(["summarize", "items", str(shop.run)])
    with pytest.raises(SystemExit, match=r"data file .*log\.csv does not exist"):
        main(["prepare", str(shop.run / "config.yaml"), "--output", str(shop.run)])


def test_the_demo_refuses_a_run_of_another_recipe_and_says_how_to_serve_it(shop: Shop) -> None:
    main(["prepare", *shop.arguments, "--output", str(shop.run)])
    before = shop.run.joinpath("config.yaml").read_text()
    with pytest.raises(SystemExit, match=rf"holds a run of another recipe.*`mllm-msr show {shop.run} page`"):
        main(["demo", "--serve", "--port", "0", "--output", str(shop.run)])
    assert shop.run.joinpath("config.yaml").read_text() == before


def test_the_demo_refuses_its_own_recipe_with_other_values(tmp_path: Path) -> None:
    from mllm_msr.records.recipe import demo_recipe

    run = tmp_path / "run"
    main(
        [
            "prepare",
            str(demo_recipe()),
            "--set",
            "source.n_users=12",
            "--set",
            "source.n_items=40",
            "--output",
            str(run),
        ]
    )
    with pytest.raises(SystemExit, match="holds a run of another recipe"):
        main(["demo", "--output", str(run)])


# ---- later stages under other settings -----------------------------------------------------------------------------


def test_a_later_stage_takes_settings_of_the_sections_that_it_reads(run: RunFolder) -> None:
    changed = open_run(run.path, "train", {"training.max_steps": 2})
    assert changed.recipe.training["max_steps"] == 2 and RunFolder.open(run.path).recipe == changed.recipe
    assert list(changed.pending("report")) == ["train", "evaluate", "report"]
    again = open_run(run.path, "evaluate", {"evaluation.rows": ["popularity"]})
    assert again.recipe.evaluation.rows == ["popularity"] and again.recipe.training["max_steps"] == 2


@pytest.mark.parametrize(
    ("stage", "key", "message"),
    [
        ("train", "data.n_negatives", "`train` does not read the section 'data'; .* `mllm-msr prepare .* --set data"),
        ("evaluate", "training.seed", "`evaluate` does not read the section 'training'; .* `mllm-msr train "),
        ("train", "summaries.block_size", "does not read .* `mllm-msr summarize items "),
        ("summarize items", "evaluation.seed", "does not read .* `mllm-msr evaluate "),
        ("train", "training", r"'training' is not a section and a name, such as summaries\.block_size$"),
        ("head", "nope.nope", "'nope.nope' is not a section and a name.*known are data"),
    ],
)
def test_or_it_says_which_stage_reads_them(run: RunFolder, stage: str, key: str, message: str) -> None:
    before = run.config.read_text()
    with pytest.raises(ValueError, match=message):
        open_run(run.path, stage, {key: 1})
    assert run.config.read_text() == before


def test_settings_that_an_earlier_stage_reads_too_or_the_model_cannot_follow_leave_the_run_as_it_was(
    run: RunFolder,
) -> None:
    before = run.config.read_text()
    wanted = "`summarize items` reads this, too, .* `mllm-msr summarize items .* --set summaries.engine=titles` first"
    with pytest.raises(SystemExit, match=wanted):
        main(["summarize", "users", str(run.path), "--set", "summaries.engine=titles"])
    with pytest.raises(SystemExit, match="is `joint` and keeps no items: leave it out"):
        main(["evaluate", str(run.path), "--set", "evaluation.cache_dtype=int8"])
    assert run.config.read_text() == before and not RunFolder.open(run.path).pending("report")


def test_settings_of_a_later_stage_work_on_the_command_line(run: RunFolder) -> None:
    main(["evaluate", str(run.path), "--set", "evaluation.rows=[popularity, random]"])
    assert list(run.results().variants) == ["popularity", "random"]
    with pytest.raises(SystemExit, match="unknown variant 'rndom'"):
        main(["evaluate", str(run.path), "--set", "evaluation.rows=[rndom]"])


def test_a_run_whose_recipe_was_edited_is_checked_as_a_whole_by_the_next_stage(run: RunFolder) -> None:
    run.config.write_text(run.config.read_text().replace("block_size", "blok_size"))
    with pytest.raises(ValueError, match="unknown key 'blok_size'; did you mean 'block_size'"):
        open_run(run.path, "train")


def test_a_taken_port_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {number} cannot be used .*: name another by --port"):
            check_serving(number)
    check_serving(0)


def test_tables_without_a_recipe_make_one(shop: Shop) -> None:
    columns = {"user_id": "who", "item_id": "sku", "timestamp": "when", "title": "name"}
    own = Overrides(interactions=str(shop.log), items=str(shop.goods), columns=columns, backbone="demo")
    run = open_recipe(None, own, shop.run)
    assert (run.recipe.name, run.recipe.summaries.engine) == ("log", "extractive")
    assert run.recipe.training["model_name_or_path"] == "demo"


def test_a_model_folder_that_is_not_there_stops_a_run_before_its_first_stage(recipe_file: Path, tmp_path: Path) -> None:
    for key in ("training.model_name_or_path", "vectors.model"):
        with pytest.raises(SystemExit, match=f"{key}: there is no folder /nowhere"):
            main(["run", str(recipe_file), "--set", f"{key}=/nowhere", "--output", str(tmp_path / "run")])
    assert not (tmp_path / "run/data").exists()
