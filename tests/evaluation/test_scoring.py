"""What the model is shown under each view."""

import numpy as np
import polars as pl
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pictures

from mllm_msr.data.catalogue import Catalogue
from mllm_msr.evaluation import scoring as evaluation
from mllm_msr.evaluation.metrics import place_metrics, ranking_metrics

COLOURS = ["red", "green", "blue", None, "white"]


def table() -> Catalogue:
    pictures = [None if colour is None else Pictures.new("RGB", (4, 4), colour) for colour in COLOURS]
    names = [f"i{place}" for place in range(len(COLOURS))]
    features = Features(
        {"item_id": Value("string"), "title": Value("string"), "text": Value("string"), "image": Image()}
    )
    rows = {"item_id": names, "title": names, "text": names, "image": pictures}
    return Catalogue(Dataset.from_dict(rows, features=features))


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
    seen = pl.DataFrame(
        [(user, item) for user, items in chosen.items() for item in items], ["user_id", "item_id"], orient="row"
    )
    parts = list(evaluation.over_the_catalogue(tasks, catalogue, seen, pairs=20))
    assert len(parts) > 1
    whole = pl.concat(parts)
    assert whole.select("user_id", "history").equals(tasks.select("user_id", "history"))
    for user, candidates, labels in whole.select("user_id", "candidates", "labels").iter_rows():
        assert set(candidates) == set(catalogue) - set(chosen[user][:-1])
        assert [item for item, label in zip(candidates, labels, strict=True) if label] == chosen[user][-1:]
    values = {item: place // 2 for place, item in enumerate(catalogue)}  # equals in twos
    pairs = evaluation.pairs(whole)
    scores = evaluation.score_with_values(whole, [float(values[item]) for item in pairs["item_id"]])
    found = evaluation.places(scores)
    again = ranking_metrics(scores["user_id"], scores["label"], scores["logit"], n_bootstrap=50)
    metrics = place_metrics(found["above"], found["equal"], found["candidates"], n_bootstrap=50)
    assert set(again) - set(metrics) == {"auc"}
    for name, result in metrics.items():
        assert [result["value"], *result["ci95"]] == pytest.approx([again[name]["value"], *again[name]["ci95"]])
    with pytest.raises(ValueError, match="missing or NaN"):
        evaluation.places(scores.with_columns(pl.lit(float("nan")).alias("logit")))


def test_some_tasks_are_drawn_by_seed_and_stay_in_order():
    tasks = pl.DataFrame({"task": range(50)})
    some = evaluation.some_tasks(tasks, 10, seed=3)["task"].to_list()
    assert len(some) == 10 and some == sorted(some)
    assert some == evaluation.some_tasks(tasks, 10, seed=3)["task"].to_list()
    assert some != evaluation.some_tasks(tasks, 10, seed=4)["task"].to_list()
    assert evaluation.some_tasks(tasks, None, seed=3).equals(tasks) and evaluation.some_tasks(tasks, 99, seed=3).equals(
        tasks
    )


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
