"""What the model is shown under each view, and which tasks are drawn."""

import polars as pl
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as Images

from mllm_msr.data.catalogue import Catalogue
from mllm_msr.evaluation import scoring

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
