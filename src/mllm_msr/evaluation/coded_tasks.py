"""Ranking tasks in numbers, for rankers that work on arrays.

Items are 0 ... I - 1, their places in ``items.sort("item_id")``. Lists of different lengths, such as histories, lie one
after another in one array. Letters: U lists, T codes in all, S pieces, B lists of a batch, L places, N (task,
candidate) pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import polars as pl

from mllm_msr.evaluation.metrics import TieGroups, metric_column, user_columns

Array = np.ndarray
PADDING = -1  # after the last code of a padded list


def item_codes(ids: pl.Series, items: pl.DataFrame) -> Array:
    """Item ids as places in ``items.sort("item_id")``."""
    return ids.cast(pl.Enum(items["item_id"].sort())).to_physical().to_numpy().astype(np.int64)


@dataclass(frozen=True)
class CodedLists:
    """Lists of item codes: (T,) ``codes``, and (U + 1,) ``bounds``, where each list begins and the last one ends."""

    codes: Array
    bounds: Array

    @classmethod
    def of(cls, lists: pl.Series, items: pl.DataFrame) -> "CodedLists":
        """From a column of lists of item ids."""
        ends = lists.list.len().to_numpy().astype(np.int64).cumsum()
        return cls(item_codes(lists.explode(empty_as_null=False), items), np.concatenate([[0], ends]))

    @classmethod
    def of_log(cls, interactions: pl.DataFrame, items: pl.DataFrame) -> "CodedLists":
        """A list a user from ``user_id``, ``item_id`` rows, users and items in the order of their first rows."""
        return cls.of(interactions.group_by("user_id", maintain_order=True).agg("item_id")["item_id"], items)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def lengths(self) -> Array:
        """(U,): codes of each list."""
        return np.diff(self.bounds)

    @property
    def owner(self) -> Array:
        """(T,): the list that each code belongs to."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def last(self, most: int | None) -> "CodedLists":
        """The last ``most`` codes of each list; all for None."""
        if most is None or not len(self):
            return self
        kept = np.arange(len(self.codes)) >= np.repeat(self.bounds[1:] - most, self.lengths)
        return CodedLists(self.codes[kept], np.concatenate([[0], np.minimum(self.lengths, most).cumsum()]))

    def slice(self, begin: int, end: int) -> "CodedLists":
        """Lists ``begin`` ... ``end - 1``."""
        bounds = self.bounds[begin : end + 1]
        return CodedLists(self.codes[bounds[0] : bounds[-1]], bounds - bounds[0])

    def pick(self, lists: Array) -> "CodedLists":
        """The lists with these numbers, in their order."""
        lengths = self.lengths[lists]
        bounds = np.concatenate([[0], lengths.cumsum()])
        place = np.arange(bounds[-1]) + np.repeat(self.bounds[:-1][lists] - bounds[:-1], lengths)
        return CodedLists(self.codes[place], bounds)

    def padded(self, starts: Array, lengths: Array) -> Array:
        """(B, L): parts of ``codes``, ``PADDING`` after their ends; L is the longest, at least 1."""
        place = np.arange(max(int(lengths.max(initial=0)), 1))
        real = place < lengths[:, None]
        if not len(self.codes):
            return np.full(real.shape, PADDING)
        return np.where(real, self.codes[np.where(real, starts[:, None] + place, 0)], PADDING)

    def pieces(self, most: int) -> tuple[Array, Array]:
        """(S,) starts and (S,) lengths of pieces of 2 to ``most`` codes: lists cut from their ends into pieces that
        share one code with the next, so that each step from code to code is in exactly one.

        >>> starts, lengths = CodedLists(np.arange(6), np.array([0, 5, 6])).pieces(3)
        >>> starts.tolist(), lengths.tolist()
        ([2, 0], [3, 3])
        """
        count = np.maximum(-(-(self.lengths - 1) // (most - 1)), 0)
        nth = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
        ends = np.repeat(self.bounds[1:], count) - nth * (most - 1)
        starts = np.maximum(ends - most, np.repeat(self.bounds[:-1], count))
        return starts, ends - starts


class CodedTasks:
    """Tasks with item codes.

    Args:
        tasks: ``history``, ``candidates`` (lists of item ids), ``labels``.
        items: ``item_id`` of the whole catalogue.
    """

    def __init__(self, tasks: pl.DataFrame, items: pl.DataFrame) -> None:
        self.histories = CodedLists.of(tasks["history"], items)
        self.candidates = CodedLists.of(tasks["candidates"], items)
        self.labels = tasks["labels"].explode(empty_as_null=False).to_numpy()

    def __len__(self) -> int:
        return len(self.histories)

    def quality(self, values: Array) -> float:
        """Mean NDCG@5 over tasks of (N,) values."""
        owner, positives = self.candidates.owner, np.flatnonzero(self.labels)
        if np.array_equal(owner[positives], np.arange(len(self))):  # one each: no need to sort
            own = values[positives][owner]
            above, level = (np.bincount(owner[where], minlength=len(self)) for where in (values > own, values == own))
            return ndcg_at(5, above, level - 1)
        return float(np.nanmean(user_columns(owner, self.labels, values, ["ndcg@5"])["ndcg@5"]))

    def catalogue_places(
        self, scores: Callable[[CodedLists], Array], chosen: CodedLists | None = None, pairs: int = 10_000_000
    ) -> tuple[Array, Array]:
        """Where each task's first positive stands among all items but those that its user has chosen.

        Args:
            scores: (B, I) scores of the whole catalogue from B histories.
            chosen: what the users have chosen, the positive or not; the histories for None.
            pairs: about how many scores are in memory at a time.

        Returns: (U,) items with a higher score than the positive, and (U,) others with the same.
        """
        positive = np.flatnonzero(self.labels)
        users, first = np.unique(self.candidates.owner[positive], return_index=True)
        if len(users) < len(self):
            raise ValueError("a task without a positive has no place in the catalogue")
        targets, chosen = self.candidates.codes[positive[first]], chosen or self.histories
        above, equal = np.zeros(len(self), np.int64), np.zeros(len(self), np.int64)
        begin, step = 0, 1
        while begin < len(self):
            end = min(begin + step, len(self))
            values = scores(self.histories.slice(begin, end))
            above[begin:end], equal[begin:end] = count_above(values, targets[begin:end], chosen.slice(begin, end))
            begin, step = end, max(1, pairs // values.shape[1])
        return above, equal


def count_above(
    values: Array, targets: Array, left_out: CodedLists, counted: Array | None = None
) -> tuple[Array, Array]:
    """How many items have a higher value than the target (B,), and how many others have the same (B,).

    Args:
        values: (B, I), of every item; overwritten.
        targets: (B,) item codes.
        left_out: B lists of items that do not count; the target counts all the same.
        counted: (I,), the items that count beside the target; all for None.
    """
    if np.isnan(values).any():
        raise ValueError("a score of the catalogue is NaN")
    rows = np.arange(len(targets))
    own = values[rows, targets][:, None]
    values[left_out.owner, left_out.codes] = -np.inf
    values[rows, targets] = own[:, 0]
    if counted is None:
        return (values > own).sum(axis=1), (values == own).sum(axis=1) - 1
    kept = values[:, counted]
    return (kept > own).sum(axis=1), (kept == own).sum(axis=1) - counted[targets]


def ndcg_at(k: int, above: Array, equal: Array) -> float:
    """Mean NDCG@k of tasks of one positive each, from :meth:`CodedTasks.catalogue_places`; expected over ties. Of no
    task, 0.

    >>> round(ndcg_at(10, np.array([0, 1, 10]), np.array([0, 0, 0])), 4)  # 1, 1 / log2(3), 0
    0.5436
    """
    if not len(above):
        return 0.0
    last = above + equal + 1
    return float(metric_column(TieGroups.of_places(above + 1, last, last), f"ndcg@{k}").mean())
