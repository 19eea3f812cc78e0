"""Tiny backbones for all rooms, and one thread: figures and times do not depend on how many cores a machine has."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in processes that tests start

from collections.abc import Callable
from functools import cache
from pathlib import Path

import devices
import hypothesis
import pytest
import tiny_models
import torch

# The same examples in every run, and none that a busy machine makes fail.
hypothesis.settings.register_profile(
    "suite",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("suite")
devices.begin()

LONG = ("front", "training", "hub_cards", "serving", "processing")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Rooms with long files first, so that both processes of `make test` end at about the same time."""
    order = {room: number for number, room in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.parent.name, len(LONG)))


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's stock repository, or of the text-only `language_model`; made once."""

    @cache
    def made(name: str) -> Path:
        folder = tmp_path_factory.mktemp("backbones") / name
        if name == "language_model":
            return tiny_models.save_language_model(folder)
        return tiny_models.save_backbone(name, folder)

    return made


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
