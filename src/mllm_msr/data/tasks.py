"""From a cleaned log to ranking tasks: which interactions are targets, and which items stand beside each.

Everything random is a hash of (seed, user, position, counter), so tasks are the same on any number of threads, in any
chunk size, and negatives of one user do not move when another is added at the end of the alphabet. Nothing loops over
users.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from mllm_msr.data.coded_log import ROW, Array, CodedLog, by_user_and_time, code, user_starts
from mllm_msr.data.negatives import NegativeSampler, noise
from mllm_msr.records.sections import PrepareOptions

SPLITS = ("train", "validation", "test")
TRAIN, VALIDATION, TEST = 0, 1, 2
CHUNK = 3_000_000  # list entries (history + candidates) built at a time: a few hundred MB as text


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
    """Who is asked what, over a log in parts: what must be n_training of all of them before any task is made.

    ``counts``: training interactions by item code; ``report``: what was counted while planning. Build with :meth:`of`
    or :meth:`of_log`.
    """

    log: CodedLog
    options: PrepareOptions
    rules: Any
    counts: Array
    report: dict[str, Any]

    @classmethod
    def of(cls, interactions: pl.DataFrame, options: PrepareOptions, seen: pl.DataFrame | None = None) -> "TaskPlan":
        """Plan a small log, its rows in any order of users; ``seen`` as in :func:`make_tasks`."""
        log = CodedLog.of(interactions.lazy())
        rows = log.load(0)
        log.store(0, rows[by_user_and_time(rows)])
        if seen is not None and len(seen):
            cut = np.zeros(len(seen), ROW)
            for name, ids in (("user", log.users), ("item", log.items)):
                cut[name] = seen.select(code(f"{name}_id", ids)).to_series().to_numpy()
            log.store(0, cut, "seen")
        return cls.of_log(log, options)

    @classmethod
    def of_log(cls, log: CodedLog, options: PrepareOptions) -> "TaskPlan":
        """Decide roles by ``options.protocol``; raises ValueError when there is no task at all."""
        plan = cls(log, options, _rules(log, options), np.zeros(len(log.items), dtype=np.int64), {})
        report: Counter[str] = Counter()
        for part in plan._parts():
            plan.counts += np.bincount(part.item[part.training], minlength=len(log.items))
            report.update(part.report)
        plan.report = dict(report)
        if not any(report[f"{name}_tasks"] for name in SPLITS):
            reasons = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in plan.report.items() if count)
            raise ValueError(
                f"no ranking task is left ({reasons}): lower min_history or n_negatives, or bring more data"
            )
        return plan

    @property
    def popularity(self) -> pl.DataFrame:
        """item_id, count: training interactions of every item of the catalogue, zero included."""
        return pl.DataFrame({"item_id": self.log.items, "count": pl.Series(self.counts, dtype=pl.Int64)})

    def chunks(self, entries: int = CHUNK) -> Iterator[pl.DataFrame]:
        """Tasks by user and position, in tables of about ``entries`` list entries; the cut does not change them."""
        for tasks, _, _ in self.coded_chunks(entries):
            yield self.decode(tasks)

    def coded_chunks(self, entries: int = CHUNK) -> Iterator[tuple[pl.DataFrame, Array, Array]]:
        """The same with numbers for ids, and with them all rows (``ROW``) of some users: the log's and those seen.

        Every user is in one chunk, also one without a task.
        """
        for part in self._parts():
            targets = np.flatnonzero(part.split >= 0)
            user = part.user[targets]
            first = np.flatnonzero(np.diff(user, prepend=-1))  # each user's first target
            chunk = (np.cumsum(part.position[targets] + part.width(targets)) // entries)[first]
            cuts = first[1:][np.diff(chunk) > 0]
            bounds = [0, *user[cuts], int(part.user[-1]) + 1]
            for rows, start, end in zip(np.split(targets, cuts), bounds, bounds[1:], strict=False):
                logged, seen = (_of(kind, start + part.first_user, end + part.first_user) for kind in part.rows)
                yield part.tasks(rows, self.log.users, self.counts), logged, seen

    def decode(self, tasks: pl.DataFrame) -> pl.DataFrame:
        """Coded tasks with their ids."""
        lists = {
            name: _lists(self.log.items.gather(tasks[name].explode(empty_as_null=False)), tasks[name].list.len())
            for name in ("history", "candidates")
        }
        return tasks.with_columns(self.log.users.gather(tasks["user_id"]).alias("user_id"), **lists)

    def _parts(self) -> Iterator["Part"]:
        for number in range(self.log.n_parts):
            rows = self.log.load(number)
            if len(rows):
                yield Part(rows, self.log.load(number, "seen"), len(self.log.items), self.options, self.rules)


class Part:
    """The rows of some users with their roles, and what is needed to draw negatives.

    ``user`` (from ``first_user``), ``item``, ``time``: by user, time and input order; ``position``: place in the user's
    sequence; ``split``: 0 train, 1 validation, 2 test target, -1 none; ``training``: counts for popularity.
    """

    def __init__(self, rows: Array, seen: Array, n_items: int, options: PrepareOptions, rules: Any) -> None:
        self.options, self.rows, self.first_user = options, (rows, seen), int(rows["user"][0])
        self.user, self.item = rows["user"].astype(np.int64) - self.first_user, rows["item"].astype(np.int64)
        self.time = rows["time"].copy()
        n_users = int(self.user[-1]) + 1
        lengths = np.bincount(self.user, minlength=n_users)
        self.position = np.arange(len(rows)) - (np.cumsum(lengths) - lengths)[self.user]
        split, self.training = _roles(rows, self.position, lengths[self.user], options, rules)

        pairs = self.user * n_items + self.item
        cut = (seen["user"].astype(np.int64) - self.first_user) * n_items + seen["item"]
        self.sampler = NegativeSampler(np.concatenate([pairs, cut]), n_users, n_items)
        least = 1 if options.negatives == "all" else options.n_negatives
        wanted = np.where(split == TRAIN, options.n_train_negatives, least)
        refusals = {  # a target may be refused for several reasons; the first counts
            "targets_with_short_history": self.position < options.min_history,
            "targets_already_in_history": _repeated(pairs),
            "targets_with_too_few_unseen_items": self.sampler.available[self.user] < wanted,
        }
        self.report: dict[str, int] = {}
        for name, refused in refusals.items():
            self.report[name] = int((refused & (split >= 0)).sum())
            split = np.where(refused, -1, split)
        self.split = split
        tied = np.zeros(len(rows), dtype=bool)  # another item at the same moment before it: input order decided
        tied[1:] = (self.user[1:] == self.user[:-1]) & (self.time[1:] == self.time[:-1])
        for number, name in enumerate(SPLITS):
            self.report[f"{name}_tasks"] = int((split == number).sum())
            self.report[f"{name}_targets_tied_in_time"] = int(((split == number) & tied).sum())
        self.report["training_interactions"] = int(self.training.sum())

    def width(self, rows: Array) -> Array:
        """Candidates of each target: itself and its negatives, of which a user has few left under "all" only."""
        options = self.options
        held_out = np.minimum(self.sampler.available[self.user[rows]], options.n_negatives)
        return 1 + np.where(self.split[rows] == TRAIN, options.n_train_negatives, held_out)

    def tasks(self, rows: Array, users: pl.Series, counts: Array) -> pl.DataFrame:
        """The tasks of some targets, ids as numbers."""
        position, width = self.position[rows], self.width(rows)
        candidates = np.empty(width.sum(), dtype=np.uint32)
        labels = np.empty(width.sum(), dtype=np.int64)
        starts = np.cumsum(width) - width
        for count in np.unique(width):
            of_width = np.flatnonzero(width == count)
            slots = starts[of_width][:, None] + np.arange(count)
            candidates[slots], labels[slots] = self._candidates(rows[of_width], int(count) - 1, counts)
        history = _ranges(rows - position, position)
        user = pl.Series(self.user[rows] + self.first_user, dtype=pl.UInt32)
        return pl.DataFrame(
            {
                "task_id": users.gather(user) + ":" + pl.Series(position).cast(pl.String),
                "split": pl.Series(SPLITS).gather(self.split[rows]),
                "user_id": user,
                "history": _lists(pl.Series(self.item[history], dtype=pl.UInt32), position),
                "cutoff": self.time[rows],
                "candidates": _lists(pl.Series(candidates), width),
                "labels": _lists(pl.Series(labels), width),
                "history_length": position,
                "target_train_count": counts[self.item[rows]],
            }
        )

    def _candidates(self, rows: Array, n: int, counts: Array) -> tuple[Array, Array]:
        """Item codes and labels, both ``(rows, 1 + n)``, the target at a random place."""
        seed, user, position = self.options.seed, self.user[rows] + self.first_user, self.position[rows]
        if self.options.negatives == "popularity" and self.split[rows[0]] != TRAIN:
            negatives = self.sampler.popular(self.user[rows], n, counts, seed, user, position)
        else:
            negatives = self.sampler.uniform(self.user[rows], n, seed, user, position)
        items = np.concatenate([self.item[rows][:, None], negatives], axis=1)
        keys = noise(seed, "order", user[:, None], position[:, None], np.arange(n + 1)[None])
        order = np.argsort(keys, axis=1, kind="stable")
        return np.take_along_axis(items, order, axis=1), (order == 0).astype(np.int64)


def candidate_hash(tasks: pl.DataFrame) -> str:
    """Hex digest of task ids, candidates and labels, in the order of rows; the same on every machine."""
    digest = hashlib.sha256(hash_lines(tasks).str.join("").item().encode())
    return digest.hexdigest()[:16]


def hash_lines(tasks: pl.DataFrame) -> pl.Series:
    """What a task adds to the hash; a chunk's lines after another's give the hash of the whole."""
    labels = pl.col("labels").cast(pl.List(pl.String)).list.join("")
    return tasks.select(
        pl.concat_str(
            "task_id", pl.lit("\x1e"), pl.col("candidates").list.join("\x1f"), pl.lit("\x1e"), labels, pl.lit("\n")
        )
    ).to_series()


def _rules(log: CodedLog, options: PrepareOptions) -> Any:
    """What the protocol needs to know of the whole log: each user's split (U,), or the two moments that part it."""
    if options.protocol == "paper":
        n_users = len(log.users)
        start, end = (n_users * fold // options.folds for fold in (options.fold, options.fold + 1))
        order = np.argsort(noise(options.seed, "fold", np.arange(n_users)), kind="stable")
        group = np.full(n_users, TRAIN, dtype=np.int8)
        group[np.roll(order, -start)[: end - start]] = TEST
        group[np.roll(order, -end)[: -(-n_users // 10)]] = VALIDATION  # a tenth, whatever the folds
        return group
    if options.protocol == "global-cutoff":
        moments = np.concatenate([rows["time"] for rows in log.parts()])
        places = [int(0.8 * len(moments)), int(0.9 * len(moments))]
        moments.partition(places)
        return moments[places]
    return None


def _roles(rows: Array, position: Array, length: Array, options: PrepareOptions, rules: Any) -> tuple[Array, Array]:
    """Each row's split (-1 none, 0 train, 1 validation, 2 test) and whether it belongs to training."""
    limit = options.max_train_targets or len(rows)
    from_end = length - 1 - position
    split = np.full(len(rows), -1, dtype=np.int8)
    if options.protocol == "strict":
        training = from_end >= 2
        split[training & (from_end < 2 + limit)] = TRAIN
        split[from_end == 1] = VALIDATION
        split[from_end == 0] = TEST
    elif options.protocol == "paper":
        group = rules[rows["user"]]
        training = group == TRAIN
        split[from_end == 0] = group[from_end == 0]
    else:
        first, second = rules
        user, time = rows["user"], rows["time"]
        training = time < first
        starts = user_starts(user)
        n_training = np.repeat(np.add.reduceat(training, starts[:-1], dtype=np.int64), np.diff(starts))
        split[training & (n_training - position <= limit)] = TRAIN
        for within, code in (((time >= first) & (time < second), VALIDATION), (time >= second, TEST)):
            new = np.ones(len(rows), dtype=bool)  # the user's first interaction in the window
            new[1:] = (user[1:] != user[:-1]) | ~within[:-1]
            split[within & new] = code
    return split, training


def _repeated(pairs: Array) -> Array:
    """Which values have stood earlier."""
    ordered = np.sort(pairs)  # many times faster than the order itself, and mostly enough
    if (ordered[1:] != ordered[:-1]).all():
        return np.zeros(len(pairs), dtype=bool)
    order = np.argsort(pairs, kind="stable")
    repeated = np.zeros(len(pairs), dtype=bool)
    repeated[order[1:]] = pairs[order[1:]] == pairs[order[:-1]]
    return repeated


def _of(rows: Array, start: int, end: int) -> Array:
    """The rows of the users from ``start`` to before ``end``; ``rows`` by user."""
    return rows[slice(*np.searchsorted(rows["user"], [start, end]))]


def _ranges(starts: Array, lengths: Array) -> Array:
    """Concatenate the ranges start ... start + length - 1."""
    offsets = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - offsets, lengths)


def _lists(values: pl.Series, lengths: Array | pl.Series) -> pl.Series:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    lists = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), values.to_arrow())
    made = pl.from_arrow(lists)
    assert isinstance(made, pl.Series)
    return made
