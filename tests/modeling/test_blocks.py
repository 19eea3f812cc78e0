"""Packed rows: what prompts share is computed once, and scores, losses and gradients are those of whole prompts."""

import numpy as np
import pytest
import tiny_models
import torch

from mllm_msr.modeling import block_attention as blocks
from mllm_msr.modeling.modeling_mllm_msr import MllmMsrForRecommendation
from mllm_msr.modeling.packing import positions
from mllm_msr.modeling.ranking import Recommender
from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor

LIMITS = (160, 400)
USERS = [
    {"preference": "quiet red films with ships", "recent": []},
    {"preference": "", "recent": [{"summary": "stripes"}]},
    {"preference": "long summers " * 6, "recent": [{"title": "Noise", "summary": "blue"}, {"summary": "stripes"}]},
]
ITEMS = [
    {"title": "The Sea " * (k + 1), "text": "", "image": tiny_models.picture(k, 40 + 8 * k, 48) if k != 2 else None}
    for k in range(5)
]
PAIRS = [(0, 0), (0, 1), (1, 2), (1, 3), (0, 2), (2, 4)]


def recommender_of(path, interaction="joint"):
    processor = MllmMsrProcessor.from_backbone(path)
    model = MllmMsrForRecommendation.from_backbone(path, dtype=torch.float32, processor=processor).eval()
    model.config.interaction, (model.config.user_limit, model.config.item_limit) = interaction, LIMITS
    text = model.get_decoder().config
    if getattr(text, "sliding_window", None):
        text.sliding_window = 4096  # beyond these prompts
    return model, processor


def prompts(processor):
    return processor(
        [USERS[user]["preference"] for user, _ in PAIRS],
        [ITEMS[item] for _, item in PAIRS],
        recent=[USERS[user]["recent"] for user, _ in PAIRS],
    )


def late_logit(model, processor, user, item):
    """The definition: one sequence, in which the user and the candidate do not see each other."""
    batch = processor.blocks([user], [item], LIMITS)
    user, item, answer = batch["users"], batch["items"], batch["answer_ids"][None]
    widths = [user["input_ids"].shape[1], item["input_ids"].shape[1]]
    end = torch.arange(answer.shape[1])[None] + sum(LIMITS)
    starts = [positions(model, user), positions(model, item) + LIMITS[0]]
    where = torch.cat([*starts, end.expand(*starts[0].shape[:-2], 1, -1)], -1)
    seen = torch.ones(where.shape[-1], where.shape[-1], dtype=torch.bool).tril()
    begin, cut = widths[0], sum(widths)
    seen[begin:cut, :begin] = False
    more = {}
    if "token_type_ids" in item:  # the tokens of a picture see each other
        more["token_type_ids"] = torch.cat([user["token_type_ids"], item["token_type_ids"], 0 * answer], 1)
        shown = item["token_type_ids"][0] == 1
        seen[begin:cut, begin:cut] |= shown[:, None] & shown
    textual = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    more |= {name: value for name, value in item.items() if name not in textual}
    ids = torch.cat([user["input_ids"], item["input_ids"], answer], 1)
    output = model.backbone(
        input_ids=ids, position_ids=where, attention_mask=seen[None, None], logits_to_keep=1, **more
    )
    return model.answer_logits(output.logits[:, -1])


@pytest.fixture(params=[blocks.SHORT, 0], ids=["in place", "to copies"])
def either_way(request, monkeypatch):
    monkeypatch.setattr(blocks, "SHORT", request.param or 0)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_packed_prompts_have_the_logits_and_gradients_of_whole_ones(backbone, family, either_way):
    model, processor = recommender_of(backbone(family))
    batch, owners = prompts(processor), torch.tensor([7, 7, 3, 3, 7, 5])
    labels = torch.tensor([1, 0, 0, 1, 0, 1], dtype=torch.float32)
    results = []
    for more in ({"logits_to_keep": 1}, {"owners": owners}):
        model.zero_grad()
        logits = model.answer_logits(model(**batch, **more).logits.reshape(len(PAIRS), -1))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
        loss.backward()
        gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        results.append((logits.detach(), gradients))
    (plain, expected), (packed, gradients) = results
    assert plain.std() > 1e-3
    assert packed == pytest.approx(plain, abs=1e-5)
    assert gradients.keys() == expected.keys() and len(gradients) > 10
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected[name], atol=1e-5, rtol=1e-4), name


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_late_pairs_are_those_of_the_definition(backbone, family, either_way):
    model, processor = recommender_of(backbone(family), "late")
    with torch.no_grad():
        expected = torch.cat([late_logit(model, processor, USERS[user], ITEMS[item]) for user, item in PAIRS])
    logits = model.score(**processor.blocks(USERS, ITEMS, LIMITS), pairs=torch.tensor(PAIRS).T).logits
    assert expected.std() > 1e-3
    assert logits == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_ranking_late_gives_the_same_in_any_order_and_memory(backbone, family, tmp_path):
    model, processor = recommender_of(backbone(family), "late")
    catalogue = {f"i{number}": item for number, item in enumerate(ITEMS)}
    candidates = [["i4", "i0", "i2"], ["i1"], ["i3", "i2", "i0", "i4", "i1"]]
    expected = [
        model.score(
            **processor.blocks([user], [catalogue[item] for item in row], LIMITS),
            pairs=torch.tensor([[0] * len(row), list(range(len(row)))]),
        ).logits.numpy()
        for user, row in zip(USERS, candidates, strict=True)
    ]
    tight = {"memory_gb": 1e-6, "token_budget": 1}
    for options in ({}, tight, {"cache": tmp_path}, {"cache": tmp_path, **tight}, {"token_budget": 300}):
        scores = Recommender(model, processor, **options).score(USERS, candidates, catalogue)
        for ours, theirs in zip(scores, expected, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5), options
    assert len(list(tmp_path.glob("*/*/*.safetensors"))) == len(ITEMS)


def test_gradient_checkpointing_changes_nothing(backbone):
    model, processor = recommender_of(backbone("llava"))
    batch, owners = prompts(processor), torch.tensor([0, 0, 1, 1, 0, 2])
    model.train()
    found = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        model.zero_grad()
        model.answer_logits(model(**batch, owners=owners).logits).sum().backward()
        found.append([weight.grad.clone() for weight in model.get_decoder().parameters()])
    for plain, again in zip(*found, strict=True):
        assert torch.allclose(plain, again, atol=1e-6)


def test_other_calls_are_as_they_were(backbone):
    model, processor = recommender_of(backbone("llava"))
    batch = prompts(processor)
    before = model.score(**batch).logits
    model.score(**batch, owners=torch.zeros(len(PAIRS), dtype=torch.long))
    assert torch.equal(model.score(**batch).logits, before)


def test_an_index_grows_shrinks_and_survives_a_broken_file(backbone, tmp_path):
    model, processor = recommender_of(backbone("llava"), "late")
    recommender = Recommender(model, processor, cache=tmp_path)
    catalogue = {f"i{number}": item for number, item in enumerate(ITEMS)}
    assert recommender.index(catalogue) == (5, 0, 0)
    assert recommender.index(catalogue) == (0, 5, 0)
    changed = {**catalogue, "i1": {**catalogue["i1"], "title": "Another"}}
    del changed["i4"]
    assert recommender.index(changed) == (1, 3, 2)
    scores = recommender.score(USERS[:1], [list(changed)], changed)
    next(tmp_path.glob("*/*/*.safetensors")).write_bytes(b"cut off")
    again = Recommender(model, processor, cache=tmp_path).score(USERS[:1], [list(changed)], changed)
    assert np.array_equal(scores[0], again[0])
    with torch.no_grad():
        model.get_decoder().layers[0].mlp.up_proj.weight += 0.1
    assert Recommender(model, processor, cache=tmp_path).index(changed) == (4, 0, 0)


def test_what_cannot_be_late_is_refused(backbone):
    model, processor = recommender_of(backbone("llava"), "late")
    with pytest.raises(ValueError, match="scores blocks"):
        model.score(**prompts(processor))
    with pytest.raises(ValueError, match="a limit=8 leaves no room"):
        processor.blocks(USERS, [], (8, 400))
    model.config.item_limit = 20
    with pytest.raises(ValueError, match=r"longer than config\.item_limit=20"):
        model.score(**processor.blocks(USERS, ITEMS, LIMITS), pairs=torch.tensor(PAIRS).T)
    model.config.interaction = "joint"
    with pytest.raises(ValueError, match="leave `cache` out"):
        Recommender(model, processor, cache="anywhere")


def test_a_control_token_in_a_title_is_text_in_a_block(backbone):
    _, processor = recommender_of(backbone("llava"))
    image = processor.tokenizer.image_token
    batch = processor.blocks([], [{"title": f"A {image} here", "image": None}], LIMITS)
    assert processor.tokenizer.convert_tokens_to_ids(image) not in batch["items"]["input_ids"]
