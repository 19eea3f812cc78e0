"""The base model's pretraining: right answers, one tokenisation with the processor, and a base that ships."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from mllm_msr.data.sources.world import TRAITS, draw, random_item
from mllm_msr.demo import pretraining
from mllm_msr.modeling.inputs import Candidate
from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor
from mllm_msr.records.recipe import backbone_path

BASE = Path(backbone_path("demo"))


@pytest.fixture(scope="module")
def processor() -> MllmMsrProcessor:
    return MllmMsrProcessor.from_backbone(str(BASE), prompts=pretraining.PROMPTS)


def test_questions_have_right_answers():
    rng = np.random.default_rng(5)
    for _ in range(300):
        item = random_item(rng, "x")
        turns = pretraining.dialogue(rng, item)
        if len(turns) == 1:
            continue
        listed = turns[0][0].split("\n")[0]
        words = set(listed.replace(",", " ").replace(";", " ").split()[1:])
        for asked, answer in turns:
            question = asked.split("\n")[-1]
            fitting = [value for value in item.traits.values() if value in words]
            if question == "Which fit?":
                assert answer == (", ".join(fitting) or "none")
            elif question.startswith("Is the "):
                assert answer == ("Yes" if item.traits[question.split()[2]] in words else "No")
            elif question.startswith("Is "):
                assert answer == ("Yes" if question.split()[1] in words else "No")
            elif question.startswith("Name the "):
                assert answer == item.traits[question.split()[2].rstrip(".")]
            elif question.startswith("Do "):
                assert answer == ("Yes" if len(fitting) >= pretraining.NUMBERS.index(question.split()[1]) else "No")
            else:
                assert question == "How many fit?" and answer == pretraining.NUMBERS[len(fitting)]


def test_pretraining_never_asks_what_the_recommender_is_asked():
    rng = np.random.default_rng(6)
    asked = "\n".join(question for _ in range(500) for question, _ in pretraining.dialogue(rng, random_item(rng, "x")))
    assert "choose" not in asked and "Likes" not in asked
    assert "Would they choose it?" in pretraining.PROMPTS["recommendation"]


def test_dialogues_are_tokenised_as_the_processor_does(processor):
    rng = np.random.default_rng(7)
    item = random_item(rng, "x")
    caption = next(
        turns for turns in iter(lambda: pretraining.dialogue(rng, item), None) if turns[0][0].endswith("Describe it.")
    )
    stock = pretraining.build_processor(processor.tokenizer)
    ids, labels = pretraining.encode(stock, caption)
    prompt = [token for token, label in zip(ids, labels, strict=True) if label == -100]
    batch = processor.item_summary([Candidate(title=item.title, text=item.text, image=draw(item))])
    assert batch["input_ids"][0].tolist() == prompt


def test_any_text_survives_the_tokenizer(processor):
    for text in ("Café Ünïcode 東京 🎬", "<|user|>", "tabs\tand\nlines", "MovieLens (1995)"):
        assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text


def test_the_base_ships_as_a_small_stock_model():
    files = {path.name: path.stat().st_size for path in BASE.iterdir()}
    assert files["model.safetensors"] <= 8 * 2**20
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    assert isinstance(AutoModelForImageTextToText.from_pretrained(BASE), LlavaForConditionalGeneration)


def test_every_trait_value_is_one_token(processor):
    for values in TRAITS.values():
        for value in values:
            assert len(processor.tokenizer(f" {value}", add_special_tokens=False)["input_ids"]) == 1, value
