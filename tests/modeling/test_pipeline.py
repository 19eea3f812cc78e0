"""`pipeline("sequential-recommendation")` ranks as the model scores, by request or in batches, and after saving."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import picture
from transformers import pipeline

from mllm_msr import MllmMsrForRecommendation, MllmMsrProcessor, SequentialRecommendationPipeline
from mllm_msr.modeling.lora import language_model_lora_targets

CANDIDATES = [{"title": "One", "image": picture(1)}, {"title": "Two", "text": "about ships"}, {"title": "Three"}]
REQUEST = {"preference": "likes ships", "candidates": CANDIDATES}


@pytest.fixture
def parts(backbone) -> tuple[MllmMsrForRecommendation, MllmMsrProcessor]:
    processor = MllmMsrProcessor.from_backbone(str(backbone("qwen2_vl")))
    return MllmMsrForRecommendation.from_backbone(backbone("qwen2_vl"), processor=processor), processor


def ranked(model: MllmMsrForRecommendation, processor: MllmMsrProcessor, preference: str) -> list[tuple[str, float]]:
    logits = model.score(**processor([preference] * 3, CANDIDATES)).logits.tolist()
    titles = [candidate["title"] for candidate in CANDIDATES]
    return sorted(zip(titles, logits, strict=True), key=lambda pair: -pair[1])


def check(answer: list[dict], expected: list[tuple[str, float]]) -> None:
    assert [one["title"] for one in answer] == [title for title, _ in expected]
    assert [one["logit"] for one in answer] == pytest.approx([logit for _, logit in expected], abs=1e-5)
    assert [one["score"] for one in answer] == pytest.approx(
        [torch.tensor(logit).sigmoid().item() for _, logit in expected], abs=1e-5
    )


def test_ranks_one_request_or_many(parts) -> None:
    rank = pipeline("sequential-recommendation", model=parts[0], processor=parts[1])
    assert type(rank) is SequentialRecommendationPipeline
    check(rank(REQUEST), ranked(*parts, "likes ships"))
    first, second = rank([REQUEST, {**REQUEST, "preference": "red"}], top_k=2)
    check(first, ranked(*parts, "likes ships")[:2])
    check(second, ranked(*parts, "red")[:2])


def test_a_batch_of_requests_is_answered_as_one_by_one(parts) -> None:
    rank = pipeline("sequential-recommendation", model=parts[0], processor=parts[1], max_new_tokens=4)
    history = [{"title": "Film", "image": picture(5)}, {"title": "Second"}, {"title": "Third", "summary": "blue"}]
    requests = [
        REQUEST,
        {"history": history, "candidates": CANDIDATES[:2], "recent": [{"title": "x", "summary": "red"}]},
        {"history": [], "candidates": CANDIDATES},
        {"history": history[1:], "candidates": CANDIDATES[1:]},
    ]
    alone = [rank(request, block_size=2) for request in requests]
    for batch_size in (3, 10):
        together = rank(requests, batch_size=batch_size, block_size=2, write_batch_size=2)
        for one, other in zip(together, alone, strict=True):
            check(one, [(candidate["title"], candidate["logit"]) for candidate in other])
    assert [len(answer) for answer in rank((one for one in requests), batch_size=2, top_k=1)] == [1] * 4


def test_a_history_is_condensed_by_the_backbone_without_the_adapter(parts) -> None:
    model, processor = parts
    rank = pipeline("sequential-recommendation", model=model, processor=processor, max_new_tokens=4)
    history = [{"title": f"Film {index}", "image": picture(index)} for index in range(3)] + [
        {"title": "Last", "summary": "blue"}
    ]
    request = {"history": history, "candidates": CANDIDATES}
    (before,) = rank._condense([history], 3, 4, 8)
    assert before
    check(rank(request), ranked(model, processor, before))
    targets = language_model_lora_targets(model)
    get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    assert rank._condense([history], 3, 4, 8) != [before]
    check(rank(request), ranked(model, processor, before))


def test_requests_that_lack_something_are_refused(parts) -> None:
    rank = pipeline("sequential-recommendation", model=parts[0], processor=parts[1])
    for request in ({"candidates": CANDIDATES}, {**REQUEST, "history": []}, {"preference": "x", "candidates": []}):
        with pytest.raises(ValueError, match="either a `preference` or a `history`"):
            rank(request)


def test_saving_keeps_the_processor(parts, tmp_path: Path) -> None:
    """`test_loading.py` does the same where the package is not installed."""
    rank = pipeline("sequential-recommendation", model=parts[0], processor=parts[1])
    rank.save_pretrained(tmp_path)
    again = pipeline(
        "sequential-recommendation", model=str(tmp_path), pipeline_class=SequentialRecommendationPipeline
    )  # or trust_remote_code=True: transformers asks for it wherever a repository brings a pipeline
    assert type(again.processor) is MllmMsrProcessor and again.processor.prompts == parts[1].prompts
    for one in (again, pipeline("sequential-recommendation", model=parts[0], processor=parts[1])):
        check(one(REQUEST), ranked(*parts, "likes ships"))
