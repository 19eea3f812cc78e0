"""The heads of a run: what ranks by item vectors, trained and fused, saved beside the model and read again to rank.

Members of the fused score can be the sequence head (content and identity), the same network with identity alone and
with content alone, a recurrent one with identity alone, both with item features (SASRecF, GRU4RecF), the sequence head
in which items also have the mean identity of the ten nearest to them, and the likeness of content as it is.
``RUN/head`` holds the members, the sequence head and the likeness as an ``ItemRanker``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from mllm_msr.evaluation.coded_tasks import Array, CodedLists, CodedTasks
from mllm_msr.evaluation.fusion import catalogue_lists, fit_fusion, settle_bias
from mllm_msr.evaluation.likeness import LikenessRanker, likeness
from mllm_msr.evaluation.rankers import Ranker, item_vectors, training_log
from mllm_msr.evaluation.sequential_baselines import (
    FEATURED,
    GRU4REC,
    SASREC,
    SequenceRanker,
    train_ranker,
)
from mllm_msr.modeling.item_ranking import LIKENESS, ItemRanker
from mllm_msr.modeling.score_fusion import BUCKETS, ScoreFusion
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import ITEMS
from mllm_msr.records.sections import HeadOptions

TRAINED: dict[str, dict[str, Any]] = {  # options of their own
    "sequence_head": {},
    "identity_only": SASREC,
    "content_only": {"identity": False},
    "gru4rec": GRU4REC,
    "sasrecf": SASREC | FEATURED,
    "gru4recf": GRU4REC | FEATURED,
    "neighbour_identity": {"neighbours": 10},
}
# members that are these baselines, and are trained once for both
BASELINES = {"identity_only": "sasrec", "gru4rec": "gru4rec", "sasrecf": "sasrecf", "gru4recf": "gru4recf"}
WITHOUT_CONTENT = ("identity_only", "gru4rec")
BLOCK = 128  # users whose histories are padded together


@dataclass(frozen=True)
class Heads:
    """What ranks by item vectors, and its parts as rankers of coded tasks.

    Args:
        items: ``item_id`` of the whole catalogue.
        item_ranker: of the items in the order of their codes.
    """

    items: pl.DataFrame
    item_ranker: ItemRanker

    def ranker(self, name: str) -> Ranker:
        """A member, or "fused"."""
        if name == "fused":
            return FusedRanker(self)
        member: Any = self.item_ranker.members[name]
        return LikenessRanker(self.items, member) if name == LIKENESS else SequenceRanker(member, self.items)


class FusedRanker(Ranker):
    """The weighted sum of all members, by the bucket of training frequency of the ranked item."""

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads.items)
        self.item_ranker, self.buckets = heads.item_ranker, heads.item_ranker.buckets()
        self.members = [heads.ranker(name) for name in heads.item_ranker.fusion.members]

    def score(self, histories: CodedLists, candidates: CodedLists) -> Array:
        scores = np.stack([member.score(histories, candidates) for member in self.members], axis=-1)
        return self.item_ranker.fusion(torch.from_numpy(scores).float(), self.buckets[candidates.codes]).numpy()

    def score_catalogue(self, histories: CodedLists) -> Array:
        blocks = [np.empty((0, len(self.items)), np.float32)]
        for begin in range(0, len(histories), BLOCK):
            part = histories.slice(begin, min(begin + BLOCK, len(histories)))
            codes = torch.from_numpy(part.padded(part.bounds[:-1], part.lengths))
            blocks.append(self.item_ranker.score_codes(codes).numpy())
        return np.concatenate(blocks)


def train_heads(run: RunFolder, folder: Path) -> Heads:
    """Train the heads of a prepared run with item vectors, fit their fusion on validation tasks, and save all of it."""
    options, items = run.recipe.head, run.read(ITEMS, ["item_id"])
    names = [name for name in (*TRAINED, LIKENESS) if name in ("sequence_head", LIKENESS, *options.members)]
    train, tasks = member_trainer(run), CodedTasks(run.tasks("validation"), items)
    rankers: dict[str, Any] = {name: train(name) for name in names}
    fusion = fitted(rankers, tasks, rankers["sequence_head"].head.counts, options)
    parts = {name: each.likeness if name == LIKENESS else each.head for name, each in rankers.items()}
    ranker = ItemRanker.of(items["item_id"].sort().to_list(), parts, fusion)
    ranker.save_pretrained(folder)
    return Heads(items, ranker)


def member_trainer(run: RunFolder) -> Callable[[str], SequenceRanker | LikenessRanker]:
    """Trains, by its name, what can be a member of the fused score; of what the run has trained already the epochs are
    only read. The run's tables are read once for all."""
    tasks, items, options = run.tasks("validation"), run.read(ITEMS, ["item_id"]), run.recipe.head
    content, log = torch.from_numpy(item_vectors(run)), training_log(run)

    def train(name: str) -> SequenceRanker | LikenessRanker:
        if name == LIKENESS:
            return likeness(tasks, items, content)
        read = None if name in WITHOUT_CONTENT else content
        folder = run.trained_baselines if name in BASELINES else run.trained_heads
        settings: dict[str, Any] = {"head": options, "seed": options.seed, "folder": folder}
        return train_ranker(BASELINES.get(name, name), TRAINED[name], tasks, items, log, read, **settings)

    return train


def load_heads(run: RunFolder) -> Heads:
    """What :func:`train_heads` has saved in a run."""
    return Heads(run.read(ITEMS, ["item_id"]), ItemRanker.from_pretrained(run.head))


def head_ranker(run: RunFolder, name: str) -> Ranker:
    """A head of a run, or "fused"; one that is no member of the fused score is trained for itself."""
    heads = load_heads(run)
    return heads.ranker(name) if name in ("fused", *heads.item_ranker.members) else member_trainer(run)(name)


def fitted(members: Mapping[str, Any], tasks: CodedTasks, counts: torch.Tensor, options: HeadOptions) -> ScoreFusion:
    """Weights by validation of the members that are wanted; without a validation task, the first of them alone."""
    names = tuple(options.members)
    if not len(tasks):
        weights = torch.eye(len(names))[:1].expand(len(BUCKETS), -1)
        nothing = torch.zeros(len(names))
        return ScoreFusion(names, nothing, nothing + 1, weights, torch.zeros(len(BUCKETS)))
    lists = catalogue_lists(
        [members[name] for name in names],
        tasks,
        counts.numpy(),
        n_tasks=options.fusion_tasks,
        hidden_share=options.hidden_share,
        seed=options.seed,
    )
    n_whole = min(len(tasks), options.fusion_tasks)
    return settle_bias(fit_fusion(lists, names, n_whole), lists.part(torch.arange(len(lists)) < n_whole))
