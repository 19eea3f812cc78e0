"""Slices, calibration and checks: every user in one part of each division, and figures that mean what they say."""

from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest

from mllm_msr.evaluation import diagnostics
from mllm_msr.evaluation.metrics import ranking_metrics, user_columns
from mllm_msr.records.results import AgreementFigures, Check, Estimate, Slice

RNG = np.random.default_rng(0)
N_USERS, N_ITEMS = 60, 30
DIVISIONS = ("history_length", "target_train_count", "popularity_decile")


@dataclass
class Scored:
    """Two variants on the same tasks: one follows popularity, one scores everything alike."""

    scores: pl.DataFrame
    tasks: pl.DataFrame
    popularity: pl.DataFrame

    def slices(self, by: str) -> list[Slice]:
        columns = {
            str(variant): user_columns(frame["user_id"], frame["label"], frame["logit"], diagnostics.SLICE_METRICS)
            for (variant,), frame in self.scores.group_by("variant")
        }
        found = diagnostics.slices(columns, self.tasks, self.popularity)
        assert {part.by for part in found} == set(DIVISIONS)
        return [part for part in found if part.by == by]


@pytest.fixture(scope="module")
def scored() -> Scored:
    counts = np.sort(RNG.integers(0, 60, N_ITEMS))
    counts[0] = 0
    popularity = pl.DataFrame({"item_id": [f"i{i:02}" for i in range(N_ITEMS)], "count": counts})
    tasks, scores = [], []
    for user in range(N_USERS):
        shown = RNG.permutation(N_ITEMS)[:11]
        labels = [1] + [0] * 10
        items = [f"i{item:02}" for item in shown]
        tasks.append((f"u{user}", items, labels, 3 + user % 20, int(counts[shown[0]])))
        for variant, logits in (("popularity", counts[shown].astype(float)), ("blind", np.zeros(11))):
            for item, label, logit in zip(items, labels, logits, strict=True):
                scores.append((variant, f"u{user}", item, label, float(logit)))
    names = ["user_id", "candidates", "labels", "history_length", "target_train_count"]
    return Scored(
        pl.DataFrame(scores, schema=["variant", "user_id", "item_id", "label", "logit"], orient="row"),
        pl.DataFrame(tasks, schema=names, orient="row"),
        popularity,
    )


def test_every_division_has_every_user_once_and_its_means_add_up(scored):
    own = scored.scores.filter(variant="popularity")
    whole = ranking_metrics(own["user_id"], own["label"], own["logit"], n_bootstrap=2)["ndcg@5"]["value"]
    for by in DIVISIONS:
        parts = scored.slices(by)
        assert sum(part.users for part in parts) == N_USERS
        mean = sum(part.users * part.variants["popularity"]["ndcg@5"].value for part in parts) / N_USERS
        assert mean == pytest.approx(whole)
        starts = [int(part.part.split("-")[0].rstrip("+")) for part in parts]
        assert starts == sorted(set(starts))


def test_a_slice_has_the_metrics_of_its_users_alone(scored):
    part = scored.slices("target_train_count")[-1]
    least = int(part.part.split("-")[0].rstrip("+"))
    users = scored.tasks.filter(pl.col("target_train_count") >= least).select("user_id")
    own = scored.scores.filter(variant="popularity").join(users, on="user_id", how="semi")
    expected = ranking_metrics(own["user_id"], own["label"], own["logit"], n_bootstrap=200)
    assert set(part.variants["popularity"]) == set(diagnostics.SLICE_METRICS)
    for name, result in part.variants["popularity"].items():
        assert result.value == pytest.approx(expected[name]["value"])
        assert [result.low, result.high] == pytest.approx(expected[name]["ci95"])


def test_cold_users_are_parts_of_their_own_and_the_others_quarters(scored):
    for lengths, expected in (
        ([0] * 2 + [3] * 3 + [7] * 28 + [12] * 27, [("0", 2), ("1-4", 3), ("5-6", 0), ("7-11", 28), ("12+", 27)]),
        ([9] * 30 + [15] * 30, [("9-11", 30), ("15+", 30)]),
        ([0] * 10 + [2] * 50, [("0", 10), ("1+", 50)]),
    ):
        tasks = scored.tasks.with_columns(pl.Series("history_length", lengths))
        parts = Scored(scored.scores, tasks, scored.popularity).slices("history_length")
        assert [(part.part, part.users) for part in parts] == [(name, users) for name, users in expected if users]


def test_cold_items_are_a_part_of_their_own_and_popular_ones_are_ranked_better_by_popularity(scored):
    cold = [part.users for part in scored.slices("target_train_count") if part.part == "0"]
    assert cold == [scored.tasks.filter(pl.col("target_train_count") == 0).height]
    deciles = [part.variants["popularity"]["auc_user"].value for part in scored.slices("popularity_decile")]
    assert deciles[0] < 0.2 and deciles[-1] > 0.8
    for by in DIVISIONS:
        assert all(part.variants["blind"]["auc_user"].value == 0.5 for part in scored.slices(by))


def test_reliability_of_honest_and_of_shifted_probabilities():
    logits = RNG.normal(-2, 1.5, 40_000)
    labels = (RNG.random(40_000) < 1 / (1 + np.exp(-logits))).astype(int)
    honest = diagnostics.reliability(labels, logits)
    assert honest.error < 0.01
    assert sum(part.count for part in honest.bins) == 40_000 and len(honest.bins) == 10
    assert diagnostics.reliability(labels, logits + 3).error > 0.2
    assert diagnostics.reliability(labels, logits + 3, shift=-3).error == pytest.approx(honest.error)
    assert len(diagnostics.reliability(np.array([0, 1]), np.zeros(2)).bins) == 1  # equals fall together


def test_agreement_of_equal_scaled_and_reversed_scores():
    users, logits = np.repeat(np.arange(50), 9), RNG.normal(size=450)
    assert diagnostics.agreement(users, logits, logits) == AgreementFigures(0.0, 0.0, pytest.approx(1.0))
    doubled = diagnostics.agreement(users, logits, 2 * logits)
    assert doubled.rank_correlation == pytest.approx(1.0) and doubled.first_changed == 0.0
    assert doubled.max_difference == pytest.approx(np.abs(logits).max())
    reverse = diagnostics.agreement(users, logits, -logits)
    assert reverse.rank_correlation == pytest.approx(-1.0) and reverse.first_changed == 1.0
    blind = diagnostics.agreement(users, logits, np.zeros(450))  # all are first, so the first one stays among them
    assert blind.rank_correlation is None and blind.first_changed == 0.0


def test_ties_and_popularity_are_seen(scored):
    found = diagnostics.checks(scored.scores, scored.popularity)
    assert found["popularity"].popularity_correlation == pytest.approx(1.0)
    assert found["blind"] == Check(tied_users=1.0, popularity_correlation=None)
    reverse = scored.scores.filter(variant="popularity").with_columns(-pl.col("logit"))
    assert diagnostics.checks(reverse, scored.popularity)["popularity"].popularity_correlation == pytest.approx(-1.0)


def report(n_items: int = 90) -> dict:
    """Of a strict run of which 20 users were drawn, who met so many of the 100 items."""
    steps = [("k-core", 50, 100), ("sample", 20, n_items), ("history", 20, n_items)]
    cleaning = [{"step": step, "users": users, "items": items} for step, users, items in steps]
    return {"cleaning": cleaning, "protocol": {"name": "strict"}}


def test_a_cut_catalogue_and_popularity_below_chance_are_explained():
    below, above = ({"auc_user": Estimate(value, value - 0.02, value + 0.02)} for value in (0.45, 0.49))
    cut, upside_down = diagnostics.notes(report(), {"popularity": below})
    assert "a sample of 20 of 50 users" in cut and "90 of 100 items" in cut and "below chance" in upside_down
    assert diagnostics.notes(report(100), {"popularity": above}) == []
    assert diagnostics.notes(report(100) | {"protocol": {"name": "paper"}}, {"popularity": below}) == []
