"""A whole catalogue by the heads, the best of it by the answer: in which order, with which reasons, what is asked."""

import numpy as np
import pytest
import torch
from devices import DEVICE
from tiny_rankers import IDS, fusion, make

from mllm_msr.modeling.item_ranking import ItemRanker
from mllm_msr.modeling.recommending import Refused, Wanted, fused_scores, recommend

HISTORY = ["film-3", "film-7", "gone", "film-9"]
LEFT = [item for item in IDS if item not in HISTORY]


@pytest.fixture(scope="module")
def ranker() -> ItemRanker:
    made = make().to(DEVICE)
    made.answer_fusion = fusion("mllm_msr", "others")
    return made


class Asked:
    """An answer that is made up, and of what it was asked."""

    def __init__(self) -> None:
        self.ids: list[str] = []

    def __call__(self, ids: list[str]) -> np.ndarray:
        self.ids = ids
        return np.array([np.sin(3 * int(item.split("-")[1])) for item in ids], np.float32)


def test_the_best_are_reranked_and_the_others_follow_as_they_do_for_many_users(ranker: ItemRanker) -> None:
    asked = Asked()
    by, found = recommend(ranker, HISTORY, IDS, Wanted(n=40, rerank=8, explain=12), asked)
    chosen = torch.tensor([[item in HISTORY for item in IDS]], device=DEVICE)

    def answers(best: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(Asked()([IDS[code] for code in best[0].tolist()])).to(DEVICE)[None]

    whole = ranker.answer_fusion.rerank(ranker.score([HISTORY]), ranker.buckets(), chosen, 8, answers)[0]
    expected = sorted(LEFT, key=lambda item: -float(whole[IDS.index(item)]))
    assert by == "fused" and [each.item_id for each in found] == expected
    assert {each.item_id for each in found[:8]} == set(asked.ids)
    fused = fused_scores(ranker, HISTORY, [*asked.ids, "new"], Asked()([*asked.ids, "new-0"]))
    assert fused[-1] is None  # it has no vector
    assert {each.item_id: each.fused for each in found[:8]} == pytest.approx(dict(zip(asked.ids, fused, strict=False)))
    for place, each in enumerate(found):
        assert bool(each.shares) == bool(each.nearest) == (place < 12) and ("answer" in each.shares) == (place < 8)
        if place < 12:
            assert sum(each.shares.values()) == pytest.approx(each.fused, abs=1e-4)


def test_an_item_that_the_heads_forget_meanwhile_is_not_explained() -> None:
    ranker, asked = make().to(DEVICE), Asked()
    ranker.answer_fusion = fusion("mllm_msr", "others")

    def answer(ids: list[str]) -> np.ndarray:
        ranker.remove_items(ids[:1])
        return asked(ids)

    _, found = recommend(ranker, HISTORY, IDS, Wanted(n=4, rerank=4, explain=4), answer)
    assert len(found) == 4
    assert [each.item_id for each in found if not (each.shares or each.nearest)] == asked.ids[:1]


def test_without_the_answer_the_heads_order_all_of_it(ranker: ItemRanker) -> None:
    asked = Asked()
    for by, member in (("fused", "fused"), ("head", "sequence_head")):
        _, found = recommend(ranker, HISTORY, IDS, Wanted(n=40, by=by, rerank=0), asked)
        scores = dict(zip(IDS, ranker.score([HISTORY], by=member)[0].tolist(), strict=True))
        assert [each.item_id for each in found] == sorted(LEFT, key=lambda item: -scores[item])
        assert [each.score for each in found] == pytest.approx([scores[each.item_id] for each in found])
    assert asked.ids == []


def test_only_what_is_wanted_is_ranked_and_asked_about(ranker: ItemRanker) -> None:
    wanted = Wanted(only=["film-1", "film-2", "film-3", "film-4", "none"], exclude=["film-2"])
    asked = Asked()
    _, found = recommend(ranker, HISTORY, IDS, wanted, asked)
    assert {each.item_id for each in found} == set(asked.ids) == {"film-1", "film-4"}
    even = Wanted(by="answer", allowed=lambda item: int(item.split("-")[1]) % 2 == 0, n=3, rerank=40)
    _, found = recommend(ranker, HISTORY, IDS, even, asked)
    assert len(asked.ids) == 15 and [each.score for each in found] == sorted(Asked()(asked.ids).tolist())[:-4:-1]
    by, found = recommend(None, [], IDS, Wanted(n=40), asked)
    assert by == "answer" and len(found) == 30 and found[0].fused is None


@pytest.mark.parametrize(
    ("heads", "history", "by", "message"),
    [
        (False, HISTORY, "fused", "needs the heads, which this model has not"),
        (True, [], "head", "reads a history, and there is none"),
        (True, HISTORY, "heads", "by='heads' is not known; there are answer, head, fused"),
        (False, [], None, "30 items are too many for the answer alone: name up to 20"),
    ],
)
def test_what_cannot_be_is_refused(ranker, heads: bool, history, by, message: str, monkeypatch) -> None:
    monkeypatch.setattr("mllm_msr.modeling.recommending.MOST_ANSWERS", 20)
    with pytest.raises(Refused, match=message):
        recommend(ranker if heads else None, history, IDS, Wanted(by=by), Asked())
