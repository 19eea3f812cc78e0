"""The state of a server: what is acknowledged stays, once, whoever is killed and however many write."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mllm_msr.serving.store import Event, KeyReused, Store, StoredItem, open_store

WRITER = """
import sys
from mllm_msr.serving.store import Event, open_store
store, user, first = open_store(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for number in range(first, 10**6):
    store.append(user, [Event(f"item{number}", number, f"key{number}")], 0, 3)
    print(number, flush=True)
"""


@pytest.fixture
def store(state: str):
    opened = open_store(state)
    yield opened
    opened.close()


@pytest.fixture
def user(request: pytest.FixtureRequest) -> str:
    return f"user of {request.node.name}/ü"


def append(store: Store, user: str, *items: str, before: int = 0, key: str | None = None):
    return store.append(user, [Event(item, key=key) for item in items], before, 3)


def test_events_are_kept_in_order_and_a_key_counts_once(store: Store, user: str) -> None:
    assert append(store, user, "b", "a").total == 2
    assert append(store, user, "c", key="x").added == 1
    again = append(store, user, "c", key="x")
    assert (again.added, again.duplicates, again.total) == (0, 1, 3)
    assert append(store, user, "a").added == 1  # without a key every event counts
    assert store.history(user) == ["b", "a", "c", "a"]
    with pytest.raises(KeyReused, match="'x' is that of another event"):
        store.append(user, [Event("n", key="y"), Event("d", key="x")], 0, 3)
    assert store.history(user) == ["b", "a", "c", "a"]
    twice = store.append(user, [Event("e", key="z"), Event("e", key="z")], 0, 3)
    assert (twice.added, twice.duplicates) == (1, 1)


def test_a_killed_writer_loses_nothing_that_it_acknowledged_and_repeats_nothing(state: str, user: str) -> None:
    acknowledged = -1
    for _ in range(2):
        line = [sys.executable, "-c", WRITER, state, user, str(max(acknowledged - 2, 0))]  # a client that tries again
        with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            seen = [int(writer.stdout.readline()) for _ in range(15)]
            os.kill(writer.pid, signal.SIGKILL)
            acknowledged = int((writer.stdout.read().split() or [seen[-1]])[-1])
    store = open_store(state)
    history = store.history(user)
    store.close()
    assert history == [f"item{number}" for number in range(len(history))]
    assert acknowledged < len(history) <= acknowledged + 2  # what was under way may have been committed


def test_many_writers_of_one_user_leave_no_gap(state: str, user: str) -> None:
    stores = [open_store(state) for _ in range(2)]

    def write(number: int) -> None:
        for event in range(6):
            append(stores[number % 2], user, f"{number}-{event}", key=f"{number}-{event}")
            append(stores[(number + 1) % 2], user, f"{number}-{event}", key=f"{number}-{event}")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    history = stores[0].history(user)
    assert sorted(history) == sorted(f"{number}-{event}" for number in range(4) for event in range(6))
    for number in range(4):
        own = [item for item in history if item.startswith(f"{number}-")]
        assert own == [f"{number}-{event}" for event in range(6)]
    for opened in stores:
        opened.close()


def test_a_full_block_is_condensed_by_one_server_and_again_after_its_lease(store: Store, user: str) -> None:
    append(store, user, "a", before=1)
    assert store.claim("one", 60) is None
    append(store, user, "b", before=1)  # three items with the one that the run has
    claim = store.claim("one", 0.0)
    assert claim is not None and claim.user_id == user
    other = store.claim("other", 60)  # the lease is over, as if the first server had been killed
    assert other is not None and other.user_id == user
    assert not store.add_preference(claim, "one", 1, "grounds", "of the first")
    assert store.add_preference(other, "other", 1, "grounds", "quiet ships")
    assert store.claim("one", 60) is None and not store.renew(claim, "one", 60) and store.renew(other, "other", 60)
    append(store, user, "c", "d", "e", before=1)  # a further block while the first is condensed
    store.done(other)
    later = store.claim("one", 60)
    assert later is not None and later.version == other.version + 1
    store.done(later)
    assert store.claim("one", 60) is None and store.preferences(user) == {1: ("grounds", "quiet ships")}


def test_a_user_who_is_forgotten_leaves_no_row(store: Store, user: str) -> None:
    append(store, user, "a", "b", "c")
    claim = store.claim("one", 60)
    assert claim is not None
    store.add_preference(claim, "one", 1, "grounds", "red")
    assert store.forget(user, leave_mark=True) and not store.forget(user, leave_mark=True)
    assert not store.add_preference(claim, "one", 2, "grounds", "blue")
    assert store.history(user) == [] and store.preferences(user) == {} and store.due() == 0
    assert store.is_forgotten(user) and not store.is_forgotten("another")


def test_servers_learn_of_items_by_their_version(store: Store, user: str) -> None:
    last = max((item.version for item in store.items_since(0)), default=0)
    store.put([StoredItem("x", "X", image=b"png", columns={"year": 1999}), StoredItem("y", "Y", vector=b"\0\1")])
    first, second = store.items_since(last)
    assert (first.item_id, first.columns, first.image) == ("x", {"year": 1999}, None) and store.image("x") == b"png"
    store.put([StoredItem("x", deleted=True)])
    (change,) = store.items_since(second.version)
    assert change.deleted and store.image("x") is None and second.vector == b"\0\1"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("nonsense://x", "neither a file nor|driver is not installed"),
        ("postgresql+psycopg://me:secret@127.0.0.1:1/x", r"me:\*\*\*@127.0.0.1:1/x: the database cannot be opened"),
    ],
    indirect=False,
)
def test_a_state_that_cannot_be_opened_is_one_sentence_without_a_password(state: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        open_store(state)
    assert "secret" not in str(raised.value)


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user,item\n" * 200, encoding="utf-8")
    with pytest.raises(ValueError, match=r"log.csv: the database cannot be opened"):
        open_store(path)
