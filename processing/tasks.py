"""From a cleaned log to ranking tasks: which interactions are targets, and which items stand beside each.

Everything random is a hash of (seed, user, position, counter), so tasks are the same on any number of threads, in any
chunk size, and negatives of one user do not move when another is added at the end of the alphabet. Nothing loops over
users.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from mllm_msr.processing.options import PrepareOptions

SPLITS = ("train", "validation", "test")
TRAIN, VALIDATION, TEST = 0, 1, 2
CHUNK = 3_000_000  # list entries (history + candidates) built at a time: a few hundred MB as text
Array = np.ndarray


def make_tasks(interactions: pl.DataFrame, seen: pl.DataFrame | None = None, **options: Any) -> pl.DataFrame:
    """All ranking tasks of a log, as one table; ``options`` are fields of PrepareOptions.

    Columns: task_id str, split ("train", "validation", "test"), user_id str, history list[str] (oldest first), cutoff
    int64 (the target's time, seconds), candidates list[str] (in random order), labels list[int64] (1 the target),
    history_length int64, target_train_count int64 (training interactions of the target). ``seen``: further (user_id,
    item_id) pairs that are no negatives. Use :class:`TaskPlan` where a log is large.
    """
    return pl.concat(TaskPlan.of(interactions, PrepareOptions(**options), seen).chunks())


@dataclass
class TaskPlan:
    """Who is asked what: every interaction's role, and what is needed to draw negatives. Build with :meth:`of`.

    ``user``, ``item``, ``time``: the log by user, time and input order, ids as codes; ``position``: place in the user's
    sequence; ``split``: 0 train, 1 validation, 2 test target, -1 none; ``counts``: training interactions by item;
    ``report``: what was counted while planning.
    """

    users: pl.Series
    items: pl.Series
    user: Array
    item: Array
    time: Array
    position: Array
    split: Array
    counts: Array
    unseen: "Unseen"
    options: PrepareOptions
    report: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, interactions: pl.DataFrame, options: PrepareOptions, seen: pl.DataFrame | None = None) -> "TaskPlan":
        """Decide roles by ``options.protocol``; raises ValueError when there is no task at all."""
        users = interactions["user_id"].unique().sort()
        items = interactions["item_id"].unique().sort()
        user, item = _codes(interactions["user_id"], users), _codes(interactions["item_id"], items)
        time = interactions["timestamp"].to_numpy()
        if (np.diff(user) < 0).any() or ((np.diff(time) < 0) & (np.diff(user) == 0)).any():
            order = np.lexsort((time, user))  # stable: ties in time stay in input order
            user, item, time = user[order], item[order], time[order]
        lengths = np.bincount(user, minlength=len(users))
        position = np.arange(len(user)) - (np.cumsum(lengths) - lengths)[user]

        split, training = _roles(user, time, position, lengths, options)
        pairs = user * len(items) + item
        if seen is not None and len(seen):
            cut = _codes(seen["user_id"], users) * len(items) + _codes(seen["item_id"], items)
            unseen = Unseen(np.concatenate([pairs, cut]), len(users), len(items))
        else:
            unseen = Unseen(pairs, len(users), len(items))
        held_out = 1 if options.negatives == "all" else options.n_negatives
        wanted = np.where(split == TRAIN, options.n_train_negatives, held_out)
        repeated = np.ones(len(pairs), dtype=bool)
        repeated[_first(pairs)] = False
        refusals = {  # a target may be refused for several reasons; the first counts
            "targets_with_short_history": position < options.min_history,
            "targets_already_in_history": repeated,
            "targets_with_too_few_unseen_items": unseen.count[user] < wanted,
        }
        report: dict[str, Any] = {}
        for name, refused in refusals.items():
            report[name] = int((refused & (split >= 0)).sum())
            split = np.where(refused, -1, split)
        if not (split >= 0).any():
            raise ValueError(
                f"no ranking task is left ({report}): lower min_history or n_negatives, or bring more data"
            )
        tied = np.zeros(len(user), dtype=bool)  # another item at the same moment before it: input order decided
        tied[1:] = (user[1:] == user[:-1]) & (time[1:] == time[:-1])
        for code, name in enumerate(SPLITS):
            report[f"{name}_tasks"] = int((split == code).sum())
            report[f"{name}_targets_tied_in_time"] = int(((split == code) & tied).sum())
        counts = np.bincount(item[training], minlength=len(items))
        report["training_interactions"] = int(training.sum())
        return cls(users, items, user, item, time, position, split, counts, unseen, options, report)

    @property
    def popularity(self) -> pl.DataFrame:
        """item_id, count: training interactions of every item of the catalogue, zero included."""
        return pl.DataFrame({"item_id": self.items, "count": pl.Series(self.counts, dtype=pl.Int64)})

    def chunks(self, entries: int = CHUNK) -> Iterator[pl.DataFrame]:
        """Tasks by user and position, in tables of about ``entries`` list entries; the cut does not change them."""
        targets = np.flatnonzero(self.split >= 0)
        size = self.position[targets] + self._width(targets)
        part = np.cumsum(size) // entries
        for rows in np.split(targets, np.flatnonzero(np.diff(part)) + 1):
            yield self._tasks(rows)

    def _width(self, rows: Array) -> Array:
        """Candidates of each target: itself and its negatives."""
        options = self.options
        held_out = self.unseen.count[self.user[rows]] if options.negatives == "all" else options.n_negatives
        return 1 + np.where(self.split[rows] == TRAIN, options.n_train_negatives, held_out)

    def _tasks(self, rows: Array) -> pl.DataFrame:
        user, position, split = self.user[rows], self.position[rows], self.split[rows]
        width = self._width(rows)
        candidates = np.empty(width.sum(), dtype=np.int64)
        labels = np.empty(width.sum(), dtype=np.int64)
        starts = np.cumsum(width) - width
        for count in np.unique(width):  # one or two widths, but for negatives="all"
            of_width = np.flatnonzero(width == count)
            slots = starts[of_width][:, None] + np.arange(count)
            candidates[slots], labels[slots] = self._candidates(rows[of_width], int(count) - 1)
        history = _ranges(rows - position, position)
        return pl.DataFrame(
            {
                "task_id": self.users.gather(user) + ":" + pl.Series(position).cast(pl.String),
                "split": pl.Series(np.array(SPLITS)[split]),
                "user_id": self.users.gather(user),
                "history": _lists(self.items.gather(self.item[history]), position),
                "cutoff": self.time[rows],
                "candidates": _lists(self.items.gather(candidates), width),
                "labels": _lists(pl.Series(labels), width),
                "history_length": position,
                "target_train_count": self.counts[self.item[rows]],
            }
        )

    def _candidates(self, rows: Array, n: int) -> tuple[Array, Array]:
        """Item codes and labels, both ``(rows, 1 + n)``, the target at a random place."""
        seed, user, position = self.options.seed, self.user[rows], self.position[rows]
        held_out = self.split[rows[0]] != TRAIN
        if self.options.negatives == "popularity" and held_out:
            negatives = self._popular_negatives(rows, n)
        else:
            negatives = self.unseen.item(user, sample_ranks(self.unseen.count[user], n, seed, user, position))
        items = np.concatenate([self.item[rows][:, None], negatives], axis=1)
        keys = noise(seed, "order", user[:, None], position[:, None], np.arange(n + 1)[None])
        order = np.argsort(keys, axis=1, kind="stable")
        return np.take_along_axis(items, order, axis=1), (order == 0).astype(np.int64)

    def _popular_negatives(self, rows: Array, n: int) -> Array:
        """``(B, n)`` distinct unseen items, drawn by training count; a user who met nearly all that is popular gets
        the rest uniformly. Draws that are seen or repeated are passed over."""
        seed, user, position = self.options.seed, self.user[rows], self.position[rows]
        weight = np.cumsum(self.counts if self.counts.any() else np.ones(len(self.items), dtype=np.int64))
        draw = noise(seed, "popular", user[:, None], position[:, None], np.arange(8 * n)[None])
        popular = np.searchsorted(weight, (draw % np.uint64(weight[-1])).astype(np.int64), side="right")
        uniform = self.unseen.item(user, sample_ranks(self.unseen.count[user], n, seed, user, position))
        items = np.concatenate([popular, uniform], axis=1)  # (B, 8n + n)
        order = np.argsort(items, axis=1, kind="stable")
        ordered = np.take_along_axis(items, order, axis=1)
        repeats = np.zeros(items.shape, dtype=bool)
        np.put_along_axis(repeats, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
        good = ~repeats & ~self.unseen.met(user, items)
        first = np.argsort(~good, axis=1, kind="stable")[:, :n]
        return np.take_along_axis(items, first, axis=1)


class Unseen:
    """Each user's unseen items, as ranks 0 ... count-1, without ever listing them.

    ``pairs``: (P,) codes ``user * n_items + item`` of all that users have met, in any order, repeats allowed.
    """

    def __init__(self, pairs: Array, n_users: int, n_items: int) -> None:
        self.pairs = pairs = pairs[_first(pairs)]
        user, item = np.divmod(pairs, n_items)
        lengths = np.bincount(user, minlength=n_users)
        self.n_items = n_items
        self.count = n_items - lengths  # (U,)
        self.starts = np.cumsum(lengths) - lengths
        # before a user's j-th met item (in item order) lie item - j unseen ones; user * (n_items + 1) keeps users apart
        self.before = user * (n_items + 1) + item - (np.arange(len(pairs)) - self.starts[user])

    def item(self, user: Array, rank: Array) -> Array:
        """Item codes ``(B, n)`` of the unseen items at ``rank`` ``(B, n)`` of users ``(B,)``."""
        key = user[:, None] * (self.n_items + 1) + rank
        met = np.searchsorted(self.before, key.ravel(), side="right").reshape(key.shape) - self.starts[user][:, None]
        return rank + met

    def met(self, user: Array, items: Array) -> Array:
        """Whether users ``(B,)`` have met items ``(B, n)``."""
        key = user[:, None] * self.n_items + items
        place = np.minimum(np.searchsorted(self.pairs, key), len(self.pairs) - 1)
        return self.pairs[place] == key


def sample_ranks(count: Array, n: int, seed: int, user: Array, position: Array) -> Array:
    """``(B, n)`` distinct whole numbers below ``count`` ``(B,)`` a row; every subset is equally likely (R. Floyd)."""
    chosen = np.empty((len(count), n), dtype=np.int64)
    for j in range(n):
        top = count - n + j
        draw = (noise(seed, "negative", user, position, j) % (top + 1).astype(np.uint64)).astype(np.int64)
        taken = (chosen[:, :j] == draw[:, None]).any(axis=1)
        chosen[:, j] = np.where(taken, top, draw)
    return chosen


def noise(seed: int, purpose: str, *keys: Array | int) -> Array:
    """Uniform uint64 for every combination of keys (broadcast): splitmix64 over seed, purpose and keys."""
    start = int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:8], "big")
    state = np.array(start, dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic is meant modulo 2^64
        for key in keys:
            state = (state ^ np.asarray(key).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def candidate_hash(tasks: pl.DataFrame) -> str:
    """Hex digest of task ids, candidates and labels, in the order of rows; the same on every machine."""
    digest = hashlib.sha256()
    update_hash(digest, tasks)
    return digest.hexdigest()[:16]


def update_hash(digest: Any, tasks: pl.DataFrame) -> None:
    """Add a chunk of tasks to a hashlib digest; chunks in order give the hash of the whole."""
    lines = tasks.select(
        pl.concat_str(
            "task_id",
            pl.col("candidates").list.join("\x1f"),
            pl.col("labels").cast(pl.List(pl.String)).list.join(""),
            separator="\x1e",
        )
    ).to_series()
    digest.update("".join(f"{line}\n" for line in lines).encode())


def _roles(user: Array, time: Array, position: Array, lengths: Array, options: PrepareOptions) -> tuple[Array, Array]:
    """Each interaction's split (-1 none, 0 train, 1 validation, 2 test) and whether it belongs to training."""
    limit = options.max_train_targets or len(user)
    from_end = lengths[user] - 1 - position
    split = np.full(len(user), -1)
    if options.protocol == "strict":
        training = from_end >= 2
        split[training & (from_end < 2 + limit)] = TRAIN
        split[from_end == 1] = VALIDATION
        split[from_end == 0] = TEST
    elif options.protocol == "paper":
        n_users = len(lengths)
        start, end = (n_users * fold // options.folds for fold in (options.fold, options.fold + 1))
        order = np.argsort(noise(options.seed, "fold", np.arange(n_users)), kind="stable")
        group = np.full(n_users, TRAIN)
        group[np.roll(order, -start)[: end - start]] = TEST
        group[np.roll(order, -end)[: -(-n_users // 10)]] = VALIDATION  # a tenth, whatever the folds
        training = group[user] == TRAIN
        split[from_end == 0] = group[user][from_end == 0]
    else:
        moments = np.sort(time)
        first, second = moments[int(0.8 * len(moments))], moments[int(0.9 * len(moments))]
        training = time < first
        known = np.bincount(user[training], minlength=len(lengths))[user]
        split[training & (known - position <= limit)] = TRAIN
        for within, code in (((time >= first) & (time < second), VALIDATION), (time >= second, TEST)):
            new = np.ones(len(user), dtype=bool)  # the user's first interaction in the window
            new[1:] = (user[1:] != user[:-1]) | ~within[:-1]
            split[within & new] = code
    return split, training


def _first(values: Array) -> Array:
    """Where each value stands first, in order of values (np.unique is several times slower)."""
    order = np.argsort(values, kind="stable")
    new = np.ones(len(values), dtype=bool)
    new[1:] = values[order[1:]] != values[order[:-1]]
    return order[new]


def _codes(ids: pl.Series, values: pl.Series) -> Array:
    return ids.cast(pl.Enum(values)).to_physical().to_numpy().astype(np.int64)


def _ranges(starts: Array, lengths: Array) -> Array:
    """Concatenate the ranges start ... start + length - 1."""
    offsets = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - offsets, lengths)


def _lists(values: pl.Series, lengths: Array) -> pl.Series:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    lists = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), values.to_arrow())
    made = pl.from_arrow(lists)
    assert isinstance(made, pl.Series)
    return made
