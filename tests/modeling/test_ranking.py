"""Ranking: shared prefixes and pictures give the scores of one plain forward a pair, on every family."""

import json
import math
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from transformers import AutoConfig, Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3NextConfig

from mllm_msr.modeling import image_features
from mllm_msr.modeling.configuration_mllm_msr import MllmMsrConfig
from mllm_msr.modeling.inputs import Candidate, HistoryItem, User
from mllm_msr.modeling.modeling_mllm_msr import MllmMsrForRecommendation
from mllm_msr.modeling.packing import block_limits
from mllm_msr.modeling.ranking import Recommender
from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor

USERS = [
    User("quiet red films with ships"),
    User("", [HistoryItem(summary="stripes")]),
    User("long summers " * 12, [HistoryItem("Noise", "blue"), HistoryItem(summary="stripes")]),
]


def catalogue() -> dict[str, Candidate]:
    random.seed(0)
    colours = [tuple(random.choices(range(256), k=3)) for _ in range(6)]
    images = [Image.new("RGB", (40 + 8 * k, 48), colour) if k != 2 else None for k, colour in enumerate(colours)]
    return {f"i{k}": Candidate(f"i{k}", "The Sea " * (k + 1), image=image) for k, image in enumerate(images)}


CANDIDATES = [["i0", "i1", "i2", "i3"], ["i3", "i2", "i4", "i5", "i1"], ["i5"]]


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_scores_equal_the_plain_forward_of_each_pair(backbone, family):
    path = backbone(family)
    processor = MllmMsrProcessor.from_backbone(path)
    model = MllmMsrForRecommendation.from_backbone(path, dtype=torch.float32, processor=processor).eval()
    items = catalogue()
    plain = [
        [model.score(**processor([user], [items[item]])).logits.item() for item in row]
        for user, row in zip(USERS, CANDIDATES, strict=True)
    ]
    for budget in (1, 600, 100_000):  # pair by pair, a few at a time, all at once
        recommender = Recommender(model, processor, token_budget=budget)
        assert recommender.shares_prefix and recommender.obstacle is None
        shared = recommender.score(USERS, CANDIDATES, items)
        for ours, theirs in zip(shared, plain, strict=True):
            assert ours.dtype == np.float32
            assert ours == pytest.approx(np.array(theirs), abs=1e-4)


def plain_scores(model, processor, items):
    return [
        model.score(**processor([user] * len(row), [items[item] for item in row])).logits.cpu().numpy()
        for user, row in zip(USERS, CANDIDATES, strict=True)
    ]


def test_images_are_encoded_once_in_all_calls(backbone, monkeypatch):
    encoded: list[int] = []

    def counted(backbone, images, real=image_features.encode_images):
        encoded.append(len(images))
        return real(backbone, images)

    monkeypatch.setattr(image_features, "encode_images", counted)
    path = backbone("llava")
    processor = MllmMsrProcessor.from_backbone(path)
    model = MllmMsrForRecommendation.from_backbone(path, dtype=torch.float32, processor=processor).eval()
    items = catalogue()
    expected = plain_scores(model, processor, items)
    ready = {
        name: replace(item, image=processor.prepare_images([item.image])[0] if item.image else None)
        for name, item in items.items()
    }
    for memory, counts in ((1, (5, 0)), (1e-9, (9, 9))):  # in gigabytes: plenty, and too little to keep anything
        recommender = Recommender(model, processor, memory_gb=memory)
        for count in counts:
            encoded.clear()
            scores = recommender.score(USERS, CANDIDATES, ready)
            assert [row.tolist() for row in scores] == [pytest.approx(row.tolist(), abs=1e-4) for row in expected]
            assert sum(encoded) == count
        others = {name: replace(item, image=items["i0"].image) for name, item in items.items()}
        shown = recommender.score(USERS, CANDIDATES, others)  # by the same ids, not prepared: nothing is confused
        assert shown[2].tolist() == pytest.approx(plain_scores(model, processor, others)[2].tolist(), abs=1e-4)
        assert len(recommender.plan.images) == (6 if memory == 1 else 0)
    recommender = Recommender(model, processor, memory_gb=1)
    for count in (5, 0):  # not prepared, they are known by their content
        encoded.clear()
        scores = recommender.score(USERS, CANDIDATES, dict(catalogue()))
        assert [row.tolist() for row in scores] == [pytest.approx(row.tolist(), abs=1e-4) for row in expected]
        assert sum(encoded) == count


@pytest.mark.parametrize(
    ("text", "window"),
    [
        (MistralConfig(**tiny_models.TEXT, sliding_window=24), 24),
        (Qwen2Config(**tiny_models.TEXT, use_sliding_window=True, sliding_window=24, max_window_layers=1), 24),
        (MistralConfig(**tiny_models.TEXT, sliding_window=4096), 4096),
    ],
    ids=["all layers slide", "one layer slides", "none reaches its window"],
)
def test_sliding_windows_change_nothing(backbone, text, window):
    """Prompts longer than a window are scored whole, others share their prefixes."""
    processor = MllmMsrProcessor.from_backbone(backbone("llava"))
    config = MllmMsrForRecommendation.from_backbone(backbone("llava"), processor=processor).config
    text.vocab_size = config.get_text_config().vocab_size
    config.vlm_config.text_config = text
    model = MllmMsrForRecommendation(config).eval()
    tiny_models.randomise(model)
    expected = plain_scores(model, processor, catalogue())
    recommender = Recommender(model, processor)
    assert recommender.window == window and recommender.obstacle is None
    for ours, theirs in zip(recommender.score(USERS, CANDIDATES, catalogue()), expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    demanding = Recommender(model, processor, share_prefix=True)
    if window > 24:
        assert len(demanding.score(USERS, CANDIDATES, catalogue())) == 3
    else:
        with pytest.raises(ValueError, match="longer than the sliding window of 24"):
            demanding.score(USERS, CANDIDATES, catalogue())


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_prefixes_are_shared_where_one_asks_for_it(backbone, family, record_property):
    path = backbone(family)
    processor = MllmMsrProcessor.from_backbone(path)
    model = MllmMsrForRecommendation.from_backbone(path, processor=processor)
    if window := Recommender(model, processor).window:
        record_property("note", f"prompts within the sliding window (here {window}); longer ones whole")
    short = {"recommendation": "{{ preference }} {{ title }} {{ image }}?"}
    processor = MllmMsrProcessor.from_backbone(path, prompts=short)
    users = [User("red"), User("blue ships")]
    scores = [
        Recommender(model, processor, share_prefix=share).score(users, [["i0", "i3"], ["i1"]], catalogue())
        for share in (True, False)
    ]
    for ours, theirs in zip(*scores, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_attention_that_cannot_continue_a_prefix_is_refused_with_the_reason(backbone):
    config = MllmMsrForRecommendation.from_backbone(backbone("llava")).config.vlm_config
    assert block_limits(config) == (None, None)
    config.text_config = Qwen3NextConfig(**tiny_models.TEXT)
    assert "linear_attention" in block_limits(config)[0]
    config.text_config = Gemma2Config(**tiny_models.TEXT)
    assert "caps the logits" in block_limits(config)[0]
    config.text_config = LlamaConfig(**tiny_models.TEXT, rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    assert "depend on the whole prompt" in block_limits(config)[0]


def test_a_family_not_in_the_table_is_served_by_the_plain_path(backbone, tmp_path):
    shutil.copytree(backbone("llava"), tmp_path / "backbone")
    settings = json.loads((tmp_path / "backbone" / "config.json").read_text())
    layers = {"vision_feature_layers": [-1], "model_type": "vipllava", "architectures": None}
    (tmp_path / "backbone" / "config.json").write_text(json.dumps(settings | layers))
    processor = MllmMsrProcessor.from_backbone(tmp_path / "backbone")
    config = AutoConfig.from_pretrained(tmp_path / "backbone")
    config = MllmMsrConfig(vlm_config=config, answer_token_ids=processor.answer_token_ids)
    model = MllmMsrForRecommendation(config).eval()
    tiny_models.randomise(model)
    recommender = Recommender(model, processor)
    assert "vipllava" in recommender.obstacle and not recommender.shares_prefix
    scores = recommender.score(USERS, CANDIDATES, catalogue())
    for ours, theirs in zip(scores, plain_scores(model, processor, catalogue()), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    with pytest.raises(ValueError, match="how vipllava counts positions"):
        Recommender(model, processor, share_prefix=True)


def test_a_forward_keeps_to_its_budget(backbone):
    processor = MllmMsrProcessor.from_backbone(backbone("llava"))
    model = MllmMsrForRecommendation.from_backbone(backbone("llava"), processor=processor)
    sizes = []
    model.register_forward_pre_hook(lambda _, __, batch: sizes.append(batch["input_ids"].numel()), with_kwargs=True)
    recommender = Recommender(model, processor, token_budget=400, share_prefix=False)
    recommender.score(USERS, CANDIDATES, catalogue())
    assert max(sizes) <= 400 and len(sizes) < sum(map(len, CANDIDATES))


def test_rank_orders_and_scores(backbone):
    path = backbone("llava")
    processor = MllmMsrProcessor.from_backbone(path)
    model = MllmMsrForRecommendation.from_backbone(path, dtype=torch.float32, processor=processor)
    recommender = Recommender(model, processor)
    candidates = list(catalogue().values())
    ranked = recommender.rank(USERS, candidates, top_k=3)
    everything = recommender.rank(USERS, candidates)
    assert [len(row) for row in ranked] == [3, 3, 3]
    assert [len(row) for row in everything] == [6, 6, 6]
    for row, whole in zip(ranked, everything, strict=True):
        logits = [one.logit for one in whole]
        assert logits == sorted(logits, reverse=True)
        assert [one.candidate.title for one in row] == [one.candidate.title for one in whole[:3]]
        for one in whole:
            assert one.score == pytest.approx(1 / (1 + math.exp(-one.logit)))
            assert one.candidate is candidates[one.index]
    backwards = recommender.rank(USERS, candidates[::-1], top_k=1)
    assert [row[0].candidate.title for row in backwards] == [row[0].candidate.title for row in ranked]


def test_dicts_are_taken_and_what_is_wrong_with_them_is_said(backbone):
    processor = MllmMsrProcessor.from_backbone(backbone("llava"))
    recommender = Recommender(MllmMsrForRecommendation.from_backbone(backbone("llava"), processor=processor), processor)
    user, items = {"preference": "red", "recent": [{"summary": "blue"}]}, [{"title": "A"}, {"title": "B", "text": "c"}]
    candidates = [Candidate(title="A"), Candidate(title="B", text="c")]
    objects = recommender.rank([User("red", [HistoryItem(summary="blue")])], candidates)
    assert recommender.rank([user], items) == objects
    named = {"a": items[0], "b": items[1]}
    (logits,) = recommender.score([user], [["a", "b"]], named)
    assert sorted(logits, reverse=True) == [one.logit for one in objects[0]]
    for users, candidates, message in (
        (user, items, "`users` is a list, not dict"),
        (User("red"), items, "`users` is a list, not User"),
        (["red"], items, "a user is a mapping"),
        ([{}], items, "needs at least one of"),
        ([user], items[0], "`candidates` is a list, not dict"),
        ([user], ["A"], "a candidate is a mapping"),
        ([user], [{}], "needs at least one of"),
        ([user], [{"title": "A", "image": [Image.new("RGB", (8, 8))]}], "one opened image"),
        ([user], [{"title": "A", "name": "x"}], "unknown key 'name'"),
        ([user], [{"item_id": "1", "title": "A"}, {"item_id": "1", "title": "B"}], "item '1' is there twice"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            recommender.rank(users, candidates)
    for count in (0, -1, "2"):
        with pytest.raises(ValueError, match=f"top_k={count!r}: must be a number of at least 1"):
            recommender.rank([user], items, top_k=count)
    for candidates, message in (
        ([["a", "c"]], "item 'c' is among the candidates, but not in the catalogue"),
        ([["a", "b", "a"]], "item 'a' is there twice"),
        (["ab"], "a list of item ids"),
        ([["a"], ["b"]], "1 users, but 2 lists"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            recommender.score([user], candidates, named)
    assert recommender.score([], [], named) == [] and len(recommender.score([user], [[]], named)[0]) == 0
