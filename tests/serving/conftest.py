"""The databases that a store is tested on."""

from collections.abc import Iterator
from pathlib import Path

import postgres
import pytest


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
