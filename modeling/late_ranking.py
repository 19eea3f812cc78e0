"""Ranking with ``interaction="late"``: each user and each candidate once, and a few tokens for a pair.

The keys and values of candidates are kept in memory up to a limit, chunk by chunk; each chunk meets all users before
the next is computed or read from the disk. Those of users are kept likewise, and computed again for the next chunk only
where they do not all fit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from transformers import BatchFeature

from .block_attention import KVCache
from .image_features import ImageFeatureCache, PreparedCatalogue
from .inputs import Candidate, User
from .interfaces import RecommendationModel, RecommendationProcessor
from .item_cache import ItemCache
from .packing import pack_late_answers, pack_late_prefixes

PART = 128  # users or candidates kept as one tensor
SCORES = 2**28  # bytes of attention scores in one forward

Row = TypeVar("Row")


@dataclass(frozen=True)
class Pairs:
    """N pairs: the list that a pair is of, its place there, and the number that the list has at that place."""

    users: np.ndarray
    places: np.ndarray
    items: np.ndarray

    @classmethod
    def within(cls, rows: Sequence[np.ndarray], first: int, count: int) -> "Pairs":
        """Where ``rows`` have the numbers ``first`` to ``first + count - 1``; items are counted from ``first``."""
        places = [np.flatnonzero((row >= first) & (row < first + count)) for row in rows]
        items = np.concatenate([row[chosen] for row, chosen in zip(rows, places, strict=True)]) - first
        users = np.repeat(np.arange(len(rows)), [len(chosen) for chosen in places])
        return cls(users, np.concatenate(places), items)

    def take(self, chosen: np.ndarray | slice) -> "Pairs":
        return Pairs(self.users[chosen], self.places[chosen], self.items[chosen])

    def __len__(self) -> int:
        return len(self.users)


class Scores(NamedTuple):
    """Logits of N pairs: the user, the place among the user's candidates, and the logit, each (N,)."""

    users: np.ndarray
    places: np.ndarray
    logits: np.ndarray


class LatePlan:
    """See :class:`Recommender`, whose arguments these are; ``memory`` is in bytes."""

    def __init__(
        self,
        model: RecommendationModel,
        processor: RecommendationProcessor,
        token_budget: int,
        memory: int,
        cache: ItemCache | None,
    ) -> None:
        self.model, self.processor, self.token_budget = model, processor, token_budget
        self.memory, self.cache = memory, cache
        self.answer_ids = processor.late_answer_ids

    def scores(
        self, users: Sequence[User], rows: Sequence[np.ndarray], names: Sequence[str], catalogue: Mapping[str, Any]
    ) -> Iterator[Scores]:
        """The logits of all pairs, some at a time.

        Args:
            rows: for each user the candidates, as places in ``names``.
        """
        kept_users: list[tuple[int, KVCache]] = []  # once it is clear that they can all be kept
        for items in self._item_chunks(names, catalogue):
            user_parts = iter(kept_users) if kept_users else self._parts(users, self._encode_users, self.memory // 4)
            latest: list[tuple[int, KVCache]] = []
            for begin, user_part in user_parts:
                latest = [(begin, user_part)]
                for first, item_part in items:
                    pairs = Pairs.within(rows[begin : begin + len(user_part)], first, len(item_part))
                    for scores in self._pair_scores(user_part, item_part, pairs):
                        yield scores._replace(users=scores.users + begin)
            kept_users = latest if len(latest[0][1]) == len(users) else []

    def encode_items(self, names: Sequence[str], catalogue: Mapping[str, Any]) -> Iterator[int]:
        """Compute the candidates that the cache has not; yields how many are done."""
        for _, part in self._parts(names, partial(self._encode_items, catalogue), self.memory // 2):
            yield len(part)

    def _item_chunks(self, names: Sequence[str], catalogue: Mapping[str, Any]) -> Iterator[list[tuple[int, KVCache]]]:
        """All candidates, as many parts at a time as may be kept."""
        held: list[tuple[int, KVCache]] = []
        for part in self._parts(names, partial(self._encode_items, catalogue), self.memory // 4):
            held.append(part)
            if sum(prefixes.nbytes for _, prefixes in held) >= self.memory // 2:
                yield held
                held = []
        if held:
            yield held

    def _parts(
        self, rows: Sequence[Row], encode: Callable[[Sequence[Row]], KVCache], max_bytes: int
    ) -> Iterator[tuple[int, KVCache]]:
        """The number of the first row and the keys and values of some rows, about ``max_bytes`` of them, until all are
        done."""
        held: list[KVCache] = []
        start = begin = 0
        count = 1
        while start < len(rows):
            held.append(encode(rows[start : start + count]))
            start += len(held[-1])
            count = max(1, self.token_budget // max(part.width for part in held))
            full = sum(part.nbytes for part in held) >= max_bytes or start - begin >= PART
            if full or start == len(rows):
                yield begin, KVCache.join(held)
                held, begin = [], start

    def _encode_users(self, users: Sequence[User]) -> KVCache:
        return self._encode(self.processor.late_users(users, self.model.config.user_limit), "user", [])

    def _encode_items(self, catalogue: Mapping[str, Any], names: Sequence[str]) -> KVCache:
        """From the cache, or computed and put there."""
        candidates = {name: Candidate.of(catalogue[name]) for name in names}
        prefixes: dict[str, KVCache | None] = dict.fromkeys(names)
        if self.cache is not None:
            paths = {name: self.cache.path(candidate) for name, candidate in candidates.items()}
            prefixes = {name: self.cache.load(path) for name, path in paths.items()}
        if missing := [name for name, prefix in prefixes.items() if prefix is None]:
            images = ImageFeatureCache(self.model.backbone, self.processor)
            prepared = PreparedCatalogue(images, candidates, "late_item")
            batch = self.processor.late_items([prepared[name] for name in missing], self.model.config.item_limit)
            computed = self._encode(batch, "item", images.features(batch.images))
            if self.cache is None:
                return computed
            for row, name in enumerate(missing):
                prefixes[name] = computed.select(np.array([row]))
                self.cache.save(paths[name], computed, row)
        return KVCache.join([prefix for prefix in prefixes.values() if prefix is not None])

    def _encode(self, batch: BatchFeature, side: Literal["user", "item"], features: list[torch.Tensor]) -> KVCache:
        packed = pack_late_prefixes(self.model, batch, side)
        output = self.model(**packed, image_features=features)
        return KVCache.of(output.past_key_values, packed["block_layout"].visible[0])

    def _pair_scores(self, users: KVCache, items: KVCache, pairs: Pairs) -> Iterator[Scores]:
        """The logits of some users and some candidates."""
        pairs = pairs.take(np.argsort(pairs.items, kind="stable"))  # one forward needs few candidates, and neighbours
        heads = self.model.config.get_text_config(decoder=True).num_attention_heads
        width = len(self.answer_ids)
        seen = width + users.width + items.width
        count = max(1, min(self.token_budget // width, SCORES // (4 * heads * width * seen)))
        for start in range(0, len(pairs), count):
            part = pairs.take(slice(start, start + count))
            user_rows, user_of = np.unique(part.users, return_inverse=True)
            item_rows, item_of = np.unique(part.items, return_inverse=True)
            packed = pack_late_answers(
                self.model,
                users.select(user_rows),
                items.select(item_rows),
                self.answer_ids,
                torch.from_numpy(np.stack([user_of, item_of])),
            )
            logits = self.model.score(**packed).logits.cpu().numpy()
            yield Scores(part.users, part.places, logits)
