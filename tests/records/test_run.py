"""A run belongs to one recipe and one state of its data: what is done, what is stale, and what is refused."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import tiny_recipe

from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import TASKS
from mllm_msr.records.stage_specs import STAGES


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", tiny_recipe())


def write(run: RunFolder, name: str, text: str = "made") -> Path:
    path = run.path / f"{name.replace(' ', '_')}/out.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def do(run: RunFolder, name: str, text: str = "made") -> bool:
    """Do a stage that writes ``text``; whether there was anything to do."""
    calls: list[str] = []

    def work(key: str) -> None:
        calls.append(key)
        write(run, name, text)

    run.stage(name, work, writes=[run.path / name.replace(" ", "_")])
    return bool(calls)


@pytest.mark.parametrize("content", ["{}", "[]", '{"stages": 1}', "{"])
def test_a_provenance_that_says_nothing_is_named(run: RunFolder, content: str) -> None:
    (run.path / "provenance.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"provenance\.json .*: remove it, and do"):
        run.require("prepare")


def do_all(run: RunFolder) -> RunFolder:
    for name in STAGES:
        do(run, name)
    return run


# ---- one recipe ----------------------------------------------------------------------------------------------------


def test_a_run_is_opened_with_the_recipe_it_was_made_with(run: RunFolder) -> None:
    assert RunFolder.open(run.path) == run
    assert RunFolder.create(run.path, tiny_recipe({"data.seed": 5})).recipe.data.seed == 5
    assert RunFolder.open(run.path).recipe.data.seed == 5


@pytest.mark.parametrize("settings", [{"source": {"type": "movielens", "folder": "x"}}, {"name": "other"}])
def test_a_folder_of_another_recipe_s_run_is_refused(run: RunFolder, settings: dict) -> None:
    from mllm_msr.records.recipe import parse_recipe

    before = run.config.read_text()
    with pytest.raises(ValueError, match="holds a run of another recipe, 'shop': name another folder by --output"):
        RunFolder.create(run.path, parse_recipe({**run.recipe.to_dict(), **settings}))
    assert run.config.read_text() == before


def test_a_folder_of_other_things_is_refused_and_an_empty_one_taken(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match="is not empty and not a run"):
        RunFolder.create(tmp_path, tiny_recipe())
    RunFolder.create(tmp_path / "photos", tiny_recipe())


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, FileNotFoundError, "is not a run .* start with `mllm-msr prepare`"),
        ("name: x\nsource: {type: demo}", ValueError, "of an older version of mllm-msr; make it anew"),
        ("format: 3\nname: x\nsource: {type: demo}", ValueError, "a run of format 3, .* reads format 2"),
        ("format: 2\nname: x\nsource: {type: demo}\ndata: {kcore: 3}", ValueError, r"config\.yaml: data: unknown key"),
    ],
)
def test_what_is_no_run_of_ours_is_not_opened(
    tmp_path: Path, text: str | None, error: type[Exception], message: str
) -> None:
    if text is not None:
        (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(error, match=message):
        RunFolder.open(tmp_path)


# ---- one state of its data -----------------------------------------------------------------------------------------


def test_a_stage_is_done_once(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert do(run, "prepare") and not do(run, "prepare")
    assert "prepare: up to date" in capsys.readouterr().out


def test_a_stage_that_has_not_been_done_names_the_commands_to_run(run: RunFolder) -> None:
    path = run.path
    commands = (
        f"run `mllm-msr summarize items {path}`, then `mllm-msr summarize users {path}`, then `mllm-msr train {path}`"
    )
    do(run, "prepare")
    with pytest.raises(FileNotFoundError, match=r"stage 'train' of .* has not been done yet") as stop:
        run.require("train")
    assert f"{commands} first" in str(stop.value)
    with pytest.raises(FileNotFoundError, match=r"stage 'summarize users' of .* has not been done yet"):
        do(run, "train")


def change_prepare(run: RunFolder) -> RunFolder:
    run = RunFolder.create(run.path, tiny_recipe({"data.seed": 5}))
    do(run, "prepare", "other")
    return run


def change_recipe(run: RunFolder) -> RunFolder:
    return RunFolder.create(run.path, tiny_recipe({"summaries.block_size": 2}))


def change_file(run: RunFolder) -> RunFolder:
    write(run, "summarize items", "edited")
    return run


def remove_file(run: RunFolder) -> RunFolder:
    (run.path / "train/out.txt").unlink()
    return run


@pytest.mark.parametrize(
    ("change", "reason", "first"),
    [
        (change_prepare, "'prepare' has been done anew", "summarize items"),
        (change_recipe, "the recipe has changed", "summarize items"),
        (change_file, "summarize_items/out.txt has changed", "summarize items"),
        (remove_file, "train/out.txt is missing", "train"),
    ],
)
def test_later_stages_refuse_what_has_changed_under_them(
    run: RunFolder, change: Callable[[RunFolder], RunFolder], reason: str, first: str
) -> None:
    run = change(do_all(run))
    for name in ("evaluate", "report"):
        with pytest.raises(ValueError, match=f"stage '{name}' of .* is out of date, as {reason}") as stop:
            run.require(name)
        assert f"run `mllm-msr {first} {run.path}`, then" in str(stop.value) and str(stop.value).endswith(" again")
    with pytest.raises(ValueError, match=reason):
        do(run, "report")
    assert next(iter(run.pending("report"))) == first
    for name in run.pending("report"):  # what the message says helps
        do(run, name)
    run.require("report")


def test_a_stage_that_is_done_again_says_why(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    run = change_prepare(do_all(run))
    do(run, "summarize items")
    assert "summarize items: is done again, as 'prepare' has been done anew" in capsys.readouterr().out


def test_a_stage_that_comes_out_as_before_leaves_later_ones_as_they_are(run: RunFolder) -> None:
    do_all(run)
    (run.path / "prepare/out.txt").unlink()
    assert do(run, "prepare")
    assert not any(do(run, name) for name in STAGES)


def test_a_copy_of_a_run_is_as_good(run: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(do_all(run).path, tmp_path / "copy", copy_function=shutil.copyfile)
    RunFolder.open(tmp_path / "copy").require("report")


def test_a_file_whose_size_and_time_are_as_noted_is_read_again_only_thoroughly(run: RunFolder) -> None:
    path = do_all(run).path / "train/out.txt"
    facts = path.stat()
    write(run, "train", "spot")
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    run.require("report")
    with pytest.raises(ValueError, match=r"train/out\.txt has changed"):
        run.require("report", thoroughly=True)


def test_facts_decide_in_place_of_the_recipe_s_part(run: RunFolder) -> None:
    def stage(run: RunFolder, facts: list[str]) -> str:
        run.stage("prepare", lambda key: None, writes=[write(run, "prepare")], facts=facts)
        return run.provenance()["stages"]["prepare"]["finished"]

    first = stage(run, ["content of log.csv"])
    moved = RunFolder.create(run.path, tiny_recipe({"source.n_users": 13}))
    assert stage(moved, ["content of log.csv"]) >= first
    moved.require("prepare")


def test_a_recipe_that_another_command_has_changed_stops_the_stage(run: RunFolder) -> None:
    RunFolder.create(run.path, tiny_recipe({"data.seed": 5}))
    with pytest.raises(ValueError, match=r"another command has changed the recipe of .* meanwhile"):
        do(run, "prepare")


def test_an_evaluation_of_baselines_rests_on_the_data_alone(run: RunFolder) -> None:
    do(run, "prepare")
    assert "train" in run.pending("report")
    run.stage("evaluate", lambda key: None, writes=[], after=["prepare"])
    assert list(run.pending("report")) == ["report"]


# ---- what comes from elsewhere -------------------------------------------------------------------------------------


def test_stages_of_another_run_are_taken_over_with_their_files(run: RunFolder, tmp_path: Path) -> None:
    other = RunFolder.create(tmp_path / "other", tiny_recipe({"training.max_steps": 2}))
    other.adopt(do_all(run), ["prepare", "summarize items", "summarize users"])
    assert (other.path / "prepare/out.txt").samefile(run.path / "prepare/out.txt")
    assert not do(other, "summarize users") and do(other, "train")
    (run.path / "prepare/out.txt").unlink()
    with pytest.raises(ValueError, match="is missing"):
        other.adopt(run, ["prepare"])


def test_a_model_from_elsewhere_is_noted_with_what_it_is(run: RunFolder) -> None:
    for name in ("prepare", "summarize items", "summarize users"):
        do(run, name)
    path = write(run, "train")
    run.take_over("train", "a model of the Hub", [path.parent])
    run.require("train")
    path.write_text("another")
    with pytest.raises(ValueError, match=r"train/out\.txt has changed"):
        run.require("train")


def test_notes_that_were_cut_short_are_named(run: RunFolder) -> None:
    (run.path / "provenance.json").write_text('{"versions": {}, "sta')
    with pytest.raises(ValueError, match=r"provenance\.json is no whole JSON file .*remove it"):
        run.require("prepare")


def test_results_and_tables_that_are_not_there_are_named(run: RunFolder) -> None:
    with pytest.raises(FileNotFoundError, match=r"metrics\.json is missing: run `mllm-msr evaluate "):
        run.results()
    with pytest.raises(FileNotFoundError, match=r"tasks\.parquet is missing"):
        run.read(TASKS)
    assert not run.has(TASKS)


def test_provenance_names_libraries_times_and_files(run: RunFolder) -> None:
    do(run, "prepare")
    noted = json.loads((run.path / "provenance.json").read_text(encoding="utf-8"))
    assert {"python", "mllm-msr", "torch"} <= noted["versions"].keys()
    entry = noted["stages"]["prepare"]
    assert entry.keys() == {"key", "after", "settings", "seconds", "finished", "writes"}
    assert entry["writes"].keys() == {"prepare/out.txt"}
