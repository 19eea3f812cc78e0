"""A small run of the demo's world, prepared and summarised, to train on."""

from pathlib import Path

import pytest

from mllm_msr import stages
from mllm_msr.records.recipe import backbone_path, load_recipe
from mllm_msr.records.run import Run


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    recipe = load_recipe(Path(backbone_path("demo")).parent / "recipe.yaml")
    recipe.source.update(n_users=10, n_items=40)
    run = Run.create(tmp_path_factory.mktemp("runs") / "small", recipe)
    stages.prepare(run)
    stages.summarize_items(run)
    stages.summarize_users(run)
    return run
