"""Engines: the demo's real base model in batches, and those without a model."""

from dataclasses import replace
from importlib.util import find_spec
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import save_language_model

from mllm_msr.data.sources import world
from mllm_msr.demo.pretraining import PROMPTS
from mllm_msr.modeling.inputs import Candidate, HistoryItem
from mllm_msr.processing.engine_extractive import ExtractiveEngine, TitlesEngine, dominant_colours
from mllm_msr.processing.engine_registry import ENGINES, build_engine
from mllm_msr.processing.engine_transformers import TransformersEngine
from mllm_msr.processing.engines import EngineUnavailable, HistoryBlock
from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor
from mllm_msr.records.recipe import backbone_path
from mllm_msr.records.sections import SummaryOptions
from mllm_msr.records.typed import build


def make(**options) -> TransformersEngine:
    base = backbone_path("demo")
    limits = {"item_summary": 16, "preference": 40}
    processor = MllmMsrProcessor.from_backbone(base, prompts=PROMPTS)
    return TransformersEngine(base, processor, label="demo", max_new_tokens=limits, **options)


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return make()


def things(n: int) -> list[world.DrawnItem]:
    rng = np.random.default_rng(99)
    return [world.random_item(rng, str(k)) for k in range(n)]


def candidate(item: world.DrawnItem) -> Candidate:
    return Candidate(title=item.title, text=item.text, image=world.draw(item))


def candidates(n: int) -> list[Candidate]:
    return [candidate(item) for item in things(n)]


def test_the_base_model_sees_what_is_drawn_and_reads_what_is_written(engine):
    drawn = things(60)
    texts = engine.generate("item_summary", [candidate(item) for item in drawn])
    assert all(text.ended for text in texts)
    right = np.mean([got.text == world.describe(item.traits) for item, got in zip(drawn, texts, strict=True)])
    assert right >= 0.85


def test_the_base_model_condenses_a_block_with_what_was_before(engine):
    drawn = things(60)
    blocks = [drawn[k : k + 3] for k in range(0, 60, 3)]
    before = world.condense([item.traits for item in drawn[:3]], None)
    inputs = [
        HistoryBlock(
            [HistoryItem(item.title, world.describe(item.traits)) for item in block], world.preference_text(before)
        )
        for block in blocks
    ]
    wanted = [world.preference_text(world.condense([item.traits for item in block], before)) for block in blocks]
    got = [text.text for text in engine.generate("preference", inputs)]
    words = [
        (set(a.replace(";", ",").split(", ")), set(b.replace(";", ",").split(", ")))
        for a, b in zip(wanted, got, strict=True)
    ]
    assert np.mean([len(a & b) / len(a | b) for a, b in words]) >= 0.8


def test_a_text_does_not_depend_on_the_rest_of_its_batch(engine):
    inputs = candidates(7)
    inputs[2] = replace(inputs[2], image=None)
    together = engine.generate("item_summary", inputs)
    assert together == [engine.generate("item_summary", [alone])[0] for alone in inputs]


def test_a_sampled_text_depends_on_its_seed_and_not_on_its_batch():
    engine, inputs = make(temperature=2.0), candidates(6)
    together = engine.generate("item_summary", inputs, range(6))
    assert together == [engine.generate("item_summary", [alone], [k])[0] for k, alone in enumerate(inputs)]
    assert together == engine.generate("item_summary", inputs[::-1], range(6)[::-1])[::-1]
    others = engine.generate("item_summary", inputs, range(100, 106))
    assert sum(a != b for a, b in zip(together, others, strict=True)) >= 4


def test_a_second_answer_has_half_as_much_room_again():
    engine = make()
    engine.max_new_tokens["item_summary"] = 4
    first, second = (engine.generate("item_summary", candidates(3), range(3), again) for again in (False, True))
    assert not any(text.ended for text in first)
    assert all(len(after.text) > len(before.text) for before, after in zip(first, second, strict=True))


@pytest.mark.parametrize("budget", [1, 200, 10_000])
def test_batches_within_a_token_budget_give_the_same_texts(engine, budget):
    inputs = candidates(5)
    assert make(token_budget=budget).generate("item_summary", inputs) == engine.generate("item_summary", inputs)


def test_out_of_memory_means_smaller_batches_from_then_on(engine, monkeypatch):
    inputs, tight = candidates(8), make()
    sizes = []

    def generate(*arguments, real=tight.model.generate, **batch):
        sizes.append(len(batch["input_ids"]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is")
        return real(*arguments, **batch)

    monkeypatch.setattr(tight.model, "generate", generate)
    wanted = engine.generate("item_summary", inputs)
    assert tight.generate("item_summary", inputs) == wanted
    assert sizes[:3] == [8, 4, 2]
    sizes.clear()
    assert tight.generate("item_summary", inputs) == wanted
    assert max(sizes) <= 3


def test_who_writes_is_named_by_content_and_not_by_place(engine):
    assert engine.generator == "demo"
    assert len(engine.revision) == 32
    local = build_engine(SummaryOptions(model=backbone_path("demo")))
    assert (local.generator, local.revision) == ("base", engine.revision)


def test_hashes_change_with_what_a_text_depends_on_and_only_then(engine):
    def facts(task, **options):
        prompts = options.pop("prompts", {})
        noun = options.pop("noun", "item")
        made = build_engine(SummaryOptions(model="demo", **options), prompts, noun)
        return made.prompt_hash(task), made.settings(task)

    base = {task: facts(task) for task in ("item_summary", "preference")}
    assert facts("item_summary", batch_size=3, token_budget=99, concurrency=2) == base["item_summary"]
    assert facts("item_summary", max_new_tokens={"preference": 9}) == base["item_summary"]
    assert facts("preference", max_new_tokens={"preference": 9}) != base["preference"]
    assert facts("item_summary", prompts={"preference": "x"}) == base["item_summary"]
    assert facts("preference", prompts={"preference": "x"}) != base["preference"]
    assert facts("preference", noun="film") != base["preference"]
    assert facts("preference", prompts={"preference": "x"}, noun="film") == facts(
        "preference", prompts={"preference": "x"}
    )
    assert facts("preference", temperature=0.5)[1] != base["preference"][1]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"engine": "magic", "model": "x"},
            "'magic': must be 'transformers', 'vllm', 'openai', 'extractive', 'titles' or null",
        ),
        ({"model": "x", "blocks": 3}, "unknown key 'blocks'; did you mean 'block_size'"),
        ({"engine": "transformers"}, "name the model of the transformers engine"),
        ({"model": "x", "max_new_tokens": {"fusion": 0}}, "summaries.max_new_tokens: fusion=0 must be at least 1"),
        ({"model": "x", "batch_size": 0}, "must be at least 1"),
    ],
)
def test_a_wrong_option_is_named(section, message):
    with pytest.raises(ValueError, match=message):
        build(SummaryOptions, section, "summaries")


def test_every_engine_that_a_recipe_may_name_can_be_built():
    named, _ = get_args(get_type_hints(SummaryOptions)["engine"])
    assert ENGINES.keys() == set(get_args(named))


def test_the_default_engine_is_transformers_where_a_model_is_named_and_else_none_of_a_model():
    assert SummaryOptions(model="x").engine == "transformers" and SummaryOptions().engine == "extractive"


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_an_engine_that_is_not_installed_says_how_to_get_it():
    with pytest.raises(ValueError, match="vLLM is not installed: `pip install vllm`"):
        build_engine(SummaryOptions("vllm", "some/model"))


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here")
def test_vllm_writes_what_transformers_does(tmp_path):
    folder = str(save_language_model(tmp_path / "model"))
    blocks = [HistoryBlock([HistoryItem("Mug", f"a red mug number {n}")], None) for n in range(3)]
    options = {"model": folder, "dtype": "float32", "max_length": 256, "max_new_tokens": {"preference": 8}}
    ours, theirs = (build_engine(SummaryOptions(name, **options)) for name in ("transformers", "vllm"))
    assert theirs.generate("preference", blocks) == ours.generate("preference", blocks)


def test_titles_alone_are_titles_and_nothing_else():
    engine = TitlesEngine()
    item = Candidate(title="The Red Mug", text="of stone", image=Image.new("RGB", (8, 8), "red"))
    assert [text.text for text in engine.generate("item_summary", [item, Candidate()])] == ["The Red Mug", ""]
    block = HistoryBlock([HistoryItem("B", "x"), HistoryItem("", "y")], "A")
    assert engine.generate("preference", [block])[0].text == "A; B"


def test_without_a_model_words_and_colours_are_extracted():
    engine = ExtractiveEngine(item_words=3)
    image = Image.new("RGB", (9, 9), (200, 40, 40))
    (text,) = engine.generate("item_summary", [Candidate("", "Zorro", "A masked rider, and his horse.", image)])
    assert text.text == "masked, rider, horse, red, black"
    (text,) = engine.generate("item_summary", [Candidate("", "Zorro")])
    assert text.text == "zorro"


def test_without_a_model_old_words_fade_and_repeated_words_lead():
    engine = ExtractiveEngine(preference_words=3)
    block = [HistoryItem(summary=summary) for summary in ("drama, red", "drama, blue", "comedy")]
    (first,) = engine.generate("preference", [HistoryBlock(block, None)])
    assert first.text == "drama, red, blue"
    comedies = [HistoryItem(summary="comedy")] * 3
    (second,) = engine.generate("preference", [HistoryBlock(comedies, first.text)])
    assert second.text.split(", ")[0] == "comedy"


def test_dominant_colours_are_ordered_by_area():
    image = Image.new("RGB", (10, 10), (45, 95, 200))
    image.paste((240, 215, 60), (0, 0, 10, 3))
    assert dominant_colours(image) == ["blue", "yellow"]


def test_a_model_that_cannot_be_loaded_is_no_fault_of_the_items():
    engine = make(device_map="cpu", attn_implementation="no such thing")
    with pytest.raises(EngineUnavailable, match="demo cannot be loaded"):
        engine.generate("item_summary", candidates(1))


def test_reasoning_is_no_part_of_a_text_even_if_its_marks_are_special_tokens():
    engine = make()
    tokenizer = engine.processor.tokenizer
    tokenizer.add_special_tokens({"extra_special_tokens": ["[THINK]", "[/THINK]", "<|end|>"]})
    for generated in ("[THINK] red? [/THINK] blue mug<|end|>", "red? [/THINK] blue mug", "blue mug [THINK] red"):
        assert engine._decode(tokenizer(generated, add_special_tokens=False)["input_ids"]) == "blue mug"


def test_dtype_and_device_map_are_passed_on():
    engine = make(dtype="bfloat16", device_map="cpu", attn_implementation="eager")
    assert engine.model.dtype == torch.bfloat16 and engine.model.config._attn_implementation == "eager"
    (text,) = engine.generate("item_summary", candidates(1))
    assert text.text


def test_a_failed_accelerator_is_no_fault_of_the_items(monkeypatch):
    engine = make()

    def fail(**batch):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(engine.model, "generate", fail)
    with pytest.raises(EngineUnavailable, match="run again to go on"):
        engine.generate("item_summary", candidates(3))
