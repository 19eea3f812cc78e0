"""Ranking metrics: per user first, then the mean over users with a bootstrap interval; ties by expectation.

Candidates with equal scores have no order, so every metric is the exact expected value under a uniformly random order
of equals: a model that scores everything alike gets what guessing gets, whatever order its candidates came in.

Within one user, let the candidates fall into groups of equal score, best first. For a group, ``n`` is its size, ``p``
its positives, ``a`` how many candidates stand above it. Every formula below needs only these three numbers, so one
sort serves all metrics. Metrics go by name: ``auc`` (pooled), ``auc_user``, ``map``, and ``hr@K``, ``mrr@K``,
``ndcg@K`` for any K. Letters: N rows (user-candidate pairs), U users, P positives.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import polars as pl

Array = np.ndarray
Values = Sequence | Array | pl.Series
Columns = Mapping[str, Array]  # metric to (U,) values
METRICS = ("auc", "auc_user", "hr@1", "hr@5", "hr@10", "mrr@5", "ndcg@5", "ndcg@10", "map")
LABELS = {"auc_user": "AUC per user"}  # for readers, where capitals do not do
NORMAL_FROM = 100_000  # users; from here on a bootstrapped mean is normal to more digits than anyone prints


def ranking_metrics(
    user_ids: Values,
    labels: Values,
    logits: Values,
    n_bootstrap: int = 1000,
    seed: int = 0,
    metrics: Sequence[str] = METRICS,
) -> dict[str, dict]:
    """Metrics with 95 % percentile bootstrap intervals over users.

    Args: ``user_ids`` (N,) any hashable ids, rows in any order; ``labels`` (N,) of 0/1; ``logits`` (N,) real scores,
    higher is better. Any number of candidates and positives per user.

    Returns ``{metric: {"value": float, "ci95": [low, high]}}``. ``auc`` pools all rows, whoever they belong to; the
    others are means over users. A user without positives (or, for ``auc_user``, without negatives) has no value and
    does not count in that mean. With equal ``seed`` and equal users two calls draw the same resamples, so their
    intervals can be compared.

    Intervals resample users, never rows. Means are resampled as they are. The pooled AUC is resampled by its
    first-order expansion in the users' weights (the clustered form of DeLong's components; Obuchowski, Biometrics
    1997): with ``h_u`` the wins of u's positives over all negatives and ``g_u`` the wins of all positives over u's
    negatives, ``psi_u = (h_u + g_u) / (P N) - auc (P_u / P + N_u / N)`` sums to zero and a resample with weights w has
    ``auc + sum_u w_u psi_u``. From ``NORMAL_FROM`` users on, the normal limit of the same bootstrap is computed
    directly. Intervals are clipped to [0, 1].

    Raises ``ValueError`` for NaN or missing values (naming the user), labels other than 0/1, unequal lengths, no rows,
    an unknown metric, or a metric that no user has.

    >>> result = ranking_metrics(["a", "a", "a", "b", "b", "b"], [1, 0, 0, 0, 1, 0], [2.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    >>> result["hr@1"]["value"]  # a: surely on top; b: tied for the top with one other
    0.75
    >>> result["auc"]["value"]  # 2 positives x 4 negatives: 4 wins; 2 wins and 2 ties
    0.875
    >>> result["hr@1"]["ci95"]
    [0.5, 1.0]
    """
    return estimates(user_columns(user_ids, labels, logits, metrics), n_bootstrap, seed)


def paired_differences(
    user_ids: Values,
    labels: Values,
    logits: Values,
    others: Values,
    n_bootstrap: int = 2000,
    seed: int = 0,
    metrics: Sequence[str] = METRICS,
) -> dict[str, dict]:
    """Every metric under ``logits`` less that under ``others``, on the same rows: see :func:`paired`.

    Arguments and errors as for :func:`ranking_metrics`; ``others`` (N,) are a second ranker's scores of the same rows.

    >>> users, labels = ["a", "a", "b", "b"], [1, 0, 1, 0]
    >>> paired_differences(users, labels, [1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0])["hr@1"]["difference"]
    1.0
    """
    ours, theirs = (user_columns(user_ids, labels, scores, metrics) for scores in (logits, others))
    return paired(ours, theirs, n_bootstrap, seed)


def user_columns(
    user_ids: Values, labels: Values, logits: Values, metrics: Sequence[str] = METRICS
) -> dict[str, Array]:
    """``{metric: (U,)}``, users sorted by id: values whose mean over users is the metric, NaN where undefined.

    The mean over resampled users is the resampled metric; for the pooled AUC to first order, see
    :func:`ranking_metrics`. So columns of several rankers of the same users may be subtracted or averaged first.

    >>> user_columns(["b", "b", "a", "a"], [1, 0, 0, 1], [0.5, 0.5, 3.0, 1.0], ["hr@1"])["hr@1"].tolist()
    [0.0, 0.5]
    """
    rows = Rows.read(user_ids, labels, logits)
    groups = TieGroups.of(rows)
    return {name: _pooled_auc(rows) if name == "auc" else metric_column(groups, name) for name in metrics}


def estimates(columns: Columns, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, dict]:
    """``{metric: {"value": float, "ci95": [low, high]}}`` of :func:`user_columns`; ValueError for one without values.

    >>> estimates({"hr@1": np.array([1.0, 0.0, np.nan])})["hr@1"]["value"]
    0.5
    """
    for name, column in columns.items():
        if np.isnan(column).all():
            raise ValueError(f"{name} is undefined for every user: each needs a positive (and, for AUC, a negative)")
    values = np.stack(list(columns.values()), axis=1)
    low, high = np.clip(np.nanquantile(resampled_means(values, n_bootstrap, seed), [0.025, 0.975], axis=0), 0.0, 1.0)
    return {
        name: {"value": float(value), "ci95": [float(low[i]), float(high[i])]}
        for i, (name, value) in enumerate(zip(columns, np.nanmean(values, axis=0), strict=True))
    }


def paired(ours: Columns, theirs: Columns, n_bootstrap: int = 2000, seed: int = 0) -> dict[str, dict]:
    """Every metric of ``ours`` less that of ``theirs``, columns of the same users: a paired bootstrap over users.

    Returns ``{metric: {"difference": float, "ci95": [low, high], "p": float}}``. Each resample draws users once and
    takes both rankers' means over them. ``p`` is two-sided: twice the share of resamples in which the difference does
    not have its sign, (count + 1) / (n_bootstrap + 1), so never 0 and at most 1. It is not corrected for the number of
    rankers that are compared.
    """
    values = np.stack([ours[name] - theirs[name] for name in ours], axis=1)
    means = resampled_means(values, n_bootstrap, seed)
    observed, (low, high) = np.nanmean(values, axis=0), np.nanquantile(means, [0.025, 0.975], axis=0)
    below, above = ((sign * means <= 1e-12).sum(axis=0) for sign in (1, -1))
    p = np.minimum(1.0, 2 * (np.minimum(below, above) + 1) / (len(means) + 1))
    return {
        name: {"difference": float(observed[i]), "ci95": [float(low[i]), float(high[i])], "p": float(p[i])}
        for i, name in enumerate(ours)
    }


def list_metric(name: str, labels: Values, scores: Values) -> float:
    """One metric but the pooled AUC of one list of candidates; NaN where it is undefined.

    >>> list_metric("hr@1", [1, 0, 0, 0], [0.0, 0.0, 0.0, 0.0])
    0.25
    """
    return float(metric_column(TieGroups.of(Rows.read(["the list"] * len(labels), labels, scores)), name)[0])


@dataclass(frozen=True)
class Rows:
    """Checked input. ``user`` (N,) indexes ``users``; ``level`` (N,) is the dense rank of the score, best first."""

    users: pl.Series
    user: Array
    label: Array
    level: Array

    @classmethod
    def read(cls, user_ids: Values, labels: Values, logits: Values) -> "Rows":
        label, logit = np.asarray(labels), np.asarray(logits)
        if not len(user_ids) == len(label) == len(logit):
            raise ValueError(f"lengths differ: {len(user_ids)} user ids, {len(label)} labels, {len(logit)} scores")
        if not len(user_ids):
            raise ValueError("there is nothing to evaluate: no rows")
        if not np.issubdtype(logit.dtype, np.floating):
            logit = logit.astype(np.float64)  # None becomes NaN
        users, user = _users(user_ids)
        if np.isnan(logit).any():
            row, count = int(np.isnan(logit).argmax()), int(np.isnan(logit).sum())
            raise ValueError(
                f"user {users[int(user[row])]!r}: the score in row {row} is missing or NaN ({count} such rows in all); "
                "score every candidate before evaluating"
            )
        wrong = ~np.isin(label, (0, 1))
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(f"user {users[int(user[row])]!r}: the label in row {row} is {label[row]}, expected 0 or 1")
        level = np.unique(-logit, return_inverse=True)[1]
        return cls(users, user, label.astype(bool), level)


def _users(user_ids: Values) -> tuple[pl.Series, Array]:
    """The distinct ids, sorted, and each row's (N,) place among them; ValueError for a row without an id."""
    try:
        ids = pl.Series("user_id", user_ids)
        plain = not ids.dtype.is_nested() and ids.dtype != pl.Object
    except (TypeError, pl.exceptions.PolarsError):  # of several types
        plain = False
    if not plain:  # any hashable will do
        order = {user: place for place, user in enumerate(sorted(set(user_ids), key=repr))}
        if None in order:
            raise ValueError(f"row {list(user_ids).index(None)} has no user id")
        return pl.Series("user_id", list(order), pl.Object), np.array([order[user] for user in user_ids])
    ids = ids.cast(pl.String) if ids.dtype in (pl.Categorical, pl.Enum) else ids
    ids = ids.fill_nan(None) if ids.dtype.is_float() else ids
    if ids.null_count():
        raise ValueError(f"row {ids.is_null().arg_max()} has no user id")
    users = ids.unique().sort()
    return users, users.search_sorted(ids).to_numpy().astype(np.int64)


@dataclass(frozen=True)
class TieGroups:
    """Groups of equal score that hold a positive, by user and then best first; see the module for n, p and a."""

    user: Array
    n: Array
    p: Array
    a: Array
    positives_above: Array
    candidates: Array  # (U,)
    positives: Array  # (U,)

    @classmethod
    def of(cls, rows: Rows) -> "TieGroups":
        key = rows.user * (int(rows.level.max()) + 1) + rows.level
        order = np.argsort(key)
        key = key[order]
        start = np.flatnonzero(np.concatenate(([True], key[1:] != key[:-1])))
        size = np.diff(start, append=len(key))
        before = np.concatenate(([0], np.cumsum(rows.label[order])))
        p = before[start + size] - before[start]
        start, size, p = start[p > 0], size[p > 0], p[p > 0]
        user = rows.user[order[start]]
        candidates = np.bincount(rows.user, minlength=len(rows.users))
        first = np.concatenate(([0], np.cumsum(candidates)[:-1]))[user]
        positives = np.bincount(user, weights=p, minlength=len(rows.users))
        return cls(user, size, p, start - first, before[start] - before[first], candidates, positives)

    @classmethod
    def of_places(cls, first: Array, last: Array, candidates: Array) -> "TieGroups":
        """Of users with one positive each, which is tied between two places (U,), from 1."""
        none, ones = np.zeros(len(first), dtype=np.int64), np.ones(len(first), dtype=np.int64)
        return cls(np.arange(len(first)), last - first + 1, ones, first - 1, none, candidates, ones)

    def sum(self, values: Array) -> Array:
        """(U,): the sum of a value per group over each user's groups; NaN for users without positives."""
        total = np.bincount(self.user, weights=values, minlength=len(self.candidates))
        return np.where(self.positives > 0, total, np.nan)

    @property
    def best(self) -> tuple[Array, Array, Array, Array]:
        """Of the users with a positive: user, and n, p and a of the best group with one."""
        is_best = np.concatenate(([True], self.user[1:] != self.user[:-1]))[: len(self.user)]
        return self.user[is_best], self.n[is_best], self.p[is_best], self.a[is_best]

    def of_best(self, values: Array) -> Array:
        """(U,): a value per user with a positive; NaN for the others."""
        result = np.full(len(self.candidates), np.nan)
        result[self.positives > 0] = values
        return result


def metric_column(groups: TieGroups, name: str) -> Array:
    """(U,) values of one metric but the pooled AUC, by its name; a cut beyond the longest list is at its end."""
    check_metric(name, pooled=())
    family, _, cut = name.partition("@")
    return _AT_K[family](groups, min(int(cut), groups.candidates.max(initial=1))) if cut else _OF_LISTS[name](groups)


def check_metric(name: str, pooled: Sequence[str] = ("auc",)) -> None:
    """Raise ValueError for a name that is no metric's."""
    family, at, cut = name.partition("@")
    if family not in _AT_K or not re.fullmatch("[1-9][0-9]*", cut) if at else name not in {*pooled, *_OF_LISTS}:
        known = ", ".join(["auc", *_OF_LISTS, *(f"{family}@K" for family in _AT_K)])
        raise ValueError(f"unknown metric {name!r}: known are {known} for any K")


def metric_label(name: str) -> str:
    """A metric's name for readers, such as NDCG@10 or AUC per user."""
    return LABELS.get(name, name.upper())


def missed_by_rank(groups: TieGroups, k: int) -> Iterator[Array]:
    """For every rank from 1 to k: the probability that no positive stands so high, a value per user with a positive."""
    _, n, p, a = groups.best
    missed = np.ones(len(n))
    for rank in range(k):
        place = rank - a  # within the group, from 0
        chance = np.maximum(n - p - place, 0) / np.maximum(n - place, 1)
        missed = np.where((place >= 0) & (place < n), missed * chance, missed)
        yield missed


def _auc_user(groups: TieGroups) -> Array:
    """The share of a list's positive-negative pairs in the right order, ties one half.

    ``sum over groups of p (negatives below + negatives tied / 2), divided by P N``. NaN without a positive or without a
    negative.

    >>> list_metric("auc_user", [1, 0, 0, 1], [0.9, 0.1, 0.4, 0.4])  # 2 + 1.5 of 4 pairs
    0.875
    """
    negatives = groups.candidates - groups.positives
    beaten = negatives[groups.user] - (groups.a - groups.positives_above) - (groups.n - groups.p) / 2
    pairs = groups.positives * negatives
    return np.divide(groups.sum(groups.p * beaten), pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def _hit_rate(groups: TieGroups, k: int) -> Array:
    """The probability that at least one positive is among the first k.

    Only the best group with a positive matters; with ``m = min(k - a, n)`` places left for it:
    ``1 - C(n - p, m) / C(n, m)``. 1 with a positive and k at least the list's length; NaN without positives.

    >>> list_metric("hr@2", [1, 0, 0], [0.0, 1.0, 0.0])  # one place left for two equals
    0.5
    """
    *_, missed = missed_by_rank(groups, k)
    return groups.of_best(1.0 - missed)


def _reciprocal_rank(groups: TieGroups, k: int) -> Array:
    """The expected 1 / rank of the first positive, counted as 0 beyond rank k.

    ``sum over r = 1 .. k of (HR@r - HR@(r - 1)) / r``, as the difference is the chance that the first positive stands
    at rank r. NaN without positives.

    >>> round(list_metric("mrr@5", [0, 1, 0], [2.0, 1.0, 1.0]), 5)  # rank 2 or 3 alike: (1/2 + 1/3) / 2
    0.41667
    """
    value, before = np.zeros(1), np.ones(1)
    for rank, missed in enumerate(missed_by_rank(groups, k), 1):
        value, before = value + (before - missed) / rank, missed
    return groups.of_best(value)


def _ndcg(groups: TieGroups, k: int) -> Array:
    """NDCG@k with binary gains and discount ``1 / log2(1 + rank)``.

    A group gives ``p / n`` times the discounts of the places it covers up to k; the sum is divided by that of the best
    order, ``min(P, k)`` positives first. NaN without positives.

    >>> round(list_metric("ndcg@5", [0, 1], [1.0, 0.0]), 6)  # 1 / log2(3)
    0.63093
    """
    gained = np.concatenate(([0.0], np.cumsum(1.0 / np.log2(np.arange(k) + 2.0))))  # by the first r places, r = 0 .. k
    covered = gained[np.minimum(groups.a + groups.n, k)] - gained[np.minimum(groups.a, k)]
    ideal = gained[np.minimum(groups.positives, k).astype(np.int64)]
    return groups.sum(groups.p / groups.n * covered) / np.where(ideal > 0, ideal, 1.0)


def _average_precision(groups: TieGroups) -> Array:
    """The mean over a list's positives of the share of positives among those ranked down to it; MAP's term.

    A positive at the j-th place of its group has, of ``n`` with ``p`` positives and ``q`` above the group, an expected
    ``q + 1 + (j - 1)(p - 1) / (n - 1)`` positives down to it, itself included; so a group gives
    ``p / n * sum over j = 1 .. n of (q + 1 + (j - 1)(p - 1) / (n - 1)) / (a + j)``, and the sum over groups is divided
    by P. The whole list counts, without a cut-off; with one positive it is the reciprocal rank. NaN without positives.

    >>> round(list_metric("map", [0, 1, 1], [3.0, 2.0, 1.0]), 5)  # (1/2 + 2/3) / 2
    0.58333
    """
    a, n, p = groups.a, groups.n, groups.p
    harmonic = np.concatenate(([0.0], np.cumsum(1.0 / np.arange(1, groups.candidates.max() + 1))))
    inverse = harmonic[a + n] - harmonic[a]  # sum of 1 / (a + j); and (j - 1) / (a + j) = 1 - (a + 1) / (a + j)
    before = n - (a + 1) * inverse
    gained = (groups.positives_above + 1) * inverse + (p - 1) / np.maximum(n - 1, 1) * before
    return groups.sum(p / n * gained) / np.where(groups.positives > 0, groups.positives, 1.0)


_OF_LISTS: dict[str, Any] = {"auc_user": _auc_user, "map": _average_precision}
_AT_K: dict[str, Any] = {"hr": _hit_rate, "mrr": _reciprocal_rank, "ndcg": _ndcg}


def _pooled_auc(rows: Rows) -> Array:
    """(U,): the pooled AUC, to which each user's influence on it is added U times; influences sum to zero."""
    n_levels = int(rows.level.max()) + 1
    positive = np.bincount(rows.level[rows.label], minlength=n_levels)
    negative = np.bincount(rows.level, minlength=n_levels) - positive
    n_positive, n_negative = positive.sum(), negative.sum()
    if not n_positive or not n_negative:
        raise ValueError("the pooled AUC needs at least one positive and one negative row")
    negatives_below = n_negative - np.cumsum(negative) + negative / 2  # (levels,), best first, ties one half
    positives_above = np.cumsum(positive) - positive / 2
    value = float((positive * negatives_below).sum() / (n_positive * n_negative))
    wins = np.where(rows.label, negatives_below[rows.level], positives_above[rows.level])
    share = np.where(rows.label, 1.0 / n_positive, 1.0 / n_negative)
    weights = wins / (n_positive * n_negative) - value * share
    return value + len(rows.users) * np.bincount(rows.user, weights=weights, minlength=len(rows.users))


def resampled_means(values: Array, n_bootstrap: int, seed: int) -> Array:
    """``(n_bootstrap, M)``: the means of ``values`` (U, M) over resampled users, NaN left out."""
    defined = np.isfinite(values)
    n_users = len(values)
    if n_users >= NORMAL_FROM:  # the quantiles of the normal limit stand in for resamples
        reach = np.nanstd(values, axis=0) / np.sqrt(defined.sum(axis=0))
        normal = NormalDist()
        scores = np.array([normal.inv_cdf((i + 0.5) / n_bootstrap) for i in range(n_bootstrap)])
        return np.nanmean(values, axis=0) + reach * scores[:, None]
    rng = np.random.default_rng(seed)
    filled, weight = np.where(defined, values, 0.0), defined.astype(np.float64)
    means = np.empty((n_bootstrap, values.shape[1]))
    for b in range(n_bootstrap):
        drawn = np.bincount(rng.integers(0, n_users, n_users), minlength=n_users).astype(np.float64)
        count = drawn @ weight
        means[b] = np.divide(drawn @ filled, count, out=np.full_like(count, np.nan), where=count > 0)
    return means
