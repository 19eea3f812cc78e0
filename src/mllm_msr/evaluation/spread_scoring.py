"""Scores by workers of a cluster, each with the model and the catalogue of a run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mllm_msr.modeling.inputs import Candidate, User
from mllm_msr.modeling.late_ranking import Scores
from mllm_msr.modeling.ranking import Recommender
from mllm_msr.processing.open_workers import open_workers
from mllm_msr.processing.workers import Folder, Workers
from mllm_msr.records.recipe import backbone_path
from mllm_msr.records.run import RunFolder

USERS = 256  # of a piece, however many workers there are: scores do not depend on them
PARTS = ("config.yaml", "data", "summaries", "vectors", "model", "head")


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


class ItemIndex(Protocol):
    """What a late model keeps of items, in a folder."""

    folder: Path

    def add(self, names: Sequence[str]) -> bool:
        """Have what is missing of these items computed; whether any was."""
        ...


def run_folders(run: RunFolder, parts: Sequence[str] = PARTS, index: Path | None = None) -> list[Folder]:
    """What workers read of a run; then the folder of an index, if there is one; then the backbone, if it is a folder.

    Folders are copied each for itself: an index that has grown costs no further copy of the model.
    """
    backbone = Path(backbone_path(run.recipe.training.get("model_name_or_path") or ""))
    folders = [Folder(run.path.resolve(), tuple(parts))]
    if index:
        folders.append(Folder(index.resolve()))
    if backbone.name and backbone.is_dir():
        folders.append(Folder(backbone.resolve()))
    return folders


def run_at(run: RunFolder, indexed: bool, path: Path, *others: Path) -> tuple[RunFolder, Path | None]:
    """The run and its index where a worker has them; the paths are those of :func:`run_folders`."""
    index, backbones = (others[0], others[1:]) if indexed else (None, others)
    recipe = run.recipe
    for backbone in backbones:
        recipe = replace(recipe, training={**recipe.training, "model_name_or_path": str(backbone)})
    return RunFolder(path, recipe), index


def answer(recommender: Recommender, catalogue: Mapping[str, Candidate]) -> Callable[[Question], Logits]:
    """What answers questions."""
    return lambda asked: Logits(asked.first, recommender.score(asked.users, asked.candidates, catalogue))


class SpreadRecommender(Recommender):
    """Ranks as :class:`Recommender` does, by workers that have the catalogue themselves.

    Args:
        work: makes what answers questions, from the paths of :func:`run_folders`.
        index: of a late model: the items of a call are put there before it is scored, each once for all workers.
    """

    def __init__(
        self, run: RunFolder, work: Callable[..., Callable[[Question], Logits]], index: ItemIndex | None
    ) -> None:
        self.spread = _SpreadPlan(run, work, index)
        self.cache, self.plan = None, self.spread

    def __enter__(self) -> "SpreadRecommender":
        return self

    def __exit__(self, *error: object) -> None:
        self.spread.held.close()


class _SpreadPlan:
    """See :class:`SpreadRecommender`."""

    def __init__(
        self, run: RunFolder, work: Callable[..., Callable[[Question], Logits]], index: ItemIndex | None
    ) -> None:
        self.run, self.work, self.index = run, work, index
        self.held = ExitStack()
        self.workers: Workers[Question, Logits] | None = None

    def scores(
        self, users: Sequence[User], rows: Sequence[np.ndarray], names: Sequence[str], catalogue: Mapping[str, Any]
    ) -> Iterator[Scores]:
        """The logits of all pairs, a question at a time."""
        workers = self._workers_for(names if self.workers is None else list(catalogue))
        lists = {id(row): row for row in rows}  # users of one list, as of a whole catalogue, share it
        named = {key: [names[item] for item in row] for key, row in lists.items()}
        questions = (
            Question(first, users[first : first + USERS], [named[id(row)] for row in rows[first : first + USERS]])
            for first in range(0, len(users), USERS)
        )
        for logits in workers.map(questions):
            for user, row in enumerate(logits.rows, logits.first):
                yield Scores(np.full(len(row), user), np.arange(len(row)), row)

    def _workers_for(self, names: Sequence[str]) -> Workers[Question, Logits]:
        """Workers that have read an index with these items; once they have, later calls may as well ask for all."""
        if self.index and self.index.add(names):
            self.held.close()
            self.workers = None
        if self.workers is None:
            folders = run_folders(self.run, index=self.index.folder if self.index else None)
            self.workers = self.held.enter_context(open_workers(self.run.cluster, self.work, folders))
        return self.workers
