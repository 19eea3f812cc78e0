"""Ranking metrics: per user first, then the mean over users with a bootstrap interval; ties by expectation.

Candidates with equal scores have no order, so every metric is the exact expected value under a uniformly random order
of equals: a model that scores everything alike gets what guessing gets, whatever order its candidates came in.

Within one user, let the candidates fall into groups of equal score, best first. For a group, ``n`` is its size, ``p``
its positives, ``a`` how many candidates stand above it. Every formula below needs only these three numbers, so one
sort serves all metrics. Letters: N rows (user-candidate pairs), U users, P positives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import polars as pl

Values = Sequence | np.ndarray | pl.Series
METRICS = ("auc", "auc_user", "hr@1", "hr@5", "hr@10", "mrr@5", "ndcg@5", "map")
NORMAL_FROM = 100_000  # users; from here on a bootstrapped mean is normal to more digits than anyone prints


def ranking_metrics(
    user_ids: Values, labels: Values, logits: Values, n_bootstrap: int = 1000, seed: int = 0
) -> dict[str, dict]:
    """All metrics of :data:`METRICS` with 95 % percentile bootstrap intervals over users.

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
    or a metric that no user has.

    >>> result = ranking_metrics(["a", "a", "a", "b", "b", "b"], [1, 0, 0, 0, 1, 0], [2.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    >>> result["hr@1"]["value"]  # a: surely on top; b: tied for the top with one other
    0.75
    >>> result["auc"]["value"]  # 2 positives x 4 negatives: 4 wins; 2 wins and 2 ties
    0.875
    >>> result["hr@1"]["ci95"]
    [0.5, 1.0]
    """
    return _with_intervals(user_columns(user_ids, labels, logits), n_bootstrap, seed)


def place_metrics(
    above: Values, equal: Values, candidates: Values, n_bootstrap: int = 1000, seed: int = 0
) -> dict[str, dict]:
    """The same for users of one positive each of whom only its place is known, as over a whole catalogue.

    Args: ``above`` (U,) candidates with a higher score; ``equal`` (U,) others with the same; ``candidates`` (U,) all
    of them, the positive included.

    Returns as :func:`ranking_metrics`, without the pooled AUC, for which places do not suffice.

    >>> found = place_metrics([0, 9], [0, 1], [100, 100])  # on top; tenth or eleventh
    >>> found["hr@1"]["value"], found["hr@10"]["value"]
    (0.5, 0.75)
    """
    a, ties, size = (np.asarray(values, dtype=np.int64) for values in (above, equal, candidates))
    if not len(a) or not len(a) == len(ties) == len(size) or (a + ties >= size).any() or (a < 0).any():
        raise ValueError("places: needs users, each with above + equal + 1 <= candidates")
    none, one = np.zeros(len(a), dtype=np.int64), np.ones(len(a), dtype=np.int64)
    return _with_intervals(_per_user(_Groups(np.arange(len(a)), ties + 1, one, a, none, size, one)), n_bootstrap, seed)


def _with_intervals(columns: dict[str, np.ndarray], n_bootstrap: int, seed: int) -> dict[str, dict]:
    for name, column in columns.items():
        if np.isnan(column).all():
            raise ValueError(f"{name} is undefined for every user: each needs a positive (and, for AUC, a negative)")
    values = np.stack(list(columns.values()), axis=1)
    low, high = np.clip(np.nanquantile(resampled_means(values, n_bootstrap, seed), [0.025, 0.975], axis=0), 0.0, 1.0)
    return {
        name: {"value": float(value), "ci95": [float(low[i]), float(high[i])]}
        for i, (name, value) in enumerate(zip(columns, np.nanmean(values, axis=0), strict=True))
    }


def paired_differences(
    user_ids: Values, labels: Values, logits: Values, others: Values, n_bootstrap: int = 2000, seed: int = 0
) -> dict[str, dict]:
    """Every metric under ``logits`` less that under ``others``, on the same rows: a paired bootstrap over users.

    Arguments and errors as for :func:`ranking_metrics`; ``others`` (N,) are a second ranker's scores of the same rows.

    Returns ``{metric: {"difference": float, "ci95": [low, high], "p": float}}``. Each resample draws users once and
    takes both rankers' means over them. ``p`` is two-sided: twice the share of resamples in which the difference does
    not have its sign, (count + 1) / (n_bootstrap + 1), so never 0 and at most 1. It is not corrected for the number of
    rankers that are compared.

    >>> users, labels = ["a", "a", "b", "b"], [1, 0, 1, 0]
    >>> paired_differences(users, labels, [1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0])["hr@1"]["difference"]
    1.0
    """
    ours, theirs = (user_columns(user_ids, labels, scores) for scores in (logits, others))
    values = np.stack([ours[name] - theirs[name] for name in METRICS], axis=1)
    means = resampled_means(values, n_bootstrap, seed)
    observed, (low, high) = np.nanmean(values, axis=0), np.nanquantile(means, [0.025, 0.975], axis=0)
    below, above = ((sign * means <= 1e-12).sum(axis=0) for sign in (1, -1))
    p = np.minimum(1.0, 2 * (np.minimum(below, above) + 1) / (len(means) + 1))
    return {
        name: {"difference": float(observed[i]), "ci95": [float(low[i]), float(high[i])], "p": float(p[i])}
        for i, name in enumerate(METRICS)
    }


def per_user_metrics(user_ids: Values, labels: Values, logits: Values) -> pl.DataFrame:
    """One row per user (sorted by id): ``user_id`` and every metric but the pooled AUC; null where undefined.

    Undefined: all metrics of a user without positives; ``auc_user`` of a user without negatives. Arguments and errors
    as for :func:`ranking_metrics`.

    >>> per_user_metrics(["b", "b", "a", "a"], [1, 0, 0, 1], [0.5, 0.5, 3.0, 1.0]).select("user_id", "hr@1").rows()
    [('a', 0.0), ('b', 0.5)]
    """
    rows = _Rows.read(user_ids, labels, logits)
    return pl.DataFrame({"user_id": rows.users, **_per_user(_Groups.of(rows))}).with_columns(
        pl.col(METRICS[1:]).fill_nan(None)
    )


def auc(labels: Values, scores: Values) -> float:
    """Area under the ROC curve of one list: the share of positive-negative pairs in the right order, ties one half.

    ``sum over groups of p (negatives below + negatives tied / 2), divided by P N``. NaN without a positive or without a
    negative. Over the rows of all users together it is the pooled AUC.

    >>> auc([1, 0, 0, 1], [0.9, 0.1, 0.4, 0.4])  # 2 + 1.5 of 4 pairs
    0.875
    """
    return float(_auc_user(_Groups.of(_one_list(labels, scores)))[0])


def hit_rate(labels: Values, scores: Values, k: int) -> float:
    """HR@k of one list: the probability that at least one positive is among the first k.

    Only the best group with a positive matters; with ``m = min(k - a, n)`` places left for it:
    ``1 - C(n - p, m) / C(n, m)``. 1 with a positive and k at least the list's length; NaN without positives.

    >>> hit_rate([1, 0, 0, 0], [0.0, 0.0, 0.0, 0.0], k=1)
    0.25
    """
    return float(_hit_rate(_Groups.of(_one_list(labels, scores)), k)[0])


def reciprocal_rank(labels: Values, scores: Values, k: int) -> float:
    """MRR@k of one list: the expected 1 / rank of the first positive, counted as 0 beyond rank k.

    Only the best group with a positive matters: ``sum over j = 1 .. k - a of P(j) / (a + j)`` where
    ``P(j) = p / (n - j + 1) * product over i < j - 1 of (n - p - i) / (n - i)`` is the chance that its first positive
    is its j-th. NaN without positives.

    >>> round(reciprocal_rank([0, 1, 0], [2.0, 1.0, 1.0], k=5), 5)  # rank 2 or 3 alike: (1/2 + 1/3) / 2
    0.41667
    """
    return float(_reciprocal_rank(_Groups.of(_one_list(labels, scores)), k)[0])


def ndcg(labels: Values, scores: Values, k: int) -> float:
    """NDCG@k of one list with binary gains and discount ``1 / log2(1 + rank)``.

    A group gives ``p / n`` times the discounts of the places it covers up to k; the sum is divided by that of the best
    order, ``min(P, k)`` positives first. NaN without positives.

    >>> round(ndcg([0, 1], [1.0, 0.0], k=5), 6)  # 1 / log2(3)
    0.63093
    """
    return float(_ndcg(_Groups.of(_one_list(labels, scores)), k)[0])


def average_precision(labels: Values, scores: Values) -> float:
    """AP of one list: the mean over its positives of the share of positives among those ranked down to it; MAP's term.

    A positive at the j-th place of its group has, of ``n`` with ``p`` positives and ``q`` above the group, an expected
    ``q + 1 + (j - 1)(p - 1) / (n - 1)`` positives down to it, itself included; so a group gives
    ``p / n * sum over j = 1 .. n of (q + 1 + (j - 1)(p - 1) / (n - 1)) / (a + j)``, and the sum over groups is divided
    by P. The whole list counts, without a cut-off; with one positive it is the reciprocal rank. NaN without positives.

    >>> round(average_precision([0, 1, 1], [3.0, 2.0, 1.0]), 5)  # (1/2 + 2/3) / 2
    0.58333
    """
    return float(_average_precision(_Groups.of(_one_list(labels, scores)))[0])


@dataclass(frozen=True)
class _Rows:
    """Checked input. ``user`` (N,) indexes ``users``; ``level`` (N,) is the dense rank of the score, best first."""

    users: pl.Series
    user: np.ndarray
    label: np.ndarray
    level: np.ndarray

    @classmethod
    def read(cls, user_ids: Values, labels: Values, logits: Values) -> "_Rows":
        ids = pl.Series("user_id", user_ids)
        label, logit = np.asarray(labels), np.asarray(logits)
        if not len(ids) == len(label) == len(logit):
            raise ValueError(f"lengths differ: {len(ids)} user ids, {len(label)} labels, {len(logit)} scores")
        if not len(ids):
            raise ValueError("there is nothing to evaluate: no rows")
        if not np.issubdtype(logit.dtype, np.floating):
            logit = logit.astype(np.float64)  # None becomes NaN
        if ids.null_count():
            raise ValueError(f"row {ids.is_null().arg_max()} has no user id")
        if np.isnan(logit).any():
            row, count = int(np.isnan(logit).argmax()), int(np.isnan(logit).sum())
            raise ValueError(
                f"user {ids[row]!r}: the score in row {row} is missing or NaN ({count} such rows in all); "
                "score every candidate before evaluating"
            )
        wrong = ~np.isin(label, (0, 1))
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(f"user {ids[row]!r}: the label in row {row} is {label[row]}, expected 0 or 1")
        users = ids.unique().sort()
        user = users.search_sorted(ids).to_numpy().astype(np.int64)
        level = np.unique(-logit, return_inverse=True)[1]
        return cls(users, user, label.astype(bool), level)


def _one_list(labels: Values, scores: Values) -> _Rows:
    return _Rows.read(["the list"] * len(labels), labels, scores)


@dataclass(frozen=True)
class _Groups:
    """Groups of equal score that hold a positive, by user and then best first; see the module for n, p and a."""

    user: np.ndarray
    n: np.ndarray
    p: np.ndarray
    a: np.ndarray
    positives_above: np.ndarray
    candidates: np.ndarray  # (U,)
    positives: np.ndarray  # (U,)

    @classmethod
    def of(cls, rows: _Rows) -> "_Groups":
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

    def sum(self, values: np.ndarray) -> np.ndarray:
        """(U,): the sum of a value per group over each user's groups; NaN for users without positives."""
        return self._defined(np.bincount(self.user, weights=values, minlength=len(self.candidates)))

    def best(self, values: np.ndarray, where: np.ndarray) -> np.ndarray:
        """(U,): the value of each user's best group with a positive; NaN for users without positives."""
        result = np.zeros(len(self.candidates))
        result[self.user[where]] = values
        return self._defined(result)

    def _defined(self, values: np.ndarray) -> np.ndarray:
        return np.where(self.positives > 0, values, np.nan)

    @property
    def is_best(self) -> np.ndarray:
        return np.concatenate(([True], self.user[1:] != self.user[:-1]))[: len(self.user)]


def user_columns(user_ids: Values, labels: Values, logits: Values) -> dict[str, np.ndarray]:
    """``{metric: (U,)}``, users sorted by id: values whose mean over users is the metric, NaN where undefined.

    The mean over resampled users is the resampled metric; for the pooled AUC to first order, see
    :func:`ranking_metrics`. So columns of several rankers of the same users may be subtracted or averaged first.
    """
    rows = _Rows.read(user_ids, labels, logits)
    pooled, influence = _pooled_auc(rows)
    return {"auc": pooled + influence * len(influence), **_per_user(_Groups.of(rows))}


def _per_user(groups: _Groups) -> dict[str, np.ndarray]:
    return {
        "auc_user": _auc_user(groups),
        "hr@1": _hit_rate(groups, 1),
        "hr@5": _hit_rate(groups, 5),
        "hr@10": _hit_rate(groups, 10),
        "mrr@5": _reciprocal_rank(groups, 5),
        "ndcg@5": _ndcg(groups, 5),
        "map": _average_precision(groups),
    }


def _auc_user(groups: _Groups) -> np.ndarray:
    negatives = groups.candidates - groups.positives
    beaten = negatives[groups.user] - (groups.a - groups.positives_above) - (groups.n - groups.p) / 2
    pairs = groups.positives * negatives
    return np.divide(groups.sum(groups.p * beaten), pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def _hit_rate(groups: _Groups, k: int) -> np.ndarray:
    is_best = groups.is_best
    n, p, a = groups.n[is_best], groups.p[is_best], groups.a[is_best]
    missed = np.ones(len(n))
    for j in range(k):  # the j-th place of the group, if it is still among the first k of the list
        missed *= np.where((a + j < k) & (j < n), np.maximum(n - p - j, 0) / np.maximum(n - j, 1), 1.0)
    return groups.best(1.0 - missed, is_best)


def _reciprocal_rank(groups: _Groups, k: int) -> np.ndarray:
    is_best = groups.is_best
    n, p, a = groups.n[is_best], groups.p[is_best], groups.a[is_best]
    value, none_yet = np.zeros(len(n)), np.ones(len(n))
    for j in range(k):
        chance = np.where((a + j < k) & (j < n), none_yet * p / np.maximum(n - j, 1), 0.0)
        value += chance / (a + j + 1)
        none_yet *= np.maximum(n - p - j, 0) / np.maximum(n - j, 1)
    return groups.best(value, is_best)


def _ndcg(groups: _Groups, k: int) -> np.ndarray:
    gained = np.concatenate(([0.0], np.cumsum(1.0 / np.log2(np.arange(k) + 2.0))))  # by the first r places, r = 0 .. k
    covered = gained[np.minimum(groups.a + groups.n, k)] - gained[np.minimum(groups.a, k)]
    ideal = gained[np.minimum(groups.positives, k).astype(np.int64)]
    return groups.sum(groups.p / groups.n * covered) / np.where(ideal > 0, ideal, 1.0)


def _average_precision(groups: _Groups) -> np.ndarray:
    a, n, p = groups.a, groups.n, groups.p
    harmonic = np.concatenate(([0.0], np.cumsum(1.0 / np.arange(1, groups.candidates.max() + 1))))
    inverse = harmonic[a + n] - harmonic[a]  # sum of 1 / (a + j); and (j - 1) / (a + j) = 1 - (a + 1) / (a + j)
    before = n - (a + 1) * inverse
    gained = (groups.positives_above + 1) * inverse + (p - 1) / np.maximum(n - 1, 1) * before
    return groups.sum(p / n * gained) / np.where(groups.positives > 0, groups.positives, 1.0)


def _pooled_auc(rows: _Rows) -> tuple[float, np.ndarray]:
    """The pooled AUC and every user's influence on it, (U,), which sums to zero."""
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
    return value, np.bincount(rows.user, weights=weights, minlength=len(rows.users))


def resampled_means(values: np.ndarray, n_bootstrap: int, seed: int) -> np.ndarray:
    """``(n_bootstrap, M)``: the means of ``values`` (U, M) over resampled users, NaN left out."""
    defined = np.isfinite(values)
    n_users = len(values)
    if n_users >= NORMAL_FROM:  # the quantiles of the normal limit stand in for resamples
        reach = np.nanstd(values, axis=0) / np.sqrt(defined.sum(axis=0))
        return np.nanmean(values, axis=0) + reach * _normal_scores(n_bootstrap)[:, None]
    rng = np.random.default_rng(seed)
    filled, weight = np.where(defined, values, 0.0), defined.astype(np.float64)
    means = np.empty((n_bootstrap, values.shape[1]))
    for b in range(n_bootstrap):
        drawn = np.bincount(rng.integers(0, n_users, n_users), minlength=n_users).astype(np.float64)
        count = drawn @ weight
        means[b] = np.divide(drawn @ filled, count, out=np.full_like(count, np.nan), where=count > 0)
    return means


def _normal_scores(n: int) -> np.ndarray:
    """``(n,)``: the standard normal's quantiles at n evenly spaced probabilities, ends included in the tails."""
    normal = NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / n) for i in range(n)])
