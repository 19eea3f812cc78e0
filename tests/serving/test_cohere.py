"""Cohere's own Python client against the server, over HTTP."""

import pytest
from served_runs import live

from mllm_msr.evaluation.loading import load_recommender
from mllm_msr.modeling.inputs import Candidate, User
from mllm_msr.records.run import RunFolder

cohere = pytest.importorskip("cohere", reason="cohere is not installed")

KEY = "w" * 20
QUERY = "quiet red things"
TEXTS = ["a red mug\nof clay", "a blue kite", "the sea", "a lamp"]
ITEMS = [Candidate(title="a red mug", text="of clay"), *(Candidate(title=text) for text in TEXTS[1:])]


def test_both_of_its_interfaces_rerank(run: RunFolder, tmp_path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"write {KEY}\n")
    expected = [(found.index, found.score) for found in load_recommender(run).rank([User(QUERY)], ITEMS)[0]]
    with live(run.path, "--state", str(tmp_path / "state.sqlite"), "--keys", str(keys), key=KEY) as server:
        client = cohere.ClientV2(api_key=KEY, base_url=server.url)
        reply = client.rerank(model="any", query=QUERY, documents=TEXTS, top_n=3, max_tokens_per_doc=512)
        found = [(result.index, result.relevance_score) for result in reply.results]
        assert found == [(index, pytest.approx(score, abs=1e-5)) for index, score in expected[:3]]

        first = cohere.Client(api_key=KEY, base_url=server.url)
        documents = [*TEXTS[:3], {"text": TEXTS[3], "sku": "7"}]
        reply = first.rerank(model="any", query=QUERY, documents=documents, return_documents=True)
        assert [result.index for result in reply.results] == [index for index, _ in expected]
        assert [result.document.text for result in reply.results] == [TEXTS[index] for index, _ in expected]
        assert next(result.document for result in reply.results if result.index == 3).sku == "7"

        with pytest.raises(cohere.UnprocessableEntityError, match="documents"):
            client.rerank(model="any", query=QUERY, documents=[])
        with pytest.raises(cohere.UnauthorizedError):
            cohere.ClientV2(api_key="wrong", base_url=server.url).rerank(model="any", query=QUERY, documents=TEXTS)
