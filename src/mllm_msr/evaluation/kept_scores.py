"""Scores that are kept, so that nothing is scored twice: where they lie, by all that they depend on."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import polars as pl

from mllm_msr.evaluation.scorers import ModelScorer, ModelView
from mllm_msr.processing.examples import run_contexts
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import SCORES, Table
from mllm_msr.records.sections import OURS
from mllm_msr.records.storage import digest

MODEL_STAGES = ("prepare", "summarize users", "train")  # whose output scores of our model depend on


def scores_folder(run: RunFolder, stages: Sequence[str]) -> Path:
    """Where the scores are kept of the variants that read some stages."""
    # what is trained only now, sequential baselines, is trained as the head is
    head = None if {"train", "head"} & set(stages) else asdict(run.recipe.head)
    return run.scores / digest([run.key(stage) for stage in stages], run.recipe.evaluation.facts(), head)


def kept(table: Table, path: Path, make: Callable[[], pl.DataFrame]) -> pl.DataFrame:
    """What ``path`` holds; made and written first if it is not there."""
    if not path.is_file():
        table.write(make(), path)
    return table.read(path)


def answer_scores(run: RunFolder) -> pl.DataFrame:
    """The trained model's scores of the evaluated tasks: what the variant ``mllm_msr`` has, or will find."""

    def score() -> pl.DataFrame:
        with ModelScorer(ModelView(), run) as scorer:
            scores = scorer.score(run_contexts(run, run.recipe.evaluation.split))
        return scores.select(pl.lit(OURS).alias("variant"), pl.all())

    return kept(SCORES, scores_folder(run, MODEL_STAGES) / f"{OURS}.parquet", score)
