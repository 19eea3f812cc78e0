"""`pipeline("sequential-recommendation")` ranks as the model scores, by request or in batches, and after saving."""

import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import draw_image
from transformers import pipeline

from mllm_msr import (
    Candidate,
    HistoryItem,
    MllmMsrForRecommendation,
    MllmMsrProcessor,
    SequentialRecommendationPipeline,
    User,
)
from mllm_msr.modeling.generated_text import tidy
from mllm_msr.modeling.inputs import as_candidates
from mllm_msr.modeling.lora import language_model_lora_targets

CANDIDATES = [{"title": "One", "image": draw_image(1)}, {"title": "Two", "text": "about ships"}, {"title": "Three"}]
REQUEST = {"preference": "likes ships", "candidates": CANDIDATES}


@pytest.fixture
def parts(backbone) -> tuple[MllmMsrForRecommendation, MllmMsrProcessor]:
    processor = MllmMsrProcessor.from_backbone(str(backbone("qwen2_vl")))
    return MllmMsrForRecommendation.from_backbone(backbone("qwen2_vl"), processor=processor), processor


def ranked(
    model: MllmMsrForRecommendation, processor: MllmMsrProcessor, preference: str, *recent: HistoryItem
) -> list[tuple[str, float]]:
    logits = model.score(**processor([User(preference, recent)] * 3, as_candidates(CANDIDATES))).logits.tolist()
    titles = [candidate["title"] for candidate in CANDIDATES]
    return sorted(zip(titles, logits, strict=True), key=lambda pair: -pair[1])


def check(answer: list[dict], expected: list[tuple[str, float]]) -> None:
    keys = {"title", "text", "image", "item_id", "index", "logit", "score", "preference"}
    assert all(type(one) is dict and one.keys() == keys for one in answer)
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
    history = [{"title": "Film", "image": draw_image(5)}, {"title": "Second"}, {"title": "Third", "summary": "blue"}]
    requests = [
        REQUEST,
        {"history": history, "candidates": CANDIDATES[:2]},
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
    history = [{"title": f"Film {index}", "image": draw_image(index)} for index in range(3)] + [
        {"title": "Last", "summary": "blue"}
    ]
    request, blue = {"history": history, "candidates": CANDIDATES}, HistoryItem(summary="blue")
    (before,) = rank.preferences(history)
    assert before and {one["preference"] for one in rank(request)} == {before}
    check(rank(request), ranked(model, processor, before, blue))
    prompt = processor.preference([[HistoryItem("Film", "red")]])
    text = model.generate(**prompt, max_new_tokens=4)
    targets = language_model_lora_targets(model)
    get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    assert not torch.equal(model.generate(**prompt, max_new_tokens=4), text)
    assert list(rank.preferences(history)) == [before]
    check(rank(request), ranked(model, processor, before, blue))


def test_weights_that_learned_to_say_yes_do_not_say_it_in_a_preference(parts) -> None:
    model, processor = parts
    rank = pipeline("sequential-recommendation", model=model, processor=processor, max_new_tokens=4)
    history = [{"title": f"Film {index}", "summary": "blue"} for index in range(3)]
    before = list(rank.preferences(history))
    yes, no = (ids[0] for ids in processor.answer_token_ids.values())

    def lean_to_answers(_: object, __: object, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_add(-1, torch.tensor([yes, no]), torch.full((*logits.shape[:-1], 2), 1e3))

    model.get_output_embeddings().register_forward_hook(lean_to_answers)
    batch = processor.preference([[HistoryItem("Film", "blue")]])
    assert model.generate(**batch, max_new_tokens=1, do_sample=False)[0, -1] in (yes, no)
    assert list(rank.preferences(history)) == before


def test_preferences_come_block_by_block_and_the_rest_is_recent(parts) -> None:
    model, processor = parts
    rank = pipeline("sequential-recommendation", model=model, processor=processor)
    history = [{"title": f"Film {index}", "summary": f"about {index}"} for index in range(5)]
    items = [HistoryItem(item["title"], item["summary"]) for item in history]
    steps = list(rank.preferences(history, block_size=2, max_new_tokens=4))

    def written(block: list[HistoryItem], previous: str | None) -> str:
        batch = processor.preference([block], [previous])
        ids = model.generate(**batch, max_new_tokens=4, do_sample=False)
        return tidy(processor.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))

    assert steps == [written(items[:2], None), written(items[2:4], steps[0])]
    answer = rank({"history": history, "candidates": CANDIDATES}, block_size=2, max_new_tokens=4)
    check(answer, ranked(model, processor, steps[1], HistoryItem(summary="about 4")))
    assert rank.split_history([1, 2, 3], 2) == ([[1, 2]], [3])


def test_requests_that_lack_something_are_refused(parts) -> None:
    rank = pipeline("sequential-recommendation", model=parts[0], processor=parts[1])
    for request in ({"candidates": CANDIDATES}, {**REQUEST, "history": []}, {"preference": "x", "candidates": []}):
        with pytest.raises(ValueError, match="either a `preference` or a `history`"):
            rank(request)
    for wrong, message in (
        ({"candidates": {"title": "One"}}, "`candidates` is a list, not dict"),
        ({"candidates": None}, "`candidates` is a list, not NoneType"),
        ({"candidates": ["One"]}, "a candidate is a mapping"),
        ({"preference": ["ships"]}, "`preference` of a user is a text"),
        ({"recent": "ships"}, "`recent` of a user is a list"),
        ({"top_k": 3}, "unknown key 'top_k'"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            rank({**REQUEST, **wrong})
    for history, message in (
        ({"title": "One"}, "`history` is a list of items"),
        (["One"], "a candidate is a mapping"),
        ([{}], "needs at least one of"),
        ([{"title": "One", "image": [draw_image(1)]}], "one opened image"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            rank({"history": history, "candidates": CANDIDATES})
    with pytest.raises(ValueError, match="`recent` goes with a `preference`"):
        rank({"history": [], "recent": [], "candidates": CANDIDATES})
    assert len(rank({"preference": "x", "candidates": [Candidate(title="One")]})) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"topk": 3}, "unknown parameter 'topk'; known are top_k, block_size"),
        ({"top_k": 0}, "top_k=0: must be a number of at least 1"),
        ({"block_size": -1}, "block_size=-1: must be"),
        ({"max_new_tokens": "9"}, "max_new_tokens='9': must be"),
    ],
)
def test_parameters_that_are_none_are_refused(parts, given, message) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        pipeline("sequential-recommendation", model=parts[0], processor=parts[1], **given)
    rank = pipeline("sequential-recommendation", model=parts[0], processor=parts[1])
    with pytest.raises((TypeError, ValueError), match=message):
        rank(REQUEST, **given)


def test_code_of_a_repository_leaves_a_model_of_the_package_to_the_package(parts, monkeypatch) -> None:
    """The package is newer or older than the repository, and its model is what `from_pretrained` has given."""
    fetched = ModuleType("transformers_modules.another")
    fetched.__path__ = [str(Path(inspect.getfile(SequentialRecommendationPipeline)).parent)]
    monkeypatch.setitem(sys.modules, fetched.__name__, fetched)
    code = importlib.import_module(f"{fetched.__name__}.pipeline")
    rank = pipeline(
        "sequential-recommendation",
        model=parts[0],
        processor=parts[1],
        pipeline_class=code.SequentialRecommendationPipeline,
    )
    assert type(rank) is SequentialRecommendationPipeline is not code.SequentialRecommendationPipeline
    check(rank(REQUEST), ranked(*parts, "likes ships"))


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
