"""Ranking in the middle of training: the right figures, seen by whoever decides on them, and nothing else changed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from mllm_msr.evaluation.metrics import METRICS, ranking_metrics
from mllm_msr.evaluation.scoring import score_with_model
from mllm_msr.modeling.modeling_mllm_msr import MllmMsrForRecommendation
from mllm_msr.modeling.ranking import Recommender
from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor
from mllm_msr.training import sft
from mllm_msr.training.callbacks import RankingCallback
from mllm_msr.training.data import first_tasks, task_lists
from mllm_msr.training.saving import save_recommender


@dataclass
class Evaluated:
    """A training that ranked after its second and its fourth step, and how it was asked for."""

    trainer: Trainer
    folder: Path
    flags: dict[str, Any]

    @property
    def logged(self) -> dict[int, dict[str, float]]:
        return figures(self.trainer)

    @property
    def best(self) -> int:
        """The step of the better figures."""
        return max(self.logged, key=lambda step: (self.logged[step]["eval_mrr@5"], -step))


@pytest.fixture(scope="module")
def evaluated(small_run, tmp_path_factory):
    """Four steps, the better of whose two checkpoints is kept."""
    folder = tmp_path_factory.mktemp("evaluated")
    more = {
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "max_eval_samples": 50,
        "metric_for_best_model": "eval_mrr@5",
        "load_best_model_at_end": True,
        "lora_dropout": 0.2,  # what draws random numbers would show
        "report_to": "none",
    }
    flags = small_run.flags(folder, **more)
    trainer = sft.train(*sft.parse([], **flags))
    save_recommender(trainer, folder / "model")
    return Evaluated(trainer, folder, flags)


def figures(trainer: Trainer) -> dict[int, dict[str, float]]:
    return {entry["step"]: entry for entry in trainer.state.log_history if "eval_auc" in entry}


def test_the_metrics_are_those_of_whole_candidate_lists(small_run, evaluated):
    logged = evaluated.logged
    assert set(logged) == {2, 4} and {f"eval_{name}" for name in METRICS} <= logged[2].keys()
    rows = first_tasks(small_run.table("sft", "validation"), 50)
    assert len(rows) == 63  # the third task of 21 candidates is begun, so it is completed
    model = MllmMsrForRecommendation.from_pretrained(evaluated.folder / "model")
    recommender = Recommender(model, MllmMsrProcessor.from_pretrained(evaluated.folder / "model"))
    scores = score_with_model(recommender, task_lists(rows), small_run.items)
    assert scores["item_id"].to_list() == rows["item_id"][:]
    expected = ranking_metrics(scores["user_id"], scores["label"], scores["logit"], n_bootstrap=10)
    for name in METRICS:
        assert logged[evaluated.best][f"eval_{name}"] == pytest.approx(expected[name]["value"], abs=1e-6)


def test_the_best_checkpoint_is_chosen_by_them(evaluated):
    state = evaluated.trainer.state
    assert state.best_metric == evaluated.logged[evaluated.best]["eval_mrr@5"]
    assert state.best_model_checkpoint == str(evaluated.folder / f"checkpoint-{evaluated.best}")


def test_with_and_without_ranking_the_weights_end_alike(evaluated, tmp_path):
    more = {"output_dir": str(tmp_path), "eval_steps": 3}
    more |= {"load_best_model_at_end": False, "metric_for_best_model": None}
    trainer = sft.train(*sft.parse([], **evaluated.flags | more))
    assert set(figures(trainer)) == {3, 4}
    ranked = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.remove_callback(RankingCallback)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not figures(trainer) and trainer.state.global_step == 4
    plain = trainer.model.state_dict()
    assert all(torch.equal(ranked[name], plain[name]) for name in plain)


def test_ranking_leaves_the_model_as_it_was(evaluated):
    trainer = evaluated.trainer
    callback = next(one for one in trainer.callback_handler.callbacks if isinstance(one, RankingCallback))
    trainer.model.train()
    before = torch.get_rng_state()
    metrics: dict[str, float] = {}
    callback.on_evaluate(trainer.args, trainer.state, trainer.control, metrics=metrics)
    assert metrics.keys() == {f"eval_{name}" for name in METRICS}
    assert torch.equal(before, torch.get_rng_state())
    assert all(module.training for module in trainer.model.modules())


def test_training_stops_early_by_them(evaluated, tmp_path):
    more = {"output_dir": str(tmp_path), "early_stopping_patience": 1, "learning_rate": 0.0, "max_steps": 20}
    trainer = sft.train(*sft.parse([], **evaluated.flags | more))
    assert trainer.state.global_step == 4  # nothing is learnt, so the second evaluation is no better


def test_reports_get_them(evaluated, tmp_path):
    """TensorBoard, W&B and trackio learn everything by ``on_log``."""
    heard = []

    class Listener(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            heard.append(logs.get("eval_auc"))

    trainer = sft.train(*sft.parse([], **evaluated.flags | {"output_dir": str(tmp_path), "max_steps": 2}))
    trainer.add_callback(Listener())
    trainer.evaluate()
    assert [value for value in heard if value is not None] == [figures(trainer)[2]["eval_auc"]]
