"""Stock backbones of any size with random weights, for benchmarks: time does not depend on what weights say."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2VLImageProcessorPil,
)

from mllm_msr.records.recipe import backbone_path

QWEN_IMAGE = "<|vision_start|><image><|vision_end|>"  # of the demo's tokenizer the image token


def random_llava(
    folder: Path, language: tuple[int, int, int, int], tower: tuple[int, int, int, int, int]
) -> PreTrainedConfig:
    """Save the configuration of a stock Llava, and its processor with the demo's tokenizer; return the former.

    Args:
        language: width, feed-forward, layers, heads. tower: width, layers, heads, edge of an image, edge of a patch.
    """
    (width, inner, layers, heads), (seen, depth, eyes, edge, patch) = language, tower
    tokenizer = AutoTokenizer.from_pretrained(backbone_path("demo"))
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=seen, intermediate_size=4 * seen, num_hidden_layers=depth, num_attention_heads=eyes,
            image_size=edge, patch_size=patch,
        ),
        text_config=LlamaConfig(
            hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=heads, vocab_size=len(tokenizer), max_position_embeddings=4096,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(["<image>"])[0],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge}
        ),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)  # fmt: skip
    config.save_pretrained(folder)
    return config


def random_qwen(
    folder: Path, language: tuple[int, int, int, int, int], tower: tuple[int, int, int, int]
) -> PreTrainedConfig:
    """As :func:`random_llava`, a Qwen2.5-VL, in which several heads share keys and values.

    Args:
        language: width, feed-forward, layers, heads, heads of keys. tower: width, feed-forward, layers, heads.
    """
    (width, inner, layers, heads, shared), (seen, eye_inner, depth, eyes) = language, tower
    tokenizer = AutoTokenizer.from_pretrained(backbone_path("demo"))
    names = ["<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
    tokenizer.add_tokens(names, special_tokens=True)
    start, end, video, image = tokenizer.convert_tokens_to_ids([*names, "<image>"])
    side = 3 * (width // heads // 2) // 8
    sections = [width // heads // 2 - 2 * side, side, side]
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": shared, "vocab_size": len(tokenizer),
            "max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
        },
        vision_config={
            "depth": depth, "hidden_size": seen, "out_hidden_size": width, "intermediate_size": eye_inner,
            "num_heads": eyes, "fullatt_block_indexes": [depth - 1],
        },
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    tokenizer.chat_template = tokenizer.chat_template.replace("<image>", QWEN_IMAGE)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil().save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2_5_VLProcessor"}))
    config.save_pretrained(folder)
    return config


def drawn(make: Any, config: Any, dtype: torch.dtype, device: str) -> Any:
    """A model ``make(config)`` with random weights, made where it is to be and in its type: there is one copy of it."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = make(config)
    finally:
        torch.set_default_dtype(torch.float32)
    for weights in model.parameters():
        if weights.ndim > 1:  # further apart than by default, so that no two tokens tie
            torch.nn.init.normal_(weights, std=1.5 / weights.shape[-1] ** 0.5)
    return model


def save_random_llava(
    folder: Path, language: tuple[int, int, int, int], tower: tuple[int, int, int, int, int], dtype: torch.dtype
) -> int:
    """Save a whole random Llava (see :func:`random_llava`); return its number of parameters."""
    config = random_llava(folder, language, tower)
    model = drawn(LlavaForConditionalGeneration, config, dtype, "cuda" if torch.cuda.is_available() else "cpu")
    model.generation_config.pad_token_id = AutoTokenizer.from_pretrained(folder).pad_token_id
    model.save_pretrained(folder)
    return sum(weights.numel() for weights in model.parameters())
