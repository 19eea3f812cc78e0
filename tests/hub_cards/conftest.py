"""Fabricated runs for every test of this room, and their publishing."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_run import fabricate, finish
from hub_server import Hub
from hub_storage import WRITE
from huggingface_hub import HfApi

from mllm_msr.hub_cards.release import PublishOptions, publish
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


class Publisher:
    """Publishes one run to a Hub."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    def __call__(self, hub: Hub, token: str | None = WRITE, tries: int = 6, **options):
        options = PublishOptions("org", **{"tag": "v1", **options})
        return publish(self.run, options, HfApi(hub.url, token=token), tries)

    def change(self, name: str, text: str) -> None:
        """Train and report anew, with another file in the model's folder."""
        (self.run.model / name).write_text(text)
        finish(self.run)


@pytest.fixture
def release(make_run, monkeypatch) -> Publisher:
    """Publish a run of one's own to a Hub."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between tries
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/no/such/file")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return Publisher(make_run())
