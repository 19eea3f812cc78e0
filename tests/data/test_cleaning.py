from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_msr.data.cleaning import NO_TITLE, clean
from mllm_msr.data.leakage import check_leakage
from mllm_msr.data.raw import RawData
from mllm_msr.data.tasks import TaskPlan
from mllm_msr.records.sections import PrepareOptions

ITEMS = pl.DataFrame(
    {"item_id": list("abcdefgh"), "title": list("ABCDEFGH"), "text": [""] * 8, "image_bytes": [b"x"] * 8}
)


def raw(*rows: tuple[str, str, int], items: pl.DataFrame = ITEMS) -> RawData:
    return RawData(pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row"), items)


def options(**fields: Any) -> PrepareOptions:
    return PrepareOptions(**{"k_core_users": 1, "k_core_items": 1, **fields})


def test_order_is_time_then_input() -> None:
    data = clean(raw(("v", "a", 5), ("u", "c", 2), ("u", "b", 2), ("u", "a", 1)), options())
    assert data.interactions.rows() == [("u", "a", 1), ("u", "c", 2), ("u", "b", 2), ("v", "a", 5)]


def test_milliseconds_become_seconds_and_keep_their_order() -> None:
    given = raw(("u", "late", 1_600_000_000_900), ("u", "early", 1_600_000_000_100))
    given.ticks = 1000
    assert clean(given, options()).interactions.rows() == [("u", "early", 1_600_000_000), ("u", "late", 1_600_000_000)]


def test_parts_do_not_change_anything() -> None:
    rng = np.random.default_rng(0)
    log = [
        (f"u{user}", ITEMS["item_id"][int(item)], int(time))
        for user, item, time in rng.integers(0, [60, 8, 30], (600, 3))
    ]
    for fields in ({"max_history": 3}, {"limit_users": 20}, {"repeats": "last"}, {"k_core_users": 6}):
        chosen = options(k_core_items=20, **{"k_core_users": 4, **fields})
        whole, parts = (clean(raw(*log), chosen, part_rows=rows) for rows in (10_000, 50))
        assert parts.log.n_parts == 12 and whole.log.n_parts == 1
        assert parts.table == whole.table and parts.items.equals(whole.items)
        assert parts.interactions.equals(whole.interactions)
        assert parts.log.frames("seen").equals(whole.log.frames("seen"))
        for protocol in ("strict", "paper", "global-cutoff"):
            asked = PrepareOptions(protocol=protocol, negatives="popularity", n_negatives=2)
            plans = [TaskPlan.of_log(data.log, asked) for data in (whole, parts)]
            assert plans[0].report == plans[1].report and plans[0].popularity.equals(plans[1].popularity)
            tasks = [pl.concat(plan.chunks()) for plan in plans]
            assert tasks[0].equals(tasks[1])
            seen = whole.log.frames("seen")
            check_leakage(tasks[1], parts.interactions, plans[1].popularity, seen=seen, protocol=protocol)


@pytest.mark.parametrize(
    ("repeats", "kept"), [("first", ["a1", "b2"]), ("last", ["b2", "a3"]), ("all", ["a1", "b2", "a3"])]
)
def test_duplicates_and_repeats(repeats: str, kept: list[str]) -> None:
    data = clean(raw(("u", "a", 1), ("u", "a", 1), ("u", "b", 2), ("u", "a", 3)), options(repeats=repeats))
    assert [f"{item}{time}" for _, item, time in data.interactions.iter_rows()] == kept
    assert [row["interactions"] for row in data.table[:3]] == [4, 3, len(kept)]


def test_k_core_reaches_its_fixed_point() -> None:
    # d is met once; without it user z has one interaction; without z item c has one, and so on, down to u and v
    chain = [("u", "a", 1), ("u", "b", 2), ("v", "a", 1), ("v", "b", 2), ("z", "d", 1), ("z", "c", 2), ("v", "c", 3)]
    data = clean(raw(*chain), options(k_core_users=2, k_core_items=2))
    assert set(data.interactions["item_id"]) == {"a", "b"} and set(data.interactions["user_id"]) == {"u", "v"}
    assert data.items["item_id"].to_list() == ["a", "b"]


def test_items_without_title_or_image_are_kept_or_dropped() -> None:
    items = ITEMS.with_columns(
        title=pl.when(pl.col("item_id") == "a").then(pl.lit("")).otherwise("title"),
        image_bytes=pl.when(pl.col("item_id") != "b").then("image_bytes"),
    )
    log = [("u", "a", 1), ("u", "b", 2), ("u", "c", 3), ("u", "absent", 4), ("u", "d", 5)]
    kept = clean(raw(*log, items=items), options()).items
    assert dict(kept.select("item_id", "title").iter_rows())["a"] == NO_TITLE
    assert dict(kept.select("item_id", "title").iter_rows())["absent"] == NO_TITLE
    dropped = clean(raw(*log, items=items), options(missing_images="drop"))
    assert dropped.items["item_id"].to_list() == ["c", "d"]
    assert [row["step"] for row in dropped.table][-2:] == ["missing", "k-core again"]


def test_dropping_items_restores_the_core() -> None:
    items = ITEMS.filter(pl.col("item_id") != "b")
    log = [("u", "a", 1), ("u", "b", 2), ("v", "a", 1), ("v", "c", 2), ("w", "a", 1), ("w", "c", 4)]
    data = clean(raw(*log, items=items), options(k_core_users=2, missing_images="drop"))
    assert set(data.interactions["user_id"]) == {"v", "w"}


def test_longest_history_keeps_the_recent_and_remembers_the_rest() -> None:
    log = [("u", "a", 1), ("u", "b", 2), ("u", "c", 3), ("v", "a", 4)]
    data = clean(raw(*log), options(max_history=2))
    assert data.interactions["item_id"].to_list() == ["b", "c", "a"]
    assert data.log.frames("seen").rows() == [("u", "a", 1)]


def test_sample_of_users_is_seeded_and_after_the_core() -> None:
    log = [(f"u{n:02}", item, time) for n in range(40) for time, item in enumerate("abc")]
    log += [("lone", "d", 1)]
    chosen = [options(k_core_users=2, limit_users=5, seed=seed) for seed in (0, 0, 1)]
    samples = [set(clean(raw(*log), each).interactions["user_id"]) for each in chosen]
    assert samples[0] == samples[1] != samples[2]
    assert all(len(sample) == 5 and "lone" not in sample for sample in samples)
    assert len(clean(raw(*log), options(limit_users=1000)).interactions) == len(log)


def test_nothing_left_names_the_step() -> None:
    with pytest.raises(ValueError, match="the log is empty"):
        clean(RawData(raw(("u", "a", 1)).interactions.clear(), ITEMS), options())
    with pytest.raises(ValueError, match=r"nothing is left after step 'k-core' .*: ask for fewer by `--set data"):
        clean(raw(("u", "a", 1)), options(k_core_users=2))


@given(
    st.lists(st.tuples(st.sampled_from("uvwxyz"), st.sampled_from("abcdefgh"), st.integers(0, 9)), min_size=1),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_core_holds_and_is_the_largest(rows: list[tuple[str, str, int]], least_user: int, least_item: int) -> None:
    expected = {(user, item) for user, item, _ in rows}
    while True:  # the plain definition
        users = [user for user, _ in expected]
        items = [item for _, item in expected]
        smaller = {(u, i) for u, i in expected if users.count(u) >= least_user and items.count(i) >= least_item}
        if smaller == expected:
            break
        expected = smaller
    chosen = options(k_core_users=least_user, k_core_items=least_item)
    if not expected:
        with pytest.raises(ValueError, match="nothing is left"):
            clean(raw(*rows), chosen)
        return
    data = clean(raw(*rows), chosen)
    assert set(data.interactions.select("user_id", "item_id").iter_rows()) == expected
    assert len(data.interactions) == len(expected)
    assert [row["interactions"] for row in data.table] == sorted((r["interactions"] for r in data.table), reverse=True)
