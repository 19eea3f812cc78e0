"""Tiny backbones for all rooms.

`tiny_models` is imported from its file, as `tests/` must not be on the path: it holds a folder `mllm_msr`.
"""

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

spec = importlib.util.spec_from_file_location("tiny_models", Path(__file__).with_name("tiny_models.py"))
assert spec is not None and spec.loader is not None
tiny_models = importlib.util.module_from_spec(spec)
sys.modules["tiny_models"] = tiny_models
spec.loader.exec_module(tiny_models)


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
