"""The model in the middle of training, asked to rank: metrics of the validation tasks at every evaluation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import polars as pl
import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback

from mllm_msr.data.catalogue import Catalogue
from mllm_msr.evaluation.metrics import user_columns
from mllm_msr.evaluation.scoring import score_with_model
from mllm_msr.modeling.ranking import Recommender

Score = Callable[[pl.DataFrame, Catalogue], pl.DataFrame]


class RankingCallback(TrainerCallback):
    """Ranks every task's whole candidate list whenever the trainer evaluates.

    The metrics of ``metrics.METRICS`` go, as ``eval_auc``, ``eval_hr@5`` and so on, through ``trainer.log`` to whatever
    ``report_to`` names, and among the evaluation's own, so that ``metric_for_best_model`` and early stopping know them.
    Callbacks that read them must be added after this one.

    Args:
        trainer: of a recommender, or of a PEFT model around one, whose ``processing_class`` is its processor.
        tasks: ``user_id``, ``preference``, ``recent``, ``candidates``, ``labels``, see :func:`task_lists`.
        items: the catalogue.
    """

    def __init__(self, trainer: Trainer, tasks: pl.DataFrame, items: Catalogue) -> None:
        self.trainer, self.tasks, self.items = trainer, tasks, items

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with scoring(self.trainer) as score:
            frame = score(self.tasks, self.items)
        columns = user_columns(frame["user_id"], frame["label"], frame["logit"])
        found = {f"eval_{name}": float(np.nanmean(column)) for name, column in columns.items()}
        self.trainer.log(dict(found))
        kwargs["metrics"].update(found)


@contextmanager
def scoring(trainer: Trainer) -> Iterator[Score]:
    """``evaluation.score_with_model`` by the model in training, which is left as it was: (tasks, items) to scores.

    To be called on every process, each of which scores its share and gets them all. Where each holds only a part of the
    weights, the main process gathers them and scores alone.
    """
    accelerator, alone, whole = trainer.accelerator, sharded(trainer), whole_model(trainer)
    model, main = accelerator.unwrap_model(trainer.model), accelerator.is_main_process
    training = model.training
    if alone and main:
        whole.to(accelerator.device)
    plain = whole.get_base_model() if isinstance(whole, PeftModel) else whole
    recommender = Recommender(plain, trainer.processing_class)

    def score(tasks: pl.DataFrame, items: Catalogue) -> pl.DataFrame:
        if alone:
            (frame,) = broadcast_object_list([score_with_model(recommender, tasks, items) if main else None])
            return frame
        first, last = (tasks.height * (accelerator.process_index + k) // accelerator.num_processes for k in (0, 1))
        share = [score_with_model(recommender, tasks[first:last], items)] if last > first else []
        return pl.concat(gather_object(share))

    with trainer.compute_loss_context_manager():  # the precision of training
        yield score
    model.train(training)


def whole_model(trainer: Trainer) -> Any:
    """The model in training; where processes hold parts of it, a copy of all its weights on the main process."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if not sharded(trainer):
        return model
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.accelerator.is_main_process:
        return model
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.device("meta"):  # the weights come from the state
        whole: Any = type(plain)(plain.config)
        whole.generation_config = plain.generation_config
        if isinstance(model, PeftModel):
            whole = get_peft_model(whole, model.peft_config["default"])
    whole.load_state_dict(state, assign=True)
    for name, buffer in model.named_buffers():  # of which the state has but some
        parent, _, leaf = name.rpartition(".")
        setattr(whole.get_submodule(parent), leaf, buffer.clone())
    base: Any = whole.get_base_model() if isinstance(whole, PeftModel) else whole
    base.tie_weights()
    return whole


def sharded(trainer: Trainer) -> bool:
    """Whether each process holds only a part of the weights: FSDP, or DeepSpeed ZeRO-3."""
    plugin = trainer.accelerator.state.deepspeed_plugin
    return trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)


def task_lists(rows: Dataset) -> pl.DataFrame:
    """Rows of the ``sft`` table, one a candidate, as one row a task: ``candidates`` and ``labels`` are lists."""
    columns = ["task_id", "user_id", "preference", "recent", "item_id", "label"]
    frame: Any = rows.select_columns(columns).to_polars()
    context = pl.col("user_id", "preference", "recent").first()
    lists = {"candidates": pl.col("item_id"), "labels": pl.col("label")}
    return frame.group_by("task_id", maintain_order=True).agg(context, **lists)


def first_tasks(rows: Dataset, n_rows: int | None) -> Dataset:
    """The first ``n_rows`` rows and those that complete the last one's task; all if ``None``."""
    tasks = list(rows["task_id"])
    end = len(tasks) if n_rows is None else min(n_rows, len(tasks))
    while 0 < end < len(tasks) and tasks[end] == tasks[end - 1]:
        end += 1
    return rows.select(range(end))
