"""Items to be kept, and a process that keeps some."""

import time
from pathlib import Path

import torch

from mllm_msr.modeling import item_shards
from mllm_msr.modeling.block_layout import KVCache
from mllm_msr.modeling.eight_bits import to_eight_bits
from mllm_msr.modeling.item_shards import ShardFolder, ShardWriter
from mllm_msr.modeling.item_store import tensors_of


def item(key: str, dtype: torch.dtype = torch.float32) -> KVCache:
    """Two layers of an item whose length and values follow from its key."""
    generator = torch.Generator().manual_seed(int(key))
    length = 3 + int(key) % 9
    layers = [tuple(torch.randn(1, 2, length, 4, generator=generator).to(dtype) for _ in range(2)) for _ in range(2)]
    return KVCache([(keys, values) for keys, values in layers], torch.ones(1, length, dtype=torch.bool))


def fill(folder: Path, keys: list[str], pause: float) -> None:
    """Write shards of some items in eight bits, slowly."""
    item_shards.SHARD_ITEMS = 4
    writer = ShardWriter(ShardFolder(folder))
    for key in keys:
        writer.put([key], to_eight_bits(tensors_of(item(key))))
        time.sleep(pause)
    writer.flush()
