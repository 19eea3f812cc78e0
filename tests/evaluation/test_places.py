"""Places of the chosen item: the same metrics as from the scores, whatever is tied."""

import numpy as np
import polars as pl
import pytest

from mllm_msr.evaluation.metrics import METRICS, user_columns
from mllm_msr.evaluation.places import hit_curve, place_columns, popularity_figures, rank_of_choice


def scores_of(n_users: int, n_candidates: int, levels: int, seed: int = 0) -> pl.DataFrame:
    """One choice a user, scores of a few levels, rows in any order."""
    rng = np.random.default_rng(seed)
    rows = [
        (f"u{user}", int(place == user % n_candidates), float(rng.integers(levels)))
        for user in range(n_users)
        for place in range(n_candidates)
    ]
    frame = pl.DataFrame(rows, schema=["user_id", "label", "logit"], orient="row")
    return frame[rng.permutation(len(frame))]


@pytest.mark.parametrize("levels", [1, 3, 10_000])
def test_places_say_as_much_of_one_choice_as_scores_do(levels):
    scores = scores_of(40, 23, levels)
    expected = user_columns(scores["user_id"], scores["label"], scores["logit"])
    columns = place_columns(rank_of_choice(scores))
    assert list(columns) == [name for name in METRICS if name != "auc"]
    for name, column in columns.items():
        assert column == pytest.approx(expected[name]), name


def test_the_curve_of_hits_is_the_hit_rate_at_every_rank():
    scores = scores_of(30, 12, 4)
    names = [f"hr@{k}" for k in range(1, 13)]
    expected = user_columns(scores["user_id"], scores["label"], scores["logit"], names)
    assert hit_curve(scores) == pytest.approx([expected[name].mean() for name in names])
    assert hit_curve(scores, longest=5) == pytest.approx(hit_curve(scores)[:5])


def test_the_best_of_several_choices_counts_and_who_chose_nothing_has_no_place():
    scores = pl.DataFrame(
        {"user_id": list("bbbbaac"), "label": [1, 0, 1, 0, 0, 0, 1], "logit": [0.0, 2.0, 1.0, 1.0, 1.0, 0.0, 0.0]}
    )
    assert rank_of_choice(scores).rows() == [("b", 2, 3, 4), ("c", 1, 1, 1)]


@pytest.mark.parametrize(("first", "last", "candidates"), [(0, 1, 5), (3, 2, 5), (5, 6, 5)])
def test_impossible_places_are_refused(first, last, candidates):
    with pytest.raises(ValueError, match="1 <= first <= last <= candidates"):
        place_columns(pl.DataFrame({"first": [first], "last": [last], "candidates": [candidates]}))


def test_popularity_ranks_by_training_counts_and_equals_fall_anywhere(tmp_path):
    items = [f"i{item}" for item in range(30)]
    rng = np.random.default_rng(1)
    popularity = pl.DataFrame({"item_id": items, "count": rng.integers(0, 6, 30)})
    lists = [rng.permutation(items)[: 5 + user % 4].tolist() for user in range(50)]
    tasks = pl.DataFrame(
        {
            "user_id": [f"u{user}" for user in range(50)],
            "split": ["test"] * 50,
            "candidates": lists,
            "labels": [[int(place == user % 5) for place in range(len(own))] for user, own in enumerate(lists)],
        }
    )
    rows = tasks.explode("candidates", "labels").join(popularity, left_on="candidates", right_on="item_id")
    columns = user_columns(rows["user_id"], rows["labels"], rows["count"])
    figures = popularity_figures(tasks, popularity)
    assert figures == {name: pytest.approx(np.nanmean(columns[name]), abs=5e-5) for name in figures}
    tasks.write_parquet(tmp_path / "tasks.parquet")
    scanned = pl.scan_parquet(tmp_path / "tasks.parquet")
    assert popularity_figures(scanned.filter(split="test"), popularity) == figures
    assert popularity_figures(scanned.filter(split="validation"), popularity) == {}
