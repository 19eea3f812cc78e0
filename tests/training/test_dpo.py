"""training/dpo.py: what a pair is, that a right answer gains on the wrong one, and what is saved."""

import json
import math
import shutil

import pytest
import torch

from mllm_msr import MllmMsrForRecommendation, MllmMsrProcessor
from mllm_msr.training import dpo, sft
from mllm_msr.training.collators import AnswerCollator
from mllm_msr.training.saving import save_recommender


@pytest.fixture(scope="module")
def fine_tuned(small_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo") / "sft"
    more = {"max_steps": 2, "per_device_train_batch_size": 4, "eval_strategy": "no", "save_strategy": "no"}
    sft.main(*sft.parse([], **small_run.flags(folder, **more)))
    return folder


def flags(run, model, output, **more):
    return {
        "dataset_name": str(run.folder),
        "model_name_or_path": str(model),
        "output_dir": str(output),
        "dtype": "float32",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_peft": True,
        "learning_rate": 2e-3,
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "report_to": "none",
        "eval_strategy": "steps",
        "eval_steps": 4,
        "max_eval_samples": 21,
        "hard_negatives": 1,
        "hard_negatives_pool": 3,
        **more,
    }


def test_a_pair_is_one_prompt_with_both_answers(small_run):
    processor = small_run.processor
    rows = list(small_run.table("sft", "train").select(range(4)))
    batch = dpo.PreferenceCollator(AnswerCollator(processor, small_run.items))(rows)
    assert "labels" not in batch
    assert batch["completion_mask"].sum(1).tolist() == [1] * 8
    chosen, rejected = batch["input_ids"].chunk(2)
    assert torch.equal(chosen[:, :-1], rejected[:, :-1])
    yes, no = (processor.answer_token_ids[side][0] for side in ("yes", "no"))
    labels = [row["label"] for row in rows]
    assert set(labels) == {0, 1}
    assert chosen[:, -1].tolist() == [yes if label else no for label in labels]
    assert rejected[:, -1].tolist() == [no if label else yes for label in labels]


@pytest.mark.parametrize("use_peft", [True, False])
def test_right_answers_gain_and_the_result_is_a_recommender(small_run, fine_tuned, tmp_path, use_peft):
    more = {"use_peft": use_peft, "max_steps": 12, "per_device_train_batch_size": 16, "eval_steps": 12}
    trainer = dpo.train(*dpo.parse([], **flags(small_run, fine_tuned, tmp_path, **more)))
    save_recommender(trainer, tmp_path / "model")
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # it begins as its own reference
    assert sum(entry["loss"] for entry in logged[-4:]) / 4 < math.log(2) - 0.05
    assert logged[-1]["rewards/margins"] > 0
    assert any("eval_auc" in entry for entry in trainer.state.log_history)
    before, after = (
        MllmMsrForRecommendation.from_pretrained(folder).state_dict() for folder in (fine_tuned, tmp_path / "model")
    )
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and (not use_peft or all("language_model.layers" in name for name in moved))
    assert (
        MllmMsrProcessor.from_pretrained(tmp_path / "model").prompts["recommendation"]
        == (small_run.run.recipe.prompts["recommendation"])
    )


def test_an_interrupted_training_goes_on(small_run, fine_tuned, tmp_path):
    whole = dpo.train(*dpo.parse([], **flags(small_run, fine_tuned, tmp_path)))
    ends = {name: value.clone() for name, value in whole.model.state_dict().items()}
    (tmp_path / "checkpoint-4/trainer_state.json").unlink()
    resumed = dpo.train(*dpo.parse([], **flags(small_run, fine_tuned, tmp_path)))
    assert all(torch.equal(ends[name], value) for name, value in resumed.model.state_dict().items())


def test_training_works_under_the_defaults_of_trl_alone(small_run, fine_tuned, tmp_path):
    names = {"model_name_or_path": str(fine_tuned), "dataset_name": str(small_run.folder), "output_dir": str(tmp_path)}
    assert dpo.train(*dpo.parse([], **names, max_steps=1)).state.global_step == 1


def test_a_late_recommender_is_refused(small_run, fine_tuned, tmp_path):
    late = shutil.copytree(fine_tuned, tmp_path / "late")
    config = json.loads((late / "config.json").read_text(encoding="utf-8"))
    (late / "config.json").write_text(json.dumps({**config, "interaction": "late"}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"late is a late recommender; dpo\.py trains joint ones"):
        dpo.train(*dpo.parse([], **flags(small_run, late, tmp_path / "out")))


def test_an_unknown_flag_is_named(small_run, fine_tuned, tmp_path):
    with pytest.raises(ValueError, match="positive_weight"):
        dpo.parse([], **flags(small_run, fine_tuned, tmp_path, positive_weight="2"))
