"""Engines: the demo's real base model in batches, and the one without a model."""

import numpy as np
import pytest
from PIL import Image

from mllm_msr.demo import world
from mllm_msr.demo.school import PROMPTS
from mllm_msr.processing.engines import ExtractiveEngine, TransformersEngine, dominant_colours
from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor
from mllm_msr.processing.recipe import backbone_path


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    base = backbone_path("demo")
    limits = {"item_summary": 16, "preference": 40}
    return TransformersEngine(
        base, MllmMsrProcessor.from_backbone(base, prompts=PROMPTS), label="demo", max_new_tokens=limits
    )


def things(n: int) -> list[world.DrawnItem]:
    rng = np.random.default_rng(99)
    return [world.random_item(rng, str(k)) for k in range(n)]


def test_the_base_model_sees_what_is_drawn_and_reads_what_is_written(engine):
    drawn = things(60)
    inputs = [{"title": one.title, "text": one.text, "image": world.draw(one)} for one in drawn]
    texts = engine.generate("item_summary", inputs)
    assert all(ended for _, ended in texts)
    right = np.mean([text == world.describe(one.traits) for one, (text, _) in zip(drawn, texts, strict=True)])
    assert right >= 0.85


def test_the_base_model_condenses_a_block_with_what_was_before(engine):
    drawn = things(60)
    blocks = [drawn[k : k + 3] for k in range(0, 60, 3)]
    before = world.condense([one.traits for one in drawn[:3]], None)
    inputs = [
        {
            "items": [{"title": one.title, "summary": world.describe(one.traits)} for one in block],
            "previous": world.preference_text(before),
        }
        for block in blocks
    ]
    wanted = [world.preference_text(world.condense([one.traits for one in block], before)) for block in blocks]
    got = [text for text, _ in engine.generate("preference", inputs)]
    words = [
        (set(a.replace(";", ",").split(", ")), set(b.replace(";", ",").split(", ")))
        for a, b in zip(wanted, got, strict=True)
    ]
    assert np.mean([len(a & b) / len(a | b) for a, b in words]) >= 0.8


def test_a_text_does_not_depend_on_its_company(engine):
    inputs = [{"title": one.title, "text": one.text, "image": world.draw(one)} for one in things(7)]
    inputs[2]["image"] = None
    together = engine.generate("item_summary", inputs)
    assert together == [engine.generate("item_summary", [one])[0] for one in inputs]


def test_identity_names_the_content_not_the_machine(engine):
    assert engine.identity["generator"] == "demo"
    assert len(engine.identity["revision"]) == 32
    assert engine.prompt_hash("item_summary") != engine.prompt_hash("preference")


def test_without_a_model_words_and_colours_are_extracted():
    engine = ExtractiveEngine(item_words=3)
    item = {
        "title": "Zorro",
        "text": "A masked rider, and his horse.",
        "image": Image.new("RGB", (9, 9), (200, 40, 40)),
    }
    ((text, _),) = engine.generate("item_summary", [item])
    assert text == "masked, rider, horse, red, black"
    ((text, _),) = engine.generate("item_summary", [{"title": "Zorro", "text": "", "image": None}])
    assert text == "zorro"


def test_without_a_model_old_words_fade_and_repeated_words_lead():
    engine = ExtractiveEngine(preference_words=3)
    block = [{"summary": "drama, red"}, {"summary": "drama, blue"}, {"summary": "comedy"}]
    ((first, _),) = engine.generate("preference", [{"items": block, "previous": None}])
    assert first == "drama, red, blue"
    ((second, _),) = engine.generate("preference", [{"items": [{"summary": "comedy"}] * 3, "previous": first}])
    assert second.split(", ")[0] == "comedy"


def test_dominant_colours_are_ordered_by_area():
    picture = Image.new("RGB", (10, 10), (45, 95, 200))
    picture.paste((240, 215, 60), (0, 0, 10, 3))
    assert dominant_colours(picture) == ["blue", "yellow"]
