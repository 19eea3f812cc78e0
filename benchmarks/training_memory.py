"""What a step of `late` training takes of a card's memory, computed from what a small model keeps for its gradients:

    python benchmarks/training_memory.py [--tasks 64] [--items 128] [--across 24]

LoRA, bfloat16, gradient checkpointing. Counted is, by hooks on saved tensors, what one layer of a narrow model of the
same proportions keeps; it is scaled by width and tokens to a language model of 7 billion parameters (width 4,096, 32
layers). Nothing was run on a card.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from random_llava import drawn, random_llava

from mllm_msr.modeling import packing
from mllm_msr.modeling.configuration_mllm_msr import MllmMsrConfig
from mllm_msr.modeling.inputs import Candidate, User
from mllm_msr.modeling.lora import language_model_lora_targets
from mllm_msr.modeling.modeling_mllm_msr import MllmMsrForRecommendation
from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor

WIDTH, INNER, LAYERS, HEADS, VOCABULARY, WEIGHTS = 4096, 14336, 32, 32, 32064, 7.6e9  # of the large model
NARROW, TASKS, ITEMS = 256, 4, 8  # of what is counted
PART = 5  # tensors of the size of a part's scores while its gradients are computed


def saved(layers: int, across: int) -> tuple[int, tuple[int, int, int]]:
    """Bytes that a narrow model of so many layers keeps for its gradients; tokens of a user, an item and an answer."""
    with tempfile.TemporaryDirectory() as folder:
        config = random_llava(Path(folder), (NARROW, NARROW * INNER // WIDTH, layers, 8), (64, 1, 2, 8 * across, 8))
        processor = MllmMsrProcessor.from_backbone(folder)
        whole = MllmMsrConfig(vlm_config=config, answer_token_ids=processor.answer_token_ids, interaction="late")
        model: Any = drawn(MllmMsrForRecommendation, whole, torch.bfloat16, "cpu")
    model.use_block_attention()
    peft = get_peft_model(model, LoraConfig(r=8, target_modules=language_model_lora_targets(model))).train()
    pixels = np.random.default_rng(0).integers(0, 255, (8 * across, 8 * across, 3), dtype=np.uint8)
    users = [User(f"quiet red films {number} " * 14) for number in range(TASKS)]
    items = [Candidate(f"{number}", "The Sea", image=Image.fromarray(pixels)) for number in range(ITEMS)]
    blocks = processor.late_blocks(users, items, (512, 1024))
    pairs = torch.cartesian_prod(torch.arange(TASKS), torch.arange(ITEMS)).T
    packing.SCORES = 1  # the attention of each pair is computed again: what is left grows with tokens, not with pairs
    weights = {weight.untyped_storage().data_ptr() for weight in peft.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    packed = packing.pack_late(model, **blocks, pairs=pairs)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = peft(**packed).logits
    lengths = [int(blocks[side]["attention_mask"].sum(1).max()) for side in ("users", "items")]
    assert logits.shape[:2] == (1, TASKS * ITEMS)  # the head is computed for the answers only
    return sum(kept.values()), (*lengths, len(blocks["answer_ids"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=64)
    parser.add_argument("--items", type=int, default=128)
    parser.add_argument("--across", type=int, default=24, help="patches along an edge of the image")
    options = parser.parse_args()
    together = packing.SCORES  # bytes of scores, before it is changed for counting
    (one, _), (two, lengths) = (saved(layers, options.across) for layers in (1, 2))
    user, item, answer = lengths

    def tokens(tasks: int, items: int) -> int:
        return tasks * user + items * item + tasks * items * answer

    pairs, count = options.tasks * options.items, tokens(options.tasks, options.items)
    scores = 4 * pairs * HEADS * answer * (user + item + answer)
    rows = {
        "weights": 2 * WEIGHTS,
        "input of each layer": 2 * count * WIDTH * LAYERS,
        "one layer, computed again": (two - one) * count / tokens(TASKS, ITEMS) * WIDTH / NARROW,
        "attention of a part, computed again": PART * min(scores, together),
        "logits of the answers": (2 + 3 * 4) * pairs * VOCABULARY,
    }
    print(f"{options.tasks} x {options.items}: {count:,} tokens ({user} a user, {item} an item, {answer} an answer)")
    print(f"(all scores of a layer at once would be {scores / 1e9:.1f} GB, and several tensors of that size)")
    for name, size in rows.items():
        print(f"  {name:<40} {size / 1e9:6.1f} GB")
    total = sum(rows.values())
    print(f"  {'together':<40} {total / 1e9:6.1f} GB")
    print(f"  {'with --activation_offloading':<40} {(total - rows['input of each layer']) / 1e9:6.1f} GB")


if __name__ == "__main__":
    main()
