"""The summary stages on a run: what is done again, and what is not."""

from pathlib import Path

import polars as pl
import pytest
from tiny_runs import tiny_recipe

from mllm_msr import stages
from mllm_msr.cli import main
from mllm_msr.records.recipe import Recipe
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import ITEM_SUMMARIES, PREFERENCES


def small(**summaries: object) -> Recipe:
    sizes = {"source.n_users": 6, "source.n_items": 30}
    return tiny_recipe({**sizes, **{f"summaries.{name}": value for name, value in summaries.items()}})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "small"
    stages.prepare(RunFolder.create(folder, small()))
    return folder


def stages_done(capsys: pytest.CaptureFixture[str], folder: Path, **summaries: object) -> list[str]:
    """Do both stages under other options; the stages that were not up to date."""
    run = RunFolder.create(folder, small(**summaries))
    capsys.readouterr()
    stages.summarize_items(run)
    stages.summarize_users(run)
    return [line.removesuffix(" ...") for line in capsys.readouterr().out.splitlines() if line.endswith(" ...")]


def test_a_stage_is_done_again_only_for_what_its_texts_depend_on(prepared, capsys):
    both = ["summarize items", "summarize users"]
    assert stages_done(capsys, prepared) == both
    assert stages_done(capsys, prepared, batch_size=3, concurrency=2) == []
    assert stages_done(capsys, prepared, recurrent=False) == both
    wide = RunFolder.open(prepared).read(PREFERENCES)
    assert stages_done(capsys, prepared) == both  # from the texts that are still there
    assert not RunFolder.open(prepared).read(PREFERENCES).equals(wide)


def test_a_shared_cache_serves_another_run(tmp_path, capsys):
    for name in ("one", "other"):
        stages.prepare(RunFolder.create(tmp_path / name, small()))
    stages_done(capsys, tmp_path / "one", cache=str(tmp_path / "texts"))
    files = sorted((tmp_path / "texts").rglob("*.parquet"))
    assert len(stages_done(capsys, tmp_path / "other", cache=str(tmp_path / "texts"))) == 2
    assert files and sorted((tmp_path / "texts").rglob("*.parquet")) == files  # not one text was written
    assert not (tmp_path / "other/cache").exists()


def test_another_model_for_preferences_leaves_item_summaries_as_they_are(prepared, capsys):
    stages_done(capsys, prepared)
    assert stages_done(capsys, prepared, user_model="another", user_revision="2") == ["summarize users"]
    assert stages_done(capsys, prepared) == ["summarize users"]


def test_a_failed_item_is_tried_again_by_the_same_command(prepared, capsys):
    stages_done(capsys, prepared)
    run = RunFolder.open(prepared)
    whole = run.read(ITEM_SUMMARIES)
    bad = pl.when(pl.col("item_id") == whole["item_id"][0])
    run.write(
        ITEM_SUMMARIES,
        whole.with_columns(
            bad.then(pl.lit("")).otherwise("summary").alias("summary"),
            bad.then(pl.lit("failed:no answer")).otherwise("status").alias("status"),
        ),
    )
    assert stages_done(capsys, prepared) == ["summarize items"]
    assert run.read(ITEM_SUMMARIES).equals(whole)


def test_a_damaged_table_is_made_again_by_its_stage(prepared, capsys):
    stages_done(capsys, prepared)
    run = RunFolder.open(prepared)
    whole = run.read(ITEM_SUMMARIES)
    run.file(ITEM_SUMMARIES).write_bytes(b"PAR1")
    assert stages_done(capsys, prepared) == ["summarize items"]
    assert run.read(ITEM_SUMMARIES).equals(whole)


def test_show_prints_a_user(prepared, capsys):
    stages_done(capsys, prepared)
    user = RunFolder.open(prepared).read(PREFERENCES)["user_id"][0]
    main(["show", str(prepared), "user", user])
    out = capsys.readouterr().out
    assert f"user {user}: " in out and "step 1" in out and "=> " in out
    with pytest.raises(SystemExit, match="'nobody' is no user of"):
        main(["show", str(prepared), "user", "nobody"])
