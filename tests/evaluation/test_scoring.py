"""What the model is shown under each view, and which tasks are drawn."""

import numpy as np
import polars as pl
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as Images

from mllm_msr.data.catalogue import Catalogue
from mllm_msr.evaluation import scoring
from mllm_msr.evaluation.full_catalogue import over_the_catalogue, places_by_ranker
from mllm_msr.evaluation.metrics import METRICS, user_columns
from mllm_msr.evaluation.places import place_columns, rank_of_choice
from mllm_msr.evaluation.scorers import Popularity

COLOURS = ["red", "green", "blue", None, "white"]


@pytest.fixture
def catalogue() -> Catalogue:
    """Five items; the fourth has no image."""
    images = [None if colour is None else Images.new("RGB", (4, 6), colour) for colour in COLOURS]
    names = [f"i{place}" for place in range(len(COLOURS))]
    features = Features(
        {"item_id": Value("string"), "title": Value("string"), "text": Value("string"), "image": Image()}
    )
    rows = {"item_id": names, "title": names, "text": names, "image": images}
    return Catalogue(Dataset.from_dict(rows, features=features))


def pixel(image):
    return None if image is None else image.getpixel((0, 0))


def test_shuffled_images_are_all_there_and_none_at_home(catalogue):
    for seed in range(5):
        shuffled = scoring.with_shuffled_images(catalogue, seed)
        before = {item: pixel(catalogue[item].image) for item in catalogue}
        after = {item: pixel(shuffled[item].image) for item in shuffled}
        assert sorted(map(str, after.values())) == sorted(map(str, before.values()))
        assert [item for item in catalogue if after[item] == before[item]] == ["i3"]  # the one without an image
        assert all((shuffled[item].item_id, shuffled[item].title) == (item, item) for item in catalogue)


@pytest.mark.parametrize("view", [scoring.as_it_is, scoring.without_images, scoring.with_blank_images])
def test_other_views_change_the_image_alone(catalogue, view):
    seen = view(catalogue, 0)
    assert list(seen) == list(catalogue) and len(seen) == len(catalogue)
    for item in catalogue:
        own, candidate = catalogue[item], seen[item]
        assert (candidate.item_id, candidate.title, candidate.text) == (own.item_id, own.title, own.text)
        if view is scoring.without_images or own.image is None:
            assert candidate.image is None
        else:
            assert candidate.image.size == (4, 6)
            assert pixel(candidate.image) == (pixel(own.image) if view is scoring.as_it_is else scoring.GREY)


def test_over_the_catalogue_stands_all_that_was_never_chosen_and_places_count_it():
    rng = np.random.default_rng(0)
    catalogue = pl.Series([f"i{item}" for item in range(9)])
    chosen = {f"u{user}": rng.permutation(catalogue)[: 3 + user % 3].tolist() for user in range(7)}
    tasks = pl.DataFrame(
        [
            (user, items[:-1], [items[-1], *rng.choice(sorted(set(catalogue) - set(items)), 2)], [1, 0, 0])
            for user, items in chosen.items()
        ],
        schema=["user_id", "history", "candidates", "labels"],
        orient="row",
    )
    log = pl.DataFrame(
        [(user, item) for user, items in chosen.items() for item in items], ["user_id", "item_id"], orient="row"
    )
    parts = list(over_the_catalogue(tasks, catalogue, log, pairs=20))
    assert len(parts) > 1
    whole = pl.concat(parts)
    assert whole.select("user_id", "history").equals(tasks.select("user_id", "history"))
    for user, candidates, labels in whole.select("user_id", "candidates", "labels").iter_rows():
        assert set(candidates) == set(catalogue) - set(chosen[user][:-1])
        assert [item for item, label in zip(candidates, labels, strict=True) if label] == chosen[user][-1:]
    values = {item: place // 2 for place, item in enumerate(catalogue)}  # equals in twos
    pairs = scoring.pairs(whole)
    scores = scoring.score_with_values(whole, np.array([values[item] for item in pairs["item_id"]]))
    columns = place_columns(rank_of_choice(scores))
    again = user_columns(scores["user_id"], scores["label"], scores["logit"])
    assert set(METRICS) - set(columns) == {"auc"}
    for name, column in columns.items():
        assert column == pytest.approx(again[name])
    by_item = Popularity(pl.DataFrame({"item_id": catalogue, "count": [values[item] for item in catalogue]}))
    at_once = places_by_ranker(by_item, tasks, log)  # the same without a pair written out
    assert at_once.sort("user_id").equals(rank_of_choice(scores))
    with pytest.raises(ValueError, match="missing or NaN"):
        rank_of_choice(scores.with_columns(pl.lit(float("nan")).alias("logit")))


def test_random_tasks_are_drawn_by_seed_and_stay_in_order():
    tasks = pl.DataFrame({"task": range(50)})
    drawn = scoring.random_tasks(tasks, 10, seed=3)["task"].to_list()
    assert len(drawn) == 10 and drawn == sorted(drawn)
    assert drawn == scoring.random_tasks(tasks, 10, seed=3)["task"].to_list()
    assert drawn != scoring.random_tasks(tasks, 10, seed=4)["task"].to_list()
    assert scoring.random_tasks(tasks, None, seed=3).equals(tasks)
    assert scoring.random_tasks(tasks, 99, seed=3).equals(tasks)


def test_another_users_context_is_never_ones_own_and_no_preference_is_empty():
    contexts = pl.DataFrame(
        {
            "user_id": list("abcd"),
            "preference": ["likes a", "likes b", "likes c", "likes d"],
            "recent": [["a"], ["b"], ["c", "c"], []],
            "candidates": [["x"], ["y"], ["z"], ["w"]],
        }
    )
    other = scoring.of_another_user(contexts, seed=0)
    assert sorted(other["preference"]) == sorted(contexts["preference"])
    assert all(preference[-1] != user for user, preference in other.select("user_id", "preference").iter_rows())
    own = dict(contexts.select("preference", "recent").iter_rows())
    assert all(own[preference] == recent for preference, recent in other.select("preference", "recent").iter_rows())
    assert other.select("user_id", "candidates").equals(contexts.select("user_id", "candidates"))
    nothing = scoring.without_preference(contexts, seed=0)
    assert set(nothing["preference"]) == {""} and nothing["recent"].list.len().sum() == 0
    assert nothing.schema == contexts.schema
