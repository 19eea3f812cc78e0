"""A real server with a joint model and heads, over HTTP: scores, users, recommendations, items, and who may call."""

import base64
import functools
import io
import json
import re
import shlex
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from commands import printed, ranking_rows
from PIL import Image
from served_runs import READ, WRITE, Live

from mllm_msr.evaluation.loading import load_catalogue, load_recommender
from mllm_msr.modeling.inputs import Candidate, User
from mllm_msr.modeling.item_ranking import ItemRanker
from mllm_msr.processing.engine_registry import build_engine
from mllm_msr.processing.summaries import summarize_users
from mllm_msr.processing.text_store import TextStore
from mllm_msr.rank import read_users
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import INTERACTIONS, ITEM_SUMMARIES, ITEM_VECTORS, ITEMS

NESTED = functools.reduce(lambda inner, _: [inner], range(100), 1)
STRANGER = "/v1/users/a%2Fstranger%20%C3%BC"


@pytest.fixture(scope="module")
def recommender(run: RunFolder):
    return load_recommender(run)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def as_text(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def append(server: Live, path: str, *items: str, **key: str) -> dict:
    return server.ask("POST", f"{path}/events", json={"events": [{"item_id": item, **key} for item in items]})


# ---- scores --------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_recommender_alone_and_under_load(run: RunFolder, served: Live, recommender) -> None:
    catalogue = load_catalogue(run)
    ids = list(catalogue)[:12]
    users = read_users(run, run.read(INTERACTIONS)["user_id"].unique(maintain_order=True).to_list())
    expected = recommender.score([user.words for user in users], [ids] * len(users), catalogue)

    def ask(place: int) -> np.ndarray:
        body = {"user_id": users[place].user_id, "items": ids}
        results = served.ask("POST", "/v1/score", json=body)["results"]
        assert [each["item_id"] for each in results] == ids
        return np.array([each["logit"] for each in results])

    np.testing.assert_allclose(ask(0), expected[0], atol=1e-5, rtol=0)
    with ThreadPoolExecutor(12) as pool:
        for place, logits in enumerate(pool.map(ask, range(12))):
            np.testing.assert_allclose(logits, expected[place], atol=1e-5, rtol=0)


def test_documents_are_reranked_in_the_shape_of_cohere_and_jina(served: Live, recommender, picture) -> None:
    image, url = as_text(picture), f"data:image/png;base64,{as_text(picture)}"
    documents = [
        "a red ship",
        {"title": "The Sea", "text": "of no return", "image": image, "own": 7},
        [{"type": "text", "text": "stripes"}, {"type": "image_url", "image_url": {"url": url}}],
    ]
    candidates = [
        Candidate(title="a red ship"),
        Candidate(title="The Sea", text="of no return", image=picture),
        Candidate(title="stripes", image=picture),
    ]
    ranked = recommender.rank([User("quiet ships")], candidates)[0]
    body = {"query": "quiet ships", "documents": documents, "model": "any", "top_n": 2, "return_documents": True}
    reply = served.ask("POST", "/v1/rerank", json=body)
    assert [each["index"] for each in reply["results"]] == [each.index for each in ranked[:2]]
    scores = [each["relevance_score"] for each in reply["results"]]
    np.testing.assert_allclose(scores, [each.score for each in ranked[:2]], atol=1e-5)
    sent = {0: {"text": "a red ship"}, 1: documents[1], 2: documents[2]}
    assert [each["document"] for each in reply["results"]] == [sent[each["index"]] for each in reply["results"]]
    assert reply["model"] == "shop" and reply["format"] == 2 and reply["id"] and reply["meta"]
    by_user = served.ask("POST", "/v2/rerank", json={"query": "user:u0003", "documents": ["a", "b"]})
    assert len(by_user["results"]) == 2 and "document" not in by_user["results"][0]


# ---- users ---------------------------------------------------------------------------------------------------------


def test_a_known_user_is_as_the_run_has_it(run: RunFolder, served: Live) -> None:
    (user,) = read_users(run, ["u0003"])
    shown = served.ask("GET", "/v1/users/u0003")
    assert shown["history"] == list(user.history) and shown["preference"] == user.words.preference
    assert len(shown["recent"]) == len(user.words.recent)


def test_events_become_preferences_as_the_run_would_have_written_them(run: RunFolder, served: Live, tmp_path) -> None:
    served.ask("GET", STRANGER, 404)
    ids = run.read(ITEMS)["item_id"].to_list()[:7]
    assert append(served, STRANGER, ids[0], idempotency_key="first")["added"] == 1
    assert append(served, STRANGER, ids[0], idempotency_key="first")["duplicates"] == 1
    assert served.ask("GET", STRANGER)["recent"] == ids[:1]
    assert append(served, STRANGER, *ids[1:])["history_length"] == 7
    until = time.monotonic() + 60
    while (shown := served.ask("GET", STRANGER))["blocks_due"] and time.monotonic() < until:
        time.sleep(0.02)
    log = pl.DataFrame({"user_id": "a/stranger ü", "item_id": ids, "timestamp": range(7)})
    titles, summaries = run.read(ITEMS, ["item_id", "title"]), run.read(ITEM_SUMMARIES, ["item_id", "summary"])
    options = run.recipe.summaries.for_users()
    engine = build_engine(options, run.recipe.prompts, run.recipe.item_noun)
    tables = dict(titles.iter_rows()), dict(summaries.iter_rows())
    expected = summarize_users(log, *tables, engine, TextStore(tmp_path), options)
    assert shown["preferences"] == expected["preference"].to_list() and len(shown["preferences"]) == 2
    assert shown["recent"] == ids[6:] and shown["user_id"] == "a/stranger ü"


def test_everything_of_a_user_can_be_deleted_also_what_the_run_knows(served: Live) -> None:
    assert served.ask("DELETE", "/v1/users/u0005")["existed"]
    served.ask("GET", "/v1/users/u0005", 404)
    assert append(served, "/v1/users/u0005", "i0001")["history_length"] == 1
    assert served.ask("GET", "/v1/users/u0005")["history"] == ["i0001"]


# ---- recommendations -----------------------------------------------------------------------------------------------


def test_the_whole_catalogue_is_recommended_from_by_the_heads(run: RunFolder, served: Live) -> None:
    ranker = ItemRanker.from_pretrained(run.head)
    history = read_users(run, ["u0002"])[0].history
    body = {"n": 39, "by": "head", "exclude": ["i0007"]}
    reply = served.ask("POST", "/v1/users/u0002/recommendations", json=body)
    scores = dict(zip(ranker.item_ids, ranker.score([history], by="sequence_head")[0].tolist(), strict=True))
    found = {each["item_id"]: each["score"] for each in reply["results"]}
    assert set(found) == set(scores) - set(history) - {"i0007"} and list(found) == sorted(
        found, key=lambda i: -found[i]
    )
    np.testing.assert_allclose(list(found.values()), [scores[item] for item in found], atol=1e-5)
    assert reply["results"][0]["rank"] == 1 and reply["results"][0]["title"]


def test_recommendations_are_filtered_and_explained(run: RunFolder, served: Live) -> None:
    ranker = ItemRanker.from_pretrained(run.head)
    body = {"history": ["i0010", "i0011"], "n": 5, "explain": True, "where": {"year": 1999}}
    reply = served.ask("POST", "/v1/recommendations", json=body)
    assert {each["item_id"] for each in reply["results"]} == {"i0001", "i0002"} and reply["by"] == "fused"
    assert reply["recent"] == ["i0010", "i0011"]
    for each in reply["results"]:
        nearest = ranker.nearest(each["item_id"], ["i0010", "i0011"])
        assert [alike["item_id"] for alike in each["explanation"]["nearest"]] == [alike.item_id for alike in nearest]
        assert sum(each["explanation"]["shares"].values()) == pytest.approx(each["fused"], abs=1e-4)
    named = {"only": ["i0004", "i0010", "none"], "exclude": ["gone", "i0011", "none"]}
    only = served.ask("POST", "/v1/recommendations", json={"history": ["i0010"], **named})
    assert [each["item_id"] for each in only["results"]] == ["i0004"] and only["unknown"] == ["none", "gone"]
    wrong = served.ask("POST", "/v1/recommendations", 422, json={"history": ["i0010"], "where": {"yeer": [1]}})
    assert wrong["errors"][0] == {"field": "where.yeer", "message": "no item has a column 'yeer'"}


def test_without_the_answer_a_history_is_ranked_as_on_the_command_line(run: RunFolder, served: Live) -> None:
    rows = ranking_rows(printed("rank", str(run.path), "--history", "i0010,i0011", "--top-k", "5"))
    reply = served.ask("POST", "/v1/recommendations", json={"history": ["i0010", "i0011"], "n": 5, "rerank": 0})
    assert [each["item_id"] for each in reply["results"]] == [row[2] for row in rows] and len(rows) == 5


def test_a_preference_in_words_is_answered_by_the_model_alone(run: RunFolder, served: Live, recommender) -> None:
    catalogue = load_catalogue(run)
    (logits,) = recommender.score([User("red")], [list(catalogue)], catalogue)
    reply = served.ask("POST", "/v1/recommendations", json={"preference": "red", "n": 3})
    best = np.argsort(-logits, kind="stable")[:3]
    assert [each["item_id"] for each in reply["results"]] == [list(catalogue)[place] for place in best]
    assert reply["by"] == "answer"


# ---- items ---------------------------------------------------------------------------------------------------------


def test_a_new_item_is_ranked_at_once_as_if_the_run_had_had_it(
    run: RunFolder, served: Live, recommender, picture: Image.Image
) -> None:
    known = run.read(ITEMS).row(3, named=True)
    image = base64.b64encode(known["image"]["bytes"]).decode()
    item = {"item_id": "new/1", "title": known["title"], "text": known["text"], "image": image}
    item["columns"] = {"year": 2030}
    assert served.ask("PUT", "/v1/items", json={"items": [item]})["n_items"] == 40
    same = served.ask("POST", "/v1/score", json={"preference": "red", "items": ["new/1", known["item_id"]]})["results"]
    assert same[0]["logit"] == pytest.approx(same[1]["logit"], abs=1e-5)  # a copy of one that the run has
    (best,) = served.ask("POST", "/v1/recommendations", json={"history": ["i0021"], "where": {"year": [2030]}})[
        "results"
    ]
    vectors = run.read(ITEM_VECTORS).filter(item_id=known["item_id"])["vector"].to_numpy()
    ranker = ItemRanker.from_pretrained(run.head)
    ranker.put_items(["new/1"], torch.from_numpy(np.stack(vectors)))
    assert best["head"] == pytest.approx(float(ranker.score([["i0021"]], ["new/1"], "sequence_head")), abs=1e-4)

    changed = {"item_id": "new/1", "title": "Quite another", "image": as_text(picture)}
    served.ask("PUT", "/v1/items", json={"items": [changed]})
    (score,) = served.ask("POST", "/v1/score", json={"preference": "red", "items": ["new/1"]})["results"]
    (expected,) = recommender.rank([User("red")], [Candidate(title="Quite another", image=picture)])[0]
    assert score["logit"] == pytest.approx(expected.logit, abs=1e-5)

    append(served, "/v1/users/chooses", "new/1")
    assert served.ask("DELETE", "/v1/items/new%2F1")["n_items"] == 39
    served.ask("DELETE", "/v1/items/new%2F1", 404)
    refused = served.ask("POST", "/v1/score", 422, json={"preference": "red", "items": ["new/1"]})
    assert "items.0: item 'new/1' is not in the catalogue: put it" in refused["message"]
    assert served.ask("GET", "/v1/users/chooses")["history"] == ["new/1"]
    assert len(served.ask("POST", "/v1/users/chooses/recommendations", json={"n": 2})["results"]) == 2


def test_an_item_of_which_the_engine_has_nothing_to_say_needs_a_summary(served: Live) -> None:
    item = {"item_id": "wordless", "title": "ox"}  # the engine of the tests passes over short words
    refused = served.ask("PUT", "/v1/items", 422, json={"items": [item]})
    assert refused["errors"][0]["field"] == "items" and "send a `summary` with each" in refused["message"]
    assert served.ask("PUT", "/v1/items", json={"items": [{**item, "summary": "stripes"}]})["put"] == ["wordless"]
    served.ask("DELETE", "/v1/items/wordless")


# ---- the door ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "method", "path", "status"),
    [
        (None, "GET", "/health", 200),
        (None, "GET", "/openapi.json", 200),
        (None, "GET", "/metrics", 401),
        ("wrong" * 5, "GET", "/v1/users/u0001", 401),
        (READ, "GET", "/v1/users/u0001", 200),
        (READ, "POST", "/v1/users/u0001/events", 403),
        (READ, "DELETE", "/v1/users/u0001", 403),
        (READ, "PUT", "/v1/items", 403),
        (WRITE, "GET", "/metrics", 200),
    ],
)
def test_keys_that_may_read_may_not_write(served: Live, key: str | None, method: str, path: str, status: int) -> None:
    reply = served.request(method, path, headers={"Authorization": f"Bearer {key}" if key else ""})
    assert reply.status_code == status
    assert (
        reply.headers["x-model"] == "shop" and reply.headers["x-model-revision"] and reply.headers["x-format-version"]
    )
    assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/score", {"items": ["i0001"]}, "send either `user_id`, or `history` and/or `preference`"),
        ("/v1/score", {"preference": "a", "items": ["b", "b"]}, "'b' is there twice"),
        ("/v1/score", {"preference": "a", "items": ["i0001"], "itens": 1}, "itens: is not known: leave it out"),
        ("/v1/score", {"preference": "a"}, "items: is missing: send it"),
        ("/v1/rerank", {"query": "a", "documents": [{"title": 3}]}, "documents.0.title: input should be a valid str"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": True}, "top_n: input should be a valid integer"),
        ("/v1/recommendations", {"history": ["i0001"], "n": "3"}, "n: input should be a valid integer"),
        ("/v1/recommendations", {"history": ["i0001"], "explain": 1}, "explain: input should be a valid boolean"),
        ("/v1/rerank", {"query": "a", "documents": [{"image": "http://a.b/x"}]}, "fetches no URLs: send it"),
        ("/v1/rerank", {"query": "a", "documents": [{"image": "bm90IGFuIGltYWdl"}]}, "not an image"),
        ("/v1/rerank", {"query": "a\0", "documents": ["b"]}, "query: has a NUL character"),
        ("/v1/rerank", {"query": "a", "documents": [{"text": "b", "own": "\ud800"}]}, "documents.0.own: has half of"),
        ("/v1/rerank", {"query": "a", "documents": [{"text": "b", "\ud800": 1}]}, "documents.0: a name in it has half"),
        ("/v1/rerank", {"query": "a", "documents": [{"text": "b", "own": NESTED}]}, "nested more than 32 levels deep"),
        ("/v1/recommendations", {"history": ["i0001"], "where": {"\ud800": 1}}, "where: a name in it has half of"),
        ("/v1/users/x/events", {"events": [{"item_id": "nope"}]}, "events.0.item_id: item 'nope' is not in"),
        ("/v1/users/%FF/events", {"events": [{"item_id": "i0001"}]}, "user_id: the id in the path is not valid UTF-8"),
    ],
)
def test_a_wrong_request_is_told_which_field_and_what_to_do(served: Live, path: str, body: dict, message: str) -> None:
    escaped = json.dumps(body).encode()  # halves of surrogate pairs as well
    reply = served.ask("POST", path, 422, content=escaped, headers={"Content-Type": "application/json"})
    assert message in reply["message"] and reply["errors"]


def test_other_refusals_are_one_sentence_as_well(served: Live) -> None:
    assert "/docs" in served.ask("GET", "/v1/nothing", 404)["message"]
    large = served.ask("POST", "/v1/rerank", 413, content=b"x" * 1_000_001)
    assert "more than 1,000,000 bytes" in large["message"]
    chunks = (b"x" * 100_000 for _ in range(11))  # whose length is not told ahead
    assert "more than 1,000,000 bytes" in served.ask("POST", "/v1/rerank", 413, content=chunks)["message"]
    assert "JSON" in served.ask("POST", "/v1/rerank", 422, content=b"{")["message"]
    body = {"preference": "a", "items": ["i0001"]}
    late = served.ask("POST", "/v1/score", 504, json=body, headers={"X-Deadline-Seconds": "0.000001"})
    assert "not done in time" in late["message"]
    assert append(served, "/v1/users/other", "i0001", idempotency_key="k")["added"] == 1
    events = {"events": [{"item_id": "i0002", "idempotency_key": "k"}]}
    assert "another event" in served.ask("POST", "/v1/users/other/events", 409, json=events)["message"]


@pytest.mark.parametrize(
    ("body", "encoding"), [(b"\x1f\x8b\x08", "gzip"), (b'{"preference": "\xff"}', ""), (b"[" * 100_000, "")]
)
def test_a_body_that_cannot_be_read_is_told_what_to_be(served: Live, body: bytes, encoding: str) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    reply = served.request("POST", "/v1/recommendations", content=body, headers=headers)
    assert reply.status_code in (400, 422) and "JSON" in reply.json()["message"]


def test_many_equal_items_are_refused_at_once(served: Live) -> None:
    items, took = [f"i{number}" for number in range(9999)], []
    for _ in range(5):  # the quickest says what it takes, however busy the machine is
        start = time.monotonic()
        reply = served.ask("POST", "/v1/score", 422, json={"preference": "a", "items": [*items, items[-1]]})
        took.append(time.monotonic() - start)
        assert "'i9998' is there twice" in reply["message"]
    assert min(took) < 1


def test_a_request_is_given_up_at_its_deadline_while_images_are_read_and_histories_condensed(
    served: Live, picture: Image.Image
) -> None:
    headers = {"X-Deadline-Seconds": "0.001"}
    body = {"query": "a", "documents": [{"image": as_text(picture)}] * 50}
    assert "the images were not read" in served.ask("POST", "/v1/rerank", 504, json=body, headers=headers)["message"]
    long = {"history": ["i0010"] * 2000, "condense": True}
    reply = served.ask("POST", "/v1/recommendations", 504, json=long, headers=headers)
    assert "the history was not condensed in time" in reply["message"]


def test_a_wrong_header_is_named(served: Live) -> None:
    body = {"preference": "a", "items": ["i0001"]}
    reply = served.ask("POST", "/v1/score", 422, json=body, headers={"X-Deadline-Seconds": "soon"})
    assert reply["errors"][0]["field"] == "x-deadline-seconds" and reply["message"].startswith("x-deadline-seconds: ")


def test_the_page_of_endpoints_says_what_to_do_without_its_script(served: Live) -> None:
    assert '<a href="/openapi.json">' in served.get("/docs").text


def test_metrics_count_routes_and_never_ids(served: Live) -> None:
    served.ask("GET", "/v1/users/u0001")
    served.request("INVENTED", "/v1/users/u0001")
    text = served.get("/metrics").text
    assert 'mllm_msr_requests_total{method="GET",route="/v1/users/{user_id}",status="200"}' in text
    assert (
        "u0001" not in text
        and "INVENTED" not in text
        and "mllm_msr_scored_pairs" in text
        and "mllm_msr_users_due" in text
    )


def test_the_description_names_every_endpoint(served: Live) -> None:
    paths = served.get("/openapi.json").json()["paths"]
    assert {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods} == {
        "POST /v1/rerank",
        "POST /v1/score",
        "POST /v1/recommendations",
        "POST /v1/users/{user_id}/recommendations",
        "POST /v1/users/{user_id}/events",
        "GET /v1/users/{user_id}",
        "DELETE /v1/users/{user_id}",
        "PUT /v1/items",
        "DELETE /v1/items/{item_id}",
        "GET /health",
        "GET /ready",
        "GET /metrics",
    }


def test_every_command_of_the_documentation_answers(served: Live) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8").replace("\\\n", "")
    commands = re.findall(r"^curl .*127\.0\.0\.1:8080.*(?:\n  .*)*", text, re.MULTILINE)
    assert len(commands) >= 16
    for command in commands:
        line = shlex.split(command.replace("http://127.0.0.1:8080", served.url))
        key = ["-H", f"Authorization: Bearer {WRITE}"]
        done = subprocess.run([*line, *key, "-sS", "--fail-with-body"], capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
