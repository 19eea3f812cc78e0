"""Packed rows: what prompts share is computed once, and scores, losses and gradients are those of whole prompts."""

import math
from dataclasses import replace

import numpy as np
import pytest
import tiny_models
import torch
from devices import DEVICE
from packed_rows import packed_recommender
from torch.nn.functional import adaptive_avg_pool1d

from mllm_msr.modeling import block_attention as blocks
from mllm_msr.modeling import packing
from mllm_msr.modeling.block_layout import KVCache, PrefixGroup
from mllm_msr.modeling.configuration_mllm_msr import MllmMsrConfig
from mllm_msr.modeling.inputs import Candidate, HistoryItem, User
from mllm_msr.modeling.item_shards import ShardFolder
from mllm_msr.modeling.modeling_mllm_msr import MllmMsrForRecommendation
from mllm_msr.modeling.packing import pack_joint, pack_late, positions
from mllm_msr.modeling.ranking import Recommender
from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor

LIMITS = (160, 400)
USERS = [
    User("quiet red films with ships"),
    User("", [HistoryItem(summary="stripes")]),
    User("long summers " * 6, [HistoryItem("Noise", "blue"), HistoryItem(summary="stripes")]),
]
ITEMS = [
    Candidate(f"i{k}", "The Sea " * (k + 1), image=tiny_models.draw_image(k, 40 + 8 * k, 48) if k != 2 else None)
    for k in range(5)
]
CATALOGUE = {item.item_id: item for item in ITEMS}
PAIRS = [(0, 0), (0, 1), (1, 2), (1, 3), (0, 2), (2, 4)]


def recommender_of(path, interaction="joint", memory=0):
    return packed_recommender(path, interaction, LIMITS, memory)


def prompts(processor):
    return processor([USERS[user] for user, _ in PAIRS], [ITEMS[item] for _, item in PAIRS]).to(DEVICE)


def late_batch(model, processor, users=USERS, items=ITEMS, pairs=PAIRS, memory_only=True):
    blocks = processor.late_blocks(users, items, LIMITS)
    return pack_late(model, **blocks, pairs=torch.tensor(pairs).T, memory_only=memory_only)


def late_logit(model, processor, user, item, memory_only=True):
    """The definition: one sequence, in which the user and the candidate do not see each other, and, where there are
    memory tokens after the candidate, the answer sees of it only these (or these too)."""
    batch = processor.late_blocks([user], [item], LIMITS)
    user, item, answer = batch["users"].to(DEVICE), batch["items"].to(DEVICE), batch["answer_ids"][None].to(DEVICE)
    memory = model.config.item_memory
    widths = [user["input_ids"].shape[1], item["input_ids"].shape[1]]
    end = torch.arange(memory + answer.shape[1], device=DEVICE)[None] + sum(LIMITS)
    starts = [positions(model, user), positions(model, item) + LIMITS[0]]
    where = torch.cat([*starts, end.expand(*starts[0].shape[:-2], 1, -1)], -1)
    seen = torch.ones(where.shape[-1], where.shape[-1], dtype=torch.bool, device=DEVICE).tril()
    begin, cut = widths[0], sum(widths)
    seen[begin : cut + memory, :begin] = False
    if memory and memory_only:
        seen[cut + memory :, begin:cut] = False
    answer = torch.cat([answer[:, :1].expand(-1, memory), answer], 1)  # the first ones are replaced
    more = {}
    if "token_type_ids" in item:  # the tokens of an image see each other
        more["token_type_ids"] = torch.cat([user["token_type_ids"], item["token_type_ids"], 0 * answer], 1)
        shown = item["token_type_ids"][0] == 1
        seen[begin:cut, begin:cut] |= shown[:, None] & shown
    textual = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    more |= {name: value for name, value in item.items() if name not in textual}
    ids = torch.cat([user["input_ids"], item["input_ids"], answer], 1)

    def with_memory(decoder, args, arguments):
        """Each begins as the mean of a stretch of the candidate's text or of its image, and what it has learned."""
        embedded = arguments["inputs_embeds"].clone()
        own, shown = embedded[:, begin:cut], item["input_ids"][0] == model.config.vlm_config.image_token_id
        n_text = min(max(round(memory * float((~shown).float().mean())), 1), memory - 1)
        parts = [(own[:, ~shown], n_text), (own[:, shown], memory - n_text)] if memory > 1 and shown.any() else []
        means = [adaptive_avg_pool1d(part.mT, count).mT for part, count in parts or [(own, memory)]]
        embedded[:, cut : cut + memory] = torch.cat(means, 1) + model.item_memory.weight
        return args, {**arguments, "inputs_embeds": embedded}

    hook = model.get_decoder().register_forward_pre_hook(with_memory, with_kwargs=True) if memory else None
    output = model.backbone(
        input_ids=ids, position_ids=where, attention_mask=seen[None, None], logits_to_keep=1, **more
    )
    if hook is not None:
        hook.remove()
    return model.answer_logits(output.logits[:, -1])


@pytest.fixture(params=[10**6, 0], ids=["in place", "to copies"])
def either_way(request, monkeypatch):
    monkeypatch.setattr(packing, "SHORT", request.param)
    monkeypatch.setattr(packing, "LITTLE", 0)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_packed_prompts_have_the_logits_and_gradients_of_whole_ones(backbone, family, either_way):
    model, processor = recommender_of(backbone(family))
    batch, group_ids = prompts(processor), torch.tensor([7, 7, 3, 3, 7, 5])
    labels = torch.tensor([1, 0, 0, 1, 0, 1], dtype=torch.float32, device=DEVICE)
    results = []
    for arguments in ({**batch, "logits_to_keep": 1}, pack_joint(model, batch, group_ids)):
        model.zero_grad()
        logits = model.answer_logits(model(**arguments).logits.reshape(len(PAIRS), -1))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
        loss.backward()
        gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        results.append((logits.detach().cpu(), gradients))
    (plain, expected), (packed, gradients) = results
    assert plain.std() > 1e-3
    assert packed == pytest.approx(plain, abs=1e-5)
    assert gradients.keys() == expected.keys() and len(gradients) > 10
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected[name], atol=1e-5, rtol=1e-4), name


@pytest.mark.parametrize("interaction", ["joint", "late"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_last_layer_computes_answers_only(backbone, family, interaction):
    model, processor = recommender_of(backbone(family), interaction)
    if interaction == "joint":
        packed = pack_joint(model, prompts(processor), torch.tensor([7, 7, 3, 3, 7, 5]))
    else:
        packed = late_batch(model, processor)
    computed = []
    layers = model.get_decoder().layers
    hooks = [layer.mlp.register_forward_hook(lambda _, args, __: computed.append(args[0].shape[1])) for layer in layers]
    with torch.enable_grad():  # where something is trained, all is computed
        whole = model.answer_logits(model(**packed).logits.flatten(0, 1)).detach()
    answers = model.score(**packed).logits
    for hook in hooks:
        hook.remove()
    tokens = packed["input_ids"].numel()
    assert computed == [tokens] * (len(computed) - 1) + [len(PAIRS)]
    assert whole.std() > 1e-3 and answers.cpu() == pytest.approx(whole.cpu(), abs=1e-5)


@pytest.mark.parametrize(("memory", "only"), [(0, True), (3, True), (3, False)])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_late_pairs_are_those_of_the_definition(backbone, family, memory, only, either_way):
    model, processor = recommender_of(backbone(family), "late", memory)
    pairs = [(USERS[user], ITEMS[item]) for user, item in PAIRS]
    with torch.no_grad():
        expected = torch.cat([late_logit(model, processor, *pair, memory_only=only) for pair in pairs]).cpu()
    logits = model.score(**late_batch(model, processor, memory_only=only)).logits.cpu()
    assert expected.std() > 1e-3
    assert logits == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("memory", [0, 3])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_ranking_late_gives_the_same_in_any_order_and_memory(backbone, family, memory, tmp_path):
    model, processor = recommender_of(backbone(family), "late", memory)
    candidates = [["i4", "i0", "i2"], ["i1"], ["i3", "i2", "i0", "i4", "i1"]]
    expected = [
        model.score(
            **late_batch(model, processor, [user], [CATALOGUE[item] for item in row], [(0, k) for k in range(len(row))])
        )
        .logits.cpu()
        .numpy()
        for user, row in zip(USERS, candidates, strict=True)
    ]
    tight = {"memory_gb": 1e-6, "token_budget": 1}
    for options in ({}, tight, {"cache": tmp_path}, {"cache": tmp_path, **tight}, {"token_budget": 300}):
        scores = Recommender(model, processor, **options).score(USERS, candidates, CATALOGUE)
        for ours, theirs in zip(scores, expected, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5), options
    (model_folder,) = tmp_path.iterdir()
    shards = ShardFolder(model_folder)
    assert len(shards.places) == len(ITEMS) and not shards.map(shards.places)
    if memory:  # nothing else is kept of an item
        kept = [shards.shard(name).tensors["keys.0"] for name in shards.keys]
        assert {keys.shape[-2] for keys in kept} == {memory}


@pytest.mark.parametrize("interaction", ["joint", "late"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_autocast_over_float32_weights_changes_no_more_than_rounding(
    backbone, family, interaction, either_way, tmp_path
):
    model, processor = recommender_of(backbone(family), interaction)
    cache = {"cache": tmp_path} if interaction == "late" else {}
    candidates = [list(CATALOGUE)] * len(USERS)
    plain = Recommender(model, processor, **cache).score(USERS, candidates, CATALOGUE)
    for again in range(2):  # the second time from the cache
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            mixed = Recommender(model, processor, **cache).score(USERS, candidates, CATALOGUE)
        for ours, theirs in zip(mixed, plain, strict=True):
            assert 0 < np.abs(ours - theirs).max() < 0.3 and np.abs(ours - theirs).mean() < 0.1, (
                again
            )  # as with bf16 weights
    exact = Recommender(model, processor, **cache).score(USERS, candidates, CATALOGUE)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(exact, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_no_more_in_place_than_in_a_kernel(dtype):
    """Sharp attention of 20 suffixes to 2 users and 5 candidates; rounded scores lose six times as much."""

    def draw(count, heads, tokens):
        return torch.randn(count, heads, tokens, 64).to(DEVICE, dtype)

    sides = [[draw(2, 4, 150), draw(2, 4, 150)], [draw(5, 4, 300), draw(5, 4, 300)]]
    own = [draw(20, 8, 6) * 3, draw(20, 4, 6), draw(20, 4, 6)]
    prefix_of = [torch.arange(20, device=DEVICE) % 2, torch.arange(20, device=DEVICE) % 5]
    causal = torch.ones(6, 6, dtype=torch.bool, device=DEVICE).tril()[None, None]

    caches = [KVCache([pair], torch.ones(pair[0].shape[::2], dtype=torch.bool, device=DEVICE)) for pair in sides]
    groups = [PrefixGroup.of(*pair) for pair in zip(caches, prefix_of, strict=True)]

    def by_a_kernel(precision):
        keys, values = (
            torch.cat([*(pair[side][of] for pair, of in zip(sides, prefix_of, strict=True)), own[1 + side]], 2)
            for side in range(2)
        )
        seen = torch.cat([torch.ones(6, 450, dtype=torch.bool, device=DEVICE), causal[0, 0]], 1)
        return blocks._sdpa(*(each.to(precision) for each in (own[0], keys, values)), seen, 64**-0.5, 0.0)

    exact = by_a_kernel(torch.float64)
    in_place = blocks._attend_in_place(causal, groups, own, sides, 64**-0.5, 0.0)
    assert (in_place - exact).abs().mean() < 2 * (by_a_kernel(dtype) - exact).abs().mean()


def test_a_packed_row_is_trained_under_autocast(backbone):
    model, processor = recommender_of(backbone("llava"), "late")
    model.train()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        logits = model(**late_batch(model, processor)).logits
    model.answer_logits(logits).sum().backward()
    gradients = [weight.grad for weight in model.get_decoder().parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_gradient_checkpointing_changes_nothing(backbone):
    model, processor = recommender_of(backbone("llava"))
    batch, group_ids = prompts(processor), torch.tensor([0, 0, 1, 1, 0, 2])
    model.train()
    gradients = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        model.zero_grad()
        model.answer_logits(model(**pack_joint(model, batch, group_ids)).logits).sum().backward()
        gradients.append([weight.grad.clone() for weight in model.get_decoder().parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert torch.allclose(plain, again, atol=1e-6)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("family", "interaction"), [("llava", "late"), ("gemma3", "late"), ("qwen2_vl", "joint")])
def test_attention_in_parts_changes_nothing(backbone, family, interaction, checkpointed, either_way, monkeypatch):
    model, processor = recommender_of(backbone(family), interaction)
    model.train()
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    results = []
    for scores, count in ((packing.SCORES, 1), (1, len(PAIRS))):
        monkeypatch.setattr(packing, "SCORES", scores)
        if interaction == "late":
            packed = late_batch(model, processor)
        else:
            packed = pack_joint(model, prompts(processor), torch.tensor([7, 7, 3, 3, 7, 5]))
        assert len(packed["block_layout"].parts) == count
        model.zero_grad()
        logits = model.answer_logits(model(**packed).logits[0])
        logits.square().sum().backward()
        gradients = [weight.grad.cpu() for weight in model.get_decoder().parameters() if weight.grad is not None]
        results.append([logits.detach().cpu(), *gradients])
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)


def test_other_calls_are_as_they_were(backbone):
    model, processor = recommender_of(backbone("llava"))
    batch = prompts(processor)
    before = model.score(**batch).logits
    model.score(**pack_joint(model, batch, torch.zeros(len(PAIRS), dtype=torch.long)))
    assert torch.equal(model.score(**batch).logits, before)


def indexed(recommender, catalogue):
    report = recommender.index(catalogue)
    assert report.nbytes > 1000 * len(catalogue)
    return report.computed, report.kept, report.deleted


def test_an_index_grows_shrinks_and_survives_a_broken_file(backbone, tmp_path):
    model, processor = recommender_of(backbone("llava"), "late")
    recommender = Recommender(model, processor, cache=tmp_path)
    assert indexed(recommender, CATALOGUE) == (5, 0, 0)
    assert indexed(recommender, CATALOGUE) == (0, 5, 0)
    changed = {**CATALOGUE, "i1": replace(CATALOGUE["i1"], title="Another")}
    del changed["i4"]
    assert indexed(recommender, changed) == (1, 3, 2)
    scores = recommender.score(USERS[:1], [list(changed)], changed)
    next(tmp_path.glob("*/*.safetensors")).write_bytes(b"cut off")
    again = Recommender(model, processor, cache=tmp_path).score(USERS[:1], [list(changed)], changed)
    assert scores[0] == pytest.approx(again[0], abs=1e-5)
    with torch.no_grad():
        model.get_decoder().layers[0].mlp.up_proj.weight += 0.1
    assert indexed(Recommender(model, processor, cache=tmp_path), changed) == (4, 0, 0)


def test_what_cannot_be_late_is_refused(backbone):
    model, processor = recommender_of(backbone("llava"), "late")
    batch = prompts(processor)
    with pytest.raises(ValueError, match="scores no whole prompts"):
        model.score(**batch)
    with pytest.raises(ValueError, match="this one takes pack_late"):
        pack_joint(model, batch, torch.zeros(len(PAIRS), dtype=torch.long))
    with pytest.raises(ValueError, match="a limit=8 leaves no room"):
        processor.late_users(USERS, 8)
    model.config.item_limit = 20
    with pytest.raises(ValueError, match=r"more than config\.item_limit=20"):
        late_batch(model, processor)
    model.config.item_limit = 2000
    with pytest.raises(ValueError, match="more than the backbone's 2048 positions"):
        late_batch(model, processor)
    model.config.interaction = "joint"
    with pytest.raises(ValueError, match="interaction='late' only"):
        late_batch(model, processor)
    with pytest.raises(ValueError, match="leave `cache` out"):
        Recommender(model, processor, cache="anywhere")


@pytest.mark.parametrize("memory", [0, 1, 300])
def test_an_item_of_which_nothing_is_shown_has_the_scores_of_the_definition(backbone, memory, tmp_path):
    """And memory tokens may be more than the candidate's own."""
    model, _ = recommender_of(backbone("qwen2_vl"), "late", memory)
    template = "{{ title }}{% if image %}{{ image }}{% endif %}"
    processor = MllmMsrProcessor.from_backbone(backbone("qwen2_vl"), prompts={"late_item": template})
    items = {"": ITEMS[0], "blank": Candidate("blank"), "image": Candidate("image", image=ITEMS[1].image)}
    with torch.no_grad():
        expected = [late_logit(model, processor, USERS[0], item).item() for item in items.values()]
    for options in ({}, {"token_budget": 1}, {"cache": tmp_path}):
        (scores,) = Recommender(model, processor, **options).score(USERS[:1], [list(items)], items)
        assert scores == pytest.approx(expected, abs=1e-5), options
    with pytest.raises(ValueError, match="item '' is among the candidates, but not in"):
        Recommender(model, processor).score(USERS[:1], [[""]], {})


def test_what_is_kept_is_of_one_way_to_write_items(backbone, tmp_path):
    model, processor = recommender_of(backbone("llava"), "late")
    folders = {Recommender(model, processor, cache=tmp_path).cache.folder for _ in range(2)}
    processor.tokenizer.add_tokens(["ship"])
    folders.add(Recommender(model, processor, cache=tmp_path).cache.folder)
    assert len(folders) == 2


def test_numbers_that_cannot_be_are_refused(backbone):
    model, processor = recommender_of(backbone("llava"), "late")
    for given in (-1, 1.5, "4", True):
        for set_there in (model.set_item_memory, lambda count: MllmMsrConfig(interaction="late", item_memory=count)):
            with pytest.raises(ValueError, match=f"item_memory={given!r}: must be a whole number of at least 0"):
                set_there(given)
    with pytest.raises(ValueError, match="item_memory=4 needs interaction='late'"):
        MllmMsrConfig(item_memory=4)
    with pytest.raises(ValueError, match="item_limit=0: must be a whole number of at least 1"):
        MllmMsrConfig(item_limit=0)
    for name, value in (("memory_gb", -1), ("memory_gb", math.nan), ("memory_gb", math.inf), ("token_budget", 0)):
        with pytest.raises(ValueError, match=f"{name}={value}: must be a "):
            Recommender(model, processor, **{name: value})
    model.config.interaction = "joint"
    with pytest.raises(ValueError, match="item_memory=4 needs interaction='late'"):
        model.set_item_memory(4)


def test_a_control_token_in_a_title_is_text_in_a_block(backbone):
    _, processor = recommender_of(backbone("llava"))
    image = processor.tokenizer.image_token
    batch = processor.late_items([Candidate(title=f"A {image} here")])
    assert processor.tokenizer.convert_tokens_to_ids(image) not in batch["input_ids"]


def test_packed_rows_need_block_attention(backbone):
    processor = MllmMsrProcessor.from_backbone(backbone("llava"))
    model = MllmMsrForRecommendation.from_backbone(backbone("llava"), processor=processor)
    with pytest.raises(ValueError, match="use_block_attention"):
        pack_joint(model, prompts(processor), torch.zeros(len(PAIRS), dtype=torch.long))
    attention = model.config.vlm_config.vision_config._attn_implementation
    model.use_block_attention()
    assert model.get_decoder().config._attn_implementation == blocks.BLOCK_ATTENTION
    assert model.config.vlm_config.vision_config._attn_implementation == attention == "sdpa"
