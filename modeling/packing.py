"""Packed rows: forward arguments in which what several prompts share stands once (see `block_attention.py`).

Batches are best given as the processor makes them, on the CPU: all tables are made there, and what the model takes is
moved to its device at the end, so that nothing waits for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .block_attention import BLOCK_ATTENTION
from .block_layout import BlockLayout, KVCache, Memory, PrefixGroup, Segments, SuffixPart
from .families import FAMILIES
from .interfaces import RecommendationModel

SHIFTING_ROPE = frozenset({"dynamic", "longrope"})  # rotations that depend on the length of the whole prompt
SHORT = 64  # suffixes of up to so many tokens see their prefixes in place, longer ones see copies
LITTLE = 2  # on a CPU copies are quicker as well where what is copied is no more than so many times the suffix
SCORES = 2**30  # bytes of attention scores that are computed together
TEXTUAL = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")  # of a batch; the rest is of images

Batch = Mapping[str, torch.Tensor]


def block_limits(vlm_config: PreTrainedConfig) -> tuple[str | None, int | None]:
    """Why a backbone cannot compute packed rows, if so, and the most tokens that may see each other, if limited.

    Sliding windows are left alone until rows are too wide for them; up to there they are plain attention.
    """
    if vlm_config.model_type not in FAMILIES:
        return f"it is not known how {vlm_config.model_type} counts positions", None
    text = vlm_config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = {each.get("rope_type") for each in (rope, *rope.values()) if isinstance(each, dict)}
    if kinds & SHIFTING_ROPE:
        return f"rotary positions of type {kinds & SHIFTING_ROPE} depend on the whole prompt", None
    if getattr(text, "attn_logit_softcapping", None):
        return f"{text.model_type} caps the logits of its attention", None
    layers = DynamicCache(config=text).layers  # what transformers itself would keep of each layer
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return f"the layers {sorted(set(text.layer_types))} of {text.model_type} are not all plain attention", None
    windows = [layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
    return None, min(windows, default=None)


class RowTooWide(ValueError):
    """A sliding window would hide from a token what it must see."""


def pack_joint(model: RecommendationModel, batch: Batch, group_ids: torch.Tensor) -> dict[str, Any]:
    """Arguments of the model's forward for B whole prompts as one row, in which a group shares what it begins with.

    Args:
        batch: from the processor, padded on the left.
        group_ids: (B,) equal numbers for prompts that may share.

    Returns:
        The arguments; the logits are then (1, B, V), of the last token of each prompt.
    """
    if model.config.interaction != "joint":
        raise ValueError("whole prompts are packed for a model with interaction='joint'; this one takes pack_late")
    images, batch, group_ids = _images(batch), _on_host(batch), group_ids.cpu()
    mask = batch["attention_mask"].bool()
    ids, group = group_ids.unique(return_inverse=True)
    rows = torch.arange(len(group), device=group.device)
    firsts = torch.full_like(ids, len(group)).scatter_reduce(0, group, rows, "amin")  # a row of each group
    lengths = shared_lengths(batch["input_ids"], mask, firsts, group, model.config.vlm_config.image_token_id)
    where = positions(model, batch)
    begin = mask.shape[1] - mask.sum(1) + lengths  # (B,) the column at which a row's own part begins
    own = torch.arange(mask.shape[1], device=mask.device) >= begin[:, None]
    first_rows: Batch = {name: batch[name][firsts] for name in ("input_ids", "token_type_ids") if name in batch}
    prefixes = _Tokens.of(first_rows, where[..., firsts, :], (mask & ~own)[firsts])
    suffixes = _Tokens.of(batch, where, own)
    return _packed(model, images, [prefixes], suffixes, [group], [])


def pack_late(
    model: RecommendationModel,
    users: Batch,
    items: Batch,
    answer_ids: torch.Tensor,
    pairs: torch.Tensor,
    memory_only: bool = True,
) -> dict[str, Any]:
    """Arguments of the model's forward for P pairs of users and candidates (`interaction="late"`).

    Where `config.item_memory` is not 0, each candidate ends with so many memory tokens, and all that the pairs see of
    it is these.

    Args:
        users, items, answer_ids: from the processor's `late_blocks`.
        pairs: (2, P) the user and the candidate of each pair.
        memory_only: False: they see all of the candidate as well, as is easier to learn at first.

    Returns:
        The arguments; the logits are then (1, P, V), of the last token of each pair.
    """
    prefixes = [_late_tokens(model, users, "user"), _late_tokens(model, items, "item", memory_only)]
    pairs = pairs.cpu()
    return _packed(model, _images(items), prefixes, _late_answers(model, answer_ids, pairs), [*pairs], [])


def compute_late_prefixes(
    model: RecommendationModel,
    batch: Batch,
    side: Literal["user", "item"],
    image_features: Sequence[torch.Tensor] = (),
) -> KVCache:
    """The keys and values of users alone or candidates alone, which is all that their answers need of them: the forward
    ends where those of the last layer are there.

    Args:
        batch, image_features: as in the model's forward; users have no images.
    """
    packed = _packed(model, _images(batch), [_late_tokens(model, batch, side)], None, [], [])
    layout = packed["block_layout"]
    layout.kept = kept = KVCache([], layout.visible[0].inside)
    layout.until_computed(partial(model, **packed, image_features=image_features))
    return kept


def pack_late_answers(
    model: RecommendationModel, users: KVCache, items: KVCache, answer_ids: torch.Tensor, pairs: torch.Tensor
) -> dict[str, Any]:
    """As :func:`pack_late`, of users and candidates that were computed before."""
    pairs = pairs.cpu()
    return _packed(model, {}, [], _late_answers(model, answer_ids, pairs), [*pairs], [users, items])


def positions(model: RecommendationModel, batch: Batch) -> torch.Tensor:
    """The position of each token of a padded batch, as the backbone counts them: (B, L), or (3, B, L) with rows and
    columns of images."""
    mask = batch["attention_mask"]
    if not FAMILIES[model.config.vlm_config.model_type].grid_positions:
        return (mask.cumsum(-1) - 1).clamp(min=0)
    count: Any = model.base_model.get_rope_index
    grid = batch.get("image_grid_thw")
    return count(batch["input_ids"], batch["mm_token_type_ids"], grid, attention_mask=mask)[0]


def shared_lengths(
    ids: torch.Tensor, mask: torch.Tensor, firsts: torch.Tensor, group: torch.Tensor, image_token_id: int
) -> torch.Tensor:
    """(B,) how many leading tokens each prompt shares with the others of its group.

    They end before the first image and before the last token, at which the answer is read.

    Args:
        ids, mask: (B, L), padded on the left.
        firsts: (G,) a row of each group. group: (B,) the group of each row.
    """
    lengths = mask.sum(1)
    columns = torch.arange(ids.shape[1], device=ids.device)
    begun = ids.gather(
        1, (columns + ids.shape[1] - lengths[:, None]).clamp(max=ids.shape[1] - 1)
    )  # padded on the right
    same = (begun == begun[firsts][group]) & (begun != image_token_id) & (columns < lengths[:, None] - 1)
    shared = same.long().cumprod(1).sum(1)
    return torch.full_like(firsts, ids.shape[1]).scatter_reduce(0, group, shared, "amin")[group]


@dataclass
class _Tokens:
    """T tokens of N rows, in reading order.

    ids: (T,). where: (T,) or (3, T) positions. types: (T,), of families that have them. counts: (N,) tokens of a row.
    memory: how many tokens at the end of each row are memory tokens, whose ids mean nothing; memory_only: whether no
    others are seen from outside.
    """

    ids: torch.Tensor
    where: torch.Tensor
    types: torch.Tensor | None
    counts: torch.Tensor
    memory: int = 0
    memory_only: bool = False

    @classmethod
    def of(cls, batch: Batch, where: torch.Tensor, chosen: torch.Tensor) -> "_Tokens":
        """Those of a batch (B, L) that are ``chosen``, (B, L)."""
        types = batch["token_type_ids"][chosen] if "token_type_ids" in batch else None
        return cls(batch["input_ids"][chosen], where[..., chosen], types, chosen.sum(1))

    def with_memory(self, begin: int, memory: int, only: bool) -> "_Tokens":
        """Each row with so many memory tokens after it, at the positions from ``begin``."""
        if not memory:
            return self
        rows = torch.arange(len(self.counts))
        counts = self.counts + memory
        total = len(self.ids) + memory * len(rows)
        places = torch.arange(len(self.ids)) + memory * rows.repeat_interleave(self.counts)
        ids, where = self.ids.new_zeros(total), self.where.new_empty(*self.where.shape[:-1], total)
        memories = (counts.cumsum(0)[:, None] - memory + torch.arange(memory)).flatten()
        ids[places], where[..., places] = self.ids, self.where
        where[..., memories] = begin + torch.arange(memory).repeat(len(rows))
        types = self.types.new_zeros(total).index_copy(0, places, self.types) if self.types is not None else None
        return _Tokens(ids, where, types, counts, memory, only)


def _late_tokens(
    model: RecommendationModel, batch: Batch, side: Literal["user", "item"], memory_only: bool = True
) -> _Tokens:
    """Users begin at position 0, candidates at the end of the longest user, their memory at that of the longest
    candidate."""
    config = model.config
    if config.interaction != "late":
        raise ValueError("users and candidates are packed apart for a model with interaction='late' only")
    limit, begin = {"user": (config.user_limit, 0), "item": (config.item_limit, config.user_limit)}[side]
    batch = _on_host(batch)
    mask = batch["attention_mask"].bool()
    if int(mask.sum(1).max()) > limit:
        raise ValueError(f"{int(mask.sum(1).max())} tokens of one {side} are more than config.{side}_limit={limit}")
    tokens = _Tokens.of(batch, positions(model, batch) + begin, mask)
    return tokens.with_memory(begin + limit, config.item_memory, memory_only) if side == "item" else tokens


def _late_answers(model: RecommendationModel, answer_ids: torch.Tensor, pairs: torch.Tensor) -> _Tokens:
    """The answers' tokens for each of (2, P) pairs, at the positions after the longest candidate and its memory."""
    answer_ids, count, config = answer_ids.cpu(), pairs.shape[1], model.config
    begin = config.user_limit + config.item_limit + config.item_memory
    context = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context is not None and begin + len(answer_ids) > context:
        raise ValueError(
            f"config.user_limit={config.user_limit}, config.item_limit={config.item_limit}, config.item_memory="
            f"{config.item_memory} and the answer's {len(answer_ids)} tokens are more than the backbone's {context} "
            "positions: train with lower limits"
        )
    where = torch.arange(len(answer_ids)) + begin
    if FAMILIES[config.vlm_config.model_type].grid_positions:
        where = where.expand(3, -1)
    counts = torch.full((count,), len(answer_ids))
    return _Tokens(answer_ids.repeat(count), where.tile(count), None, counts)


def _images(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch.items() if name not in TEXTUAL}


def _on_host(batch: Batch) -> dict[str, torch.Tensor]:
    """What decides tokens and positions, where the tables are made."""
    return {name: batch[name].cpu() for name in (*TEXTUAL, "image_grid_thw") if name in batch}


def _packed(
    model: RecommendationModel,
    images: Batch,
    prefixes: list[_Tokens],
    suffixes: _Tokens | None,
    prefix_of: list[torch.Tensor],
    caches: list[KVCache],
) -> dict[str, Any]:
    """Arguments of the model for the tokens one after another, on its device.

    Args:
        images: those that the tokens show, as the backbone takes them.
        prefix_of: for each group, in the row or cached, (P,) the prefix that each suffix sees.
    """
    if model.get_decoder().config._attn_implementation != BLOCK_ATTENTION:
        raise ValueError("packed rows need block attention: call model.use_block_attention() once before")
    parts = [*prefixes, suffixes] if suffixes is not None else prefixes
    types = None
    if any(part.types is not None for part in parts):
        types = torch.cat([torch.zeros_like(part.ids) if part.types is None else part.types for part in parts])
    heads, device = model.config.get_text_config(decoder=True).num_attention_heads, model.device
    layout = _layout(prefixes, suffixes, prefix_of, caches, types, heads, device.type == "cpu")
    window = block_limits(model.config.vlm_config)[1]
    if window is not None and layout.width > window:
        raise RowTooWide(f"prompts of {layout.width} tokens are longer than the sliding window of {window}")
    arguments = {
        "input_ids": torch.cat([part.ids for part in parts])[None],
        "position_ids": torch.cat([part.where for part in parts], -1)[..., None, :],
        # four dimensions: no mask is made of it
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
        **images,
    }
    if layout.suffixes is not None:
        arguments["logits_to_keep"] = layout.suffixes.places.amax(1)
    if types is not None:
        arguments["token_type_ids"] = types[None]
    for segments, part in zip(layout.prefixes, prefixes, strict=True):
        if part.memory:
            ends = (part.counts - part.memory)[:, None] + torch.arange(part.memory)
            image = arguments["input_ids"][0] == model.config.vlm_config.image_token_id
            layout.memory = Memory(segments.places.gather(1, ends), *_pools(segments, part, image))
    moved = {name: value.to(device, non_blocking=True) for name, value in arguments.items()}
    return {"logits_to_keep": 1, **moved, "block_layout": layout.to(device), "use_cache": False}


def _layout(
    prefixes: list[_Tokens],
    suffixes: _Tokens | None,
    prefix_of: list[torch.Tensor],
    caches: list[KVCache],
    types: torch.Tensor | None,
    heads: int,
    on_cpu: bool,
) -> BlockLayout:
    """The layout of a row of these tokens. ``types``: (T,) 1 for images whose tokens see each other; ``heads``: of
    queries; ``on_cpu``: where attention is computed."""
    images = None  # (T,) the number of the image that a token belongs to, -1 elsewhere
    if types is not None:
        shown = types == 1
        begins = shown & ~nn.functional.pad(shown, (1, 0))[:-1]
        images = torch.where(shown, begins.cumsum(0), -1)
    segments, visible, slots, start, slot = [], [], [], 0, 0
    for part in [*prefixes, *([suffixes] if suffixes is not None else [])]:
        columns = torch.arange(int(part.counts.max()))
        inside = columns < part.counts[:, None]
        ends = part.counts.cumsum(0)[:, None] + start
        places = torch.where(inside, ends - part.counts[:, None] + columns, 0)
        segments.append(Segments(places, inside, _mask(images, places, inside, part is suffixes)))
        visible.append(segments[-1])
        if part.memory_only:
            memories = ends - part.memory + torch.arange(part.memory)
            visible[-1] = Segments(memories, torch.ones_like(memories, dtype=torch.bool), None)
        slots.append(inside.flatten().nonzero()[:, 0] + slot)
        start, slot = start + len(part.ids), slot + inside.numel()
    in_row, visible = segments[: len(prefixes)], visible[: len(prefixes)]
    all_prefixes: list[Segments | KVCache] = [*visible, *caches]
    parts = []
    if suffixes is not None:
        shapes = [each.inside.shape for each in (segments[-1], *all_prefixes)]
        count, length = shapes[0]
        seen = sum(width for _, width in shapes)
        size = max(1, SCORES // (4 * heads * length * seen))
        copied = not caches and (length > SHORT or (on_cpu and seen - length <= LITTLE * length))
        for begin in range(0, count, size):
            some = slice(begin, min(begin + size, count))
            groups = [PrefixGroup.of(*pair, some) for pair in zip(all_prefixes, prefix_of, strict=True)]
            copies = _copies(segments[-1], visible, prefix_of, some) if copied else None
            parts.append(SuffixPart(some, groups, copies))
    return BlockLayout(in_row, visible, segments[-1] if suffixes is not None else None, parts, torch.cat(slots))


def _copies(suffixes: Segments, prefixes: list[Segments], prefix_of: list[torch.Tensor], some: slice) -> Segments:
    """Some of the suffixes, each behind the prefixes that it sees."""
    seen = [(each, of[some]) for each, of in zip(prefixes, prefix_of, strict=True)]
    places = torch.cat([*(each.places[of] for each, of in seen), suffixes.places[some]], 1)
    inside = torch.cat([*(each.inside[of] for each, of in seen), suffixes.inside[some]], 1)
    mask: Any = suffixes.mask  # never None
    own = mask if len(mask) == 1 else mask[some]
    before = inside[:, None, None, : -own.shape[-1]]
    count = 1 if len(own) == 1 and before.all() else len(places)
    mask = torch.cat([before[:count].expand(-1, -1, own.shape[-1], -1), own.expand(count, -1, -1, -1)], -1)
    return Segments(places, inside, mask)


def _pools(segments: Segments, part: _Tokens, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, m, W) each, for each memory token the places of the tokens whose mean it begins with, and their shares of it.

    Text and image are apart: a mean of both says little of either, and a title of few tokens is not learned from it.
    Each of the two has as many memory tokens as its share of the candidate's tokens, but at least one, and they are the
    means of stretches of about the same length, as adaptive average pooling has them.

    Args:
        image: (T,) which tokens of the row stand for an image.
    """
    own, count = (part.counts - part.memory)[:, None], part.memory
    columns = torch.arange(segments.places.shape[1])
    shown = image[segments.places] & (columns < own) & (count > 1)
    order = (shown + 2 * (columns >= own)).argsort(dim=1, stable=True)  # text, image, and what is not the candidate's
    texts = own - shown.sum(1, keepdim=True)  # (N, 1) tokens
    of_text = (count * texts / own).round().long().clamp(1, max(count - 1, 1))
    of_text = torch.where(texts == own, count, torch.where(texts == 0, 0, of_text))
    number, later = torch.arange(count), torch.arange(count) >= of_text
    number, parts = number - of_text * later, torch.where(later, count - of_text, of_text)
    first, length = texts * later, torch.where(later, own - texts, texts)
    begin, end = first + number * length // parts, first + ((number + 1) * length + parts - 1) // parts
    columns = begin[..., None] + torch.arange(int((end - begin).max()))
    inside = columns < end[..., None]
    places = segments.places.gather(1, order)[torch.arange(len(own))[:, None, None], torch.where(inside, columns, 0)]
    return places, inside / (end - begin)[..., None]


def _mask(images: torch.Tensor | None, places: torch.Tensor, inside: torch.Tensor, always: bool) -> torch.Tensor | None:
    """(N or 1, 1, L, L) which tokens of a segment see which; None, unless ``always``, if that is what precedes."""
    causal = torch.ones(2 * [places.shape[1]], dtype=torch.bool, device=places.device).tril()
    if images is None:
        return causal[None, None] if always else None
    image = torch.where(inside, images[places], -1)
    same = (image[:, :, None] == image[:, None, :]) & (image[:, :, None] >= 0)
    return (same | causal)[:, None]
