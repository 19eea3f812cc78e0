"""From a history to recommendations: a whole catalogue by the heads, the best of it by the answer, fused; and why.

Whoever recommends does so by this file: the pipeline, the demo page, and `mllm-msr serve`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch

from .item_ranking import AlikeItem, ItemRanker
from .score_fusion import ScoreFusion

By = Literal["answer", "head", "fused"]
NEAREST = 3  # items of a history that explain a recommendation
MOST_ANSWERS = 10_000  # that a list may ask for

Answer = Callable[[list[str]], np.ndarray]  # ids of N items; their (N,) logits


class Refused(ValueError):
    """What cannot be done as it is wanted; ``field`` is what should be changed."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Wanted:
    """Which recommendations are wanted.

    Args:
        n: how many.
        by: what orders them; None: fused where there are heads and a history, else the answer.
        rerank: of how many of the heads' best the answer is asked; 0 leaves it out. Of ``n`` at least where the answer
            orders them.
        exclude, only: item ids.
        allowed: whether an item may be recommended; None: each may.
        explain: how many of the best say why they stand where they stand.
    """

    n: int = 10
    by: By | None = None
    rerank: int = 100
    exclude: Sequence[str] = ()
    only: Sequence[str] | None = None
    allowed: Callable[[str], bool] | None = None
    explain: int = 0

    def __post_init__(self) -> None:
        if self.by not in (None, *get_args(By)):
            raise Refused("by", f"by={self.by!r} is not known; there are {', '.join(get_args(By))}")

    def among(self, ids: Iterable[str]) -> list[str]:
        """Those of some items that may be recommended."""
        return [item for item in ids if self.allowed is None or self.allowed(item)]


@dataclass
class Recommendation:
    """An item with the scores that it has.

    Args:
        score: what the list is ordered by.
        others: of the heads, fused without the answer; head: of the sequence head; logit: of the answer.
        fused: of the heads and, where it was asked and has a weight, the answer.
        bucket: of training frequency.
        nearest: the items of the history that are most like it.
        shares: what each member adds to ``fused``, which is their sum.
    """

    item_id: str
    score: float
    others: float | None = None
    head: float | None = None
    logit: float | None = None
    fused: float | None = None
    bucket: int = 0
    nearest: list[AlikeItem] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)


def _at_once(work: Callable[[], Any]) -> Any:
    return work()


def recommend(
    ranker: ItemRanker | None,
    history: Sequence[str],
    catalogue: Iterable[str],
    wanted: Wanted,
    answer: Answer,
    run: Callable[[Callable[[], Any]], Any] = _at_once,
) -> tuple[By, list[Recommendation]]:
    """The best items that a user has not chosen yet, best first, and what they are ordered by.

    Where heads and answer rank together, the answer is asked of the heads' best ``rerank`` items, and the others follow
    behind these in the order of the heads.

    Args:
        ranker: the heads, if there are any.
        history: all items chosen so far, oldest first.
        catalogue: ids of all items, for the answer alone.
        answer: asks the trained model; it is called once, or not at all.
        run: has a function run where the ranker may be used.

    Raises:
        Refused: heads are asked for that are not there, or too many items are left for the answer.
    """
    by: By = wanted.by or ("fused" if ranker is not None and history else "answer")
    if by != "answer" and ranker is None:
        raise Refused("by", f"by={by!r} needs the heads, which this model has not: send by='answer'")
    if by != "answer" and not history:
        raise Refused("by", f"by={by!r} reads a history, and there is none: send by='answer'")
    wanted, headed = replace(wanted, by=by), ranker if history else None
    fusion = None if headed is None else headed.answer_fusion
    if headed is None:
        found = [Recommendation(item, 0.0) for item in _candidates(catalogue, history, wanted)]
    else:
        found = run(lambda: _best_by_heads(headed, history, wanted))
    if by == "answer" and found:
        found = _by_answer(found, fusion, answer)
    elif by == "fused" and fusion is not None and found:
        found = _reranked(found, fusion, wanted.rerank, answer)
    found = found[: wanted.n]
    if wanted.explain and headed is not None:
        run(lambda: explain(headed, history, found[: wanted.explain]))
    return by, found


def _candidates(catalogue: Iterable[str], history: Sequence[str], wanted: Wanted) -> list[str]:
    """What the answer alone is to rank."""
    left_out = {*history, *wanted.exclude}
    only = None if wanted.only is None else set(wanted.only)
    found = wanted.among(item for item in catalogue if item not in left_out and (only is None or item in only))
    _check_count(len(found))
    return found


def _check_count(count: int) -> None:
    if count > MOST_ANSWERS:
        raise Refused("only", f"{count} items are too many for the answer alone: name up to {MOST_ANSWERS}")


def _best_by_heads(ranker: ItemRanker, history: Sequence[str], wanted: Wanted) -> list[Recommendation]:
    """The best items of the catalogue that are neither chosen nor left out, as many as are of use."""
    member = "sequence_head" if wanted.by == "head" else "fused"
    scores = ranker.score([history], by=member)[0]
    mask = torch.ones(len(ranker), dtype=torch.bool, device=scores.device)
    if wanted.only is not None or wanted.allowed is not None:
        ids = ranker.item_ids if wanted.only is None else [item for item in wanted.only if item in ranker]
        mask[:] = False
        mask[ranker.codes_of(wanted.among(ids))] = True
    mask[ranker.codes_of([item for item in {*history, *wanted.exclude} if item in ranker])] = False
    depth = wanted.n if wanted.by == "head" else max(wanted.n, wanted.rerank)
    values, codes = scores.masked_fill(~mask, -torch.inf).topk(min(depth, int(mask.sum())))
    if not len(codes):
        return []
    names = ranker.item_ids
    ids = [names[code] for code in codes.tolist()]
    fused = values if member == "fused" else ranker.score([history], ids)[0]
    head = values if member != "fused" else ranker.score([history], ids, by="sequence_head")[0]
    rows = zip(ids, values.tolist(), fused.tolist(), head.tolist(), ranker.buckets(codes).tolist(), strict=True)
    return [
        Recommendation(item, score, others, head, None, others, bucket) for item, score, others, head, bucket in rows
    ]


def _reranked(found: list[Recommendation], fusion: ScoreFusion, depth: int, answer: Answer) -> list[Recommendation]:
    """The same items with the answers of the first ``depth``, which are put in order anew before the others."""

    def asked(best: torch.Tensor) -> torch.Tensor:
        chosen = [found[place] for place in best[0].tolist()]
        logits = answer([each.item_id for each in chosen])
        for each, logit in zip(chosen, logits.tolist(), strict=True):
            each.logit = logit
        return torch.from_numpy(logits)[None]

    scores = fusion.rerank(_others(found)[None], _buckets(found), None, depth, asked)[0]
    for each, score in zip(found, scores.tolist(), strict=True):
        each.score = score
        each.fused = each.others if each.logit is None else score
    return sorted(found, key=lambda each: -each.score)


def _by_answer(found: list[Recommendation], fusion: ScoreFusion | None, answer: Answer) -> list[Recommendation]:
    """The same items in the order of their answers."""
    _check_count(len(found))
    logits = answer([each.item_id for each in found])
    if fusion is not None:
        fused = fusion.join(torch.from_numpy(logits), _others(found), _buckets(found))
        for each, value in zip(found, fused.tolist(), strict=True):
            each.fused = value
    for each, logit in zip(found, logits.tolist(), strict=True):
        each.logit = each.score = logit
    return sorted(found, key=lambda each: -each.score)


def _others(found: Sequence[Recommendation]) -> torch.Tensor:
    return torch.tensor([each.others for each in found])


def _buckets(found: Sequence[Recommendation]) -> torch.Tensor:
    return torch.tensor([each.bucket for each in found])


def fused_scores(
    ranker: ItemRanker, history: Sequence[str], item_ids: Sequence[str], logits: np.ndarray
) -> list[float | None]:
    """The fused score of each of some items, by their answers; None for one that has no vector."""
    places = [place for place, item in enumerate(item_ids) if item in ranker]
    codes = ranker.codes_of([item_ids[place] for place in places])
    values = ranker.score_codes(ranker.read([history])[0], codes)[0].cpu()
    if ranker.answer_fusion is not None:
        values = ranker.answer_fusion.join(torch.from_numpy(logits[places]), values, ranker.buckets(codes).cpu())
    scores: list[float | None] = [None] * len(item_ids)
    for place, value in zip(places, values.tolist(), strict=True):
        scores[place] = value
    return scores


def explain(ranker: ItemRanker, history: Sequence[str], found: Sequence[Recommendation]) -> None:
    """Add to each item the nearest of the history, and what each member adds to its fused score; nothing to one that
    the heads do not know, or not any more."""
    found = [each for each in found if each.item_id in ranker]
    if not found:
        return
    ids, heads, whole = [each.item_id for each in found], ranker.fusion, ranker.answer_fusion
    whole = None if whole is None else whole.spread(heads)
    scores = torch.stack([values[0] for values in ranker.member_scores([history], ids).values()], dim=-1).cpu()
    for each, row in zip(found, scores, strict=True):
        fusion, names = heads, list(heads.members)
        if whole is not None and each.logit is not None:
            fusion, names = whole, ["answer", *names]
            row = torch.cat([row.new_tensor([each.logit]), row])
        shares = fusion.shares(row, torch.tensor(each.bucket)).tolist()
        each.shares = {**dict(zip(names, shares, strict=True)), "bias": float(fusion.bias[each.bucket])}
        each.nearest = ranker.nearest(each.item_id, history, NEAREST)
