"""Fabricated runs for every test of this room."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hub_run import fabricate

from mllm_msr.records.run import RunFolder


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that nobody changes."""
    return fabricate(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[[], RunFolder]:
    """A run of one's own, to break."""
    return lambda: fabricate(tmp_path / "run")
