"""Likeness by content: cosines of whitened vectors, of the catalogue's items and of new ones."""

import numpy as np
import polars as pl
import pytest
import torch

from mllm_msr.evaluation.coded_tasks import CodedLists, CodedTasks
from mllm_msr.evaluation.likeness import LikenessRanker, likeness
from mllm_msr.modeling.content_likeness import ContentLikeness

ITEMS = pl.DataFrame({"item_id": [f"{item:02}" for item in range(30)]})


def content() -> torch.Tensor:
    """Ten kinds of three items each, under one feature whose size says nothing."""
    rng = np.random.default_rng(0)
    kinds = np.repeat(np.eye(10), 3, axis=0) + 0.05 * rng.normal(size=(30, 10))
    return torch.from_numpy(np.concatenate([kinds, 100 + 2 * rng.normal(size=(30, 1))], axis=1))


def tasks() -> pl.DataFrame:
    """The last item tells the kind of the next; those before it mislead."""
    rows = []
    for kind in range(10):
        of_kind = [f"{3 * kind + place:02}" for place in range(3)]
        others = [f"{(3 * kind + 3 * step) % 30:02}" for step in range(1, 9)]
        rows.append((others[:4] + of_kind[:1], [of_kind[1], *others], [1] + [0] * 8))
    return pl.DataFrame(rows, schema=["history", "candidates", "labels"], orient="row")


def test_the_reach_is_chosen_by_validation_and_the_like_come_first():
    ranker = likeness(tasks(), ITEMS, content())
    assert ranker.likeness.reach == 1
    values = ranker(tasks()).reshape(10, 9)
    assert (values.argmax(axis=1) == 0).mean() >= 0.9


def test_candidates_and_catalogue_have_the_same_scores():
    ranker, coded = LikenessRanker(ITEMS, ContentLikeness.of(content(), reach=3)), CodedTasks(tasks(), ITEMS)
    whole = ranker.score_catalogue(coded.histories)
    values = ranker.score(coded.histories, coded.candidates, pairs=7)
    assert np.allclose(whole[coded.candidates.owner, coded.candidates.codes], values, atol=1e-6)
    assert np.array_equal(whole, ranker.score_catalogue(coded.histories, hidden=torch.ones(30, dtype=torch.bool)))


def test_a_score_is_the_mean_cosine_with_the_last_items_and_nothing_for_nobody():
    model = ContentLikeness.of(content(), reach=2)
    directions = model.item_vectors()
    assert torch.allclose(directions.norm(dim=1), torch.ones(30))
    histories = CodedLists(np.array([9, 4, 7]), np.array([0, 3, 3]))
    scores = LikenessRanker(ITEMS, model).score_catalogue(histories)
    assert scores[0] == pytest.approx(((directions[4] + directions[7]) / 2 @ directions.T).numpy(), abs=1e-6)
    assert not scores[1].any()


def test_whitening_makes_every_direction_count_whatever_its_size():
    plain = torch.nn.functional.normalize(content().float() - content().float().mean(dim=0), dim=1)
    whitened = ContentLikeness.of(content()).item_vectors()
    kind = torch.arange(30) // 3
    nearest = [(directions @ directions.T - 9 * torch.eye(30)).argmax(dim=1) for directions in (plain, whitened)]
    hidden, clear = (float((kind[other] == kind).float().mean()) for other in nearest)
    assert hidden + 0.1 < clear  # by the large feature


def test_features_that_all_items_share_are_no_likeness():
    model = ContentLikeness.of(torch.ones(4, 3))
    assert not model.item_vectors().any() and torch.isfinite(model.whitening).all()
