"""Every metric against its definition: scikit-learn, trec_eval, and the mean over all orders of equals."""

import itertools
import time
from typing import Any

import ir_measures
import numpy as np
import polars as pl
import pytest
from sklearn.metrics import average_precision_score, ndcg_score, roc_auc_score

from mllm_msr.evaluation import metrics
from mllm_msr.records.sections import EvaluationOptions

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
                "map": (np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits == 1].mean(),
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
        for name, value in expected.items():
            result = metrics.list_metric(name, labels, scores)
            assert result == pytest.approx(value, abs=1e-12, nan_ok=True), (name, labels, scores)


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


TREC = {
    **{f"hr@{k}": ir_measures.Success @ k for k in (1, 5, 10)},
    "mrr@5": ir_measures.RR @ 5,
    "ndcg@5": ir_measures.nDCG @ 5,
    "map": ir_measures.AP,
}


def trec(users: list[str], labels: list[int], scores: list[float], measures: dict[str, Any] = TREC) -> dict[str, float]:
    """The metrics of trec_eval, which knows no ties."""
    items = [f"d{i}" for i in range(len(users))]
    judged = [ir_measures.Qrel(u, i, label) for u, i, label in zip(users, items, labels, strict=True)]
    ranked = [ir_measures.ScoredDoc(u, i, score) for u, i, score in zip(users, items, scores, strict=True)]
    result = ir_measures.calc_aggregate(list(measures.values()), judged, ranked)
    return {name: result[measure] for name, measure in measures.items()}


def ranks(size: int, positives: list[int]) -> tuple[list[int], list[float]]:
    return [int(i in positives) for i in range(size)], [float(size - i) for i in range(size)]


ADVERSARIAL = {
    "positive last of many": ranks(300, [299]),
    "positive just beyond the cut": ranks(21, [5]),
    "positive just within the cut": ranks(21, [4]),
    "more positives than places": ranks(12, list(range(2, 12))),
    "positives first and last": ranks(40, [0, 39]),
    "two candidates": ranks(2, [1]),
    "huge and tiny scores": ([0, 1, 0, 0, 1], [1e30, 1e-30, -1e30, -1e-30, 3.0]),
    "negative scores": ([1, 0, 0], [-3.0, -2.0, -1.0]),
    "next to equal": ([0, 1, 0], [np.nextafter(np.float32(1), np.float32(2)), 1.0, 0.5]),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_lists_equal_trec_eval_and_scikit_learn(name):
    labels, scores = ADVERSARIAL[name]
    result = metrics.ranking_metrics(["u"] * len(labels), labels, scores, n_bootstrap=2)
    order = np.argsort(np.argsort(scores)).astype(float).tolist()  # trec_eval reads scores in single precision
    for metric, value in trec(["u"] * len(labels), labels, order).items():
        assert result[metric]["value"] == pytest.approx(value, abs=1e-9), metric
    assert result["auc"]["value"] == pytest.approx(roc_auc_score(labels, scores))
    assert result["auc_user"]["value"] == pytest.approx(roc_auc_score(labels, scores))
    assert result["map"]["value"] == pytest.approx(average_precision_score(labels, scores))


def test_equals_trec_eval_on_lists_of_any_length_with_any_number_of_positives():
    users, labels, scores = [], [], []
    for user in range(60):
        size = int(RNG.integers(2, 60))
        own = (RNG.random(size) < RNG.random()).astype(int)
        own[:2] = 1, 0
        users += [f"u{user}"] * size
        labels += own.tolist()
        scores += RNG.permutation(size).astype(float).tolist()
    result = metrics.ranking_metrics(users, labels, scores, n_bootstrap=2)
    for metric, value in trec(users, labels, scores).items():
        assert result[metric]["value"] == pytest.approx(value, abs=1e-9), metric


def test_infinite_scores_are_ranked():
    inf = float("inf")
    for name, value in (("hr@1", 0.5), ("map", 0.75), ("auc_user", 2.5 / 3)):
        assert metrics.list_metric(name, [0, 1, 0, 0], [-inf, inf, 0.0, inf]) == pytest.approx(value)
    assert metrics.list_metric("auc_user", [1, 0], [0.0, -0.0]) == 0.5  # equal numbers, however written


def test_single_list_functions_agree_with_the_table():
    labels, scores = [0, 1, 0, 1, 0, 0], [3.0, 2.0, 2.0, 1.0, 1.0, 0.0]
    columns = metrics.user_columns(["x"] * 6, labels, scores)
    for name in metrics.METRICS[1:]:
        assert [metrics.list_metric(name, labels, scores)] == columns[name].tolist()
    assert metrics.list_metric("hr@2", labels, scores) == 0.5


def test_any_cutoff_is_a_metric_and_an_unknown_one_is_refused():
    users, labels, scores = [], [], []
    for user in range(20):
        own = ranks(30, RNG.choice(30, 2, replace=False).tolist())
        users, labels, scores = users + [user] * 30, labels + own[0], scores + own[1]
    names = ["hr@3", "hr@20", "mrr@10", "ndcg@10", "ndcg@30"]
    result = metrics.ranking_metrics(users, labels, scores, n_bootstrap=2, metrics=names)
    wanted = [ir_measures.parse_measure(name) for name in ("Success@3", "Success@20", "RR@10", "nDCG@10", "nDCG@30")]
    expected = trec([f"u{user}" for user in users], labels, scores, dict(zip(names, wanted, strict=True)))
    assert list(result) == names
    for name in names:
        assert result[name]["value"] == pytest.approx(expected[name], abs=1e-9), name
    for name in ("hr@0", "hr", "recall@5", "map@5", "ndcg@-1"):
        with pytest.raises(ValueError, match=f"unknown metric '{name}': known are auc"):
            metrics.ranking_metrics(users, labels, scores, metrics=[name])


@pytest.mark.parametrize(
    "ids",
    [
        [7, 7, 3, 3],
        [7.0, 7.0, 3.5, 3.5],
        np.array([7, 7, 3, 3], dtype=np.int32),
        [("a", 1), ("a", 1), ("b", 2), ("b", 2)],
        ["a", "a", 1, 1],
        pl.Series(["x", "x", "y", "y"], dtype=pl.Categorical),
    ],
)
def test_user_ids_may_be_anything_hashable(ids):
    labels, scores = [1, 0, 0, 1], [0.9, 0.1, 0.4, 0.3]
    assert metrics.ranking_metrics(ids, labels, scores, n_bootstrap=2)["hr@1"]["value"] == 0.5
    assert metrics.user_columns(ids, labels, scores)["hr@1"].tolist() in ([0.0, 1.0], [1.0, 0.0])


def test_an_all_tied_model_gets_what_guessing_gets_wherever_the_positive_stands():
    for place in (0, 20):
        labels = np.zeros((7, 21), int)
        labels[:, place] = 1
        result = metrics.ranking_metrics(np.repeat(list("abcdefg"), 21), labels.ravel(), np.zeros(7 * 21), 20)
        assert result["auc"]["value"] == result["auc_user"]["value"] == 0.5
        for k in (1, 5, 10):
            assert result[f"hr@{k}"]["value"] == pytest.approx(k / 21)
        assert result["mrr@5"]["value"] == pytest.approx(sum(1 / r for r in range(1, 6)) / 21)


def test_users_without_a_value_do_not_count():
    users, labels, scores = ["a", "a", "b", "b", "c", "c"], [1, 0, 0, 0, 1, 1], [1.0, 0.0, 5.0, 4.0, 2.0, 1.0]
    columns = metrics.user_columns(users, labels, scores)
    assert columns["auc_user"] == pytest.approx([1.0, np.nan, np.nan], nan_ok=True)  # b: no positive, c: no negative
    assert columns["hr@1"] == pytest.approx([1.0, np.nan, 1.0], nan_ok=True)
    result = metrics.ranking_metrics(users, labels, scores, n_bootstrap=50)
    assert result["hr@1"] == {"value": 1.0, "ci95": [1.0, 1.0]}
    with pytest.raises(ValueError, match="auc_user is undefined"):
        metrics.ranking_metrics(["a", "b"], [1, 0], [0.0, 1.0])
    assert np.isnan(metrics.list_metric("hr@1", [0, 0], [1.0, 0.0]))


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
        values.append(metrics.list_metric("auc_user", labels[drawn], scores[drawn]))
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
    begun = time.process_time()
    fast = metrics.ranking_metrics(users, labels, scores)
    assert time.process_time() - begun < 10
    resampled = metrics.ranking_metrics(users[:-5], labels[:-5], scores[:-5], n_bootstrap=200)  # one user too few
    for name in metrics.METRICS:
        assert fast[name]["value"] == pytest.approx(resampled[name]["value"], abs=1e-4)
        assert fast[name]["ci95"] == pytest.approx(resampled[name]["ci95"], abs=6e-4)


def test_paired_differences_are_those_of_the_metrics_and_see_what_separate_intervals_do_not():
    users, labels = np.repeat(np.arange(300), 11), np.tile([1] + [0] * 10, 300)
    shared = RNG.normal(size=3300) + labels
    ours, theirs = shared + 0.1 * labels, shared
    table = metrics.paired_differences(users, labels, ours, theirs, n_bootstrap=400)
    a, b = (metrics.ranking_metrics(users, labels, scores, n_bootstrap=400) for scores in (ours, theirs))
    for name in metrics.METRICS:
        assert table[name]["difference"] == pytest.approx(a[name]["value"] - b[name]["value"], abs=1e-12)
    assert table["auc"]["ci95"][0] > 0 and table["auc"]["p"] < 0.01
    assert b["auc"]["ci95"][1] > a["auc"]["ci95"][0]  # the separate intervals overlap
    reverse = metrics.paired_differences(users, labels, theirs, ours, n_bootstrap=400)
    assert reverse["map"]["difference"] == -table["map"]["difference"] and reverse["map"]["p"] == table["map"]["p"]


def test_equal_rankers_do_not_differ_and_chance_rejects_at_its_rate():
    users, labels = np.repeat(np.arange(100), 6), np.tile([1, 0, 0, 0, 0, 0], 100)
    same = metrics.paired_differences(users, labels, labels * 1.0, labels * 2.0, n_bootstrap=50)
    assert all(one == {"difference": 0.0, "ci95": [0.0, 0.0], "p": 1.0} for one in same.values())
    rejected = 0
    for trial in range(100):
        rng = np.random.default_rng(trial)
        table = metrics.paired_differences(users, labels, rng.normal(size=600), rng.normal(size=600), 200, trial)
        rejected += table["auc_user"]["p"] < 0.05
    assert rejected <= 14  # 5 are expected; more than 14 has odds below 1 : 1000


def test_normal_limit_of_the_paired_bootstrap():
    values = RNG.normal(0.01, 1.0, size=(metrics.NORMAL_FROM, 1))
    fast = np.quantile(metrics.resampled_means(values, 1000, 0), [0.025, 0.975])
    slow = np.quantile(metrics.resampled_means(values[:-1], 1000, 0), [0.025, 0.975])
    assert fast == pytest.approx(slow, abs=6e-4)


def test_a_recipe_s_metrics_are_those_that_are_measured_unless_it_names_others():
    assert EvaluationOptions().metrics == list(metrics.METRICS)


def test_readers_see_metrics_by_their_usual_names():
    assert [metrics.metric_label(name) for name in ("ndcg@10", "auc_user", "map")] == ["NDCG@10", "AUC per user", "MAP"]


def test_a_cut_beyond_every_list_is_that_of_the_longest_one() -> None:
    rng = np.random.default_rng(0)
    users, labels, scores = np.repeat(np.arange(30), 6), np.tile([1, 0, 0, 1, 0, 0], 30), rng.integers(0, 3, 180) / 2
    names = ["hr", "mrr", "ndcg"]
    far = metrics.user_columns(users, labels, scores, [f"{name}@{10**12}" for name in names])
    near = metrics.user_columns(users, labels, scores, [f"{name}@6" for name in names])
    for one, other in zip(far.values(), near.values(), strict=True):
        np.testing.assert_allclose(one, other)
