"""Ranking with ``interaction="late"``: each user and each candidate once, and a few tokens for a pair.

The keys and values of candidates come from the :class:`ItemStore`, chunk by chunk; each chunk meets all users before
the next is computed or read from the disk. Those of users are kept in memory in the same way, and computed again for
the next chunk only where they do not all fit.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from transformers import BatchFeature

from .block_layout import KVCache
from .compiled_answers import CompiledAnswers
from .core_rows import cores, each_on_a_core, rows_of
from .image_features import ImageFeatureCache, PreparedCatalogue
from .inputs import User
from .interfaces import RecommendationModel, RecommendationProcessor
from .item_cache import ItemKeys
from .item_store import ItemStore
from .packing import RowTooWide, compute_late_prefixes, pack_late_answers

PART = 128  # users kept as one tensor
SCORES = 2**28  # bytes of attention scores in one forward
CPU_BUDGET = 4096  # tokens of a forward that the caches of a CPU are best used by

Thing = TypeVar("Thing")
exhaust: Callable[[Iterable[Any]], Any] = partial(deque, maxlen=0)  # an iterator that is run for what it does


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

    @classmethod
    def among(cls, rows: Sequence[np.ndarray], row_of: np.ndarray) -> "Pairs":
        """Where ``rows`` have a number whose place in ``row_of`` holds what is to be its item, and not -1."""
        items = [row_of[row] for row in rows]
        places = [np.flatnonzero(each >= 0) for each in items]
        users = np.repeat(np.arange(len(rows)), [len(chosen) for chosen in places])
        return cls(users, np.concatenate(places), np.concatenate([each[each >= 0] for each in items]))

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
    """See :class:`Recommender`, whose arguments these are; ``memory`` is in bytes, half of it for candidates that are
    kept from call to call, and a quarter each for those of a chunk and for users."""

    def __init__(
        self,
        model: RecommendationModel,
        processor: RecommendationProcessor,
        token_budget: int,
        memory: int,
        keys: ItemKeys,
        store: ItemStore,
        compile: str | None = None,
    ) -> None:
        self.model, self.processor, self.token_budget, self.memory = model, processor, token_budget, memory
        self.keys, self.store, self.users = keys, store, ItemStore(model.device, memory // 4, None)
        self.answer_ids = processor.late_answer_ids
        self.compiled = None if compile is None else CompiledAnswers(model, self.answer_ids, compile)
        self.longest = {"user": 0, "item": 0}  # tokens of one that was computed

    def scores(
        self, users: Sequence[User], rows: Sequence[np.ndarray], names: Sequence[str], catalogue: Mapping[str, Any]
    ) -> Iterator[Scores]:
        """The logits of all pairs, some at a time.

        Args:
            rows: for each user the candidates, as places in ``names``.
        """
        for items in self._item_chunks(names, catalogue):
            for which, user_part in self._user_parts(users):
                for row_of, item_part in items:
                    pairs = Pairs.among([rows[user] for user in which], row_of)
                    for scores in self._pair_scores(user_part, item_part, pairs):
                        yield scores._replace(users=which[scores.users])

    def encode_items(self, names: Sequence[str], catalogue: Mapping[str, Any]) -> Iterator[int]:
        """Compute the candidates that are not kept yet; yields how many are done."""
        return self._compute(names, [self.keys.of(catalogue, name) for name in names], catalogue)

    def _item_chunks(
        self, names: Sequence[str], catalogue: Mapping[str, Any]
    ) -> Iterator[list[tuple[np.ndarray, KVCache]]]:
        """All candidates, as many at a time as may be kept, in parts: for each name its row or -1, and the rows."""
        keys = [self.keys.of(catalogue, name) for name in names]
        start = 0
        while start < len(names):
            if not self.store.item_bytes:  # which says how many there may be
                exhaust(self._compute(names[:1], keys[:1], catalogue))
            chunk = slice(start, start + max(1, self.memory // 4 // self.store.item_bytes))
            exhaust(self._compute(names[chunk], keys[chunk], catalogue))
            parts = []
            for places, part in self.store.take(keys[chunk]):
                row_of = np.full(len(names), -1)
                row_of[start + places] = np.arange(len(places))
                parts.append((row_of, part))
            yield parts
            start = chunk.stop

    def _compute(self, names: Sequence[str], keys: Sequence[str], catalogue: Mapping[str, Any]) -> Iterator[int]:
        """Compute what is missing of these candidates; yields how many are done."""

        def encode(some: Sequence[str]) -> KVCache:
            images = ImageFeatureCache(self.model.backbone, self.processor)
            prepared = PreparedCatalogue(images, catalogue, "late_item")
            batch = self.processor.late_items([prepared[name] for name in some], self.model.config.item_limit)
            return self._encode(batch, "item", images.features(batch.images))

        return self._fill(self.store, dict(zip(keys, names, strict=True)), encode, "item")

    def _user_parts(self, users: Sequence[User]) -> Iterator[tuple[np.ndarray, KVCache]]:
        """The places of some users and their keys and values, as many as may be kept, until all are done."""

        def encode(some: Sequence[User]) -> KVCache:
            return self._encode(self.processor.late_users(some, self.model.config.user_limit), "user", [])

        start = 0
        while start < len(users):
            size = self.users.item_bytes
            part = users[start : start + max(1, min(PART, self.memory // 4 // size) if size else 1)]
            keys = [self.keys.of_user(user) for user in part]
            exhaust(self._fill(self.users, dict(zip(keys, part, strict=True)), encode, "user"))
            for places, prefixes in self.users.take(keys):
                yield start + places, prefixes
            start += len(part)

    def _fill(
        self,
        store: ItemStore,
        wanted: Mapping[str, Thing],
        encode: Callable[[Sequence[Thing]], KVCache],
        side: Literal["user", "item"],
    ) -> Iterator[int]:
        """Compute what a store lacks of these, by their keys; yields how many are done."""
        missing, budget = store.missing(list(wanted)), self.token_budget
        if self.model.device.type == "cpu":
            budget = min(budget, CPU_BUDGET)
        start = 0
        try:
            while start < len(missing):
                batch = missing[start : start + max(1, budget // (self.longest[side] or budget))]
                store.put(batch, encode([wanted[key] for key in batch]))
                yield len(batch)
                start += len(batch)
        finally:
            store.flush()

    def _encode(self, batch: BatchFeature, side: Literal["user", "item"], features: list[torch.Tensor]) -> KVCache:
        self.longest[side] = max(self.longest[side], batch["input_ids"].shape[1])
        return compute_late_prefixes(self.model, batch, side, features)

    def _pair_scores(self, users: KVCache, items: KVCache, pairs: Pairs) -> Iterator[Scores]:
        """The logits of some users and some candidates."""
        if self.compiled is not None and len(pairs) <= self.compiled.most:
            with suppress(RowTooWide):  # as it is padded; or it is refused again
                yield from _compiled_scores(self.compiled, users, items, pairs)
                return
        device = self.model.device
        # one forward needs few candidates, and neighbours; on a CPU those of one user
        by_user = pairs.users if device.type == "cpu" else np.zeros(len(pairs))
        pairs = pairs.take(np.lexsort([pairs.items, by_user]))
        heads = self.model.config.get_text_config(decoder=True).num_attention_heads
        width = len(self.answer_ids)
        seen = width + users.width + items.width
        tokens = min(self.token_budget, SCORES // (4 * heads * seen))

        def scores(part: Pairs) -> Scores:
            user_rows, user_of = np.unique(part.users, return_inverse=True)
            item_rows, item_of = np.unique(part.items, return_inverse=True)
            packed = pack_late_answers(
                self.model,
                users.select(user_rows),
                items.select(item_rows),
                self.answer_ids,
                torch.from_numpy(np.stack([user_of, item_of])),
            )
            return Scores(part.users, part.places, self.model.score(**packed).logits.cpu().numpy())

        rows = rows_of(pairs.users, device, tokens, lambda: width)
        yield from each_on_a_core(scores, map(pairs.take, rows), cores(device))


def _compiled_scores(compiled: CompiledAnswers, users: KVCache, items: KVCache, pairs: Pairs) -> Iterator[Scores]:
    """The logits of a few pairs, user by user."""
    for user in np.unique(pairs.users):
        part = pairs.take(np.flatnonzero(pairs.users == user))
        logits = compiled(users.select(np.array([user])), items, part.items)
        yield Scores(part.users, part.places, logits.cpu().numpy())
