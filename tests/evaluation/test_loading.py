"""Where a run's model is scored."""

import pytest
import torch
from tiny_runs import tiny_recipe

from mllm_msr import MllmMsrForRecommendation, MllmMsrProcessor
from mllm_msr.evaluation.loading import load_recommender
from mllm_msr.processing.served_scoring import ServedRecommender
from mllm_msr.records.run import RunFolder


def test_a_run_is_scored_by_the_server_that_its_recipe_names(backbone, tmp_path):
    recipe = tiny_recipe({"evaluation.served": "http://127.0.0.1:8000/v1"})
    run = RunFolder.create(tmp_path / "run", recipe)
    base = str(backbone("llava"))
    processor = MllmMsrProcessor.from_backbone(base)
    model = MllmMsrForRecommendation.from_backbone(base, processor=processor, dtype=torch.float32)
    for part in (model, processor):
        part.save_pretrained(run.model)
    assert isinstance(load_recommender(run), ServedRecommender)
    model.config.interaction = "late"
    model.config.save_pretrained(run.model)
    with pytest.raises(ValueError, match="is `late`, and servers answer whole prompts only"):
        load_recommender(run)


def test_a_joint_model_keeps_no_items_in_eight_bits(backbone, tmp_path):
    run = RunFolder.create(tmp_path / "run", tiny_recipe({"evaluation.cache_dtype": "int8"}))
    MllmMsrForRecommendation.from_backbone(str(backbone("llava"))).config.save_pretrained(run.model)
    with pytest.raises(ValueError, match=r"evaluation.cache_dtype: the model of .* is `joint` and keeps no items"):
        load_recommender(run)
