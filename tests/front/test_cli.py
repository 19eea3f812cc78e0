"""The command line, started as a user starts it."""

import subprocess
import sys

import pytest

from mllm_msr.cli import build_parser, main

COMMANDS = ("demo", "run", "prepare", "summarize", "train", "evaluate", "rank", "report", "publish")


def test_help_names_every_command_and_loads_nothing_heavy():
    code = (
        "import sys, mllm_msr.cli as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print('HEAVY', sorted({'torch', 'transformers', 'polars', 'datasets'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "HEAVY []" in out
    assert all(f"  {command}" in out for command in COMMANDS)
    assert "examples:" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args([command, "--help"])
    assert stop.value.code == 0
    assert f"mllm-msr {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere"], "nowhere is not a run directory"),
        (["run", "nowhere.yaml"], "nowhere.yaml"),
        (["rank", "nowhere", "--user", "u"], "nowhere is not a run directory"),
    ],
)
def test_a_mistake_ends_with_one_clear_line(arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert str(stop.value.code).startswith("mllm-msr: ")
    assert message in str(stop.value.code)
    assert "\n" not in str(stop.value.code)


def test_data_that_is_not_there_is_named(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\nsource: {type: movielens}\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="needs a folder: give --data DIR"):
        main(["prepare", str(recipe), "--output", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="does not exist"):
        main(["prepare", str(recipe), "--data", str(tmp_path / "no"), "--output", str(tmp_path / "run")])


def test_stages_out_of_order_say_what_is_missing(tmp_path):
    (tmp_path / "config.yaml").write_text("name: x\nsource: {type: demo}\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"stage 'summarize users' of .* has not been done yet"):
        main(["train", str(tmp_path)])
