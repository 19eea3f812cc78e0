from typing import Any

import polars as pl
import pytest

from mllm_msr.data.leakage import (
    LeakageError,
    check_leakage,
    check_no_ids,
    check_own_words,
    check_used_preferences,
)
from mllm_msr.data.tasks import TaskPlan
from mllm_msr.records.sections import PrepareOptions

LOG = pl.DataFrame(
    [("u", item, time) for time, item in enumerate("abcdef")]
    + [("v", item, time) for time, item in enumerate("aghij")],
    schema=["user_id", "item_id", "timestamp"],
    orient="row",
)
PLAN = TaskPlan.of(LOG, PrepareOptions(n_negatives=3))
TASKS = pl.concat(PLAN.chunks())
STEPS = [("u", 1, ["a", "b", "c"], 2), ("u", 2, ["a", "b", "c", "d", "e"], 4), ("v", 1, ["a", "g", "h"], 2)]


def preferences(*rows: Any) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=["user_id", "step", "read_item_ids", "last_timestamp"], orient="row")


def spoil(task_id: str, **columns: Any) -> pl.DataFrame:
    """TASKS with other values in one row."""
    return TASKS.with_columns(
        pl.when(pl.col("task_id") == task_id).then(pl.lit(pl.Series([value]))).otherwise(name).alias(name)
        for name, value in columns.items()
    )


def test_sound_tasks_pass() -> None:
    check_leakage(TASKS, LOG, PLAN.popularity, preferences(*STEPS))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"history": ["a", "b", "c", "d", "f"]}, "targets in their own history"),
        ({"history": ["a", "b", "c", "d", "g"]}, "never met"),
        ({"history": ["a", "b"]}, "history_length is wrong"),
        ({"cutoff": 2}, "later than the cutoff"),
        ({"candidates": ["f", "g", "b", "h"], "labels": [1, 0, 0, 0]}, "negatives that the user has met"),
        ({"candidates": ["g", "f", "h", "i"], "labels": [1, 0, 0, 0]}, "targets that the user never met"),
        ({"candidates": ["f", "g", "g", "h"], "labels": [1, 0, 0, 0]}, "candidates twice"),
        ({"candidates": ["f", "g", "i", "h"], "labels": [0, 0, 0, 0]}, "without exactly one target"),
        ({"candidates": ["f", "g"], "labels": [1, 0, 0]}, "labels do not match"),
    ],
)
def test_spoilt_tasks_stop_with_the_row(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(LeakageError, match=rf"(?s){message}.*u:5"):
        check_leakage(spoil("u:5", **columns), LOG)


def test_negatives_that_were_cut_off_are_found() -> None:
    negative = TASKS.filter(task_id="u:5").explode("candidates", "labels").filter(labels=0)["candidates"][0]
    seen = pl.DataFrame({"user_id": ["u"], "item_id": [negative]})
    with pytest.raises(LeakageError, match="negatives that the user has met"):
        check_leakage(TASKS, LOG, seen=seen)


def test_popularity_that_saw_held_out_interactions() -> None:
    counts = LOG.group_by("item_id").len("count")
    with pytest.raises(LeakageError, match="counts held-out interactions"):
        check_leakage(TASKS, LOG, counts)
    with pytest.raises(LeakageError, match="is not the popularity"):
        check_leakage(TASKS, LOG, PLAN.popularity.with_columns(pl.col("count") * 0))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("u", 1, ["a", "b", "f"], 5)], "outside the history"),
        ([("u", 1, ["a", "b", "g"], 2)], "outside the history"),
        ([("w", 1, ["a"], 0)], "users who are not in the log"),
        ([("u", 1, ["a", "b", "c"], 1)], "later than they say"),
        ([("u", 1, ["a"], 9)], "later than the cutoff"),
        ([("u", 1, ["a", "b"], 1), ("u", 2, ["c", "d"], 3)], "forget"),
    ],
)
def test_preferences_that_read_too_much(rows: list[Any], message: str) -> None:
    with pytest.raises(LeakageError, match=message):
        check_leakage(TASKS, LOG, preferences=preferences(*rows))


def test_preferences_of_users_without_a_task_may_read_all() -> None:
    log = pl.concat([LOG, pl.DataFrame({"user_id": ["w"] * 2, "item_id": ["a", "b"], "timestamp": [0, 1]})])
    check_leakage(TASKS, log, preferences=preferences(*STEPS, ("w", 1, ["a", "b"], 1)))


def test_a_preference_fits_the_task_that_uses_it() -> None:
    check_used_preferences(TASKS, preferences(*STEPS), 3)
    early = preferences(
        ("u", 1, ["a", "b", "c", "d"], 2), *STEPS[1:]
    )  # d is the target of the task u:3, which reads it
    check_leakage(TASKS, LOG, preferences=early.with_columns(last_timestamp=pl.Series([3, 4, 2])))
    with pytest.raises(LeakageError, match=r"(?s)read beyond their history: 1 rows.*u:3"):
        check_used_preferences(TASKS.filter(pl.col("history_length") < 5), early, 3)
    late = preferences(("u", 1, ["a", "b", "c"], 9))
    with pytest.raises(LeakageError, match="read beyond their history"):
        check_used_preferences(TASKS, late, 3)


def test_paper_never_trains_on_who_is_held_out() -> None:
    plan = TaskPlan.of(LOG, PrepareOptions(protocol="paper", folds=3, n_negatives=3, min_history=1))
    tasks = pl.concat(plan.chunks())
    held_out = tasks.filter(pl.col("split") != "train")
    check_leakage(tasks, LOG, plan.popularity, protocol="paper")
    trained = held_out.with_columns(split=pl.lit("train"), task_id=pl.lit("x"))
    with pytest.raises(LeakageError, match="held-out users that are trained on"):
        check_leakage(pl.concat([tasks, trained]), LOG, protocol="paper")
    counted = LOG.group_by("item_id").len("count").with_columns(pl.col("count").cast(pl.Int64))
    with pytest.raises(LeakageError, match="counts held-out interactions"):
        check_leakage(tasks, LOG, counted, protocol="paper")


def test_numbers_for_ids_are_checked_alike() -> None:
    coded = LOG.with_columns(user_id=pl.lit(0, pl.UInt32), item_id=pl.col("item_id").rank("dense").cast(pl.UInt32))
    tasks = pl.DataFrame(
        {
            "task_id": ["0:1"],
            "split": ["test"],
            "user_id": [0],
            "history": [[1]],
            "cutoff": [2],
            "candidates": [[2, 90]],
        }
        | {"labels": [[1, 0]], "history_length": [1], "target_train_count": [0]},
        schema_overrides={"user_id": pl.UInt32},
    )
    check_leakage(tasks, coded)
    with pytest.raises(LeakageError, match="negatives that the user has met"):
        check_leakage(tasks.with_columns(candidates=pl.Series([[2, 3]])), coded)


def test_raw_ids_in_a_text() -> None:
    ids = pl.Series(["B00TEST123", "12", "games", "AE1XYZ-9", "ann.7@shop/3"])
    fine = pl.Series(["12 games from 1995", "B00TEST1234", ""])
    check_no_ids(fine, ids)
    check_no_ids(pl.Series([], dtype=pl.String), ids)
    for text in ("likes B00TEST123.", "user AE1XYZ-9: 3", "(ann.7@shop/3)", "id=B00TEST123", "B00TEST123/AE1"):
        with pytest.raises(LeakageError, match="raw ids in a text"):
            check_no_ids(pl.Series([*fine, text]), ids)
    check_no_ids(pl.Series(["likes B00TEST123."]), ids, allowed=pl.Series(["Part B00TEST123"]))


def test_items_that_are_called_by_their_id() -> None:
    items = pl.DataFrame({"item_id": ["7", "8"], "title": ["8", "Room 8"], "text": ["", "8 rooms"]})
    check_own_words(items)
    for column in ("title", "text"):
        with pytest.raises(LeakageError, match=r"(?s)that are the item's id: 2 rows.*'item_id': '7'"):
            check_own_words(items.with_columns(pl.col("item_id").alias(column)))
