"""Every metric against its definition: scikit-learn where it has one, and the mean over all orders of equals."""

import itertools
import time

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import ndcg_score, roc_auc_score

from mllm_msr.training import metrics

RNG = np.random.default_rng(0)


def expectation(labels: list[int], scores: list[float]) -> dict[str, float]:
    """The mean of each metric's plain definition over every order that agrees with the scores."""
    orders = [
        order
        for order in itertools.permutations(range(len(labels)))
        if all(scores[i] >= scores[j] for i, j in itertools.pairwise(order))
    ]
    rows = []
    for order in orders:
        hits = np.array([labels[i] for i in order])
        first = int(hits.argmax()) + 1
        gains = 1 / np.log2(np.arange(len(hits)) + 2)
        pairs = [(x, y) for x, y in itertools.combinations(hits, 2) if x != y]
        rows.append(
            {
                "auc_user": np.mean([x > y for x, y in pairs]) if pairs else np.nan,
                **{f"hr@{k}": float(first <= k) for k in (1, 5, 10)},
                "mrr@5": 1 / first if first <= 5 else 0.0,
                "ndcg@5": (gains * hits)[:5].sum() / gains[: min(hits.sum(), 5)].sum(),
            }
        )
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


@pytest.mark.parametrize("levels", [1, 2, 3, 100])
def test_equals_the_mean_over_all_orders_of_equals(levels):
    for _ in range(12):
        size = int(RNG.integers(2, 8))
        labels = (RNG.random(size) < 0.4).astype(int)
        labels[RNG.integers(size)] = 1
        scores = RNG.integers(0, levels, size).astype(float)
        expected = expectation(labels.tolist(), scores.tolist())
        row = metrics.per_user_metrics(["x"] * size, labels, scores).row(0, named=True)
        for name, value in expected.items():
            if np.isnan(value):
                assert row[name] is None
            else:
                assert row[name] == pytest.approx(value, abs=1e-12), (name, labels, scores)


@pytest.mark.parametrize("levels", [3, 1000])
def test_equals_scikit_learn(levels):
    users = np.repeat(np.arange(40), 25)
    labels = (RNG.random(1000) < 0.2).astype(int)
    labels[::25] = 1
    scores = (RNG.integers(0, levels, 1000) + labels).astype(np.float32)
    shuffled = RNG.permutation(1000)
    result = metrics.ranking_metrics(users[shuffled], labels[shuffled], scores[shuffled], n_bootstrap=10)
    lists = [(labels[users == user], scores[users == user]) for user in range(40)]
    assert result["auc"]["value"] == pytest.approx(roc_auc_score(labels, scores))
    assert result["auc_user"]["value"] == pytest.approx(np.mean([roc_auc_score(y, s) for y, s in lists]))
    assert result["ndcg@5"]["value"] == pytest.approx(np.mean([ndcg_score([y], [s], k=5) for y, s in lists]))


def test_single_list_functions_agree_with_the_table():
    labels, scores = [0, 1, 0, 1, 0, 0], [3.0, 2.0, 2.0, 1.0, 1.0, 0.0]
    row = metrics.per_user_metrics(["x"] * 6, labels, scores).row(0, named=True)
    assert metrics.auc(labels, scores) == row["auc_user"]
    assert metrics.hit_rate(labels, scores, 5) == row["hr@5"]
    assert metrics.reciprocal_rank(labels, scores, 5) == row["mrr@5"]
    assert metrics.ndcg(labels, scores, 5) == row["ndcg@5"]
    assert metrics.hit_rate(labels, scores, 2) == 0.5


def test_an_all_tied_model_gets_what_guessing_gets_wherever_the_positive_stands():
    for place in (0, 20):
        labels = np.zeros((7, 21), int)
        labels[:, place] = 1
        result = metrics.ranking_metrics(np.repeat(list("abcdefg"), 21), labels.ravel(), np.zeros(7 * 21), 20)
        assert result["auc"]["value"] == result["auc_user"]["value"] == 0.5
        for k in (1, 5, 10):
            assert result[f"hr@{k}"]["value"] == pytest.approx(k / 21)
        assert result["mrr@5"]["value"] == pytest.approx(sum(1 / r for r in range(1, 6)) / 21)


def test_users_without_a_value_do_not_count_and_are_null():
    users, labels, scores = ["a", "a", "b", "b", "c", "c"], [1, 0, 0, 0, 1, 1], [1.0, 0.0, 5.0, 4.0, 2.0, 1.0]
    table = metrics.per_user_metrics(users, labels, scores)
    assert table["user_id"].to_list() == ["a", "b", "c"]
    assert table["auc_user"].to_list() == [1.0, None, None]  # b has no positive, c no negative
    assert table["hr@1"].to_list() == [1.0, None, 1.0]
    result = metrics.ranking_metrics(users, labels, scores, n_bootstrap=50)
    assert result["hr@1"] == {"value": 1.0, "ci95": [1.0, 1.0]}
    with pytest.raises(ValueError, match="auc_user is undefined"):
        metrics.ranking_metrics(["a", "b"], [1, 0], [0.0, 1.0])
    assert np.isnan(metrics.hit_rate([0, 0], [1.0, 0.0], 1))


@pytest.mark.parametrize("bad", [float("nan"), None])
def test_missing_scores_are_refused_by_user(bad):
    with pytest.raises(ValueError, match=r"user 'u7'.*row 2"):
        metrics.ranking_metrics(["u1", "u1", "u7"], [1, 0, 1], [0.1, 0.2, bad])


@pytest.mark.parametrize(
    ("users", "labels", "scores", "message"),
    [
        (["u1", None], [1, 0], [0.0, 1.0], "row 1 has no user id"),
        (["u1", "u1"], [1, 2], [0.0, 1.0], "user 'u1': the label in row 1 is 2"),
        (["u1", "u1"], [1, None], [0.0, 1.0], "the label in row 1 is None"),
        (["u1"], [1, 0], [0.0, 1.0], "lengths differ: 1 user ids, 2 labels"),
        ([], [], [], "no rows"),
        (["u1", "u1"], [0, 0], [0.0, 1.0], "at least one positive"),
    ],
)
def test_bad_input_is_refused_with_its_reason(users, labels, scores, message):
    with pytest.raises(ValueError, match=message):
        metrics.ranking_metrics(users, labels, scores)


def exact_bootstrap_of_pooled_auc(users, labels, scores, resamples: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    rows = [np.flatnonzero(users == user) for user in np.unique(users)]
    values = []
    for _ in range(resamples):
        drawn = np.concatenate([rows[i] for i in rng.integers(0, len(rows), len(rows))])
        values.append(metrics.auc(labels[drawn], scores[drawn]))
    return np.quantile(values, [0.025, 0.975])


def test_pooled_interval_is_that_of_resampling_users_outright():
    users = np.repeat(np.arange(120), 11)
    labels = np.tile([1] + [0] * 10, 120)
    shift = np.repeat(RNG.normal(size=120), 11)  # rows of a user belong together: resampling rows would be too narrow
    scores = labels * 0.8 + shift + RNG.normal(size=len(users))
    result = metrics.ranking_metrics(users, labels, scores)["auc"]
    assert result["value"] == pytest.approx(roc_auc_score(labels, scores))
    assert result["ci95"] == pytest.approx(exact_bootstrap_of_pooled_auc(users, labels, scores, 400), abs=0.008)


def test_intervals_cover_and_are_reproducible():
    covered = 0
    for trial in range(60):
        rng = np.random.default_rng(trial)
        scores = rng.normal(size=(80, 11))
        scores[:, 0] += 1.0  # AUC = Phi(1 / sqrt 2) = .7602
        labels = np.tile([1] + [0] * 10, 80)
        users = np.repeat(np.arange(80), 11)
        result = metrics.ranking_metrics(users, labels, scores.ravel(), n_bootstrap=200, seed=3)
        low, high = result["auc_user"]["ci95"]
        covered += low <= 0.7602 <= high
        if trial == 0:
            assert result == metrics.ranking_metrics(users, labels, scores.ravel(), n_bootstrap=200, seed=3)
            order = rng.permutation(len(users))
            again = metrics.ranking_metrics(users[order], labels[order], scores.ravel()[order], 200, seed=3)
            assert again["hr@5"]["ci95"] == pytest.approx(result["hr@5"]["ci95"])
    assert covered >= 51  # 95 % of 60 is 57; fewer than 51 has odds below 1 : 100


def test_many_users_take_the_fast_path_with_the_same_interval():
    n_users = metrics.NORMAL_FROM
    labels = np.tile([1, 0, 0, 0, 0], n_users)
    scores = (RNG.normal(size=5 * n_users) + labels).astype(np.float32)
    users = pl.Series([f"u{i:06}" for i in range(n_users)]).gather(np.repeat(np.arange(n_users), 5))
    begun = time.perf_counter()
    fast = metrics.ranking_metrics(users, labels, scores)
    assert time.perf_counter() - begun < 10
    resampled = metrics.ranking_metrics(users[:-5], labels[:-5], scores[:-5], n_bootstrap=200)  # one user too few
    for name in metrics.METRICS:
        assert fast[name]["value"] == pytest.approx(resampled[name]["value"], abs=1e-4)
        assert fast[name]["ci95"] == pytest.approx(resampled[name]["ci95"], abs=6e-4)
