"""Scores that are kept, so that nothing is scored twice: where they lie, by all that they depend on."""

import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

import polars as pl

from mllm_msr.evaluation.scorers import ModelScorer, ModelView, Scorer
from mllm_msr.processing.examples import run_contexts
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import SCORES, Table
from mllm_msr.records.sections import OURS
from mllm_msr.records.storage import digest

logger = logging.getLogger(__name__)
MODEL_STAGES = ("prepare", "summarize users", "train")  # whose output scores of our model depend on


def scores_folder(run: RunFolder, stages: Sequence[str]) -> Path:
    """Where the scores are kept of the variants that read some stages."""
    # what is trained only now, sequential baselines, is trained as the head is
    head = None if {"train", "head"} & set(stages) else asdict(run.recipe.head)
    return run.scores / digest([run.key(stage) for stage in stages], run.recipe.evaluation.facts(), head)


def kept(table: Table, path: Path, make: Callable[[], pl.DataFrame], variant: str | None = None) -> pl.DataFrame:
    """What ``path`` holds; made and written first if it is not there, is damaged, or has another ``variant``."""
    if path.is_file():
        try:
            frame = table.read(path)
        except ValueError as error:
            logger.warning("%s: it is made again", error)
        else:
            if variant is None or frame["variant"].unique().to_list() == [variant]:
                return frame
            logger.warning("%s does not hold the scores of %s: it is made again", path, variant)
    table.write(make(), path)
    return table.read(path)


def kept_scores(folder: Path, name: str, scorer: Callable[[], Scorer], tasks: pl.DataFrame) -> pl.DataFrame:
    """A variant's scores of all tasks, saved part by part, so that a killed evaluation goes on.

    ``scorer`` makes what scores them; it is called if something is missing.
    """
    parts = folder / f"{name}.parts"

    def score() -> pl.DataFrame:
        maker = scorer()
        shown, size = maker.shown(tasks), maker.part_size or len(tasks)

        def scored(part: pl.DataFrame) -> pl.DataFrame:
            return maker.score(part).select(pl.lit(name).alias("variant"), pl.all())

        if len(shown) <= size:
            return scored(shown)
        made = []
        for begin in range(0, len(shown), size):
            part = shown[begin : begin + size]
            made.append(kept(SCORES, parts / f"{begin}-{begin + len(part)}.parquet", partial(scored, part), name))
        return pl.concat(made)

    scores = kept(SCORES, folder / f"{name}.parquet", score, name)
    shutil.rmtree(parts, ignore_errors=True)
    return scores


def answer_scores(run: RunFolder) -> pl.DataFrame:
    """The trained model's scores of the evaluated tasks: what the variant ``mllm_msr`` has, or will find."""
    with ExitStack() as held:
        return kept_scores(
            scores_folder(run, MODEL_STAGES),
            OURS,
            lambda: held.enter_context(ModelScorer(ModelView(), run)),
            run_contexts(run, run.recipe.evaluation.split),
        )
