"""Checkpoints of whole weights: what is saved under other names than it has in memory is read back all the same."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from mllm_msr.modeling.modeling_mllm_msr import MllmMsrForRecommendation
from mllm_msr.training import sft
from mllm_msr.training.checkpoints import Patience
from mllm_msr.training.whole_checkpoints import last_checkpoint


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


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("spoil", [torn, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_checkpoint_that_is_not_whole_is_passed_over(trained, tmp_path, name, spoil):
    shutil.copytree(trained[0].args.output_dir, tmp_path, dirs_exist_ok=True)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    spoil(tmp_path / "checkpoint-4" / name)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_one_that_a_flag_names_must_be_whole(trained, tmp_path):
    trainer, flags = trained
    named = shutil.copytree(f"{trainer.args.output_dir}/checkpoint-2", tmp_path / "checkpoint-2")
    torn(named / "scheduler.pt")
    with pytest.raises(ValueError, match=r"--resume_from_checkpoint .*checkpoint-2: scheduler\.pt has [\d,]+ bytes of"):
        sft.train(*sft.parse([], **flags | {"output_dir": str(tmp_path), "resume_from_checkpoint": str(named)}))


def test_one_that_a_flag_names_must_be_one(trained, tmp_path):
    with pytest.raises(ValueError, match=r"is no checkpoint, as it has no trainer_state\.json"):
        sft.train(*sft.parse([], **trained[1] | {"resume_from_checkpoint": str(tmp_path)}))


def test_checkpoints_of_other_settings_are_not_gone_on_from(trained):
    with pytest.raises(ValueError, match=r"of another training \(--learning_rate 0\.001, not 0\.1\): give another"):
        sft.train(*sft.parse([], **trained[1] | {"learning_rate": 0.1}))


def test_a_training_that_has_ended_takes_no_further_step(small_run, tmp_path):
    """As when it is killed while the model is saved: with a constant rate, a step more would be seen."""
    more = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2, "lr_scheduler_type": "constant"}
    more |= {"eval_strategy": "no", "learning_rate": 1e-3}
    flags = small_run.flags(tmp_path, **more)
    ends = {name: value.clone() for name, value in sft.train(*sft.parse([], **flags)).model.state_dict().items()}
    again = sft.train(*sft.parse([], **flags))
    assert again.state.global_step == 2 and equal(ends, again.model.state_dict())
    with pytest.raises(ValueError, match="has a checkpoint of step 2, beyond the 1 asked for"):
        sft.train(*sft.parse([], **flags | {"max_steps": 1}))


def test_early_stopping_has_not_forgotten_how_long_nothing_became_better(small_run, tmp_path):
    more = {"max_steps": 9, "save_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.0}
    more |= {"eval_strategy": "steps", "eval_steps": 1, "max_eval_samples": 2, "early_stopping_patience": 2}
    more |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    flags = small_run.flags(tmp_path, **more)
    assert sft.train(*sft.parse([], **flags)).state.global_step == 3
    assert sft.train(*sft.parse([], **flags)).state.global_step == 3  # killed after its last checkpoint
    shutil.rmtree(tmp_path / "checkpoint-3")
    assert sft.train(*sft.parse([], **flags)).state.global_step == 3  # killed before it


def test_evaluations_before_its_begin_do_not_count():
    patience, args = Patience(1, begin=0.5), TrainingArguments(metric_for_best_model="auc", greater_is_better=True)
    state, control = TrainerState(max_steps=4, best_metric=0.9), TrainerControl()
    for state.global_step in (1, 2):
        assert not control.should_training_stop
        patience.on_evaluate(args, state, control, metrics={"eval_auc": 0.5})
    assert control.should_training_stop
