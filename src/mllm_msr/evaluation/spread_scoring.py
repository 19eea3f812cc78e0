"""Scores by workers of a cluster, each with the model and the catalogue of a run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mllm_msr.modeling.inputs import Candidate, User
from mllm_msr.modeling.late_ranking import Scores
from mllm_msr.modeling.ranking import Recommender
from mllm_msr.processing.workers import Folder, Workers
from mllm_msr.records.recipe import backbone_path
from mllm_msr.records.run import RunFolder

USERS = 256  # of a piece, however many workers there are: scores do not depend on them
PARTS = ("config.yaml", "data", "summaries", "vectors", "model", "head", "cache/late_items")


@dataclass(frozen=True)
class Question:
    """Some users and their candidates by id; ``first`` is the place of the first user among all."""

    first: int
    users: Sequence[User]
    candidates: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Logits:
    """The logits of a question's candidates, user by user."""

    first: int
    rows: list[np.ndarray]


def run_folders(run: RunFolder, parts: Sequence[str] = PARTS) -> list[Folder]:
    """What workers read of a run, and its backbone where that is a folder."""
    backbone = Path(backbone_path(run.recipe.training.get("model_name_or_path") or ""))
    own = Folder(run.path.resolve(), tuple(parts))
    return [own, Folder(backbone.resolve())] if backbone.name and backbone.is_dir() else [own]


def run_at(run: RunFolder, path: Path, *backbones: Path) -> RunFolder:
    """The run where a worker has it: the paths are those of :func:`run_folders`."""
    recipe = run.recipe
    for backbone in backbones:
        recipe = replace(recipe, training={**recipe.training, "model_name_or_path": str(backbone)})
    return RunFolder(path, recipe)


def answer(recommender: Recommender, catalogue: Mapping[str, Candidate]) -> Callable[[Question], Logits]:
    """What answers questions."""
    return lambda asked: Logits(asked.first, recommender.score(asked.users, asked.candidates, catalogue))


class SpreadRecommender(Recommender):
    """Ranks as :class:`Recommender` does, by workers that have the catalogue themselves."""

    def __init__(self, workers: Workers[Question, Logits]) -> None:
        self.cache, self.plan = None, _SpreadPlan(workers)


class _SpreadPlan:
    """See :class:`SpreadRecommender`."""

    def __init__(self, workers: Workers[Question, Logits]) -> None:
        self.workers = workers

    def scores(
        self, users: Sequence[User], rows: Sequence[np.ndarray], names: Sequence[str], catalogue: Mapping[str, Any]
    ) -> Iterator[Scores]:
        """The logits of all pairs, a question at a time."""
        lists = {id(row): row for row in rows}  # users of one list, as of a whole catalogue, share it
        named = {key: [names[item] for item in row] for key, row in lists.items()}
        questions = (
            Question(first, users[first : first + USERS], [named[id(row)] for row in rows[first : first + USERS]])
            for first in range(0, len(users), USERS)
        )
        for logits in self.workers.map(questions):
            for user, row in enumerate(logits.rows, logits.first):
                yield Scores(np.full(len(row), user), np.arange(len(row)), row)
