"""Every command and snippet of README and docs: run on a small demo run, or, where it needs hours, a GPU, a server or
an account, put to the parser that would read it. A block that nothing here knows fails."""

import argparse
import contextlib
import json
import re
import runpy
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from doc_blocks import PAGES, ROOT, SKILL, Block, all_blocks
from fastapi.testclient import TestClient
from tiny_runs import TINY

from mllm_msr import cli
from mllm_msr.opening import check_recipe, parse_setting
from mllm_msr.parser import build_parser
from mllm_msr.records.recipe import load_content, recipe_file, with_settings
from mllm_msr.study import Study

RUN_ON_A_RUN = ("rank", "show", "summarize", "vectors", "head", "evaluate", "compare", "publish")
NOT_HERE = (
    "--fine-tune",
    "--agreement",
    "--collection",
    "--ray",
)  # tests of transfer, ways of computing, releases and clusters have these
IN_MINUTES = ("README.md", "docs/evaluation.md", "docs/summaries.md", "docs/model.md", "docs/index.md")
RUNS = ("demo_output", "RUN", "runs/movielens_100k")
IDS = {"42": "u0003", "50,172": "i0001,i0002"}  # of MovieLens
SERVER = "http://127.0.0.1:8080"
COMMANDS = [
    pytest.param(block, command, id=f"{block} {' '.join(command)[:60]}")
    for block in all_blocks("bash")
    for command in block.commands()
]
ELSEWHERE = {  # what tests of other rooms run: by a line of the block
    "from mllm_msr.modeling.lora import language_model_lora_targets": "tests/modeling/test_page.py",
    "ranker = model.item_ranker": "tests/modeling/test_page.py",
    "ServedRecommender(processor": "tests/processing/test_served_scoring.py",
    "client = cohere.ClientV2": "tests/serving/test_clients.py",
    "SFTTrainer(": "tests/hub_cards/test_chat_table.py",
    "metric = evaluate.load(": "tests/hub_cards/test_metric_space.py",
}


class Parsed(Exception):
    """The arguments of a program are as it takes them; it need not go on."""


def place_of(command: list[str]) -> str | None:
    """The run that a command of ours is about, as a page names it."""
    return next((word for word in command if word in RUNS), None)


def is_run_here(block: Block, command: list[str]) -> bool:
    return (
        block.page in IN_MINUTES
        and command[0].endswith("mllm-msr")
        and command[1] in RUN_ON_A_RUN
        and place_of(command) is not None
        and not set(command) & set(NOT_HERE)
    )


@pytest.mark.parametrize(("block", "command"), COMMANDS)
def test_a_command_is_one(block: Block, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    name = command[0].removeprefix(".venv/bin/")
    assert name in CHECKS or name.startswith("--"), f"{block}: nothing here knows {name!r}"
    monkeypatch.chdir(ROOT)
    CHECKS.get(name, flags_of_sft)([word for word in command[1:] if word != "..."] if name in CHECKS else command)


def ours(words: list[str]) -> None:
    options = build_parser().parse_args(words)
    assert cli.wrong_usage(options) is None
    recipe = getattr(options, "recipe", None)
    if recipe and (recipe.parts[0] == "recipes" or not recipe.suffix) and str(recipe) not in ("RUN", "RECIPE"):
        settings = {key: parse_setting(key, text) for key, text in options.set}
        check_recipe(with_settings(load_content(recipe_file(recipe)), settings))
    if options.command == "study":
        assert Study.load(options.study).plan(options.only)


def launched(words: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    options = launch_command_parser().parse_args(words[1:])
    assert options.config_file is None or Path(options.config_file).is_file()
    if options.module:
        assert options.training_script == "mllm_msr.cli"
        return ours(options.training_script_args)
    if options.training_script_args:
        flags(options.training_script, options.training_script_args)
    assert Path(options.training_script).is_file()


def flags(script: str, words: list[str]) -> None:
    from mllm_msr.training import arguments, dpo

    kinds = dpo.KINDS if Path(script).name == "dpo.py" else arguments.SFT_KINDS
    arguments.parse(kinds, words, {})


def flags_of_sft(words: list[str]) -> None:
    flags("sft.py", ["--dataset_name", "RUN", "--model_name_or_path", "demo", "--output_dir", "out", *words])


def program(words: list[str]) -> None:
    """A program's own parser reads the words; it goes no further."""
    parse = argparse.ArgumentParser.parse_args

    def and_stop(parser: argparse.ArgumentParser, *arguments: object) -> None:
        parse(parser, words[1:])
        raise Parsed

    file = ROOT / "src/mllm_msr/rebuild.py" if words[0] == "data/rebuild.py" else ROOT / words[0]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", and_stop)
        patch.syspath_prepend(str(file.parent))
        runpy.run_path(str(file), run_name="__main__")


def made(words: list[str]) -> None:
    assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def installed(words: list[str]) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    what = re.fullmatch(r"\.(?:\[([\w,-]+)\])?", words[-1])
    assert words[0] == "install" and what and set(filter(None, (what[1] or "").split(","))) <= set(known)


def hub_client(words: list[str]) -> None:
    from huggingface_hub.cli.hf import app

    shown = CliRunner().invoke(app, [*words, "--help"])  # which reads all options first
    assert shown.exit_code == 0, shown.output


def ray_client(words: list[str]) -> None:
    from ray.scripts.scripts import cli as ray

    shown = CliRunner().invoke(ray, [*words, "--help"])
    assert shown.exit_code == 0, shown.output


def container(words: list[str]) -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    if words[0] == "build":
        return
    options = dict(zip(words[1:-1:2], words[2:-1:2], strict=True))
    assert words[0] == "run" and words[-1] == "mllm-msr" and f"EXPOSE {options['-p'].split(':')[1]}" in text
    assert options["-e"].split("=")[0] in (ROOT / "src/mllm_msr/serving/auth.py").read_text(encoding="utf-8")
    targets = [words[place + 1].split(":")[1] for place, word in enumerate(words) if word == "-v"]
    assert all(target in text for target in targets)


def request(words: list[str]) -> None:
    """A request is JSON; those to the server are answered in the test below."""
    body = words[words.index("-d") + 1] if "-d" in words else "{}"
    assert isinstance(json.loads(body), dict)


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "mllm-msr": ours,
    "accelerate": launched,
    "python": program,
    "make": made,
    "pip": installed,
    "hf": hub_client,
    "ray": ray_client,
    "docker": container,
    "curl": request,
    "git": lambda words: None if words[0] == "clone" else pytest.fail("only a clone"),
    "cd": lambda words: None,
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which `demo_output` is a finished run, and `OTHER_RUN` another of the same candidates."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(TINY), encoding="utf-8")
    (folder / "new.csv").write_text("item_id,title,text\nn1,Blue mug,striped\n", encoding="utf-8")
    with contextlib.chdir(folder):
        cli.main(["run", "recipe.yaml", "--output", "demo_output"])
        shutil.copytree("demo_output", "OTHER_RUN")
        yield folder


def test_what_takes_a_run_does_its_work_on_one(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = []
    for block in all_blocks("bash"):
        for command in block.commands():
            if is_run_here(block, command):
                words = [IDS.get(word, "demo_output" if word in RUNS else word) for word in command[1:]]
                if words[0] == "compare":
                    words = ["compare", "demo_output", "OTHER_RUN"]
                cli.main(words)
                assert capsys.readouterr().out, command
                done.append(words[0])
    assert set(done) == set(RUN_ON_A_RUN) and (demo / "rankings").is_dir()


def test_requests_to_the_server_are_answered(demo: Path) -> None:
    from mllm_msr.evaluation.loading import Computing
    from mllm_msr.serving.app import create_app
    from mllm_msr.serving.auth import read_keys
    from mllm_msr.serving.door import Limits
    from mllm_msr.serving.images import ImageReader
    from mllm_msr.serving.opening import open_run
    from mllm_msr.serving.service import Service
    from mllm_msr.serving.store import open_store

    opened = open_run(Path("demo_output"), Computing(device="cpu"), None)
    app = create_app(
        Service(opened, open_store("state.sqlite")), read_keys(None), Limits(10**6), ImageReader(False), False
    )
    requests = [
        command
        for block in all_blocks("bash")
        for command in block.commands()
        if any(SERVER in word for word in command)
    ]
    assert len(requests) >= 16
    with TestClient(app, base_url=SERVER) as client:
        for words in requests:
            parser = argparse.ArgumentParser()
            parser.add_argument("url")
            for flag in ("-X", "-d", "-H"):
                parser.add_argument(flag)
            asked = parser.parse_args(words[1:])
            method = asked.X or ("POST" if asked.d else "GET")
            reply = client.request(
                method, asked.url, content=asked.d, headers=dict([asked.H.split(": ")]) if asked.H else {}
            )
            assert reply.status_code < 300, (words, reply.text)


@pytest.mark.parametrize("block", [pytest.param(block, id=str(block)) for block in all_blocks("python")])
def test_python_runs(block: Block, demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = compile(block.text, str(block), "exec")
    if place := next((place for line, place in ELSEWHERE.items() if line in block.text), None):
        assert (ROOT / place).is_file()
        return
    text = block.text.replace("RUN/", "demo_output/").replace('"org/mllm-msr-demo-data"', '"demo_output/hub/dataset"')
    text = text.replace('"org/mllm-msr-demo"', '"demo_output/hub/model"').replace('"noise.jpg"', "None")
    code = compile(text, str(block), "exec")
    exec(code, {"__name__": "snippet"})
    if block.page == "README.md":
        assert len(block.text.splitlines()) <= 25
        shown = capsys.readouterr().out.strip().splitlines()
        assert len(shown) == 4 and shown[0][:5] >= shown[1][:5] >= shown[2][:5] and shown[3].startswith("['i0")


@pytest.mark.parametrize("block", [pytest.param(block, id=str(block)) for block in all_blocks("yaml")])
def test_parts_of_recipes_and_studies_are_taken(block: Block, tmp_path: Path) -> None:
    content = yaml.safe_load(block.text)
    if "cells" in content:
        (tmp_path / "study.yaml").write_text(block.text, encoding="utf-8")
        study = Study.load(tmp_path / "study.yaml")
        base = load_content(ROOT / "recipes" / study.recipe)
        for planned in study.plan():
            check_recipe(with_settings(base, planned.settings))
    else:
        check_recipe({"name": "x", "source": {"type": "demo"}, **content})


def test_the_skill_is_found_in_an_installed_package() -> None:
    _, head, _ = (ROOT / SKILL).read_text(encoding="utf-8").split("---\n", 2)
    facts = yaml.safe_load(head)
    assert set(facts) == {"name", "description"} and facts["name"] == Path(SKILL).parent.name
    assert len(facts["description"]) <= 1024
    package = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    assert SKILL.removeprefix("src/mllm_msr/") in package["mllm_msr"]


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            path, _, _ = target.partition("#")
            assert target.startswith("http") or not path or (ROOT / page).parent.joinpath(path).exists(), (page, target)
