"""What one request may not do to others or to the server: hold it up, break it, or be answered by half."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from PIL import Image
from served_runs import Live

from mllm_msr.evaluation.loading import Computing
from mllm_msr.modeling.inputs import Candidate, User
from mllm_msr.modeling.recommending import Refused, Wanted
from mllm_msr.records.run import RunFolder
from mllm_msr.serving.opening import open_run
from mllm_msr.serving.service import Service
from mllm_msr.serving.store import open_store


@pytest.fixture(scope="module")
def service(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service of that run in this process, with a state of its own."""
    store = open_store(tmp_path_factory.mktemp("service") / "state.sqlite")
    made = Service(open_run(run.path, Computing(device="cpu")), store)
    made.start()
    yield made
    made.close()


def test_vectors_that_are_not_those_of_the_run_are_refused_in_plain_words(served: Live) -> None:
    items = [{"item_id": str(size), "title": "a", "summary": "a", "vector": [1.0] * size} for size in (1, 2)]
    unequal = served.ask("PUT", "/v1/items", 422, json={"items": items})
    assert unequal["message"].startswith("items: their vectors have different lengths")
    short = served.ask("PUT", "/v1/items", 422, json={"items": items[:1]})
    assert "finite numbers each" in short["message"]


def test_of_a_long_history_the_newest_items_are_read(served: Live) -> None:
    body = {"history": [f"i{place % 12:04}" for place in range(1, 9000)], "n": 1, "rerank": 2, "explain": True}
    body["history"] = [item.replace("i0000", "i0012") for item in body["history"]]
    assert served.ask("POST", "/v1/recommendations", json=body)["recent"] == body["history"][-32:]


def test_an_item_that_goes_between_heads_and_answer_is_left_out(service: Service, monkeypatch) -> None:
    gone, answer = [], service.answer

    def after_a_deletion(user: User, ids: Sequence[str], until: float) -> np.ndarray:
        if not gone:
            gone.append(ids[0])
            service.delete(ids[0])
        return answer(user, ids, until)

    monkeypatch.setattr(service, "answer", after_a_deletion)
    asker = service.asker(history=["i0001", "i0002"])
    _, found = service.recommend(asker, Wanted(5, rerank=5), {}, float("inf"))
    assert len(found) == 5 and gone[0] not in [each.item_id for each in found]


def test_a_prompt_that_cannot_be_made_is_the_requests_fault(service: Service, monkeypatch) -> None:
    monkeypatch.setattr(service.opened.recommender.processor, "max_length", 20)
    with pytest.raises(Refused, match="max_length=20 leaves no room"):
        service.answer_documents(User("ships"), [Candidate(title="a", image=Image.new("RGB", (48, 40)))], float("inf"))
    with pytest.raises(Refused, match="max_length=20 leaves no room"):
        service.answer(User("ships"), ["i0005"], float("inf"))
