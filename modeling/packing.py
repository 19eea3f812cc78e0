"""From batches of whole prompts, or of users and candidates, to one packed row for the backbone (see `blocks.py`)."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .block_attention import NAME, Blocks, Past
from .families import FAMILIES

SHIFTING_ROPE = frozenset({"dynamic", "longrope"})  # rotations that depend on the length of the whole prompt
TYPES = ("token_type_ids", "mm_token_type_ids")


def block_limits(vlm_config: Any) -> tuple[str | None, int | None]:
    """Why a backbone cannot compute blocks, if so, and up to how many tokens together it can, if that is limited.

    Sliding windows are left alone until blocks are too wide for them; up to there they are plain attention.
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


def positions(model: Any, batch: Any) -> torch.Tensor:
    """The position of each token of a padded batch, as the backbone counts them: (B, L), or (3, B, L) with rows and
    columns of pictures."""
    mask = batch["attention_mask"]
    if not FAMILIES[model.config.vlm_config.model_type].grid_positions:
        return (mask.cumsum(-1) - 1).clamp(min=0)
    return model.base_model.get_rope_index(
        batch["input_ids"], batch["mm_token_type_ids"], batch.get("image_grid_thw"), attention_mask=mask
    )[0]


class BlocksTooLong(ValueError):
    """A sliding window would hide from a token what it must see."""


@dataclass
class _Part:
    """Some tokens of padded rows, in reading order, and what the backbone is told of each."""

    ids: torch.Tensor  # (T,)
    where: torch.Tensor  # (T,) or (3, T)
    types: torch.Tensor | None  # (T,)
    counts: torch.Tensor  # (N,) tokens of each row

    @classmethod
    def of(cls, batch: Any, where: torch.Tensor, chosen: torch.Tensor) -> "_Part":
        types = batch["token_type_ids"][chosen] if "token_type_ids" in batch else None
        return cls(batch["input_ids"][chosen], where[..., chosen], types, chosen.sum(1))


def _packed(model: Any, parts: list[_Part], leaves: bool, **blocks: Any) -> dict[str, Any]:
    """Arguments of the backbone for the parts one after another, the last of which are leaves if ``leaves``."""
    config = model.get_decoder().config
    if config._attn_implementation != NAME:  # for good: layers computed again for their gradients look it up again
        config._attn_implementation_internal = NAME
    places, start = [], 0
    for part in parts:
        columns = torch.arange(int(part.counts.max()), device=part.ids.device)
        first = part.counts.cumsum(0) - part.counts + start
        places.append(torch.where(columns < part.counts[:, None], first[:, None] + columns, -1))
        start += len(part.ids)
    types = None
    if any(part.types is not None for part in parts):
        types = torch.cat([torch.zeros_like(part.ids) if part.types is None else part.types for part in parts])
    pictures = None
    if types is not None:  # of a family whose pictures' tokens see each other
        shown = types == 1
        begins = shown & ~torch.nn.functional.pad(shown, (1, 0))[:-1]
        pictures = torch.where(shown, begins.cumsum(0), -1)
    built = Blocks(places[:-1] if leaves else places, places[-1] if leaves else None, pictures=pictures, **blocks)
    window = block_limits(model.config.vlm_config)[1]
    if window is not None and built.widest() > window:
        raise BlocksTooLong(f"prompts of {built.widest()} tokens are longer than the sliding window of {window}")
    arguments = {
        "input_ids": torch.cat([part.ids for part in parts])[None],
        "position_ids": torch.cat([part.where for part in parts], -1)[..., None, :],
        # four dimensions: no mask is made of it
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=parts[0].ids.device),
        "blocks": built,
        "use_cache": False,
        "logits_to_keep": places[-1].amax(1),
    }
    if types is not None:
        arguments["token_type_ids"] = types[None]
    return arguments


def shared_lengths(batch: Any, owners: torch.Tensor, image_token_id: int) -> torch.Tensor:
    """(B,) how many leading tokens each row shares with its owner's others.

    They end before the first picture and before the last token, at which the answer is read.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    lengths = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    rows = [row[kept] for row, kept in zip(ids, mask, strict=True)]
    for owner in owners.unique().tolist():
        own = (owners == owner).nonzero()[:, 0].tolist()
        length = min(len(rows[number]) for number in own) - 1
        first = rows[own[0]][:length]
        same = torch.stack([rows[number][:length] == first for number in own]).all(0)
        lengths[own] = (same & (first != image_token_id)).long().cumprod(0).sum()
    return lengths


def pack_joint(model: Any, batch: Any, owners: torch.Tensor) -> dict[str, Any]:
    """One packed row of B whole prompts, in which the rows of an owner share what they begin with.

    Args:
        batch: from the processor, padded on the left; pictures' tensors are not looked at.
        owners: (B,) equal numbers for rows that may share.
    """
    mask = batch["attention_mask"].bool()
    lengths = shared_lengths(batch, owners, model.config.vlm_config.image_token_id)
    where = positions(model, batch)
    cut = mask.shape[1] - mask.sum(1) + lengths  # (B,) the column at which a row's own part begins
    own = torch.arange(mask.shape[1], device=mask.device) >= cut[:, None]
    _, parent = owners.unique(return_inverse=True)
    first = torch.zeros_like(mask[:, 0])  # one row of each owner
    first[[parent.tolist().index(number) for number in range(int(parent.max()) + 1)]] = True
    firsts = first.nonzero()[:, 0][parent[first].argsort()]  # in the order of the owners' numbers
    shared = (mask & ~own)[firsts]
    rows = {name: batch[name][firsts] for name in ("input_ids", "token_type_ids") if name in batch}
    root = _Part.of(rows, where[..., firsts, :], shared)
    return _packed(model, [root, _Part.of(batch, where, own)], leaves=True, parents=[parent])


def pack_roots(model: Any, batches: list[Any], keep: bool = False) -> dict[str, Any]:
    """One packed row of several batches of blocks (`interaction="late"`): users, if any, then candidates."""
    return _packed(model, [_root(model, *group) for group in enumerate(batches) if group[1]], leaves=False, keep=keep)


def pack_late(
    model: Any,
    users: Any,
    items: Any,
    answer_ids: torch.Tensor,
    pairs: torch.Tensor,
    past: list[Past] | None = None,
) -> dict[str, Any]:
    """One packed row of blocks and of the tokens that ask for the answers (`interaction="late"`).

    Args:
        users, items: batches of the processor's `blocks`; neither if ``past`` has their keys and values.
        answer_ids: (A,) the end of every prompt.
        pairs: (2, P) the user and the candidate of each pair.
    """
    config = model.config
    count = pairs.shape[1]
    where = torch.arange(len(answer_ids), device=answer_ids.device) + config.user_limit + config.item_limit
    answers = _Part(
        answer_ids.repeat(count),
        (where if not _grid(model) else where.expand(3, -1)).repeat(*[1] * _grid(model), count),
        None,
        torch.full((count,), len(answer_ids), device=answer_ids.device),
    )
    roots = [] if past is not None else [_root(model, 0, users), _root(model, 1, items)]
    return _packed(model, [*roots, answers], leaves=True, parents=[*pairs], past=past)


def _root(model: Any, group: int, batch: Any) -> _Part:
    """Users begin at position 0, candidates at the end of the longest user."""
    limit = (model.config.user_limit, model.config.item_limit)[group]
    mask = batch["attention_mask"].bool()
    if int(mask.sum(1).max()) > limit:
        kind = ("user", "item")[group]
        raise ValueError(f"a block of {int(mask.sum(1).max())} tokens is longer than config.{kind}_limit={limit}")
    return _Part.of(batch, positions(model, batch) + (model.config.user_limit if group else 0), mask)


def _grid(model: Any) -> bool:
    return FAMILIES[model.config.vlm_config.model_type].grid_positions
