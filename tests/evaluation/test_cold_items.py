"""The four figures of cold and trained items against each other, counted by hand."""

import numpy as np
import polars as pl
import pytest

from mllm_msr.evaluation.cold_items import cold_items, kind_columns, places_among_candidates

COUNTS = pl.DataFrame({"item_id": ["c1", "c2", "c3", "t1", "t2", "t9"], "count": [0, 0, 0, 1, 2, 9]})
ROWS = [  # user, item, label, logit: the target first
    ("cold", [("c1", 1, 5.0), ("c2", 0, 7.0), ("c3", 0, 1.0), ("t1", 0, 5.0), ("t2", 0, 2.0)]),
    ("rare", [("t1", 1, 9.0), ("c2", 0, 1.0), ("t9", 0, 1.0)]),
    ("well", [("t9", 1, 3.0), ("t1", 0, 4.0), ("t2", 0, 2.0), ("c1", 0, 3.0)]),
    ("warm", [("t9", 1, 1.0), ("t1", 0, 0.0)]),
]
SCORES = pl.DataFrame(
    [(user, *row) for user, rows in ROWS for row in rows],
    schema=["user_id", "item_id", "label", "logit"],
    orient="row",
)


def test_each_kind_of_target_against_each_kind_of_negative() -> None:
    found = cold_items({"ours": SCORES}, {}, COUNTS)
    assert (found.among_all, found.cold_targets, found.trained_targets) == (False, 1, 2)
    values = {name: estimate.value for name, estimate in found.variants["ours"].items()}
    assert values == {
        "cold_cold": 0.5,  # above c3, below c2
        "cold_trained": 0.75,  # level with t1, above t2
        "trained_cold": 0.5,  # level with c1; the other user has no cold negative
        "trained_trained": pytest.approx((0.5 + 1.0) / 2),
    }


def test_what_no_user_has_is_left_out() -> None:
    warm = SCORES.filter(pl.col("user_id") == "warm")
    assert list(cold_items({"ours": warm}, {}, COUNTS).variants["ours"]) == ["trained_trained"]
    rare = cold_items({"ours": SCORES.filter(pl.col("user_id") == "rare")}, {}, COUNTS)  # neither cold nor well trained
    assert (rare.cold_targets, rare.trained_targets, rare.variants) == (0, 0, {"ours": {}})


def test_places_among_all_items_come_first() -> None:
    places = places_among_candidates(SCORES.filter(pl.col("user_id") != "warm"), COUNTS)
    found = cold_items({"ours": SCORES, "other": SCORES}, {"ours": places}, COUNTS)
    assert found.among_all and list(found.variants) == ["ours"] and found.trained_targets == 1
    assert found.variants["ours"]["trained_trained"].value == 0.5
    targets = pl.DataFrame({"user_id": ["cold", "rare", "well"], "count": [0, 1, 9]})
    columns = kind_columns(places, targets)
    assert np.isnan(columns["trained_trained"]).tolist() == [True, True, False]  # by user: cold, rare, well
