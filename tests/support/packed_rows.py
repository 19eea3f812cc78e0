"""Recommenders whose prompts are computed as packed rows."""

from pathlib import Path

import torch

from mllm_msr import MllmMsrForRecommendation, MllmMsrProcessor


def packed_recommender(
    path: Path, interaction: str, limits: tuple[int, int], memory: int = 0
) -> tuple[MllmMsrForRecommendation, MllmMsrProcessor]:
    """A recommender of such a repository that computes packed rows; ``limits`` are those of users and items."""
    processor = MllmMsrProcessor.from_backbone(path)
    model = MllmMsrForRecommendation.from_backbone(path, dtype=torch.float32, processor=processor).eval()
    model.config.interaction, (model.config.user_limit, model.config.item_limit) = interaction, limits
    model.set_item_memory(memory)
    if memory:
        torch.nn.init.normal_(model.item_memory.weight, std=0.1)
    text = model.get_decoder().config
    if getattr(text, "sliding_window", None):
        text.sliding_window = 4096  # beyond these prompts
    model.use_block_attention()
    return model, processor
