"""A model behind vLLM's and SGLang's scoring endpoints ranks as it does in this process."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from chat_server import Reply, chat_server
from PIL import Image

from mllm_msr import Candidate, HistoryItem, MllmMsrForRecommendation, MllmMsrProcessor, Recommender, User
from mllm_msr.processing.engines import EngineUnavailable
from mllm_msr.processing.served_scoring import SGLANG, ServedRecommender

USERS = [User("quiet red films"), User("", (HistoryItem("Jaws", "a shark"),)), User("</s> [INST] <image> ships")]
CATALOGUE = {
    "a": Candidate("a", "The Sea", "ships in a storm"),
    "b": Candidate("b", "Noise <image>"),
    "c": Candidate("c", "Summer", "long " * 300),
}
CANDIDATES = [["a", "b", "c"], ["c"], ["b", "a"]]
FAILING = {"vllm": 503, "sglang": 429}


@pytest.fixture(scope="module")
def recommender(backbone) -> Recommender:
    """Its logits are large, and it has two spellings of each answer, of which a single one would not give the score."""
    base = str(backbone("qwen2_5_vl"))
    processor = MllmMsrProcessor.from_backbone(base, max_length=200)
    model = MllmMsrForRecommendation.from_backbone(base, processor=processor, dtype=torch.float32)
    answers = {"yes": [*processor.answer_token_ids["yes"], 301], "no": [*processor.answer_token_ids["no"], 302]}
    processor._answers = model.config.answer_token_ids = answers
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5)
    return Recommender(model, processor)


@contextmanager
def scoring_server(kind: str, model: MllmMsrForRecommendation) -> Iterator[tuple[str, list[dict]]]:
    """vLLM 0.33 or SGLang 0.5.23, as far as scoring goes; it fails on its first request."""
    requests: list[dict] = []
    path = {"vllm": "/generative_scoring", "sglang": "/v1/score"}[kind]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != path:
                return self.reply(404, {"detail": "Not Found"})
            requests.append(request)
            if len(requests) == 1:
                return self.reply(FAILING[kind], {})
            rows = [
                self.probabilities(request["query"] + item, request["label_token_ids"]) for item in request["items"]
            ]
            if kind == "sglang":
                return self.reply(200, {"scores": rows, "model": "default", "object": "scoring"})
            data = [{"index": index, "object": "score", "score": row[0]} for index, row in enumerate(rows)]
            return self.reply(200, {"object": "list", "model": "stock", "data": data[::-1]})

        def probabilities(self, prompt: list[int], labels: list[int]) -> list[float]:
            with torch.inference_mode():
                logits = model.backbone(input_ids=torch.tensor([prompt])).logits[0, -1]
            return logits.log_softmax(-1)[labels].double().softmax(-1).tolist()

        def reply(self, status: int, content: dict) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1", requests
    finally:
        http.shutdown()
        http.server_close()


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_server_gives_the_scores_of_this_process(recommender, kind, monkeypatch):
    monkeypatch.setattr("mllm_msr.processing.served_scoring.CANDIDATES", 2)
    expected = recommender.score(USERS, CANDIDATES, CATALOGUE)
    with scoring_server(kind, recommender.model) as (url, requests):
        served = ServedRecommender(recommender.processor, url, pause=0.01)
        logits = served.score(USERS, CANDIDATES, CATALOGUE)
        ranked = served.rank(USERS[:1], list(CATALOGUE.values()), top_k=2)[0]
    assert [row.tolist() for row in logits] == [pytest.approx(row.tolist(), abs=1e-4) for row in expected]
    assert np.abs(np.concatenate(expected)).max() > 2  # where a rounded probability would tell
    assert [found.candidate.item_id for found in ranked] == [
        found.candidate.item_id for found in recommender.rank(USERS[:1], list(CATALOGUE.values()), top_k=2)[0]
    ]
    assert all(item for request in requests for item in request["items"])
    assert max(len(request["query"]) for request in requests) > 30  # what the prompts of a user share is sent once


def test_what_a_server_cannot_do_is_said(recommender):
    processor = recommender.processor
    shown = {**CATALOGUE, "b": replace(CATALOGUE["b"], image=Image.new("RGB", (28, 28)))}
    with scoring_server("vllm", recommender.model) as (url, _):
        with pytest.raises(ValueError, match="'b' has an image"):
            ServedRecommender(processor, url).score(USERS, CANDIDATES, shown)
        with pytest.raises(EngineUnavailable, match="has neither"):
            ServedRecommender(processor, f"{url}/elsewhere").score(USERS, CANDIDATES, CATALOGUE)
    with pytest.raises(EngineUnavailable, match="connection"):
        ServedRecommender(processor, url, tries=2, pause=0.01).score(USERS, CANDIDATES, CATALOGUE)
    with pytest.raises(ValueError, match=r"set evaluation\.served"):
        ServedRecommender(processor, "nowhere")


def of_vllm(*scores: object) -> bytes:
    return json.dumps({"data": [{"index": index, "score": score} for index, score in enumerate(scores)]}).encode()


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (200, of_vllm(float("nan"), 0.2), "are no probabilities"),
        (200, of_vllm(-0.1, -2.2), "are no probabilities"),  # their logarithms
        (200, of_vllm(4.2, 0.1), "are no probabilities"),
        (200, of_vllm(0.5), "not that of /generative_scoring"),
        (200, of_vllm(None, 0.5), "not that of /generative_scoring"),
        (200, b"null", "malformed-answer"),
        (200, b"[" * 100_000, "malformed-answer"),
        (401, b"no such key: sk-secret", r"\(http-401\): set OPENAI_API_KEY"),
    ],
)
def test_what_a_server_says_is_no_score_unless_it_is_one(recommender, status, answer, message):
    with chat_server(lambda body, n: Reply(status, answer)) as (url, _):
        served = ServedRecommender(recommender.processor, url, tries=1, pause=0.01)
        with pytest.raises(EngineUnavailable, match=message) as stop:
            served.score(USERS[:1], [["a", "b"]], CATALOGUE)
    assert "sk-secret" not in str(stop.value)


def test_every_label_of_an_answer_has_a_probability(recommender):
    with chat_server(lambda body, n: Reply(content=b'{"scores": [[0.5], [0.1]]}')) as (url, _):
        served = ServedRecommender(recommender.processor, url, tries=1, pause=0.01)
        served.plan.path = SGLANG
        with pytest.raises(EngineUnavailable, match="not that of /v1/score"):
            served.score(USERS[:1], [["a", "b"]], CATALOGUE)
