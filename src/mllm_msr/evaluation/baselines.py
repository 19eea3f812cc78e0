"""Classical rankers on the same frozen tasks: item-kNN, TF-IDF of the items' words, PureSVD.

They learn from training interactions alone; of a held-out user they read nothing but the history that the task itself
shows. What is left to choose (how many neighbours, how much of the history, how many dimensions) is chosen by NDCG@5 on
the validation tasks. Letters: I items, D dimensions, K neighbours, C candidates of a task, N (task, candidate) pairs.
"""

import re
from collections.abc import Callable, Mapping
from itertools import product

import numpy as np
import polars as pl
import torch

from mllm_msr.evaluation.metrics import per_user_metrics

Array = np.ndarray
Scorer = Callable[[Array, Array], Array]  # item codes of a history, oldest first, and of C candidates, to C scores
Ranker = Callable[[pl.DataFrame], Array]  # tasks to (N,) values of their candidates, task after task
RECENT = (5, 10, 20, 50, None)  # items of the history, from its end, that may count
WORD = re.compile(r"\w+")


def training_interactions(
    interactions: pl.DataFrame, tasks: pl.DataFrame, protocol: str, popularity: pl.DataFrame
) -> pl.DataFrame:
    """The rows of a run's log that a model may be trained on, so that no baseline sees what is held out.

    ``strict``: all but each user's last two; ``paper``: all of the users who have training tasks; ``global-cutoff``:
    all before the moment at which four fifths of the log lie. Never more of any item than ``popularity`` (``item_id``,
    ``count``) says training has, or ValueError.
    """
    if protocol == "strict":
        training = interactions.filter(pl.int_range(pl.len()).reverse().over("user_id") >= 2)
    elif protocol == "paper":
        learners = tasks.filter(split="train")["user_id"].unique()
        training = interactions.filter(pl.col("user_id").is_in(learners.implode()))
    else:
        moments = interactions["timestamp"].sort()
        training = interactions.filter(pl.col("timestamp") < moments[int(0.8 * len(moments))])
    counts = training.group_by("item_id").len("found").join(popularity, on="item_id", how="left")
    if wrong := counts.filter(pl.col("found") > pl.col("count").fill_null(0)).rows(named=True):
        raise ValueError(
            f"item {wrong[0]['item_id']!r} has {wrong[0]['found']} training interactions in interactions.parquet, but "
            f"{wrong[0]['count']} in popularity.parquet: prepare the run again"
        )
    return training


class CodedTasks:
    """Tasks with numbers 0 ... I-1 for item ids.

    Args:
        tasks: ``history``, ``candidates`` (lists of item ids), ``labels``.
        items: ``item_id`` of the whole catalogue; item codes are places in ``items.sort("item_id")``.
    """

    def __init__(self, tasks: pl.DataFrame, items: pl.DataFrame) -> None:
        self.histories = _coded_lists(tasks["history"], items)
        self.candidates = _coded_lists(tasks["candidates"], items)
        self.labels = tasks["labels"].explode().to_numpy()
        self.owner = np.repeat(np.arange(len(tasks)), tasks["labels"].list.len().to_numpy())

    def values(self, scorer: Scorer) -> Array:
        """(N,): every candidate's score, task after task."""
        return np.concatenate([scorer(*task) for task in zip(self.histories, self.candidates, strict=True)])

    def quality(self, scorer: Scorer) -> float:
        """Mean NDCG@5 over tasks."""
        return self.quality_of(self.values(scorer))

    def quality_of(self, values: Array) -> float:
        """Mean NDCG@5 of (N,) values."""
        return float(per_user_metrics(self.owner, self.labels, values)["ndcg@5"].drop_nulls().to_numpy().mean())


def item_codes(ids: pl.Series, items: pl.DataFrame) -> Array:
    """Item ids as places in ``items.sort("item_id")``."""
    return ids.cast(pl.Enum(items["item_id"].sort())).to_physical().to_numpy().astype(np.int64)


def _coded_lists(lists: pl.Series, items: pl.DataFrame) -> list[Array]:
    ends = lists.list.len().to_numpy().astype(np.int64).cumsum()
    codes = item_codes(lists.explode(empty_as_null=False), items)
    return np.split(codes, ends[:-1])


def _best(scorers: Mapping[tuple, Scorer], validation: pl.DataFrame, items: pl.DataFrame, row: str) -> Ranker:
    known = CodedTasks(validation, items)
    quality = {choice: known.quality(scorer) for choice, scorer in scorers.items()}
    best = max(quality, key=lambda choice: quality[choice])
    said = ", ".join("all" if part is None else str(part) for part in best)
    print(f"  {row}: {said} of {len(quality)} settings by validation (NDCG@5 {quality[best]:.3f})", flush=True)
    return lambda tasks: CodedTasks(tasks, items).values(scorers[best])


def knn(validation: pl.DataFrame, items: pl.DataFrame, training: pl.DataFrame) -> Ranker:
    """Row ``knn``: mean similarity of a candidate to the recent history, only its nearest K items counting.

    Similarity is the cosine of two items' sets of training users.

    Args:
        validation: as for :class:`CodedTasks`; so are the tasks that the ranker is given.
        items: ``item_id`` of the whole catalogue.
        training: ``user_id``, ``item_id`` of every training interaction.
    """
    nearest, similarity = neighbours(user_item_matrix(training, items), most=200)

    def scorer(k: int, recent: int | None) -> Scorer:
        def score(history: Array, candidates: Array) -> Array:
            share = np.zeros(len(nearest))
            counted = history[-recent:] if recent else history
            share[counted] = 1 / max(len(counted), 1)
            return (similarity[candidates, :k] * share[nearest[candidates, :k]]).sum(axis=1)

        return score

    scorers = {choice: scorer(*choice) for choice in product((20, 50, 100, 200), RECENT)}
    return _best(scorers, validation, items, "knn: neighbours, history")


def svd(validation: pl.DataFrame, items: pl.DataFrame, training: pl.DataFrame, seed: int = 0) -> Ranker:
    """Row ``svd``: PureSVD (Cremonesi et al., RecSys 2010).

    The user-item matrix of training interactions, 1 or nothing, has D leading right singular vectors V (I, D); a user
    whose history is the indicator h (I,) gives item i the i-th entry of h V V^T, here divided by the square root of the
    history's length, so that users can be pooled. Arguments as for :func:`knn`.
    """
    vectors = leading_vectors(user_item_matrix(training, items), 128, seed)

    def scorer(rank: int) -> Scorer:
        own = vectors[:, :rank]
        return lambda history, candidates: own[candidates] @ own[history].sum(axis=0) / max(len(history), 1) ** 0.5

    scorers = {(rank,): scorer(rank) for rank in (8, 16, 32, 64, 128)}
    return _best(scorers, validation, items, "svd: dimensions")


def tfidf(validation: pl.DataFrame, items: pl.DataFrame) -> Ranker:
    """Row ``tfidf``: mean cosine between a candidate's and the recent history items' words.

    Words of title and text, lower case; weight (1 + log count) log((1 + I) / (1 + items with the word)), so that words
    of nearly every item count for nothing in any language.
    ``items``: ``item_id``, ``title``, ``text``; ``validation`` as for :func:`knn`.
    """
    vectors = word_vectors(items)

    def scorer(recent: int | None) -> Scorer:
        def score(history: Array, candidates: Array) -> Array:
            counted = history[-recent:] if recent else history
            profile: dict[int, float] = {}
            for item in counted.tolist():
                for word, weight in vectors[item].items():
                    profile[word] = profile.get(word, 0.0) + weight / len(counted)
            words = [vectors[item].items() for item in candidates.tolist()]
            return np.array([sum(weight * profile.get(word, 0.0) for word, weight in own) for own in words])

        return score

    scorers = {(recent,): scorer(recent) for recent in RECENT}
    return _best(scorers, validation, items, "tfidf: history")


def word_vectors(items: pl.DataFrame) -> list[dict[int, float]]:
    """Each item's words, by number, with weights whose squares sum to one; in the order of item codes."""
    numbers: dict[str, int] = {}
    counts: list[dict[int, int]] = []
    spread: dict[int, int] = {}
    for title, text in items.sort("item_id").select("title", "text").iter_rows():
        own: dict[int, int] = {}
        for word in WORD.findall(f"{title or ''} {text or ''}".lower()):
            number = numbers.setdefault(word, len(numbers))
            own[number] = own.get(number, 0) + 1
        for number in own:
            spread[number] = spread.get(number, 0) + 1
        counts.append(own)
    rarity = {number: np.log((1 + len(counts)) / (1 + spread[number])) for number in spread}
    vectors = []
    for own in counts:
        weights = {number: (1 + np.log(count)) * rarity[number] for number, count in own.items() if rarity[number]}
        norm = sum(weight**2 for weight in weights.values()) ** 0.5 or 1.0
        vectors.append({number: float(weight / norm) for number, weight in weights.items()})
    return vectors


def user_item_matrix(training: pl.DataFrame, items: pl.DataFrame) -> torch.Tensor:
    """Sparse (U, I) of ones where a user met an item in training."""
    users = training["user_id"].rank("dense").to_numpy().astype(np.int64) - 1
    place = torch.from_numpy(np.unique(np.stack([users, item_codes(training["item_id"], items)]), axis=1))
    shape = (int(users.max(initial=0)) + 1, len(items))
    return torch.sparse_coo_tensor(place, torch.ones(place.shape[1]), shape, check_invariants=True).coalesce()


def neighbours(matrix: torch.Tensor, most: int) -> tuple[Array, Array]:
    """(I, K) codes of each item's nearest other items by cosine of the columns of (U, I), and their cosines."""
    n_items = matrix.shape[1]
    norm = torch.sqrt(torch.zeros(n_items).index_add(0, matrix.indices()[1], matrix.values())).clamp(min=1)
    turned = matrix.t().coalesce()
    chunk = max(1, 50_000_000 // max(matrix.shape))
    found, cosines = [], []
    for begin in range(0, n_items, chunk):
        codes = torch.arange(begin, min(begin + chunk, n_items))
        picked = torch.zeros(n_items, len(codes))
        picked[codes, torch.arange(len(codes))] = 1.0
        alike = (turned @ (matrix @ picked)).T / norm / norm[codes][:, None]
        alike[torch.arange(len(codes)), codes] = 0.0
        best = alike.topk(min(most, n_items), dim=1)
        found.append(best.indices)
        cosines.append(best.values)
    return torch.cat(found).numpy(), torch.cat(cosines).numpy()


def leading_vectors(matrix: torch.Tensor, rank: int, seed: int, rounds: int = 8) -> Array:
    """(I, rank): the leading right singular vectors of a sparse (U, I) matrix, by seeded subspace iteration."""
    width = min(rank + 20, *matrix.shape)
    turned = matrix.t().coalesce()
    basis = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(seed))
    for _ in range(rounds):
        basis = torch.linalg.qr(turned @ (matrix @ basis)).Q
    rotation = torch.linalg.svd(matrix @ basis, full_matrices=False).Vh.T
    return (basis @ rotation)[:, :rank].numpy()
