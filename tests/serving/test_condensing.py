"""Condensing in the background, also by an engine that fails: nothing is lost, and it is tried again."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_runs import tiny_recipe

from mllm_msr.modeling.inputs import HistoryItem
from mllm_msr.processing.engines import EngineUnavailable, Text
from mllm_msr.serving import condensing
from mllm_msr.serving.condensing import Condenser, PreferenceWriter
from mllm_msr.serving.opening import RunUsers
from mllm_msr.serving.store import Event, Store, open_store
from mllm_msr.serving.users import Users


class Sums:
    """An engine that joins summaries, and is out of order as long as it is told to be."""

    generator, revision, batch_size, broken = "sums", "1", 4, False

    def prompt_hash(self, task: str) -> str:
        return task

    def settings(self, task: str) -> str:
        return ""

    def generate(self, task, inputs, seeds=None, again=False):
        if self.broken:
            raise EngineUnavailable("no server at this address")
        return [Text("; ".join(filter(None, [b.previous, *(i.summary for i in b.items)])), True) for b in inputs]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(tmp_path / "state.sqlite")
    yield opened
    opened.close()


@pytest.fixture
def users(store: Store) -> Users:
    run = RunUsers({"known": ["a", "b"]}, {"known": ["z"]}, {"known": []})
    return Users(run, store, 3)


@pytest.fixture
def condenser(users: Users, store: Store) -> Iterator[Condenser]:
    writer = PreferenceWriter(tiny_recipe())
    writer.engine = Sums()
    made = Condenser(users, store, writer, lambda item: None if item == "gone" else HistoryItem(item.upper(), item))
    yield made
    if made._thread.is_alive():
        made.close()


def append(users: Users, user: str, *items: str) -> None:
    users.append(user, [Event(item) for item in items])


def condensed(users: Users, user: str, blocks: int) -> list[str]:
    until = time.monotonic() + 60
    while len(steps := users.state(user).steps) < blocks and time.monotonic() < until:
        time.sleep(0.01)
    return list(steps)


def test_blocks_count_from_what_the_run_has_and_recent_items_are_used_until_then(users: Users, condenser) -> None:
    append(users, "known", "c", "gone", "d", "e", "f")
    state = users.state("known")
    assert state.whole == ["z", "a", "b", "c", "gone", "d", "e", "f"] and state.blocks_due == 2
    assert [item.summary for item in state.words(str).recent] == ["a", "b", "c", "gone", "d", "e", "f"]
    condenser.start()
    assert condensed(users, "known", 2) == ["a; b; c", "a; b; c; d; e"]
    state = users.state("known")
    assert state.preference == "a; b; c; d; e" and state.recent == ["f"] and state.blocks_due == 0
    assert [item.summary for item in state.words(lambda item: None).recent] == []


def test_answers_are_told_of_the_newest_items_of_a_long_history(users: Users) -> None:
    state = replace(users.state("known"), history=[str(place) for place in range(100)], steps=["first"])
    assert len(state.recent) == 100 - state.block_size
    assert state.told == state.recent[-32:] == [item.summary for item in state.words(str).recent]
    assert len(replace(state, block_size=20, steps=[]).told) == 40


def test_what_was_due_before_a_server_began_is_condensed(users: Users, condenser: Condenser) -> None:
    for user in ("one", "two"):
        append(users, user, *"abc")
    condenser.start()
    assert condensed(users, "one", 1) == condensed(users, "two", 1) == ["a; b; c"]


def test_an_engine_that_is_down_is_tried_again(users: Users, condenser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(condensing, "AGAIN", 0.05)
    monkeypatch.setattr(condensing, "POLL", 0.05)
    condenser.writer.engine.broken = True
    append(users, "one", *"abc")
    condenser.start()
    while condenser.failures < 2:
        time.sleep(0.01)
    assert users.state("one").steps == []
    condenser.writer.engine.broken = False
    assert condensed(users, "one", 1) == ["a; b; c"]


def test_a_preference_that_rests_on_another_history_is_not_used(users: Users, condenser, store: Store) -> None:
    append(users, "known", *"cdef")
    condenser.start()
    assert len(condensed(users, "known", 2)) == 2
    other = replace(users, run=RunUsers({"known": ["b", "a"]}, {}, {"known": []}))  # the run was prepared anew
    assert other.state("known").steps == [] and other.state("known").blocks_due == 2
    fewer = replace(users, run=RunUsers({}, {}, {}))
    assert fewer.state("known").steps == []


def test_a_history_is_condensed_for_a_request_as_a_stage_would(condenser: Condenser) -> None:
    history = [HistoryItem(item.upper(), item) for item in "abcdefg"]
    assert condenser.writer.preferences(history) == ["a; b; c", "a; b; c; d; e; f"]
    assert condenser.writer.preferences(history[:2]) == []


def test_a_text_gives_way_to_requests_for_a_while(users: Users, condenser, monkeypatch) -> None:
    monkeypatch.setattr("mllm_msr.serving.condensing.GIVE_WAY", 0.3)
    condenser.busy = lambda: True
    append(users, "patient", "a", "b", "c", "d")
    start = time.monotonic()
    condenser.start()
    assert len(condensed(users, "patient", 1)) == 1 and time.monotonic() - start >= 0.3


def test_an_engine_is_loaded_once_and_while_nothing_else_computes() -> None:
    loads = []
    writer = PreferenceWriter(tiny_recipe(), lambda function: loads.append(function))
    assert not loads
    for _ in range(2):
        assert writer.write([HistoryItem("Mug", "blue mug")], None)
    assert len(loads) == 1
