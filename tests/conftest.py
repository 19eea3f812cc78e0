"""Tiny backbones for all rooms."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import tiny_models
import torch


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
