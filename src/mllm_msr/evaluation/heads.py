"""The heads of a run: what ranks by item vectors, trained and fused, saved beside the model and read again to rank.

Members of the fused score are the sequence head (content and identity), the same network with identity alone and with
content alone, and the likeness of content as it is. ``RUN/head`` holds a folder for each trained one, the likeness and
the fusion's weights.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors.torch import load_file, save_file

from mllm_msr.evaluation.coded_tasks import Array, CodedLists, CodedTasks
from mllm_msr.evaluation.fusion import catalogue_lists, fit_fusion
from mllm_msr.evaluation.likeness import LikenessRanker, likeness
from mllm_msr.evaluation.rankers import Ranker, item_vectors, training_log
from mllm_msr.evaluation.sequence_training import FitOptions, TrainingData, fit
from mllm_msr.evaluation.sequential_baselines import SequenceRanker
from mllm_msr.modeling.content_likeness import ContentLikeness
from mllm_msr.modeling.score_fusion import BUCKETS, ScoreFusion, frequency_buckets
from mllm_msr.modeling.sequence_head import SequenceHeadConfig, SequenceHeadOptions, load_head, save_head
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import ITEMS
from mllm_msr.records.sections import HeadOptions
from mllm_msr.records.storage import write_text

TRAINED = ("sequence_head", "identity_only", "content_only")
MEMBERS = (*TRAINED, "likeness")
BLOCK = 128  # users whose scores of the whole catalogue by all members are in memory at a time
FUSION, LIKENESS = "fusion.json", "likeness.safetensors"


@dataclass(frozen=True)
class Heads:
    """What ranks by item vectors.

    Args:
        items: ``item_id`` of the whole catalogue.
        counts: (I,), training interactions of each item, by item code.
        members: rankers by the names in ``MEMBERS``.
        fusion: their weights.
    """

    items: pl.DataFrame
    counts: torch.Tensor
    members: Mapping[str, Any]
    fusion: ScoreFusion

    def ranker(self, name: str) -> Ranker:
        """A member, or "fused"."""
        return FusedRanker(self) if name == "fused" else self.members[name]


class FusedRanker(Ranker):
    """The weighted sum of all members, by the bucket of training frequency of the ranked item."""

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads.items)
        self.heads, self.buckets = heads, frequency_buckets(heads.counts)
        self.members = [heads.members[name] for name in heads.fusion.members]

    def score(self, histories: CodedLists, candidates: CodedLists) -> Array:
        scores = np.stack([member.score(histories, candidates) for member in self.members], axis=-1)
        return self.heads.fusion(torch.from_numpy(scores).float(), self.buckets[candidates.codes]).numpy()

    def score_catalogue(self, histories: CodedLists) -> Array:
        blocks = [np.empty((0, len(self.items)), np.float32)]
        for begin in range(0, len(histories), BLOCK):
            part = histories.slice(begin, min(begin + BLOCK, len(histories)))
            scores = np.stack([member.score_catalogue(part) for member in self.members], axis=-1)
            blocks.append(self.heads.fusion(torch.from_numpy(scores).float(), self.buckets).numpy())
        return np.concatenate(blocks)


def train_heads(run: RunFolder, folder: Path) -> Heads:
    """Train the heads of a prepared run with item vectors, fit their fusion on validation tasks, and save all of it."""
    options, items = run.recipe.head, run.read(ITEMS, ["item_id"])
    content = torch.from_numpy(item_vectors(run))
    histories, tasks = CodedLists.of_log(training_log(run), items), run.tasks("validation")
    coded, counts = CodedTasks(tasks, items), torch.zeros(len(items), dtype=torch.int64)
    fitting, members = fit_options(options), dict[str, Any]()
    for name in TRAINED:
        data = TrainingData(len(items), histories, coded, None if name == "identity_only" else content)
        counts = data.counts()
        head = fit(configuration(name, options, data), data, fitting, options.seed, *kept_as(run, name))
        save_head(head, items["item_id"].sort().to_list(), folder / name)
        members[name] = SequenceRanker(head, items)
    alike = likeness(tasks, items, content)
    members["likeness"] = alike
    state = {name: value.contiguous() for name, value in alike.likeness.state_dict().items()}
    save_file(state, folder / LIKENESS, metadata={"reach": str(alike.likeness.reach)})
    heads = Heads(items, counts, members, fitted(members, coded, counts, options))
    write_text(folder / FUSION, json.dumps({**heads.fusion.to_dict(), "reach": alike.likeness.reach}, indent=1))
    return heads


def load_heads(run: RunFolder) -> Heads:
    """What :func:`train_heads` has saved in a run."""
    items, members = run.read(ITEMS, ["item_id"]), dict[str, Any]()
    counts = torch.zeros(len(items), dtype=torch.int64)
    for name in TRAINED:
        head, _ = load_head(run.head / name)
        members[name], counts = SequenceRanker(head, items), head.counts.long()
    content = json.loads((run.head / FUSION).read_text(encoding="utf-8"))
    state = load_file(run.head / LIKENESS)
    members["likeness"] = LikenessRanker(items, ContentLikeness.from_state(state, content["reach"]))
    return Heads(items, counts, members, ScoreFusion.from_dict(content))


def kept_as(run: RunFolder, name: str) -> tuple[Path, str]:
    """Where a member's epochs are kept, and under which name; identity alone is SASRec, and trained once with it."""
    return (run.trained_baselines, "sasrec") if name == "identity_only" else (run.trained_heads, name)


def configuration(name: str, options: HeadOptions, data: TrainingData) -> SequenceHeadConfig:
    """What a trained member is like."""
    own = {
        each.name: getattr(options, each.name) for each in fields(SequenceHeadOptions) if hasattr(options, each.name)
    }
    size = 0 if data.content is None else data.content.shape[1]
    return SequenceHeadConfig(**own, identity=name != "content_only", n_items=data.n_items, content_size=size)


def fit_options(options: HeadOptions) -> FitOptions:
    return FitOptions(**{each.name: getattr(options, each.name) for each in fields(FitOptions)})


def fitted(members: Mapping[str, Any], tasks: CodedTasks, counts: torch.Tensor, options: HeadOptions) -> ScoreFusion:
    """Weights by validation; without a validation task, the sequence head alone."""
    if not len(tasks):
        weights = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(len(BUCKETS), -1)
        return ScoreFusion(MEMBERS, torch.zeros(4), torch.ones(4), weights, torch.zeros(len(BUCKETS)))
    lists = catalogue_lists(
        [members[name] for name in MEMBERS],
        tasks,
        counts.numpy(),
        n_tasks=options.fusion_tasks,
        hidden_share=options.hidden_share,
        seed=options.seed,
    )
    return fit_fusion(lists, MEMBERS)
