"""The summary stages on a run: what is done again, and what is not."""

from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from mllm_msr import stages
from mllm_msr.cli import main
from mllm_msr.records.recipe import Recipe
from mllm_msr.records.run import Run

RECIPE = Recipe(
    "small",
    {"type": "demo", "n_users": 6, "n_items": 30},
    data={"n_negatives": 5, "k_core_users": 1, "k_core_items": 1},
    summaries={"engine": "extractive"},
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "small"
    stages.prepare(Run.create(folder, RECIPE))
    return folder


def done(capsys, folder: Path, **summaries) -> list[str]:
    """Both stages under other options; the stages that were not up to date."""
    run = Run.create(folder, replace(RECIPE, summaries={**RECIPE.summaries, **summaries}))
    capsys.readouterr()
    stages.summarize_items(run)
    stages.summarize_users(run)
    return [line.removesuffix(" ...") for line in capsys.readouterr().out.splitlines() if line.endswith(" ...")]


def test_a_stage_is_done_again_only_for_what_its_texts_depend_on(prepared, capsys):
    both = ["summarize items", "summarize users"]
    assert done(capsys, prepared) == both
    assert done(capsys, prepared, batch_size=3, concurrency=2) == []
    assert done(capsys, prepared, recurrent=False) == both
    wide = pl.read_parquet(prepared / "summaries/preferences.parquet")
    assert done(capsys, prepared) == both  # from the texts that are still there
    assert not pl.read_parquet(prepared / "summaries/preferences.parquet").equals(wide)


def test_a_shared_cache_serves_another_run(tmp_path, capsys):
    for name in ("one", "other"):
        stages.prepare(Run.create(tmp_path / name, RECIPE))
    done(capsys, tmp_path / "one", cache=str(tmp_path / "texts"))
    files = sorted((tmp_path / "texts").rglob("*.parquet"))
    assert len(done(capsys, tmp_path / "other", cache=str(tmp_path / "texts"))) == 2
    assert files and sorted((tmp_path / "texts").rglob("*.parquet")) == files  # not one text was written
    assert not (tmp_path / "other/cache").exists()


def test_a_failed_item_is_tried_again_by_the_same_command(prepared, capsys):
    done(capsys, prepared)
    path = prepared / "summaries/items.parquet"
    whole = pl.read_parquet(path)
    bad = pl.when(pl.col("item_id") == whole["item_id"][0])
    whole.with_columns(
        bad.then(pl.lit("")).otherwise("summary").alias("summary"),
        bad.then(pl.lit("failed:no answer")).otherwise("status").alias("status"),
    ).write_parquet(path)
    assert done(capsys, prepared) == ["summarize items"]
    assert pl.read_parquet(path).equals(whole)


def test_show_prints_a_user(prepared, capsys):
    done(capsys, prepared)
    user = pl.read_parquet(prepared / "summaries/preferences.parquet")["user_id"][0]
    main(["show", "user", user, str(prepared)])
    assert f"user {user}: " in (said := capsys.readouterr().out) and "step 1" in said and "=> " in said
    with pytest.raises(SystemExit, match="user 'nobody' has no interactions"):
        main(["show", "user", "nobody", str(prepared)])
