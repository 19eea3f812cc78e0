"""A released model in other tools, where the package is not installed: CrossEncoder, and Inference Endpoints."""

import base64
import importlib.util
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import WITHOUT_PACKAGE

from mllm_msr import Candidate, HistoryItem, MllmMsrForRecommendation, MllmMsrProcessor, Recommender, User
from mllm_msr.hub_cards.reader_files import write_reader_files

QUERIES = ["likes ships", {"preference": "", "recent": [{"title": "a", "summary": "b"}]}, "<image> </s> yes"]
USERS = [User("likes ships"), User(recent=(HistoryItem("a", "b"),)), User("<image> </s> yes")]
DOCUMENTS = [
    "One\nof red",
    "Two",
    {"title": "Three <image>", "text": "word " * 200},
    {"text": "Four", "image": "a.png"},
]
IMAGE = Image.new("RGB", (40, 30), "red")
CANDIDATES = [
    Candidate(title="One", text="of red"),
    Candidate(title="Two"),
    Candidate(title="Three <image>", text="word " * 200),
    Candidate(title="Four", image=IMAGE),
]
CROSS_ENCODER = f"""
import json, torch
from sentence_transformers import CrossEncoder
queries, documents = {QUERIES!r}, {DOCUMENTS!r}
pairs = [(query, document) for query in queries for document in documents]
for kind in ("joint", "late"):
    reranker = CrossEncoder(kind, trust_remote_code=True, device="cpu")
    logits = reranker.predict(pairs, batch_size=5, activation_fn=torch.nn.Identity()).tolist()
    ranked = reranker.rank(queries[0], documents, top_k=2, return_documents=True)
    print("FOUND", json.dumps([logits, ranked]))
"""


@pytest.fixture(scope="module")
def released(backbone, tmp_path_factory):
    """A folder with a tiny model of each kind, whose prompts are cut, and the logits that ranking gives every pair."""
    base, folder, logits = str(backbone("llava")), tmp_path_factory.mktemp("released"), {}
    processor = MllmMsrProcessor.from_backbone(base, max_length=150)
    model = MllmMsrForRecommendation.from_backbone(base, processor=processor, dtype=torch.float32)
    catalogue = {str(number): candidate for number, candidate in enumerate(CANDIDATES)}
    for kind in ("joint", "late"):
        model.config.interaction = kind
        for part in (model, processor):
            part.save_pretrained(folder / kind)
        write_reader_files(folder / kind)
        logits[kind] = np.stack(Recommender(model, processor).score(USERS, [list(catalogue)] * len(USERS), catalogue))
    IMAGE.save(folder / "a.png")
    return folder, logits


def test_cross_encoder_gives_our_scores(released):
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    folder, expected = released
    code = "\n".join([WITHOUT_PACKAGE, CROSS_ENCODER])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("FOUND")]
    for ours, (logits, ranked) in zip(expected.values(), answers, strict=True):
        assert logits == pytest.approx(ours.ravel().tolist(), abs=1e-4)
        best = np.argsort(-ours[0])[:2]
        assert [(result["corpus_id"], result["text"]) for result in ranked] == [(i, DOCUMENTS[i]) for i in best]
        scores = 1 / (1 + np.exp(-ours[0, best]))
        assert [result["score"] for result in ranked] == pytest.approx(scores.tolist(), abs=1e-5)


@pytest.mark.parametrize("kind", ["joint", "late"])
def test_an_endpoint_scores_and_reranks(released, kind):
    """The toolkit of Inference Endpoints imports the file by its path and calls its class."""
    folder, expected = released[0], released[1][kind]
    spec = importlib.util.spec_from_file_location("handler", folder / kind / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    handler = module.EndpointHandler(str(folder / kind))
    buffer = io.BytesIO()
    IMAGE.save(buffer, "PNG")
    content = base64.b64encode(buffer.getvalue()).decode()
    documents = [*DOCUMENTS[:3], {"text": "Four", "image": f"data:image/png;base64,{content}"}]

    query = {"query": "likes ships", "documents": documents, "top_n": 2, "return_documents": True}
    results = json.loads(json.dumps(handler({"inputs": query})))["results"]
    best = np.argsort(-expected[0])[:2]
    assert [(result["index"], result["document"]) for result in results] == [(i, documents[i]) for i in best]
    scores = 1 / (1 + np.exp(-expected[0, best]))
    assert [result["relevance_score"] for result in results] == pytest.approx(scores.tolist(), abs=1e-5)

    candidates = [{"title": "Two", "item_id": "b"}, {"title": "Four", "image": content}]
    asked = {"inputs": {"preference": "likes ships", "candidates": candidates}, "parameters": {"top_k": 1}}
    (ranked,) = json.loads(json.dumps(handler(asked)))
    assert ranked["logit"] == pytest.approx(expected[0, [1, 3]].max(), abs=1e-4) and "image" not in ranked

    for wrong, words in (
        ({}, "`inputs` is a mapping"),
        ({"inputs": {**query, "model": "x"}}, "unknown key 'model'"),
        ({"inputs": {"query": "x", "documents": "y"}}, "`documents` a list"),
        ({"inputs": {"query": "x", "documents": [{"image": "http://127.0.0.1/a.png"}]}}, "image of item 0 is not"),
        ({"inputs": {"preference": "x", "candidates": [{"titel": "x"}]}}, "unknown key 'titel'"),
    ):
        with pytest.raises(ValueError, match=words):
            handler(wrong)
