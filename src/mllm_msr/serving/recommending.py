"""From a history to recommendations: the whole catalogue by the heads, the best of it by the answer, fused."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from mllm_msr.modeling.score_fusion import ScoreFusion, frequency_buckets

if TYPE_CHECKING:
    from mllm_msr.modeling.item_ranking import AlikeItem, ItemRanker

By = Literal["answer", "head", "fused"]
NEAREST = 3  # items of a history that explain a recommendation


@dataclass(frozen=True)
class Wanted:
    """Which recommendations are wanted.

    Args:
        n: how many.
        by: what orders them; None: fused where there are heads, else the answer.
        rerank: how many of the heads' best the answer scores; 0 leaves it out.
        exclude, only: item ids.
        where: values of columns, of which an item must have one.
        explain: whether each says why it stands where it stands.
    """

    n: int = 10
    by: By | None = None
    rerank: int = 100
    exclude: Sequence[str] = ()
    only: Sequence[str] | None = None
    where: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    explain: bool = False


@dataclass
class Recommendation:
    """An item with the scores that it has.

    Args:
        score: what the list is ordered by.
        others: of the heads, fused without the answer; head: of the sequence head; logit: of the answer.
        fused: of the heads and, where it was asked and has a weight, the answer.
        bucket: of training frequency.
    """

    item_id: str
    score: float
    others: float | None = None
    head: float | None = None
    logit: float | None = None
    fused: float | None = None
    bucket: int = 0
    nearest: list["AlikeItem"] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)


def best_by_heads(
    ranker: "ItemRanker", history: Sequence[str], allowed: Callable[[str], bool] | None, wanted: Wanted, depth: int
) -> list[Recommendation]:
    """The ``depth`` best items of the catalogue that are neither chosen nor left out, best first.

    ``allowed``: of an item by its columns; None: all are.
    """
    member = "sequence_head" if wanted.by == "head" else "fused"
    scores = ranker.score([history], by=member)[0]
    if wanted.only is None and allowed is None:
        mask = torch.ones(len(ranker), dtype=torch.bool)
    else:
        mask = torch.zeros(len(ranker), dtype=torch.bool)
        ids = ranker.item_ids if wanted.only is None else [item for item in wanted.only if item in ranker]
        mask[ranker.codes_of([item for item in ids if allowed is None or allowed(item)])] = True
    mask[ranker.codes_of([item for item in {*history, *wanted.exclude} if item in ranker])] = False
    count = min(depth, int(mask.sum()))
    values, codes = scores.masked_fill(~mask, -torch.inf).topk(count)
    names = ranker.item_ids
    ids = [names[code] for code in codes.tolist()]
    if not ids:
        return []
    fused = values if member == "fused" else ranker.score([history], ids)[0]
    head = values if member != "fused" else ranker.score([history], ids, by="sequence_head")[0]
    buckets = frequency_buckets(ranker.counts[codes])
    rows = zip(ids, values.tolist(), fused.tolist(), head.tolist(), buckets.tolist(), strict=True)
    return [
        Recommendation(item, score, others, head, None, others, bucket) for item, score, others, head, bucket in rows
    ]


def add_answers(
    found: Sequence[Recommendation], logits: np.ndarray, fusion: ScoreFusion | None, by: By
) -> list[Recommendation]:
    """The same items with their answers, in order of the answer or of the score fused with it."""
    fused: list[float | None] = [None] * len(found)
    if fusion is not None and all(each.others is not None for each in found):
        scores = torch.stack([torch.from_numpy(logits), torch.tensor([each.others for each in found])], dim=-1)
        fused = fusion(scores, torch.tensor([each.bucket for each in found])).tolist()
    for each, logit, value in zip(found, logits.tolist(), fused, strict=True):
        each.logit, each.fused = logit, value if value is not None else each.fused
        each.score = logit if by == "answer" or each.fused is None else each.fused
    return sorted(found, key=lambda each: -each.score)


def explain(
    ranker: "ItemRanker", history: Sequence[str], found: Sequence[Recommendation], fusion: ScoreFusion | None
) -> None:
    """Add to each item the nearest of the history, and what each member adds to its fused score."""
    ids = [each.item_id for each in found]
    shares = ranker.shares([history], ids)
    for place, each in enumerate(found):
        each.nearest = ranker.nearest(each.item_id, history, NEAREST)
        own = {name: float(values[0, place]) for name, values in shares.items()}
        if fusion is not None and each.logit is not None and each.others is not None:
            bucket = torch.tensor(each.bucket)
            answer, others = fusion.shares(torch.tensor([each.logit, each.others]), bucket).tolist()
            scale = float(fusion.weights[each.bucket, 1] / fusion.deviation[1])
            own = {"answer": answer, **{name: scale * value for name, value in own.items()}}
            own["bias"] += float(fusion.bias[each.bucket]) + others - scale * each.others
        each.shares = own
