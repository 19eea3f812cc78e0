"""`pipeline("sequential-recommendation")` ranks as the model scores, from a folder, by remote code and after saving."""

import os
import subprocess
import sys
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


def test_a_history_is_condensed_by_the_backbone_without_the_adapter(parts) -> None:
    model, processor = parts
    rank = pipeline("sequential-recommendation", model=model, processor=processor, max_new_tokens=4)
    history = [{"title": f"Film {index}", "image": picture(index)} for index in range(3)] + [
        {"title": "Last", "summary": "blue"}
    ]
    request = {"history": history, "candidates": CANDIDATES}
    before = rank._condense(history, 3, 4)
    assert before
    check(rank(request), ranked(model, processor, before))
    targets = language_model_lora_targets(model)
    get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    assert rank._condense(history, 3, 4) != before
    check(rank(request), ranked(model, processor, before))


def test_requests_that_lack_something_are_refused(parts) -> None:
    rank = pipeline("sequential-recommendation", model=parts[0], processor=parts[1])
    for request in ({"candidates": CANDIDATES}, {**REQUEST, "history": []}, {"preference": "x", "candidates": []}):
        with pytest.raises(ValueError, match="either a `preference` or a `history`"):
            rank(request)


def test_saved_it_works_by_remote_code_where_the_package_is_not_installed(parts, tmp_path: Path) -> None:
    rank = pipeline("sequential-recommendation", model=parts[0], processor=parts[1])
    rank.save_pretrained(tmp_path / "repo")
    code = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mllm_msr":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotInstalled())
from transformers import pipeline
rank = pipeline("sequential-recommendation", model=sys.argv[1], trust_remote_code=True)
ranked = rank({"preference": "red", "candidates": [{"title": "A"}, {"title": "B"}]})
print([(one["title"], one["logit"]) for one in ranked])
"""
    own = {"HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "repo")], capture_output=True, text=True, env={**os.environ, **own}
    )
    assert done.returncode == 0, done.stderr
    here = rank({"preference": "red", "candidates": [{"title": "A"}, {"title": "B"}]})
    there = eval(done.stdout.splitlines()[-1])
    assert [title for title, _ in there] == [one["title"] for one in here]
    assert [logit for _, logit in there] == pytest.approx([one["logit"] for one in here], abs=1e-5)
