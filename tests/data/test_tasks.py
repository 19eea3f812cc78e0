from collections import Counter
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_msr.data.leakage import check_leakage
from mllm_msr.data.tasks import TaskPlan, candidate_hash, make_tasks
from mllm_msr.records.sections import PrepareOptions


def frame(rows: list[tuple[str, str, int]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema={"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64}, orient="row")


def log(users: int = 30, length: int = 6, items: int = 40, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    rows = [
        (f"u{user:03}", f"i{item}", int(time))
        for user in range(users)
        for item, time in zip(rng.permutation(items)[:length], np.sort(rng.integers(0, 50, length)), strict=True)
    ]
    return frame(rows)


def targets(tasks: pl.DataFrame, split: str) -> list[str]:
    rows = tasks.filter(split=split).select("candidates", "labels").iter_rows()
    return [candidates[labels.index(1)] for candidates, labels in rows]


ONE = frame([("u", item, time) for time, item in enumerate("abcdef")] + [("v", "g", 1), ("v", "h", 2), ("v", "j", 3)])


def test_strict_takes_targets_from_the_end() -> None:
    tasks = make_tasks(ONE, n_negatives=3, max_train_targets=2)
    user = tasks.filter(user_id="u")
    assert [targets(user, split) for split in ("train", "validation", "test")] == [["c", "d"], ["e"], ["f"]]
    assert user["history"].to_list() == [list("ab"), list("abc"), list("abcd"), list("abcde")]
    assert user["cutoff"].to_list() == [2, 3, 4, 5]
    assert user["task_id"].to_list() == ["u:2", "u:3", "u:4", "u:5"]
    assert user["history_length"].to_list() == [2, 3, 4, 5]
    assert user["candidates"].list.len().to_list() == [2, 2, 4, 4]
    assert targets(tasks.filter(user_id="v"), "train") == []  # its only training target has no history


def test_counts_are_of_training_interactions_only() -> None:
    plan = TaskPlan.of(ONE, PrepareOptions(n_negatives=3))
    counts = dict(plan.popularity.iter_rows())
    assert counts == {**dict.fromkeys("abcdg", 1), **dict.fromkeys("efhj", 0)}
    assert pl.concat(plan.chunks()).filter(user_id="u")["target_train_count"].to_list() == [1, 1, 1, 0, 0]


def test_ties_follow_input_order_and_are_counted() -> None:
    tied = frame([("u", "z", 5), ("u", "a", 5), ("u", "m", 1), ("v", "b", 1), ("v", "c", 2), ("v", "d", 3)])
    plan = TaskPlan.of(tied, PrepareOptions(n_negatives=2))
    tasks = pl.concat(plan.chunks())
    assert targets(tasks.filter(user_id="u"), "test") == ["a"]
    assert tasks.filter(user_id="u", split="test")["history"].to_list() == [["m", "z"]]
    assert plan.report["test_targets_tied_in_time"] == 1


def test_repeated_target_is_refused_and_counted() -> None:
    rows = frame([("u", item, time) for time, item in enumerate("abca")] + [("v", item, 1) for item in "defg"])
    plan = TaskPlan.of(rows, PrepareOptions(n_negatives=2))
    tasks = pl.concat(plan.chunks())
    assert plan.report["targets_already_in_history"] == 1
    assert targets(tasks.filter(user_id="u"), "test") == []
    check_leakage(tasks, rows)


def test_user_who_met_nearly_everything_is_refused_and_counted() -> None:
    rows = frame([("u", item, time) for time, item in enumerate("abcdef")] + [("v", item, 1) for item in "abcg"])
    plan = TaskPlan.of(rows, PrepareOptions(n_negatives=3))
    assert plan.report["targets_with_too_few_unseen_items"] == 2  # u's two held-out targets; one unseen item trains
    with pytest.raises(ValueError, match="no ranking task is left"):
        TaskPlan.of(rows, PrepareOptions(n_negatives=9, n_train_negatives=9))


def test_negatives_avoid_what_a_longest_history_cut_off() -> None:
    seen = pl.DataFrame({"user_id": ["u"] * 2, "item_id": ["g", "h"]})
    tasks = make_tasks(ONE, seen=seen, n_negatives=1, seed=3)
    assert set(tasks.filter(user_id="u").explode("candidates", "labels").filter(labels=0)["candidates"]) == {"j"}


def test_paper_splits_users_and_folds_test_everyone_once() -> None:
    rows = log(users=50)
    tested: list[str] = []
    for fold in range(10):
        plan = TaskPlan.of(rows, PrepareOptions(protocol="paper", fold=fold, n_negatives=5))
        tasks = pl.concat(plan.chunks())
        assert dict(tasks["split"].value_counts().iter_rows()) == {"train": 40, "validation": 5, "test": 5}
        assert tasks["user_id"].is_unique().all() and (tasks["history_length"] == 5).all()
        trained = rows.join(tasks.filter(split="train"), on="user_id", how="semi")
        expected = dict(trained.group_by("item_id").len().iter_rows())
        assert {item: n for item, n in plan.popularity.iter_rows() if n} == expected
        tested += tasks.filter(split="test")["user_id"].to_list()
    assert sorted(tested) == sorted(set(rows["user_id"]))


def test_global_cutoff_parts_time_for_everybody() -> None:
    rows = log(users=60, length=8)
    plan = TaskPlan.of(rows, PrepareOptions(protocol="global-cutoff", n_negatives=5))
    tasks = pl.concat(plan.chunks())
    check_leakage(tasks, rows, plan.popularity)
    train, validation, test = (
        tasks.filter(split=split)["cutoff"].to_list() for split in ("train", "validation", "test")
    )
    assert max(train) < min(validation) and max(validation) < min(test)
    assert tasks.filter(split="test")["user_id"].is_unique().all()
    assert plan.popularity["count"].sum() == (rows["timestamp"] < min(validation)).sum()


def test_all_is_a_mark_and_tasks_have_a_sample_or_what_is_left() -> None:
    assert make_tasks(ONE, negatives="all", n_negatives=2).equals(make_tasks(ONE, negatives="uniform", n_negatives=2))
    tasks = make_tasks(ONE, negatives="all", n_negatives=100)
    for row in tasks.filter(pl.col("split") != "train").iter_rows(named=True):
        met = set(ONE.filter(user_id=row["user_id"])["item_id"])
        target = row["candidates"][row["labels"].index(1)]
        assert sorted(row["candidates"]) == sorted((set(ONE["item_id"]) - met) | {target})


def test_popular_negatives_follow_training_counts() -> None:
    rng = np.random.default_rng(0)
    weights = np.array([60, 20, 10, 5, 3, 2]) / 100
    rows = [(f"u{n}", "abcdef"[i], 1) for n in range(300) for i in rng.choice(6, 2, replace=False, p=weights)]
    rows += [(f"u{n}", f"{kind}{n % 50}", time) for n in range(300) for time, kind in enumerate("st", start=2)]
    tables = {kind: make_tasks(frame(rows), negatives=kind, n_negatives=2) for kind in ("popularity", "uniform")}
    counts = {}
    for kind, tasks in tables.items():
        check_leakage(tasks, frame(rows))
        drawn = tasks.filter(split="test").explode("candidates", "labels").filter(labels=0)["candidates"]
        counts[kind] = Counter(drawn)
    popular = {kind: sum(count[item] for item in "abcdef") for kind, count in counts.items()}
    assert popular["popularity"] > 5 * popular["uniform"]


@pytest.mark.parametrize("negatives", ["uniform", "popularity"])
def test_chunks_and_row_order_do_not_change_tasks(negatives: Any) -> None:
    rows = log()
    plan = TaskPlan.of(rows, PrepareOptions(n_negatives=7, negatives=negatives))
    whole = pl.concat(plan.chunks())
    parts = list(plan.chunks(entries=50))
    assert len(parts) > 10
    assert pl.concat(parts).equals(whole)
    by_user = rows.sort("user_id", descending=True, maintain_order=True)
    assert make_tasks(by_user, n_negatives=7, negatives=negatives).equals(whole)


def test_hash_is_stable_and_sees_every_change() -> None:
    tasks = make_tasks(ONE, n_negatives=3)
    assert candidate_hash(tasks) == candidate_hash(make_tasks(ONE, n_negatives=3)) == "be02c7d84bbe084b"
    changed = [
        make_tasks(ONE, n_negatives=3, seed=1),
        tasks.with_columns(pl.col("labels").list.reverse()),
        tasks.with_columns(pl.col("candidates").list.reverse()),
        tasks.head(-1),
    ]
    assert len({candidate_hash(other) for other in [tasks, *changed]}) == 5


def test_target_stands_anywhere_and_negatives_are_uniform() -> None:
    tasks = make_tasks(log(users=2000, items=12, length=3), n_negatives=5, max_train_targets=1)
    test = tasks.filter(split="test")
    places = Counter(labels.index(1) for labels in test["labels"].to_list())
    assert max(abs(count / 2000 - 1 / 6) for count in places.values()) < 0.03
    drawn = Counter(test.explode("candidates", "labels").filter(labels=0)["candidates"])
    assert max(abs(count / 10_000 - 1 / 12) for count in drawn.values()) < 0.01


@settings(max_examples=150)
@given(
    rows=st.lists(st.tuples(st.sampled_from("uvwx"), st.sampled_from("abcdefghij"), st.integers(0, 5)), min_size=3),
    protocol=st.sampled_from(["strict", "paper", "global-cutoff"]),
    negatives=st.sampled_from(["uniform", "popularity", "all"]),
    min_history=st.integers(0, 3),
    n_negatives=st.integers(1, 4),
    seed=st.integers(0, 6),
)
def test_invariants_of_every_protocol(rows: list[tuple[str, str, int]], min_history: int, **fields: Any) -> None:
    data = frame(rows)
    options = PrepareOptions(min_history=min_history, **fields)
    try:
        plan = TaskPlan.of(data, options)
    except ValueError as error:
        assert "no ranking task is left" in str(error)
        return
    tasks = pl.concat(plan.chunks(entries=20))
    check_leakage(tasks, data, plan.popularity)
    assert tasks["task_id"].is_unique().all()
    assert (tasks["history_length"] >= min_history).all()
    assert len(tasks) == sum(plan.report[f"{split}_tasks"] for split in ("train", "validation", "test"))
    for row in tasks.iter_rows(named=True):
        mine = data.filter(user_id=row["user_id"]).sort("timestamp", maintain_order=True)
        assert row["history"] == mine["item_id"].to_list()[: row["history_length"]]
        target = row["candidates"][row["labels"].index(1)]
        assert mine.row(row["history_length"])[1:] == (target, row["cutoff"])
    if options.protocol == "strict":
        for split in ("validation", "test"):
            assert tasks.filter(split=split)["user_id"].is_unique().all()
