"""Ranking with ``interaction="late"``: each user and each candidate once, and a few tokens for a pair.

Candidates are kept in memory up to a limit, chunk by chunk; each chunk meets all users before the next is computed or
read from the cache. Users are kept likewise, and computed again for the next chunk only where they do not all fit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .block_attention import Past
from .image_features import Shown
from .item_cache import ItemCache
from .packing import pack_late, pack_roots

PART = 128  # users or candidates kept as one tensor
SCORES = 2**28  # bytes of attention scores in one forward


def within(rows: Sequence[np.ndarray], first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where ``rows`` have the numbers ``first`` to ``first + count - 1``: three times (N,), the row, the place in it,
    and the number less ``first``."""
    places = [np.flatnonzero((row >= first) & (row < first + count)) for row in rows]
    numbers = np.concatenate([row[some] for row, some in zip(rows, places, strict=True)]) - first
    return np.repeat(np.arange(len(rows)), [len(some) for some in places]), np.concatenate(places), numbers


class LatePlan:
    """See :class:`Recommender`, whose arguments these are; ``memory`` is in bytes."""

    def __init__(self, model: Any, processor: Any, token_budget: int, memory: int, cache: ItemCache | None) -> None:
        self.model, self.processor, self.token_budget, self.cache = model, processor, token_budget, cache
        self.memory = memory
        self.limits = (model.config.user_limit, model.config.item_limit)
        self.answer_ids = processor.blocks([], [], self.limits)["answer_ids"].to(model.device)

    def score(
        self,
        users: Sequence[Mapping[str, Any]],
        rows: list[np.ndarray],
        names: Sequence[str],
        catalogue: Mapping[str, Mapping[str, Any]],
        out: list[np.ndarray],
        bar: Any,
    ) -> None:
        """Fill ``out``, shaped like ``rows``: for each user the candidates, as places in ``names``."""
        all_users: list[tuple[int, Past]] = []  # once it is clear that they can all be kept
        for items in self._item_chunks(names, catalogue):
            user_parts = iter(all_users) if all_users else self._parts(users, self._user_pasts, self.memory // 4)
            seen: list[tuple[int, Past]] = []
            for begin, some_users in user_parts:
                seen = [(begin, some_users)]
                for first, some_items in items:
                    self._meet(begin, some_users, first, some_items, rows, out, bar)
            all_users = seen if len(seen[0][1]) == len(users) else []

    def encode_items(self, names: Sequence[str], catalogue: Mapping[str, Mapping[str, Any]]) -> Iterator[int]:
        """Compute the candidates that the cache has not; yields how many are done."""
        for _, past in self._parts(names, self._item_pasts(catalogue), self.memory // 2):
            yield len(past)

    def _item_chunks(
        self, names: Sequence[str], catalogue: Mapping[str, Mapping[str, Any]]
    ) -> Iterator[list[tuple[int, Past]]]:
        """All candidates, as many parts at a time as may be kept."""
        held: list[tuple[int, Past]] = []
        for part in self._parts(names, self._item_pasts(catalogue), self.memory // 4):
            held.append(part)
            if sum(past.nbytes for _, past in held) >= self.memory // 2:
                yield held
                held = []
        if held:
            yield held

    def _parts(
        self, rows: Sequence[Any], encode: Callable[[Sequence[Any]], Past], most: int
    ) -> Iterator[tuple[int, Past]]:
        """The number of the first row and the past of a few rows, until all are done; each of about ``most`` bytes."""
        held: list[Past] = []
        start = begin = 0
        take = 1
        while start < len(rows):
            held.append(encode(rows[start : start + take]))
            start += len(held[-1])
            take = max(1, self.token_budget // int(max(past.lengths.max() for past in held)))
            full = sum(past.nbytes for past in held) >= most or start - begin >= PART
            if full or start == len(rows):
                yield begin, Past.join(held)
                held, begin = [], start

    def _user_pasts(self, users: Sequence[Mapping[str, Any]]) -> Past:
        return self._run(self.processor.blocks(list(users), [], self.limits)["users"], None)

    def _item_pasts(self, catalogue: Mapping[str, Mapping[str, Any]]) -> Callable[[Sequence[str]], Past]:
        def encode(names: Sequence[str]) -> Past:
            cache, device = self.cache, self.model.device
            known: dict[str, Past] = {}
            paths = {name: cache.path(catalogue[name]) for name in names} if cache else {}
            if cache:
                found = {name: cache.load(path, device) for name, path in paths.items()}
                known = {name: past for name, past in found.items() if past is not None}
            missing = [name for name in names if name not in known]
            if missing:
                shown = Shown(self.model, self.processor, catalogue)
                batch = self.processor.blocks([], shown.candidates(missing), self.limits)["items"]
                new = self._run(None, batch, shown.features(missing))
                if not cache:
                    return new
                for row, name in enumerate(missing):
                    known[name] = new.select(torch.tensor([row], device=device))
                    cache.save(paths[name], new, row)
            return Past.join([known[name] for name in names])

        return encode

    def _run(self, users: Any, items: Any, features: dict[str, Any] | None = None) -> Past:
        """The keys and values of a batch of users or of candidates."""
        batch = (users if items is None else items).to(self.model.device)
        packed = pack_roots(self.model, [users, items], keep=True)
        self.model.answers(packed, **(dict(batch) | (features or {})))
        blocks = packed["blocks"]
        layers = [(keys.contiguous(), values.contiguous()) for keys, values in blocks.kept[0]]
        return Past(layers, blocks.inside[0].sum(1))

    def _meet(
        self,
        begin: int,
        users: Past,
        first: int,
        items: Past,
        rows: list[np.ndarray],
        out: list[np.ndarray],
        bar: Any,
    ) -> None:
        """Score those pairs of some users and some candidates that are wanted."""
        mine = rows[begin : begin + len(users)]
        who, place, what = within(mine, first, len(items))
        order = np.argsort(what, kind="stable")  # so that one forward needs few candidates, and neighbours
        width = len(self.answer_ids)
        heads = self.model.config.get_text_config(decoder=True).num_attention_heads
        seen = width + sum(past.layers[0][0].shape[2] for past in (users, items))
        most = max(1, min(self.token_budget // width, SCORES // (4 * heads * width * seen)))
        for start in range(0, len(order), most):
            some = order[start : start + most]
            pairs, past = [], []
            for side, numbers in ((users, who[some]), (items, what[some])):
                used, among = np.unique(numbers, return_inverse=True)
                past.append(side.select(torch.from_numpy(used).to(self.model.device)))
                pairs.append(torch.from_numpy(among))
            packed = pack_late(self.model, None, None, self.answer_ids, torch.stack(pairs).to(self.model.device), past)
            logits = self.model.answer_logits(self.model.answers(packed).logits).cpu().numpy()
            for user, where, logit in zip(who[some], place[some], logits, strict=True):
                out[begin + user][where] = logit
            bar.update(len(some))
