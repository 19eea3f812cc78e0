"""Fabricated runs for every test of this room."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_run import fabricate

from mllm_msr.records.run import RunFolder


@pytest.fixture(scope="session")
def fabricated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to be copied."""
    return fabricate(tmp_path_factory.mktemp("fabricated") / "run").path


@pytest.fixture(scope="session")
def finished_run(fabricated: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that nobody changes."""
    return RunFolder.open(shutil.copytree(fabricated, tmp_path_factory.mktemp("finished") / "run"))


@pytest.fixture
def make_run(fabricated: Path, tmp_path: Path) -> Callable[[], RunFolder]:
    """A run of one's own, to break."""
    return lambda: RunFolder.open(shutil.copytree(fabricated, tmp_path / "run", dirs_exist_ok=True))
