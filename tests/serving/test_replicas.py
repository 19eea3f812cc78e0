"""Two real servers with a late model on one database: one is killed, and the other has all that was acknowledged."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import postgres
import pytest
from served_runs import Live, live, served_run

from mllm_msr.evaluation.loading import Computing, load_catalogue, load_recommender
from mllm_msr.modeling.inputs import User
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import ITEMS


@pytest.fixture(scope="module")
def late_run(tmp_path_factory: pytest.TempPathFactory, backbone: Callable[[str], Path]) -> RunFolder:
    return served_run(tmp_path_factory.mktemp("served") / "late", backbone("llava"), late=True)


@pytest.fixture(scope="module")
def both(late_run: RunFolder, postgres_url: str) -> Iterator[tuple[Live, Live]]:
    state = postgres.database(postgres_url)
    compiled = ("--compile", "aot_eager")  # which needs no C++ compiler
    with live(late_run.path, "--state", state, *compiled) as first, live(late_run.path, "--state", state) as second:
        yield first, second


def test_late_scores_are_those_of_the_recommender_compiled_or_not(late_run: RunFolder, both: tuple[Live, Live]) -> None:
    catalogue = load_catalogue(late_run)
    ids = list(catalogue)[:12]
    (expected,) = load_recommender(late_run, Computing(cache=late_run.item_cache)).score(
        [User("red")], [ids], catalogue
    )
    for server in both * 2:  # the second time with what is kept
        results = server.ask("POST", "/v1/score", json={"preference": "red", "items": ids})["results"]
        np.testing.assert_allclose([each["logit"] for each in results], expected, atol=1e-5, rtol=0)
        assert all(each["fused"] is None for each in results)


def test_an_item_that_one_server_has_taken_is_known_to_the_other(late_run: RunFolder, both: tuple[Live, Live]) -> None:
    first, second = both
    title = late_run.read(ITEMS).row(0, named=True)["title"]
    first.ask("PUT", "/v1/items", json={"items": [{"item_id": "new", "title": title, "text": "from elsewhere"}]})
    body = {"preference": "red", "items": ["new"]}
    scores = [server.ask("POST", "/v1/score", json=body)["results"][0]["logit"] for server in both]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    second.ask("DELETE", "/v1/items/new")
    until = time.monotonic() + 60
    while first.post("/v1/score", json=body).status_code != 422 and time.monotonic() < until:
        time.sleep(0.1)
    first.ask("POST", "/v1/score", 422, json=body)


def test_a_server_that_is_killed_has_lost_nothing_that_it_acknowledged(
    late_run: RunFolder, both: tuple[Live, Live]
) -> None:
    first, second = both
    ids = late_run.read(ITEMS)["item_id"].to_list()
    acknowledged: list[int] = []

    def send() -> None:
        try:
            for number in range(10_000):
                event = {"item_id": ids[number % len(ids)], "idempotency_key": f"key {number}"}
                first.ask("POST", "/v1/users/u/events", json={"events": [event]})
                acknowledged.append(number)
        except Exception:
            return

    sender = threading.Thread(target=send)
    sender.start()
    while len(acknowledged) < 40:
        assert sender.is_alive()
        time.sleep(0.005)
    first.kill()  # while events are under way and history blocks are being condensed
    sender.join()
    history = second.ask("GET", "/v1/users/u")["history"]
    assert history == [ids[number % len(ids)] for number in range(len(history))]
    assert len(acknowledged) <= len(history) <= len(acknowledged) + 1

    again = [{"item_id": ids[n % len(ids)], "idempotency_key": f"key {n}"} for n in range(len(acknowledged) + 1)]
    second.ask("POST", "/v1/users/u/events", json={"events": again})  # a client that does not know what has arrived
    assert second.ask("GET", "/v1/users/u")["history"] == [ids[n % len(ids)] for n in range(len(again))]

    until = time.monotonic() + 120
    while second.ask("GET", "/ready")["blocks_due"] and time.monotonic() < until:  # the last is told after it is there
        time.sleep(0.1)
    shown = second.ask("GET", "/v1/users/u")
    assert len(shown["preferences"]) == len(again) // 3 and len(shown["recent"]) == len(again) % 3
    assert second.ask("GET", "/ready")["blocks_due"] == shown["blocks_due"] == 0


def test_a_server_that_is_told_to_stop_finishes_what_it_has_begun(both: tuple[Live, Live]) -> None:
    _, second = both
    body = {"query": "red", "documents": [f"ship {number}" for number in range(300)]}
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(second.post, "/v1/rerank", json=body) for _ in range(6)]
        while second.ask("GET", "/ready")["waiting"] + sum(future.done() for future in asked) < 6:
            time.sleep(0.005)
        second.process.terminate()
        assert [len(future.result().json()["results"]) for future in asked] == [300] * 6
    assert second.process.wait(120) in (0, -15)
