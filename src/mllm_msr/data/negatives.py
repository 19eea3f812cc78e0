"""Negative sampling: items that a user has not interacted with, by hashes in place of a random generator's state.

Every sample is a function of a seed and of whole-number keys (user, position, epoch), so it is the same on any number
of threads, in any chunk size and after a restart. Letters: U users, P pairs, B samples at a time, n negatives of each.
"""

import hashlib

import numpy as np

Array = np.ndarray
POPULAR_DRAWS = 8  # popular items drawn for each negative wanted: most are new to the user


class NegativeSampler:
    """Each user's unseen items, without ever listing them.

    Args:
        pairs: (P,) codes ``user * n_items + item`` of all that users have interacted with, in any order, repeats
            allowed.
        n_users, n_items: how many there are.

    ``available`` (U,) is how many unseen items each user has.
    """

    def __init__(self, pairs: Array, n_users: int, n_items: int) -> None:
        pairs = np.sort(pairs)
        self.pairs = pairs = pairs[np.concatenate([[True], pairs[1:] != pairs[:-1]])]
        user, item = np.divmod(pairs, n_items)
        lengths = np.bincount(user, minlength=n_users)
        self.n_items = n_items
        self.available = n_items - lengths
        self.starts = np.cumsum(lengths) - lengths
        # before a user's j-th seen item (in item order) lie item - j unseen ones; user * (n_items + 1) parts the users
        self.before = user * (n_items + 1) + item - (np.arange(len(pairs)) - self.starts[user])

    def uniform(self, user: Array, n: int, seed: int, *keys: Array) -> Array:
        """(B, n) distinct unseen items of users (B,), every set of n equally likely; ``keys`` are (B,) each."""
        return self.item(user, sample_ranks(self.available[user], n, seed, *keys))

    def item(self, user: Array, rank: Array) -> Array:
        """Item codes (B, n) of the unseen items at ``rank`` (B, n), counted from 0, of users (B,)."""
        key = user[:, None] * (self.n_items + 1) + rank
        seen = np.searchsorted(self.before, key.ravel(), side="right").reshape(key.shape) - self.starts[user][:, None]
        return rank + seen

    def popular(self, user: Array, n: int, counts: Array, seed: int, *keys: Array) -> Array:
        """(B, n) distinct unseen items in proportion to the training interactions ``counts`` (I,).

        Samples that are seen or repeated are passed over; a user who has seen nearly all that is popular gets the rest
        from :meth:`uniform`.
        """
        weight = np.cumsum(counts if counts.any() else np.ones(len(counts), dtype=np.int64))
        draw = noise(seed, "popular", *(key[:, None] for key in keys), np.arange(POPULAR_DRAWS * n)[None])
        popular = np.searchsorted(weight, (draw % np.uint64(weight[-1])).astype(np.int64), side="right")
        items = np.concatenate([popular, self.uniform(user, n, seed, *keys)], axis=1)  # (B, draws + n)
        order = np.argsort(items, axis=1, kind="stable")
        ordered = np.take_along_axis(items, order, axis=1)
        repeats = np.zeros(items.shape, dtype=bool)
        np.put_along_axis(repeats, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
        good = ~repeats & ~self.seen(user, items)
        first = np.argsort(~good, axis=1, kind="stable")[:, :n]
        return np.take_along_axis(items, first, axis=1)

    def seen(self, user: Array, items: Array) -> Array:
        """Whether users (B,) have interacted with items (B, n)."""
        key = user[:, None] * self.n_items + items
        place = np.minimum(np.searchsorted(self.pairs, key), len(self.pairs) - 1)
        return self.pairs[place] == key


def sample_ranks(count: Array, n: int, seed: int, *keys: Array) -> Array:
    """(B, n) distinct whole numbers below ``count`` (B,) a row; every subset is equally likely (R. Floyd)."""
    chosen = np.empty((n, len(count)), dtype=np.int64)
    state = noise(seed, "negative", *keys)
    for j in range(n):
        top = count - n + j
        draw = (_mix(state, j) % (top + 1).astype(np.uint64)).astype(np.int64)
        taken = (chosen[:j] == draw).any(axis=0)
        chosen[j] = np.where(taken, top, draw)
    return chosen.T


def noise(seed: int, purpose: str, *keys: Array | int) -> Array:
    """Uniform uint64 for every combination of keys (broadcast): splitmix64 over seed, purpose and keys."""
    start = int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:8], "big")
    state = np.array(start, dtype=np.uint64)
    for key in keys:
        state = _mix(state, key)
    return state


def _mix(state: Array, key: Array | int) -> Array:
    with np.errstate(over="ignore"):  # arithmetic is meant modulo 2^64
        state = (state ^ np.asarray(key).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))
