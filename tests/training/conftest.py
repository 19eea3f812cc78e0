"""A small run of the demo's world, prepared and summarised, to train on."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from mllm_msr import stages
from mllm_msr.data.catalogue import Catalogue
from mllm_msr.data.hub_tables import load_table
from mllm_msr.data.sources.registry import effective_source
from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor
from mllm_msr.records.recipe import backbone_path, demo_recipe, load_recipe
from mllm_msr.records.run import RunFolder
from mllm_msr.records.sections import Source


@dataclass(frozen=True)
class SmallRun:
    """The run and what tests need of it."""

    run: RunFolder

    @property
    def folder(self) -> Path:
        return self.run.path

    def table(self, name: str, split: str) -> Dataset:
        return load_table(str(self.folder), name, split)

    @cached_property
    def items(self) -> Catalogue:
        return Catalogue(self.table("items", "train"))

    @cached_property
    def processor(self) -> MllmMsrProcessor:
        return MllmMsrProcessor.from_backbone(backbone_path("demo"), prompts=self.run.recipe.prompts)

    def flags(self, output: Path, **more: Any) -> dict[str, Any]:
        """The recipe's flags for a training into ``output``."""
        own = {"dataset_name": str(self.folder), "output_dir": str(output)}
        return {**self.run.recipe.training_flags(), **own, **more}


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    source = effective_source(Source("demo", {"n_users": 10, "n_items": 40}))
    recipe = replace(load_recipe(demo_recipe()), source=source)
    run = RunFolder.create(tmp_path_factory.mktemp("runs") / "small", recipe)
    stages.prepare(run)
    stages.summarize_items(run)
    stages.summarize_users(run)
    return SmallRun(run)
