"""A stock Llava of any size with random weights, for benchmarks: time does not depend on what weights say."""

from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from mllm_msr.records.recipe import backbone_path


def save_random_llava(
    folder: Path, language: tuple[int, int, int, int], tower: tuple[int, int, int, int, int], dtype: torch.dtype
) -> int:
    """Save a stock Llava with random weights and the demo's tokenizer; return its number of parameters.

    Args:
        language: width, feed-forward, layers, heads. tower: width, layers, heads, edge of an image, edge of a patch.
    """
    (width, inner, layers, heads), (seen, depth, eyes, edge, patch) = language, tower
    tokenizer = AutoTokenizer.from_pretrained(backbone_path("demo"))
    torch.manual_seed(0)
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
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlavaForConditionalGeneration(config).to(dtype)
    for weights in model.parameters():
        if weights.ndim > 1:  # further apart than by default, so that no two tokens tie
            torch.nn.init.normal_(weights, std=1.5 / weights.shape[-1] ** 0.5)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
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
    return sum(weights.numel() for weights in model.parameters())
