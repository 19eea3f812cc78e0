"""Ranking: shared prefixes and pictures give the scores of one plain forward a pair, on every family."""

import math
import random

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image

from mllm_msr.modeling.modeling_mllm_msr import MllmMsrForRecommendation
from mllm_msr.modeling.ranking import PLAIN_POSITIONS, Recommender
from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor

USERS = [
    {"preference": "quiet red films with ships", "recent": []},
    {"preference": "", "recent": [{"summary": "stripes"}]},
    {"preference": "long summers " * 12, "recent": [{"title": "Noise", "summary": "blue"}, {"summary": "stripes"}]},
]


def catalogue() -> dict[str, dict]:
    random.seed(0)
    colours = [tuple(random.choices(range(256), k=3)) for _ in range(6)]
    items = {
        f"i{k}": {"title": "The Sea " * (k + 1), "text": "", "image": Image.new("RGB", (40 + 8 * k, 48), colour)}
        for k, colour in enumerate(colours)
    }
    items["i2"]["image"] = None
    return items


CANDIDATES = [["i0", "i1", "i2", "i3"], ["i3", "i2", "i4", "i5", "i1"], ["i5"]]


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_scores_equal_the_plain_forward_of_each_pair(backbone, family):
    path = backbone(family)
    processor = MllmMsrProcessor.from_backbone(path)
    model = MllmMsrForRecommendation.from_backbone(path, dtype=torch.float32, processor=processor).eval()
    items = catalogue()
    plain = [
        [
            model.score(**processor([user["preference"]], [items[item]], recent=[user["recent"]])).logits.item()
            for item in row
        ]
        for user, row in zip(USERS, CANDIDATES, strict=True)
    ]
    recommender = Recommender(model, processor)
    assert recommender.shares_prefix == (model.config.vlm_config.model_type in PLAIN_POSITIONS)
    for budget in (1, 600, 100_000):  # pair by pair, a few at a time, all at once
        recommender.token_budget = budget
        shared = recommender.score(USERS, CANDIDATES, items)
        for ours, theirs in zip(shared, plain, strict=True):
            assert ours.dtype == np.float32
            assert ours == pytest.approx(np.array(theirs), abs=1e-4)


def test_rank_orders_and_scores(backbone):
    path = backbone("llava")
    processor = MllmMsrProcessor.from_backbone(path)
    model = MllmMsrForRecommendation.from_backbone(path, dtype=torch.float32, processor=processor)
    recommender = Recommender(model, processor)
    candidates = list(catalogue().values())
    ranked = recommender.rank(USERS, candidates, top_k=3)
    everything = recommender.rank(USERS, candidates)
    assert [len(row) for row in ranked] == [3, 3, 3]
    assert [len(row) for row in everything] == [6, 6, 6]
    for row, whole in zip(ranked, everything, strict=True):
        logits = [candidate["logit"] for candidate in whole]
        assert logits == sorted(logits, reverse=True)
        assert [c["title"] for c in row] == [c["title"] for c in whole[:3]]
        for candidate in whole:
            assert candidate["score"] == pytest.approx(1 / (1 + math.exp(-candidate["logit"])))
    backwards = recommender.rank(USERS, candidates[::-1], top_k=1)
    assert [row[0]["title"] for row in backwards] == [row[0]["title"] for row in ranked]
