"""What a training reads: the tables of a derived data set, wherever it is, as rows that collators understand."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from datasets import Dataset
from transformers import TrainingArguments

from mllm_msr.data.catalogue import Catalogue
from mllm_msr.data.hub_tables import load_table, pinned_source
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import CUT_INTERACTIONS
from mllm_msr.training.arguments import ExampleArguments
from mllm_msr.training.negatives import EpochNegatives, NegativeOptions


@dataclass
class TrainingData:
    """The examples and the catalogue of a training.

    Args:
        items: the catalogue.
        examples: the ``sft`` table of the training split, as it is in every epoch.
        training: the rows trained on: ``examples``, or those with ``negatives``.
        validation: the rows evaluated during training, if any are.
        negatives: of the epoch at hand, where each has its own.
        cut: ``user_id`` and ``item_id`` of what ``max_history`` has cut off the histories, where the data set has it.
    """

    items: Catalogue
    examples: Dataset
    training: Dataset
    validation: Dataset | None
    negatives: EpochNegatives | None
    cut: pl.DataFrame

    @classmethod
    def load(cls, arguments: ExampleArguments, training_args: TrainingArguments) -> "TrainingData":
        """The data set that the flags name: a run's folder, a folder as published, or one of the Hub."""
        source = arguments.dataset_name or ""
        if (Path(source) / "config.yaml").is_file():
            RunFolder.open(Path(source)).require("summarize users")
        source = pinned_source(source)
        items = Catalogue(load_table(source, "items", "train"))
        examples = load_table(source, "sft", arguments.dataset_train_split)
        cut_file = CUT_INTERACTIONS.path(Path(source))
        cut = CUT_INTERACTIONS.read(cut_file) if cut_file.is_file() else CUT_INTERACTIONS.frame()
        negatives = validation = None
        if arguments.samples_negatives:
            options = NegativeOptions(
                random=arguments.negatives_per_positive,
                hard=arguments.hard_negatives,
                pool=arguments.hard_negatives_pool,
                popular=arguments.popular_negatives,
                seed=training_args.seed,
            )
            negatives = EpochNegatives(examples, load_table(source, "tasks", "all"), items, options, cut)
        if training_args.eval_strategy != "no":
            rows = load_table(source, "sft", arguments.dataset_test_split)
            validation = first_tasks(rows, arguments.max_eval_samples)
        return cls(items, examples, negatives.dataset() if negatives else examples, validation, negatives, cut)

    def task_ids(self) -> list[str]:
        """The task of each row of ``training``."""
        return self.negatives.task_ids() if self.negatives else self.examples["task_id"][:]

    def answer_counts(self) -> tuple[int, int]:
        """How many rows of an epoch are answered Yes, and how many No."""
        yes = sum(self.examples["label"])
        return yes, len(self.training) - yes


def first_tasks(rows: Dataset, n_rows: int | None) -> Dataset:
    """The first ``n_rows`` rows and those that complete the last one's task; all if ``None``."""
    tasks = list(rows["task_id"])
    end = len(tasks) if n_rows is None else min(n_rows, len(tasks))
    while 0 < end < len(tasks) and tasks[end] == tasks[end - 1]:
        end += 1
    return rows.select(range(end))


def task_lists(rows: Dataset) -> pl.DataFrame:
    """Rows of the ``sft`` table, one for each candidate, as one row a task: ``candidates`` and ``labels`` are lists."""
    columns = ["task_id", "user_id", "preference", "recent", "item_id", "label"]
    frame: Any = rows.select_columns(columns).to_polars()
    context = pl.col("user_id", "preference", "recent").first()
    lists = {"candidates": pl.col("item_id"), "labels": pl.col("label")}
    return frame.group_by("task_id", maintain_order=True).agg(context, **lists)


def task_rows(rows: Dataset, task_ids: Sequence[str]) -> Dataset:
    """``rows`` of the ``sft`` table with one row a task: ``item_id`` and ``label`` become lists.

    What a row holds is looked up when it is asked for, so the rows may change with the epoch.

    Args:
        rows: one for each candidate.
        task_ids: the task of each of the rows.
    """
    members: dict[str, list[int]] = {}
    for place, task in enumerate(task_ids):
        members.setdefault(task, []).append(place)
    tasks = list(members.values())

    def look_up(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {}
        for places in (tasks[number] for number in batch["task"]):
            candidates = rows[places]
            for name in ("task_id", "user_id", "preference", "recent"):
                columns.setdefault(name, []).append(candidates[name][0])
            for name in ("item_id", "label"):
                columns.setdefault(name, []).append(list(candidates[name]))
        return columns

    return Dataset.from_dict({"task": range(len(tasks))}).with_transform(look_up)
