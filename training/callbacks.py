"""The model in the middle of training, asked to rank: metrics of the validation tasks at every evaluation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import polars as pl
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from transformers import Trainer, TrainerCallback

from mllm_msr.data.catalogue import Catalogue
from mllm_msr.evaluation.metrics import user_columns
from mllm_msr.evaluation.scoring import score_with_model
from mllm_msr.modeling.ranking import Recommender
from mllm_msr.training.saving import sharded, whole_model

Score = Callable[[pl.DataFrame, Catalogue], pl.DataFrame]


class RankingCallback(TrainerCallback):
    """Ranks every task's whole candidate list whenever the trainer evaluates.

    The metrics of ``metrics.METRICS`` go, as ``eval_auc``, ``eval_hr@5`` and so on, through ``trainer.log`` to whatever
    ``report_to`` names, and among the evaluation's own, so that ``metric_for_best_model`` and early stopping know them.
    Callbacks that read them must be added after this one.

    Args:
        trainer: of a recommender, or of a PEFT model around one, whose ``processing_class`` is its processor.
        tasks: ``user_id``, ``preference``, ``recent``, ``candidates``, ``labels``, see ``data.task_lists``.
        items: the catalogue.
    """

    def __init__(self, trainer: Trainer, tasks: pl.DataFrame, items: Catalogue) -> None:
        self.trainer, self.tasks, self.items = trainer, tasks, items

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with scoring(self.trainer) as score:
            scores = score(self.tasks, self.items)
        columns = user_columns(scores["user_id"], scores["label"], scores["logit"])
        metrics = {f"eval_{name}": float(np.nanmean(column)) for name, column in columns.items()}
        self.trainer.log(dict(metrics))
        kwargs["metrics"].update(metrics)


@contextmanager
def scoring(trainer: Trainer) -> Iterator[Score]:
    """Within the block, ``scoring.score_with_model`` by the model in training: (tasks, items) to scores.

    To be called on every process, each of which scores its share and gets all scores. Where each holds only a part of
    the weights, the main process gathers them and scores alone. The model is in evaluation mode for as long.
    """
    accelerator, alone, whole = trainer.accelerator, sharded(trainer), whole_model(trainer)
    model, main = accelerator.unwrap_model(trainer.model), accelerator.is_main_process
    if alone and main:
        whole.to(accelerator.device)
    plain: Any = whole.get_base_model() if isinstance(whole, PeftModel) else whole
    processor: Any = trainer.processing_class
    was_training = model.training
    recommender = Recommender(plain, processor)

    def score(tasks: pl.DataFrame, items: Catalogue) -> pl.DataFrame:
        if alone:
            (scores,) = broadcast_object_list([score_with_model(recommender, tasks, items) if main else None])
            return scores
        first, last = (tasks.height * (accelerator.process_index + k) // accelerator.num_processes for k in (0, 1))
        share = [score_with_model(recommender, tasks[first:last], items)] if last > first else []
        return pl.concat(gather_object(share))

    try:
        with trainer.compute_loss_context_manager():  # the precision of training
            yield score
    finally:
        model.train(was_training)
