"""What the model is shown under each view."""

import polars as pl
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pictures

from mllm_msr.training import evaluation
from mllm_msr.training.collator import ItemTable

COLOURS = ["red", "green", "blue", None, "white"]


def table() -> ItemTable:
    pictures = [None if colour is None else Pictures.new("RGB", (4, 4), colour) for colour in COLOURS]
    names = [f"i{place}" for place in range(len(COLOURS))]
    features = Features(
        {"item_id": Value("string"), "title": Value("string"), "text": Value("string"), "image": Image()}
    )
    rows = {"item_id": names, "title": names, "text": names, "image": pictures}
    return ItemTable(Dataset.from_dict(rows, features=features))


def pixel(image):
    return None if image is None else image.getpixel((0, 0))


def test_shuffled_images_are_all_there_and_none_at_home():
    items = table()
    for seed in range(5):
        shuffled = evaluation.ShuffledImages(items, seed)
        before = {item: pixel(items[item]["image"]) for item in items.index}
        after = {item: pixel(shuffled[item]["image"]) for item in items.index}
        assert sorted(map(str, after.values())) == sorted(map(str, before.values()))
        assert [item for item in items.index if after[item] == before[item]] == ["i3"]  # the one without a picture
        assert all(shuffled[item]["title"] == item for item in items.index)


def test_another_users_context_is_never_ones_own_and_no_preference_is_empty():
    contexts = pl.DataFrame(
        {
            "user_id": list("abcd"),
            "preference": ["likes a", "likes b", "likes c", "likes d"],
            "recent": [["a"], ["b"], ["c", "c"], []],
            "candidates": [["x"], ["y"], ["z"], ["w"]],
        }
    )
    other = evaluation.of_another_user(contexts, seed=0)
    assert sorted(other["preference"]) == sorted(contexts["preference"])
    assert all(preference[-1] != user for user, preference in other.select("user_id", "preference").iter_rows())
    own = dict(contexts.select("preference", "recent").iter_rows())
    assert all(own[preference] == recent for preference, recent in other.select("preference", "recent").iter_rows())
    assert other.select("user_id", "candidates").equals(contexts.select("user_id", "candidates"))
    nothing = evaluation.without_preference(contexts)
    assert set(nothing["preference"]) == {""} and nothing["recent"].list.len().sum() == 0
    assert nothing.schema == contexts.schema
