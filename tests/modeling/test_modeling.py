"""The model on every family, against the backbone itself and hand-computed values."""

from dataclasses import replace

import pytest
import torch
from devices import DEVICE
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES, draw_image
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText, BatchFeature, Florence2Config

from mllm_msr import Candidate, HistoryItem, MllmMsrConfig, MllmMsrForRecommendation, MllmMsrProcessor, User
from mllm_msr.modeling import image_features
from mllm_msr.modeling.image_features import ImageFeatureCache
from mllm_msr.modeling.inputs import content_key
from mllm_msr.modeling.lora import language_model_lora_targets

FAMILY = pytest.mark.parametrize("name", FAMILIES)
USERS = [User("likes quiet red films"), User(), User("ships")]
CANDIDATES = [
    Candidate(title="One", text="about ships", image=draw_image(1)),
    Candidate(title="Two"),
    Candidate(title="A third, longer title", image=draw_image(2, 70, 30)),
]


def pairs(processor: MllmMsrProcessor, labels: list[int] | None = None) -> BatchFeature:
    return processor(USERS, CANDIDATES, labels=labels).to(DEVICE)


@FAMILY
def test_a_backbone_loads_whole_and_scores_as_itself(build, backbone, name: str) -> None:
    model, processor = build(name)
    _, loading = MllmMsrForRecommendation.from_pretrained(backbone(name), config=model.config, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    stock = AutoModelForImageTextToText.from_pretrained(backbone(name))
    batch = pairs(processor)
    with torch.no_grad():
        last = stock(**batch).logits[:, -1].float()
    answers = processor.answer_token_ids
    expected = last[:, answers["yes"]].logsumexp(-1) - last[:, answers["no"]].logsumexp(-1)
    output = model.score(**batch)
    torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.probabilities, output.logits.sigmoid())
    assert output.logits.dtype == torch.float32 and output.logits.std() > 0.01


@FAMILY
def test_a_pair_scores_the_same_alone_and_in_any_batch(build, name: str) -> None:
    model, processor = build(name)
    together = model.score(**pairs(processor)).logits
    alone = [model.score(**processor([user], [item])).logits for user, item in zip(USERS, CANDIDATES, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)
    turned = model.score(**processor(USERS[::-1], CANDIDATES[::-1])).logits
    torch.testing.assert_close(together, turned.flip(0), atol=1e-5, rtol=0)


@FAMILY
def test_the_loss_is_the_cross_entropy_of_the_answers(build, name: str) -> None:
    model, processor = build(name)
    labels = [1, 0, 1]
    with torch.no_grad():
        loss = model(**pairs(processor, labels)).loss
        logits = model(**pairs(processor)).logits[:, -1]
    answers = processor.answer_token_ids
    targets = torch.tensor([answers["yes" if label else "no"][0] for label in labels], device=DEVICE)
    torch.testing.assert_close(loss, cross_entropy(logits, targets), atol=1e-5, rtol=0)


@FAMILY
def test_image_features_computed_once_give_the_same_scores(build, name: str) -> None:
    model, processor = build(name)
    cache = ImageFeatureCache(model.backbone, processor)
    candidates = [
        replace(item, image=cache.stand_in(item.title, item.image)) if item.image else item for item in CANDIDATES
    ]
    batch = processor(USERS, candidates)
    assert "pixel_values" not in batch and len(batch.images) == len(cache) == 2
    features = cache.features(batch.images)
    assert [len(image) for image in features] == [image.num_image_tokens for image in batch.images]
    cached = model.score(**batch, image_features=features).logits
    torch.testing.assert_close(cached, model.score(**pairs(processor)).logits, atol=1e-6, rtol=0)


def test_the_oldest_images_are_dropped_and_equal_ones_are_one(build, monkeypatch) -> None:
    model, processor = build("llava")
    encoded: list[int] = []

    def counted(backbone, images, real=image_features.encode_images):
        encoded.append(len(images))
        return real(backbone, images)

    monkeypatch.setattr(image_features, "encode_images", counted)
    cache = ImageFeatureCache(model.backbone, processor)

    def features(*seeds: int) -> list[torch.Tensor]:
        return cache.features([cache.stand_in(content_key(draw_image(seed)), draw_image(seed)) for seed in seeds])

    first = features(1, 2, 1, 3)
    assert len(cache) == 3 and torch.equal(first[0], first[2])
    again = features(2, 1)
    assert torch.equal(again[1], first[0]) and encoded == [3, 0]
    size = cache.nbytes // 3
    cache.evict(max_bytes=2 * size)
    assert len(cache) == 2 and cache.nbytes == 2 * size
    features(2, 3)
    assert encoded[2:] == [1], "the third was the oldest"
    cache.evict(max_images=0)
    assert len(cache) == cache.nbytes == 0


@FAMILY
def test_generates_as_the_backbone_does(build, name: str) -> None:
    model, processor = build(name)
    batch = processor.item_summary(CANDIDATES).to(DEVICE)
    added = sorted(processor.tokenizer.added_tokens_decoder)  # or a random model may write image tokens
    settings = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": added}
    cached, plain = (model.generate(**batch, **settings, use_cache=use) for use in (True, False))
    assert cached.shape[1] > batch["input_ids"].shape[1]
    assert torch.equal(cached, plain)
    text = processor.preference([[HistoryItem("One", "red")]], ["before"]).to(DEVICE)
    assert model.generate(**text, **settings).shape[1] > text["input_ids"].shape[1]


@FAMILY
def test_attention_implementations_agree(build, name: str) -> None:
    scores = []
    for implementation in ("eager", "sdpa"):
        model, processor = build(name, attn_implementation=implementation)
        assert model.config.vlm_config.get_text_config()._attn_implementation == implementation
        scores.append(model.score(**pairs(processor)).logits)
    torch.testing.assert_close(scores[0], scores[1], atol=1e-5, rtol=0)


@FAMILY
def test_half_precision_scores_in_float32(build, name: str) -> None:
    model, processor = build(name)
    half, _ = build(name, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    scores, exact = half.score(**pairs(processor)).logits, model.score(**pairs(processor)).logits
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, exact, atol=0.3, rtol=0.1)


@FAMILY
def test_adapters_train_the_language_model_and_nothing_else(build, name: str) -> None:
    model, processor = build(name)
    decoder = {id(module) for module in model.get_decoder().modules()}
    config = LoraConfig(r=2, target_modules=language_model_lora_targets(model), init_lora_weights=False)
    adapted = get_peft_model(model, config)
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert len(layers) == 2 * 7 and all(id(layer.get_base_layer()) in decoder for layer in layers)

    def gradients() -> dict[str, torch.Tensor]:
        adapted.zero_grad()
        adapted(**pairs(processor, [1, 0, 1])).loss.backward()
        return {key: value.grad.clone() for key, value in adapted.named_parameters() if value.requires_grad}

    adapted.train()
    plain = gradients()
    assert len(plain) == 2 * len(layers) and all(value.abs().sum() > 0 for value in plain.values())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing
    model.enable_input_require_grads()
    for key, value in gradients().items():
        torch.testing.assert_close(value, plain[key], atol=1e-6, rtol=1e-4)


def test_what_cannot_work_is_refused_with_the_reason(build, backbone) -> None:
    with pytest.raises(ValueError, match="no default backbone"):
        MllmMsrForRecommendation(MllmMsrConfig())
    with pytest.raises(ValueError, match="'llama' is not an image-text-to-text model"):
        MllmMsrForRecommendation.from_backbone(backbone("language_model"))
    with pytest.raises(ValueError, match="'florence2' is an encoder-decoder"):
        MllmMsrForRecommendation(MllmMsrConfig(vlm_config=Florence2Config()))
    with pytest.raises(ValueError, match="distinct tokens"):
        MllmMsrConfig(answer_token_ids={"yes": [1, 2], "no": [2]})
    with pytest.raises(ValueError, match="interaction='both'"):
        MllmMsrConfig(interaction="both")
    model, processor = build("llava")
    with pytest.raises(ValueError, match="without labels"):
        model.score(**pairs(processor, [1, 0, 1]))
    silent = MllmMsrForRecommendation.from_backbone(backbone("llava"))
    with pytest.raises(ValueError, match="answer_token_ids is not set"):
        silent.score(**pairs(processor))
