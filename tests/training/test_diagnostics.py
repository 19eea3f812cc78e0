"""Slices, calibration and checks: every user in one part of each division, and figures that mean what they say."""

import numpy as np
import polars as pl
import pytest

from mllm_msr.training import diagnostics
from mllm_msr.training.metrics import ranking_metrics

RNG = np.random.default_rng(0)
N_USERS, N_ITEMS = 60, 30


@pytest.fixture(scope="module")
def world() -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """(scores, tasks, popularity): one row follows popularity, one is blind."""
    counts = np.sort(RNG.integers(0, 60, N_ITEMS))
    counts[0] = 0
    popularity = pl.DataFrame({"item_id": [f"i{i:02}" for i in range(N_ITEMS)], "count": counts})
    tasks, scores = [], []
    for user in range(N_USERS):
        shown = RNG.permutation(N_ITEMS)[:11]
        labels = [1] + [0] * 10
        items = [f"i{item:02}" for item in shown]
        tasks.append((f"u{user}", items, labels, 3 + user % 20, int(counts[shown[0]])))
        for row, logits in (("popularity", counts[shown].astype(float)), ("blind", np.zeros(11))):
            for item, label, logit in zip(items, labels, logits, strict=True):
                scores.append((row, f"u{user}", item, label, float(logit)))
    names = ["user_id", "candidates", "labels", "history_length", "target_train_count"]
    return (
        pl.DataFrame(scores, schema=["row", "user_id", "item_id", "label", "logit"], orient="row"),
        pl.DataFrame(tasks, schema=names, orient="row"),
        popularity,
    )


def test_every_division_has_every_user_once_and_its_means_add_up(world):
    scores, tasks, popularity = world
    found = diagnostics.slices(scores, tasks, popularity)
    assert {one["by"] for one in found} == {"history_length", "target_train_count", "popularity_decile"}
    own = scores.filter(row="popularity")
    whole = ranking_metrics(own["user_id"], own["label"], own["logit"], n_bootstrap=2)["ndcg@5"]["value"]
    for by in ("history_length", "target_train_count", "popularity_decile"):
        parts = [one for one in found if one["by"] == by]
        assert sum(one["users"] for one in parts) == N_USERS
        mean = sum(one["users"] * one["rows"]["popularity"]["ndcg@5"]["value"] for one in parts) / N_USERS
        assert mean == pytest.approx(whole)
        starts = [int(one["part"].split("-")[0].rstrip("+")) for one in parts]
        assert starts == sorted(set(starts))


def test_cold_items_are_a_part_of_their_own_and_popular_ones_are_ranked_better_by_popularity(world):
    scores, tasks, popularity = world
    found = diagnostics.slices(scores, tasks, popularity)
    cold = [one for one in found if one["by"] == "target_train_count" and one["part"] == "0"]
    assert [one["users"] for one in cold] == [tasks.filter(pl.col("target_train_count") == 0).height]
    deciles = [one["rows"]["popularity"]["auc_user"]["value"] for one in found if one["by"] == "popularity_decile"]
    assert deciles[0] < 0.2 and deciles[-1] > 0.8
    assert all(one["rows"]["blind"]["auc_user"]["value"] == 0.5 for one in found)


def test_calibration_of_honest_and_of_shifted_probabilities():
    logits = RNG.normal(-2, 1.5, 40_000)
    labels = (RNG.random(40_000) < 1 / (1 + np.exp(-logits))).astype(int)
    honest = diagnostics.calibration(labels, logits)
    assert honest["error"] < 0.01
    assert sum(one["count"] for one in honest["bins"]) == 40_000 and len(honest["bins"]) == 10
    assert diagnostics.calibration(labels, logits + 3)["error"] > 0.2
    assert diagnostics.calibration(labels, logits + 3, shift=-3)["error"] == pytest.approx(honest["error"])
    assert len(diagnostics.calibration(np.array([0, 1]), np.zeros(2))["bins"]) == 1  # equals fall together


def test_ties_and_popularity_are_seen(world):
    scores, _, popularity = world
    found = diagnostics.sanity(scores, popularity)
    assert found["popularity"]["popularity_correlation"] == pytest.approx(1.0)
    assert found["blind"] == {"tied_users": 1.0}
    reverse = scores.filter(row="popularity").with_columns(-pl.col("logit"))
    assert diagnostics.sanity(reverse, popularity)["popularity"]["popularity_correlation"] == pytest.approx(-1.0)
