"""A finished tiny run, and own tables of a small shop."""

import shutil
from pathlib import Path

import polars as pl
import pytest
import yaml
from tiny_runs import CHOICES, TINY, Shop, tiny_recipe

from mllm_msr import stages
from mllm_msr.records.run import RunFolder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with all stages done, to be read only."""
    run = RunFolder.create(tmp_path_factory.mktemp("runs") / "finished", tiny_recipe())
    stages.run_all(run)
    return run


@pytest.fixture
def run(finished: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of the finished run, to be changed."""
    shutil.copytree(finished.path, tmp_path / "run")
    return RunFolder.open(tmp_path / "run")


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """The recipe of the tiny run."""
    path = tmp_path / "shop.yaml"
    path.write_text(yaml.safe_dump(TINY), encoding="utf-8")
    return path


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    shop = Shop(tmp_path)
    pl.DataFrame(CHOICES, schema=["who", "sku", "when"], orient="row").write_csv(shop.log)
    pl.DataFrame({"sku": range(16), "name": [f"Mug {n}" for n in range(16)]}).write_csv(shop.goods)
    return shop
