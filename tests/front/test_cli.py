"""The command line: it answers at once, explains itself, and ends every mistake with one clear line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mllm_msr import cli
from mllm_msr.cli import COMMANDS, build_parser, main
from mllm_msr.records.run import RunFolder


def test_help_answers_without_loading_anything_heavy() -> None:
    code = (
        "import sys\n"
        "from mllm_msr.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print('HEAVY', [name for name in ('torch', 'transformers', 'polars') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "HEAVY []" in out
    assert all(f"  {command}" in out for command in COMMANDS)
    assert "examples:" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args([command, "--help"])
    assert stop.value.code == 0
    assert f"mllm-msr {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "give a recipe file, or own tables by --interactions"),
        (["prepare"], "give a recipe file, or own tables by --interactions"),
        (["run", "--interactions", "log.csv"], "say which model to fine-tune: --backbone"),
        (["prepare", "shop.yaml", "--set", "data.seed"], "'data.seed' is not of the form NAME=VALUE"),
        (["prepare", "shop.yaml", "--negatives", "0"], "'0' is not a positive whole number"),
        (["prepare", "shop.yaml", "--limit-users", "-3"], "'-3' is not a positive whole number"),
        (["prepare", "shop.yaml", "--protocol", "lax"], "invalid choice: 'lax'"),
        (["rank", "RUN", "--user", "u", "--top-k", "0"], "'0' is not a positive whole number"),
        (["rank", "RUN", "--user", ""], "argument --user: is empty"),
        (["rank", "RUN", "--user", "u", "--items", "a,,b"], "argument --items: is empty"),
        (["rank", "RUN", "--users", "all"], "name a folder or a file for the rankings of --users: --output DIR"),
        (["rank", "RUN"], "one of the arguments --user --preference --users --history is required"),
        (["show", "RUN", "user", " "], "argument id: is empty"),
        (["demo", "--port", "70000"], "'70000' is not a port"),
        (["evaluate", "RUN", "--full-catalogue", "some"], "'some' is not a positive whole number"),
        (["publish", "RUN", "--namespace", ""], "argument --namespace: is empty"),
        (["compare", "RUN"], "name two runs or more to compare"),
        (["evalute", "RUN"], "invalid choice: 'evalute'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_wrong_usage_ends_with_status_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def stopped(arguments: list[str]) -> str:
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    line = str(stop.value.code)
    assert line.startswith("mllm-msr: ") and "\n" not in line
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere"], "nowhere is not a run"),
        (
            ["run", "nowhere.yaml"],
            "nowhere.yaml: no such file, nor a recipe of the package; known are amazon_baby_paper",
        ),
        (["rank", "nowhere", "--user", "u"], "nowhere is not a run"),
        (["compare", "nowhere", "elsewhere"], "nowhere is not a run"),
        (["show", "nowhere", "user", "u"], "nowhere is not a run"),
        (
            ["study", "nowhere.yaml"],
            "nowhere.yaml: no such file, nor a recipe of the package; known are amazon_baby_paper",
        ),
    ],
)
def test_a_mistake_ends_with_one_clear_line(arguments: list[str], message: str) -> None:
    assert message in stopped(arguments)


def test_data_that_is_not_there_is_named(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\nsource: {type: movielens}\n", encoding="utf-8")
    output = ["--output", str(tmp_path / "run")]
    assert "needs a folder: give --data DIR" in stopped(["prepare", str(recipe), *output])
    assert "does not exist" in stopped(["prepare", str(recipe), "--data", str(tmp_path / "no"), *output])
    assert not (tmp_path / "run").exists()


def test_what_was_not_foreseen_names_its_type_and_debug_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(options: object) -> None:
        raise KeyError("colour")

    monkeypatch.setitem(cli.COMMANDS, "report", fail)
    assert stopped(["report", "RUN"]) == (
        "mllm-msr: unexpected KeyError: 'colour'; run again with --debug to see where it comes from"
    )
    monkeypatch.setitem(cli.COMMANDS, "index", lambda options: json.loads("{\n"))
    assert stopped(["index", "RUN"]).startswith("mllm-msr: Expecting property name")
    for arguments in (["--debug", "report", "RUN"], ["report", "RUN", "--debug"]):
        with pytest.raises(KeyError):
            main(arguments)


INTERRUPTED = """
import os, signal, sys
folder = sys.argv[-1]

def watch(event, given):  # Ctrl-C as the first table is written
    if event == "open" and str(given[0]).startswith(folder + "/") and str(given[0]).endswith(".parquet"):
        os.kill(os.getpid(), signal.SIGINT)

from mllm_msr.cli import main
sys.addaudithook(watch)
main(sys.argv[1:])
"""


def test_ctrl_c_ends_with_status_130_and_no_traceback(recipe_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", INTERRUPTED, "prepare", str(recipe_file), "--output", str(tmp_path / "run")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 130
    assert ended.stderr.rstrip().endswith("mllm-msr: interrupted; run the same command again to go on")
    assert "Traceback" not in ended.stderr


def test_ctrl_c_inside_an_executed_text_ends_the_same_way_under_python_m(tmp_path: Path) -> None:
    (tmp_path / "interrupted.py").write_text(
        "from mllm_msr import cli\n"
        "cli.COMMANDS['report'] = lambda options: exec('raise KeyboardInterrupt')\n"
        "cli.main(['report', 'RUN'])\n",
        encoding="utf-8",
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-m", "interrupted"], env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.count("\n")) == (130, 1)


# ---- out of order --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    from tiny_runs import tiny_recipe

    from mllm_msr.stages import prepare

    run = RunFolder.create(tmp_path_factory.mktemp("runs") / "prepared", tiny_recipe())
    prepare(run)
    return run


@pytest.mark.parametrize(
    ("arguments", "stage"),
    [
        (["summarize", "users", "RUN"], "summarize items"),
        (["train", "RUN"], "summarize users"),
        (["evaluate", "RUN"], "summarize users"),
        (["report", "RUN"], "evaluate"),
        (["publish", "RUN", "--namespace", "org", "--dry-run"], "report"),
        (["rank", "RUN", "--user", "u0000"], "train"),
        (["rank", "RUN", "--preference", "blue mugs"], "train"),
        (["rank", "RUN", "--users", "all", "--output", "BEST"], "train"),
        (["index", "RUN"], "train"),
        (["show", "RUN", "user", "u0000"], "summarize users"),
        (["show", "RUN", "page", "--port", "0"], "train"),
        (["compare", "RUN", "RUN"], "evaluate"),
        (["evaluate", "RUN", "--model", "RUN"], "train"),
    ],
)
def test_a_command_out_of_order_names_the_stage_and_the_command(
    prepared: RunFolder, arguments: list[str], stage: str, tmp_path: Path
) -> None:
    places = {"RUN": str(prepared.path), "BEST": str(tmp_path / "best")}
    line = stopped([places.get(argument, argument) for argument in arguments])
    assert f"stage '{stage}' of {prepared.path} has not been done yet: run `mllm-msr " in line
    assert f"`mllm-msr {stage} {prepared.path}` first" in line


@pytest.mark.parametrize("command", [["report"], ["publish", "--namespace", "org", "--dry-run"], ["evaluate"]])
def test_evidence_on_data_that_has_changed_is_refused(run: RunFolder, recipe_file: Path, command: list[str]) -> None:
    main(["prepare", str(recipe_file), "--seed", "5", "--output", str(run.path)])
    line = stopped([command[0], str(run.path), *command[1:]])
    assert "is out of date, as 'prepare' has been done anew: run `mllm-msr summarize items " in line


def test_every_stage_names_the_next_command(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    main(["prepare", str(recipe_file), "--output", str(run)])
    for stage in ("summarize items", "summarize users", "train", "evaluate", "report"):
        assert capsys.readouterr().out.endswith(f"next: mllm-msr {stage} {run}\n")
        main([*stage.split(), str(run)])
    assert capsys.readouterr().out.endswith(
        f"next: mllm-msr rank {run} --user u0000\n  or: mllm-msr publish {run} --namespace NAME --dry-run\n"
    )
