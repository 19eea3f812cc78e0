"""Scores that are kept, so that nothing is scored twice: where they lie, by all that they depend on."""

import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import polars as pl

from mllm_msr.evaluation.scorers import ModelScorer, ModelView, Scorer
from mllm_msr.processing.examples import run_contexts
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import SCORES, Table
from mllm_msr.records.sections import OURS
from mllm_msr.records.storage import digest, file_digest, write_text

logger = logging.getLogger(__name__)
MODEL_STAGES = ("prepare", "summarize users", "train")  # whose output scores of our model depend on


def scores_folder(run: RunFolder, stages: Sequence[str]) -> Path:
    """Where the scores are kept of the variants that read some stages."""
    # what is trained only now, sequential baselines, is trained as the head is
    head = None if {"train", "head"} & set(stages) else asdict(run.recipe.head)
    return run.scores / digest([run.key(stage) for stage in stages], run.recipe.evaluation.facts(), head)


def kept(table: Table, path: Path, make: Callable[[], pl.DataFrame]) -> pl.DataFrame:
    """What ``path`` holds; made and written first if it is not there, is damaged, or was kept as something else.

    By the seal beside it, of its content and its name, a file is known: one that a disk has changed may still be read,
    and one of another variant has the same columns.
    """
    seal = path.with_suffix(".seal")
    if path.is_file():
        try:
            frame = table.read(path)
        except ValueError as error:
            logger.warning("%s: it is made again", error)
        else:
            if not seal.is_file() or seal.read_text(encoding="utf-8") == _seal(path):  # none: of an earlier release
                return frame
            logger.warning("%s is not as it was kept under this name: it is made again", path)
    seal.unlink(missing_ok=True)
    table.write(make(), path)
    write_text(seal, _seal(path))
    return table.read(path)


def _seal(path: Path) -> str:
    return digest(path.name, file_digest(path))


@dataclass(frozen=True)
class Parts:
    """How a table is made part by part: ``size`` of the ``tasks`` at a time by ``make``."""

    tasks: pl.DataFrame
    size: int
    make: Callable[[pl.DataFrame], pl.DataFrame]


def kept_parts(table: Table, path: Path, plan: Callable[[], Parts]) -> pl.DataFrame:
    """As :func:`kept`, of what is made and saved part by part; ``plan`` is called if something is missing."""
    folder = path.with_suffix(".parts")

    def make() -> pl.DataFrame:
        parts = plan()
        if len(parts.tasks) <= parts.size:
            return parts.make(parts.tasks)
        made = []
        for begin in range(0, len(parts.tasks), parts.size):
            some = parts.tasks[begin : begin + parts.size]
            part = folder / f"{path.stem}-{begin}-{begin + len(some)}.parquet"
            made.append(kept(table, part, partial(parts.make, some)))
        return pl.concat(made)

    frame = kept(table, path, make)
    shutil.rmtree(folder, ignore_errors=True)
    return frame


def kept_scores(folder: Path, name: str, scorer: Callable[[], Scorer], tasks: pl.DataFrame) -> pl.DataFrame:
    """A variant's scores of all tasks, saved part by part, so that a killed evaluation goes on.

    ``scorer`` makes what scores them; it is called if something is missing.
    """

    def plan() -> Parts:
        maker = scorer()
        shown = maker.shown(tasks)
        variant = pl.lit(name).alias("variant")
        return Parts(shown, maker.part_size or len(shown), lambda part: maker.score(part).select(variant, pl.all()))

    return kept_parts(SCORES, folder / f"{name}.parquet", plan)


def answer_scores(run: RunFolder) -> pl.DataFrame:
    """The trained model's scores of the evaluated tasks: what the variant ``mllm_msr`` has, or will find."""
    with ExitStack() as held:
        return kept_scores(
            scores_folder(run, MODEL_STAGES),
            OURS,
            lambda: held.enter_context(ModelScorer(ModelView(), run)),
            run_contexts(run, run.recipe.evaluation.split),
        )
