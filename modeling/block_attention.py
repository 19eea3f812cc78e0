"""Attention in packed rows: what several prompts share is computed once, and nothing is padded.

A packed row holds *prefixes*, whose tokens see what precedes them in their own prefix, and *suffixes*, each of which
sees what precedes in itself and one prefix of every group. With ``interaction="joint"`` there is one group: a prefix is
what a user's prompts begin with, and a suffix is the rest of one prompt. With ``late`` users are one group, candidates
another, and a suffix is the few tokens that ask for the answer. All layers but attention work on single tokens, so only
attention has to know; `block_layout.py` tells it.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .block_layout import BlockLayout, PrefixGroup, SuffixPart

BLOCK_ATTENTION = "mllm_msr_blocks"  # its name in transformers; it is sdpa for rows without a layout


def block_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    block_layout: BlockLayout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers' `AttentionInterface`: of a packed row (1, heads, T, d), or sdpa without a layout."""
    if block_layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if kwargs.get("softcap") is not None:
        raise ValueError("block attention does not know capped logits")
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, heads, d)
    if block_layout.kept is not None:
        config: Any = module.config
        block_layout.keep(k, v, config.num_hidden_layers)
    if block_layout.whole is not None:
        k, v = block_layout.of_whole_row(k, v)
    dropout = dropout if module.training else 0.0
    if block_layout.whole is not None:
        return torch.cat(list(_attend_suffixes(module, block_layout, q, k, v, scaling, dropout)))[None], None
    outputs = [
        _sdpa(segments.gather(q), segments.gather(k), segments.gather(v), segments.mask, scaling, dropout)
        for segments in block_layout.prefixes
    ]
    outputs = [output.transpose(1, 2).flatten(0, 1) for output in outputs]
    if block_layout.suffixes is not None:
        outputs += _attend_suffixes(module, block_layout, q, k, v, scaling, dropout)
    return torch.cat(outputs)[block_layout.order][None], None


def _attend_suffixes(
    module: nn.Module,
    layout: BlockLayout,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float | None,
    dropout: float,
) -> Iterator[torch.Tensor]:
    """(P x L, heads, d) of each part, or (P, heads, d) if ``q`` is that of answers alone; ``k``, ``v``: of the row."""
    suffixes: Any = layout.suffixes
    layer: Any = module.layer_idx
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    answers_only = layout.whole is not None
    queries = q[:, :, None] if answers_only else suffixes.gather(q)
    masks = suffixes.inside[:, None, None] if answers_only else suffixes.mask

    def to_copies(part: SuffixPart) -> torch.Tensor:
        copies: Any = part.copies
        return _sdpa(queries[part.places], copies.gather(k), copies.gather(v), copies.mask, scale, dropout)

    def in_place(part: SuffixPart) -> torch.Tensor:
        own = [tensor[part.places] for tensor in (queries, keys, values)]
        mask = masks if len(masks) == 1 else masks[part.places]
        return _attend_in_place(mask, part.groups, own, seen, scale, dropout)

    attend: Any = to_copies
    if answers_only or layout.parts[0].copies is None:
        attend, keys, values = in_place, suffixes.gather(k), suffixes.gather(v)
        seen = [(visible.gather(k), visible.gather(v)) for visible in layout.visible]
        # not by type: this file may be loaded twice, from the package and from a repository, and the last is registered
        cached: list[Any] = [group.prefixes for group in layout.parts[0].groups if hasattr(group.prefixes, "layers")]
        seen += [prefixes.layers[layer] for prefixes in cached]
    if len(layout.parts) > 1 and torch.is_grad_enabled():  # the scores of one part at a time are kept for its gradients
        attend = partial(checkpoint, attend, use_reentrant=False)
    for part in layout.parts:
        yield attend(part).transpose(1, 2).flatten(0, 1)


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    dropout: float,
) -> torch.Tensor:
    """Attention to what precedes, or as a mask says. On a CPU grouped heads are best left to torch whatever the shape;
    the fast kernels of GPUs know them only where there is no mask."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and mask is not None and query.device.type == "cuda":
        key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _attend_in_place(
    own_mask: Any,
    groups: list[PrefixGroup],
    own: list[torch.Tensor],
    seen: list[tuple[torch.Tensor, torch.Tensor]],
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """(P, heads, L, d): all suffixes of a prefix in one product with its keys and values, which are not copied."""
    query, key, value = (tensor.contiguous() for tensor in own)
    shape = query.shape
    query = query.reshape(len(query), key.shape[1], -1, shape[-1])  # (P, key heads, heads for each x L, d)
    own_scores = _products(query, key).unflatten(2, (-1, shape[2]))
    scores = [_hide(own_scores, own_mask[:, :, None]).flatten(2, 3)]
    for group, (keys, _) in zip(groups, seen, strict=True):
        inside = group.pick(group.prefixes.inside)[:, None, None]
        scores.append(group.by_suffix(_hide(_products(group.by_prefix(query), group.pick(keys)), inside)))
    weights = torch.cat(scores, -1).mul_(scale).softmax(-1).to(value.dtype)
    weights = drop(weights, dropout) if dropout else weights
    own_weights, *parts = weights.split([part.shape[-1] for part in scores], -1)
    output = (own_weights @ value).float()
    for group, (_, values), part in zip(groups, seen, parts, strict=True):
        output = output + group.by_suffix(group.by_prefix(part) @ group.pick(values))
    return output.to(value.dtype).reshape(shape)


def _products(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """(..., M, d) and (..., L, d) to (..., M, L) scores in float32: rounded to half precision they would lose more than
    all the rest of attention does, which kernels spare themselves, too.

    A GPU's product in half precision adds up in float32 anyway; but torch can hand that out only where nothing is
    trained, so while training its scores are rounded.
    """
    kind = queries.device.type
    if kind == "cuda" and torch.is_autocast_enabled(kind):
        queries, keys = (tensor.to(torch.get_autocast_dtype(kind)) for tensor in (queries, keys))
    keys = keys.transpose(-1, -2)
    with torch.autocast(kind, enabled=False):
        if kind != "cuda" or keys.dtype == torch.float32:
            return queries.float() @ keys.float()
        if torch.is_grad_enabled():
            return (queries.to(keys.dtype) @ keys).float()
        shape = torch.broadcast_shapes(queries.shape[:-2], keys.shape[:-2])
        left, right = (tensor.expand(*shape, -1, -1).flatten(0, -3) for tensor in (queries.to(keys.dtype), keys))
        return torch.bmm(left, right, out_dtype=torch.float32).unflatten(0, shape)


def _hide(scores: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Scores, in place, without those of what is not seen."""
    return scores.add_(torch.zeros_like(seen, dtype=scores.dtype).masked_fill_(~seen, -torch.inf))


AttentionInterface.register(BLOCK_ATTENTION, block_attention)
AttentionMaskInterface.register(BLOCK_ATTENTION, sdpa_mask)
