"""What ranks thirty films by item vectors, with random weights."""

from dataclasses import replace

import torch

from mllm_msr.modeling.content_likeness import ContentLikeness
from mllm_msr.modeling.item_ranking import ItemRanker
from mllm_msr.modeling.score_fusion import ScoreFusion
from mllm_msr.modeling.sequence_head import SequenceHead
from mllm_msr.modeling.sequence_head_options import SequenceHeadConfig

N_ITEMS, SIZE = 30, 6
IDS = [f"film-{code}" for code in range(N_ITEMS)]


def content(n_items: int = N_ITEMS, seed: int = 1) -> torch.Tensor:
    return torch.randn(n_items, SIZE, generator=torch.Generator().manual_seed(seed))


def fusion(*members: str) -> ScoreFusion:
    torch.manual_seed(2)
    size = len(members)
    return ScoreFusion(members, torch.randn(size), torch.rand(size) + 0.5, torch.randn(4, size), torch.randn(4))


def make(*names: str, **settings) -> ItemRanker:
    """A ranker of some members with random weights; item 0 was never chosen."""
    torch.manual_seed(0)
    members = {}
    for name in names or ("sequence_head", "identity_only", "content_only", "likeness"):
        if name == "likeness":
            members[name] = ContentLikeness.of(content(), reach=2)
            continue
        size = 0 if name == "identity_only" else SIZE
        config = SequenceHeadConfig(n_items=N_ITEMS, content_size=size, hidden=16, layers=1, max_length=8, **settings)
        members[name] = SequenceHead(replace(config, identity=name != "content_only"))
        members[name].set_items(torch.arange(N_ITEMS), content() if size else None)
    return ItemRanker.of(IDS, members, fusion(*members))
