"""Slices, calibration and checks: every user in one part of each division, and figures that mean what they say."""

import numpy as np
import polars as pl
import pytest

from mllm_msr.evaluation import diagnostics
from mllm_msr.evaluation.metrics import ranking_metrics

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


def test_cold_users_are_parts_of_their_own_and_the_others_quarters(world):
    scores, tasks, popularity = world
    for lengths, expected in (
        ([0] * 2 + [3] * 3 + [7] * 28 + [12] * 27, [("0", 2), ("1-4", 3), ("5-6", 0), ("7-11", 28), ("12+", 27)]),
        ([9] * 30 + [15] * 30, [("9-11", 30), ("15+", 30)]),
        ([0] * 10 + [2] * 50, [("0", 10), ("1+", 50)]),
    ):
        found = diagnostics.slices(scores, tasks.with_columns(pl.Series("history_length", lengths)), popularity)
        parts = [(one["part"], one["users"]) for one in found if one["by"] == "history_length"]
        assert parts == [(name, users) for name, users in expected if users]


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


def test_agreement_of_equal_scaled_and_reversed_scores():
    users, logits = np.repeat(np.arange(50), 9), RNG.normal(size=450)
    assert diagnostics.agreement(users, logits, logits) == {
        "max_difference": 0.0,
        "rank_correlation": pytest.approx(1.0),
        "first_changed": 0.0,
    }
    doubled = diagnostics.agreement(users, logits, 2 * logits)
    assert doubled["rank_correlation"] == pytest.approx(1.0) and doubled["first_changed"] == 0.0
    assert doubled["max_difference"] == pytest.approx(np.abs(logits).max())
    turned = diagnostics.agreement(users, logits, -logits)
    assert turned["rank_correlation"] == pytest.approx(-1.0) and turned["first_changed"] == 1.0
    blind = diagnostics.agreement(users, logits, np.zeros(450))  # all are first, so the first one stays among them
    assert "rank_correlation" not in blind and blind["first_changed"] == 0.0


def test_ties_and_popularity_are_seen(world):
    scores, _, popularity = world
    found = diagnostics.sanity(scores, popularity)
    assert found["popularity"]["popularity_correlation"] == pytest.approx(1.0)
    assert found["blind"] == {"tied_users": 1.0}
    reverse = scores.filter(row="popularity").with_columns(-pl.col("logit"))
    assert diagnostics.sanity(reverse, popularity)["popularity"]["popularity_correlation"] == pytest.approx(-1.0)
