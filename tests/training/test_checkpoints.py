"""Checkpoints of whole weights: what is saved under other names than it has in memory is read back all the same."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from mllm_msr.modeling.modeling_mllm_msr import MllmMsrForRecommendation
from mllm_msr.training import sft


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name].cpu(), theirs[name].cpu()) for name in theirs)


@pytest.fixture(scope="module")
def trained(small_run, tmp_path_factory):
    """All weights, four steps, of whose checkpoints the first is to be kept: the greatest loss."""
    more = {
        "use_peft": False,
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "max_eval_samples": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
    }
    flags = small_run.flags(tmp_path_factory.mktemp("whole"), **more)
    return sft.train(*sft.parse([], **flags)), flags


def test_the_best_of_whole_weights_is_kept(trained):
    trainer, _ = trained
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-2")
    kept, last = trainer.model.state_dict(), best.replace("checkpoint-2", "checkpoint-4")
    assert equal(kept, MllmMsrForRecommendation.from_pretrained(best, dtype="auto").state_dict())
    assert not equal(kept, MllmMsrForRecommendation.from_pretrained(last, dtype="auto").state_dict())


def test_whole_weights_resume_to_those_of_an_uninterrupted_training(trained, tmp_path):
    trainer, flags = trained
    shutil.copytree(trainer.args.output_dir, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoint-4")
    first = (tmp_path / "cut/checkpoint-2/model.safetensors").stat()
    sft.train(*sft.parse([], **flags | {"output_dir": str(tmp_path / "cut"), "load_best_model_at_end": False}))
    weights = "checkpoint-4/model.safetensors"
    assert equal(load_file(tmp_path / "cut" / weights), load_file(f"{trainer.args.output_dir}/{weights}"))
    assert (tmp_path / "cut/checkpoint-2/model.safetensors").stat().st_mtime_ns == first.st_mtime_ns  # not begun anew
