"""The databases that a store is tested on."""

from collections.abc import Callable, Iterator
from pathlib import Path

import postgres
import pytest
from served_runs import served_run

from mllm_msr.records.run import RunFolder


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with postgres.server(tmp_path_factory.mktemp("postgres")) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def state(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a store is to lie, which is empty."""
    if request.param == "sqlite":
        return str(tmp_path / "state.sqlite")
    return postgres.database(request.getfixturevalue("postgres_url"))


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, backbone: Callable[[str], Path]) -> RunFolder:
    """A run with a joint model and heads, to be read only."""
    return served_run(tmp_path_factory.mktemp("served") / "joint", backbone("llava"))
