"""The databases that a store is tested on, and a run with the server that most tests ask."""

from collections.abc import Callable, Iterator
from pathlib import Path

import postgres
import pytest
from served_runs import READ, WRITE, Live, live, served_run

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


@pytest.fixture(scope="session")
def served(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server of that run with keys, for all tests that need nothing else of it."""
    folder = tmp_path_factory.mktemp("server")
    keys, columns = folder / "keys", folder / "columns.csv"
    keys.write_text(f"# of the tests\nread {READ}\nwrite {WRITE}\n", encoding="utf-8")
    columns.write_text("item_id,year\ni0001,1999\ni0002,1999\ni0003,2001\n", encoding="utf-8")
    options = ["--state", str(folder / "state.sqlite"), "--keys", str(keys), "--item-columns", str(columns)]
    with live(run.path, *options, "--max-body-mb", "1", key=WRITE) as server:
        yield server
