"""The model on every family, against the backbone itself and hand-computed values."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES, picture
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText, BatchFeature, Florence2Config

from mllm_msr import MllmMsrConfig, MllmMsrForRecommendation, MllmMsrProcessor
from mllm_msr.modeling.lora import language_model_lora_targets
from mllm_msr.processing.backbone_images import collate_pictures

FAMILY = pytest.mark.parametrize("name", FAMILIES)
PREFERENCES = ["likes quiet red films", "", "ships"]
CANDIDATES = [
    {"title": "One", "text": "about ships", "image": picture(1)},
    {"title": "Two", "text": "", "image": None},
    {"title": "A third, longer title", "text": "", "image": picture(2, 70, 30)},
]


def pairs(processor: MllmMsrProcessor, labels: list[int] | None = None) -> BatchFeature:
    return processor(PREFERENCES, CANDIDATES, labels=labels)


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
    alone = [model.score(**processor([p], [c])).logits for p, c in zip(PREFERENCES, CANDIDATES, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)
    turned = model.score(**processor(PREFERENCES[::-1], CANDIDATES[::-1])).logits
    torch.testing.assert_close(together, turned.flip(0), atol=1e-5, rtol=0)


@FAMILY
def test_the_loss_is_the_cross_entropy_of_the_answers(build, name: str) -> None:
    model, processor = build(name)
    labels = [1, 0, 1]
    with torch.no_grad():
        loss = model(**pairs(processor, labels)).loss
        logits = model(**pairs(processor)).logits[:, -1]
    answers = processor.answer_token_ids
    targets = torch.tensor([answers["yes" if label else "no"][0] for label in labels])
    torch.testing.assert_close(loss, cross_entropy(logits, targets), atol=1e-5, rtol=0)


@FAMILY
def test_picture_features_computed_once_give_the_same_scores(build, name: str) -> None:
    model, processor = build(name)
    pictures = processor.pictures([one["image"] for one in CANDIDATES if one["image"]])
    counts = [picture.num_image_tokens for picture in pictures]
    features = model.image_features(counts, **collate_pictures(pictures))
    assert [len(one) for one in features] == counts
    light = iter([picture.light() for picture in pictures])
    batch = processor(PREFERENCES, [{**one, "image": next(light) if one["image"] else None} for one in CANDIDATES])
    assert "pixel_values" not in batch
    cached = model.score(**batch, image_features=features).logits
    torch.testing.assert_close(cached, model.score(**pairs(processor)).logits, atol=1e-6, rtol=0)


@FAMILY
def test_generates_as_the_backbone_does(build, name: str) -> None:
    model, processor = build(name)
    batch = processor.item_summary(CANDIDATES)
    added = sorted(processor.tokenizer.added_tokens_decoder)  # or a random model may write image tokens
    settings = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": added}
    cached, plain = (model.generate(**batch, **settings, use_cache=use) for use in (True, False))
    assert cached.shape[1] > batch["input_ids"].shape[1]
    assert torch.equal(cached, plain)
    text = processor.preference([[{"title": "One", "summary": "red"}]], ["before"])
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
