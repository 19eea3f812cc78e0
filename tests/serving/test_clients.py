"""Clients of the server, over HTTP: Cohere's own for Python, and those that hang up before their answer."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest
from served_runs import WRITE, Live

from mllm_msr.evaluation.loading import load_recommender
from mllm_msr.modeling.inputs import Candidate, User
from mllm_msr.records.run import RunFolder

QUERY = "quiet red things"
TEXTS = ["a red mug\nof clay", "a blue kite", "the sea", "a lamp"]
ITEMS = [Candidate(title="a red mug", text="of clay"), *(Candidate(title=text) for text in TEXTS[1:])]


def test_both_interfaces_of_cohere_rerank(run: RunFolder, served: Live) -> None:
    cohere = pytest.importorskip("cohere", reason="cohere is not installed")
    expected = [(found.index, found.score) for found in load_recommender(run).rank([User(QUERY)], ITEMS)[0]]
    client = cohere.ClientV2(api_key=WRITE, base_url=served.url)
    reply = client.rerank(model="any", query=QUERY, documents=TEXTS, top_n=3, max_tokens_per_doc=512)
    found = [(result.index, result.relevance_score) for result in reply.results]
    assert found == [(index, pytest.approx(score, abs=1e-5)) for index, score in expected[:3]]

    first = cohere.Client(api_key=WRITE, base_url=served.url)
    documents = [*TEXTS[:3], {"text": TEXTS[3], "sku": "7"}]
    reply = first.rerank(model="any", query=QUERY, documents=documents, return_documents=True)
    assert [result.index for result in reply.results] == [index for index, _ in expected]
    assert [result.document.text for result in reply.results] == [TEXTS[index] for index, _ in expected]
    assert next(result.document for result in reply.results if result.index == 3).sku == "7"

    with pytest.raises(cohere.UnprocessableEntityError, match="documents"):
        client.rerank(model="any", query=QUERY, documents=[])
    with pytest.raises(cohere.UnauthorizedError):
        cohere.ClientV2(api_key="wrong", base_url=served.url).rerank(model="any", query=QUERY, documents=TEXTS)


def test_what_a_client_waited_for_who_hung_up_is_dropped_from_the_queue(served: Live) -> None:
    def counted(name: str) -> float:
        return sum(map(float, re.findall(rf"^mllm_msr_{name} (\S+)$", served.get("/metrics").text, re.MULTILINE)))

    gone = r'requests_total\{method="POST",route="/v1/score",status="499"\}'
    done, dropped, scored = counted(gone), counted("dropped_requests"), counted("scored_pairs")
    items = [f"i{number:04d}" for number in range(12, 39)]

    def ask(number: int) -> None:
        with suppress(httpx.ReadTimeout):  # which ends the connection
            body = {"preference": str(number), "items": items}
            served.post("/v1/score", json=body, timeout=httpx.Timeout(30, read=0.05))

    with ThreadPoolExecutor(60) as pool:
        list(pool.map(ask, range(120)))
    until = time.monotonic() + 30
    while (served.ask("GET", "/ready")["waiting"] or counted(gone) == done) and time.monotonic() < until:
        time.sleep(0.05)
    assert counted(gone) > done and counted("dropped_requests") > dropped
    assert counted("scored_pairs") - scored < 120 * len(items)
