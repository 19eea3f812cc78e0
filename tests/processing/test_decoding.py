"""Rows that leave their batch, and images encoded once: on every family the texts of stock greedy search."""

import io

import polars as pl
import pytest
import torch
from tiny_models import FAMILIES, draw_image

from mllm_msr.modeling import image_features
from mllm_msr.modeling.generated_text import tidy
from mllm_msr.modeling.inputs import Candidate, HistoryItem
from mllm_msr.processing import decoding
from mllm_msr.processing.backbone_images import PreparedImage
from mllm_msr.processing.decoding import OwnSeeds
from mllm_msr.processing.engine_transformers import TransformersEngine
from mllm_msr.processing.engines import HistoryBlock, Text
from mllm_msr.processing.summaries import summarize_items
from mllm_msr.processing.text_store import TextStore

LIMIT = 24
IMAGE_SEEDS = (1, 2, None, 1, 3, 1, 2, 4)  # which image each item has


def image_of(seed: int | None):
    return seed and draw_image(seed, 40 + 16 * (seed % 2), 30)


def items() -> list[Candidate]:
    return [
        Candidate(title=f"Film {n} " + "of summers " * n, image=image_of(seed)) for n, seed in enumerate(IMAGE_SEEDS)
    ]


def engine_of(folder, **options) -> TransformersEngine:
    """An engine whose texts end after few tokens or many: any of some tokens ends one, and none comes twice."""
    engine = TransformersEngine(str(folder), max_new_tokens={"item_summary": LIMIT, "preference": LIMIT}, **options)
    engine.model.generation_config.no_repeat_ngram_size = 1
    for weights in engine.model.get_decoder().layers.parameters():
        if weights.ndim > 1:
            weights.data *= 4  # so that the next token depends on more than the latest
    engine.model.generation_config.eos_token_id = list(range(8, len(engine.processor.tokenizer), 16))
    return engine


def stock(engine: TransformersEngine, batch) -> list[Text]:
    """The texts of transformers' own greedy search, without the control characters that random weights write."""
    tokenizer, batch = engine.processor.tokenizer, batch.to(engine.model.device)
    ids = engine.model.generate(**batch, do_sample=False, max_new_tokens=LIMIT, pad_token_id=tokenizer.pad_token_id)
    new = ids[:, batch["input_ids"].shape[1] :]
    ends = set(engine.model.generation_config.eos_token_id)
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    return [Text(tidy(text), bool(ends & set(row))) for text, row in zip(texts, new.tolist(), strict=True)]


def encoded_images(monkeypatch) -> list[PreparedImage]:
    """The images that go through the vision tower from now on."""
    encoded: list[PreparedImage] = []

    def encode(backbone, images, real=image_features.encode_images):
        encoded.extend(images)
        return real(backbone, images)

    monkeypatch.setattr(image_features, "encode_images", encode)
    return encoded


@pytest.mark.parametrize("step", [1, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_those_of_stock_search_and_equal_images_are_encoded_once(backbone, family, step, monkeypatch):
    monkeypatch.setattr(decoding, "key_step", lambda model: step)
    engine = engine_of(backbone(family))
    wanted = stock(engine, engine.processor.item_summary(items()))
    assert len({len(text.text) for text in wanted}) > 2
    encoded = encoded_images(monkeypatch)
    assert engine.generate("item_summary", items()) == wanted
    assert engine.generate("item_summary", items()[::-1]) == wanted[::-1]
    assert len(encoded) == 4


@pytest.mark.parametrize("family", ["language_model", *FAMILIES])
def test_texts_alone_are_those_of_stock_search_whatever_their_lengths(backbone, family, monkeypatch):
    engine = engine_of(backbone(family))
    blocks = [HistoryBlock([HistoryItem("One", "red " * n**2)], "ships" if n % 2 else None) for n in range(8)]
    batch = engine.processor.preference([block.items for block in blocks], [block.previous for block in blocks])
    wanted = stock(engine, batch)
    assert len({len(text.text) for text in wanted}) > 2
    shapes: list[torch.Size] = []
    engine.model.register_forward_pre_hook(
        lambda module, given, named: shapes.append(named["input_ids"].shape), with_kwargs=True
    )
    monkeypatch.setattr(decoding, "WORTH", 8)
    assert engine.generate("preference", blocks) == wanted
    read = [rows * tokens for rows, tokens in shapes if tokens > 1]
    assert family == "gemma3" or sum(read) < 0.9 * batch["input_ids"].numel(), "one layer of its cache has a window"


@pytest.mark.parametrize("how", ["static", "continuous"])
@pytest.mark.parametrize("family", ["language_model", "llava"])
def test_the_ways_of_transformers_write_the_same_texts(backbone, family, how):
    engine = engine_of(backbone(family))
    engine.model.generation_config.no_repeat_ngram_size = 0  # which continuous batching does not know
    blocks = [HistoryBlock([HistoryItem("One", "red " * n**2)], "ships" if n % 2 else None) for n in range(8)]
    wanted = engine.generate("preference", blocks)
    assert len({len(text.text) for text in wanted}) > 2
    engine.decoding = how
    assert engine.generate("preference", blocks) == wanted
    if family != "language_model":  # with images, where batches go on as ever or are static, too
        engine.decoding = "dropping"
        described = engine.generate("item_summary", items())
        engine.decoding = how
        assert engine.generate("item_summary", items()) == described
    engine.temperature, seeds = 1.0, range(8)
    sampled = engine.generate("preference", blocks, seeds)
    engine.decoding = "dropping"
    assert engine.generate("preference", blocks, seeds) == sampled


def test_a_compiled_step_of_a_static_cache_writes_the_same(backbone):
    engine = engine_of(backbone("llava"))
    batch = engine.processor.item_summary(items()).to(engine.model.device)
    wanted = [text.text for text in stock(engine, batch)]
    torch.compiler.reset()
    compiling = {"backend": "eager", "mode": None, "fullgraph": True, "dynamic": False}
    rows = decoding.decode_static(engine.model, {**batch}, LIMIT, compiling)
    assert [engine._decode(row) for row in rows] == wanted
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_what_reading_and_writing_take_is_counted_apart(backbone):
    engine = engine_of(backbone("llava"))
    blocks = [HistoryBlock([HistoryItem("One", "red " * n**2)], None) for n in range(5)]
    batch = engine.processor.preference([block.items for block in blocks])
    texts = engine.generate("preference", blocks)
    assert engine.speed.read == int(batch["attention_mask"].sum()) and 5 <= engine.speed.written <= 5 * LIMIT
    assert engine.speed.reading > 0 and engine.speed.writing > 0 and len(texts) == 5
    assert str(engine.speed).startswith(f"read {engine.speed.read:,} tokens")


@pytest.mark.parametrize("again", [False, True])
def test_neither_seeds_nor_penalties_know_of_rows_that_have_left(backbone, again):
    engine = engine_of(backbone("llava"), temperature=1.0)
    engine.model.generation_config.update(no_repeat_ngram_size=0, repetition_penalty=1.3)
    engine.model.generation_config.eos_token_id += [engine.processor.tokenizer.pad_token_id]  # as of Qwen's models
    together = engine.generate("item_summary", items(), range(8), again)
    assert len({len(text.text) for text in together}) > 2
    assert together == [engine.generate("item_summary", [item], [n], again)[0] for n, item in enumerate(items())]


def test_a_row_that_has_ended_is_no_more_worked_on(backbone):
    engine = engine_of(backbone("llava"))
    rows: list[int] = []
    engine.model.get_decoder().register_forward_pre_hook(
        lambda module, given, named: rows.append(len(named["inputs_embeds"])), with_kwargs=True
    )
    engine.generate("item_summary", items())
    assert rows[0] == 8 and rows == sorted(rows, reverse=True) and len(set(rows)) > 2


def test_items_with_one_image_go_together_over_many_batches(backbone, tmp_path, monkeypatch):
    engine = engine_of(backbone("llava"), batch_size=4)
    encoded = encoded_images(monkeypatch)
    images = []
    for n in range(18):
        buffer = io.BytesIO()
        draw_image(1 + n % 3).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    ids, titles = [f"i{n}" for n in range(18)], [f"Film {n} " + "long " * (n * 7 % 18) for n in range(18)]
    frame = pl.DataFrame({"item_id": ids, "title": titles, "text": [""] * 18, "image": images})
    summarize_items(frame, engine, TextStore(tmp_path))
    assert len(encoded) == 3


def test_no_more_images_are_kept_than_two_batches_have(backbone):
    engine = engine_of(backbone("llava"), batch_size=2)
    for seed in range(1, 9, 2):
        engine.generate("item_summary", [Candidate(image=image_of(seed + n)) for n in (0, 1)])
    features = engine.model.config.text_config.hidden_size * 4 * 4  # bytes of the four tokens of an image
    assert len(engine.images) == 4 and engine.images.nbytes == 4 * features, "no pixels"


def test_images_that_do_not_fit_into_memory_are_encoded_in_smaller_batches(backbone, monkeypatch):
    engine = engine_of(backbone("llava"))
    wanted = engine.generate("item_summary", items())
    engine.images.evict(max_images=0)

    def encode(backbone, images, real=image_features.encode_images):
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(backbone, images)

    monkeypatch.setattr(image_features, "encode_images", encode)
    assert engine.generate("item_summary", items()) == wanted


def test_sampling_by_own_seeds_follows_the_model_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    sampler = OwnSeeds([0], torch.device("cpu"))
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[sampler(logits).argmax()] += 1
    assert torch.allclose(counts / 4000, logits.softmax(-1)[0], atol=0.03)
