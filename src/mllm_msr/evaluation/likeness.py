"""Items ranked by how much their vectors are like those of the last items of a history; nothing is trained."""

import numpy as np
import polars as pl
import torch
from torch import Tensor

from mllm_msr.evaluation.baselines import Ranker
from mllm_msr.evaluation.coded_tasks import Array, CodedLists, CodedTasks
from mllm_msr.modeling.content_likeness import ContentLikeness, profiles

REACH = (1, 3, 5, 10, 20)  # last items of a history that may count


def likeness(validation: pl.DataFrame, items: pl.DataFrame, content: Tensor) -> "LikenessRanker":
    """A ranker whose reach is the best of ``REACH`` by NDCG@5 on the validation tasks.

    ``content``: (I, F), in the order of ``items.sort("item_id")``; the others as for
    :func:`mllm_msr.evaluation.baselines.knn`.
    """
    tasks, ranker = CodedTasks(validation, items), LikenessRanker(items, ContentLikeness.of(content))
    quality = {}
    for reach in REACH:
        ranker.likeness.reach = reach
        quality[reach] = tasks.quality(ranker.score(tasks.histories, tasks.candidates))
    ranker.likeness.reach = max(quality, key=lambda reach: quality[reach])
    return ranker


class LikenessRanker(Ranker):
    """See :func:`likeness`; a member of fusions, too."""

    def __init__(self, items: pl.DataFrame, likeness: ContentLikeness) -> None:
        super().__init__(items)
        self.likeness, self.vectors = likeness, likeness.item_vectors()

    def _profiles(self, histories: CodedLists) -> Tensor:
        recent = histories.last(self.likeness.reach)
        return profiles(self.vectors, torch.from_numpy(recent.codes), torch.from_numpy(recent.owner), len(recent))

    def score(self, histories: CodedLists, candidates: CodedLists, pairs: int = 1 << 17) -> Array:
        states, codes, owner = self._profiles(histories), candidates.codes, candidates.owner
        values = [np.empty(0, np.float32)]
        for begin in range(0, len(codes), pairs):
            part = slice(begin, begin + pairs)
            values.append(torch.einsum("nr,nr->n", states[owner[part]], self.vectors[codes[part]]).numpy())
        return np.concatenate(values)

    def score_catalogue(self, histories: CodedLists, hidden: Tensor | None = None) -> Array:
        """(U, I); ``hidden`` items are no others, as nobody's choices count."""
        return (self._profiles(histories) @ self.vectors.T).numpy()
