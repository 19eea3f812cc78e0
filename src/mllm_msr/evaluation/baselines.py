"""Classical rankers on the same frozen tasks: item-kNN, TF-IDF of the items' words, PureSVD.

They learn from training interactions alone; of a held-out user they read nothing but the history that the task itself
has. What is left to choose (how many neighbours, how much of the history, how many dimensions) is chosen by NDCG@5 on
the validation tasks. Letters: U users, I items, D dimensions, W words, N (task, candidate) pairs.
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import polars as pl
import torch
from tqdm import tqdm

from mllm_msr.evaluation.coded_tasks import Array, CodedLists, CodedTasks, item_codes
from mllm_msr.evaluation.rankers import Ranker

RECENT = (5, 10, 20, 50, None)  # items of the history, from its end, that may count
NEIGHBOURS = (20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
MOST_PAIRS = 200_000_000  # of an item and a neighbour that are kept, 16 bytes each
WORD = re.compile(r"\w+")
BETA = "Sparse CSR tensor support is in beta"  # what torch says of matrices by rows


def knn(validation: pl.DataFrame, items: pl.DataFrame, training: pl.DataFrame) -> "ItemKnn":
    """Variant ``knn``: mean similarity of a candidate to the recent history, only its nearest neighbours counting.

    Similarity is the cosine of two items' sets of training users.

    Args:
        validation: as for :class:`CodedTasks`; so are the tasks that the ranker is given.
        items: ``item_id`` of the whole catalogue.
        training: ``user_id``, ``item_id`` of every training interaction.
    """
    nearest = Neighbours.of(user_item_matrix(training, items))
    tasks = CodedTasks(validation, items)
    sizes = [size for size in NEIGHBOURS if size < nearest.most] + [None]
    choices = list(product(sizes, RECENT))
    values = nearest.score(tasks.histories, tasks.candidates, choices)
    size, recent = _best("knn: neighbours, history", {choice: tasks.quality(values[choice]) for choice in choices})
    return ItemKnn(items, nearest, size, recent)


class ItemKnn(Ranker):
    """See :func:`knn`."""

    def __init__(self, items: pl.DataFrame, nearest: "Neighbours", size: int | None, recent: int | None) -> None:
        super().__init__(items)
        self.nearest, self.size, self.recent = nearest, size, recent
        self.table = nearest.table(size).t().coalesce()

    def score(self, histories: CodedLists, candidates: CodedLists) -> Array:
        choice = (self.size, self.recent)
        return self.nearest.score(histories, candidates, [choice])[choice]

    def score_catalogue(self, histories: CodedLists) -> Array:
        weights = mean_of_recent(histories, self.recent, len(self.items))
        return sparse_product(weights, self.table).to_dense().numpy()


@dataclass(frozen=True)
class Neighbours:
    """The pairs of an item and another with a common training user, by the item's code and then the other's.

    Args:
        n_items: I.
        keys: item code times I plus the neighbour's.
        cosine: of their columns of the (U, I) matrix.
        rank: 0 for the item's nearest, then 1, 2, ...
    """

    n_items: int
    keys: Array
    cosine: Array
    rank: Array

    @classmethod
    def of(cls, matrix: torch.Tensor) -> "Neighbours":
        """From a sparse (U, I) matrix of ones. Beyond ``MOST_PAIRS`` each item keeps its nearest only."""
        n_items = matrix.shape[1]
        norm = torch.sqrt(torch.zeros(n_items).index_add(0, matrix.indices()[1], matrix.values()))
        turned = matrix.t().coalesce()
        most = max(200, MOST_PAIRS // max(n_items, 1))
        parts = []
        starts = range(0, n_items, 1024)
        for begin in tqdm(starts, desc="  knn: items", leave=False, disable=len(starts) < 2):
            rows = turned.indices()[0]
            inside = (rows >= begin) & (rows < begin + 1024)
            place = torch.stack([rows[inside] - begin, turned.indices()[1][inside]])
            shape = (min(1024, n_items - begin), matrix.shape[0])
            chunk = torch.sparse_coo_tensor(place, turned.values()[inside], shape, check_invariants=True)
            together = sparse_product(chunk, matrix)
            item, other = together.indices()[0] + begin, together.indices()[1]
            cosine = together.values() / norm[item] / norm[other]
            parts.append(_ranked(item.numpy(), other.numpy(), cosine.numpy(), n_items, most))
        return cls(n_items, *(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    @property
    def most(self) -> int:
        """Neighbours of the item that has most."""
        return int(self.rank.max(initial=-1)) + 1

    def score(
        self, histories: CodedLists, candidates: CodedLists, choices: Sequence[tuple[int | None, int | None]]
    ) -> dict[tuple[int | None, int | None], Array]:
        """For each choice of how many neighbours and how much of the history, None for all: (N,) values."""
        values = {choice: np.zeros(len(candidates.codes)) for choice in choices}
        owner, ends = candidates.owner, histories.bounds[1:]
        for pair, place in expanded(histories.bounds[:-1][owner], histories.lengths[owner]):
            near, at = found_at(self.keys, candidates.codes[pair] * self.n_items + histories.codes[place])
            pair, back = pair[near], (ends[owner[pair]] - 1 - place)[near]
            cosine, rank = self.cosine[at], self.rank[at]
            for (size, recent), total in values.items():
                counted = np.ones(len(pair), dtype=bool) if size is None else rank < size
                if recent is not None:
                    counted &= back < recent
                add_at(total, pair[counted], cosine[counted])
        for (_, recent), total in values.items():
            lengths = histories.lengths if recent is None else np.minimum(histories.lengths, recent)
            total /= np.maximum(lengths, 1)[owner]
        return values

    def table(self, size: int | None) -> torch.Tensor:
        """Sparse (I, I): cosines of each item, by row, with its ``size`` nearest neighbours."""
        kept = slice(None) if size is None else self.rank < size
        place = torch.from_numpy(np.stack(np.divmod(self.keys[kept], self.n_items)))
        return sparse(place, torch.from_numpy(self.cosine[kept]), (self.n_items, self.n_items))


def _ranked(item: Array, other: Array, cosine: Array, n_items: int, most: int) -> tuple[Array, Array, Array]:
    """Keys, cosines and ranks of pairs of ``item``, sorted, and ``other``; without an item's pair with itself."""
    apart = item != other
    item, other, cosine = item[apart], other[apart], cosine[apart].astype(np.float32)
    nearest_first = np.lexsort((-cosine, item))
    start = np.searchsorted(item, item)  # the first of each item's pairs
    rank = np.empty(len(item), np.int32)
    rank[nearest_first] = np.arange(len(item)) - start
    kept = rank < most
    return (item * n_items + other)[kept], cosine[kept], rank[kept]


def _best(name: str, quality: Mapping[tuple, float]) -> tuple:
    """The choice of the best quality, the first of equals."""
    best = max(quality, key=lambda choice: quality[choice])
    choice = ", ".join("all" if part is None else str(part) for part in best)
    print(f"  {name}: {choice} of {len(quality)} settings by validation (NDCG@5 {quality[best]:.3f})", flush=True)
    return best


def svd(validation: pl.DataFrame, items: pl.DataFrame, training: pl.DataFrame, seed: int = 0) -> "PureSvd":
    """Variant ``svd``: PureSVD (Cremonesi et al., RecSys 2010).

    The user-item matrix of training interactions, 1 or nothing, has D leading right singular vectors V (I, D); a user
    whose history is the indicator h (I,) gives item i the i-th entry of h V V^T, here divided by the square root of the
    history's length, so that users can be pooled. Arguments as for :func:`knn`.
    """
    vectors = leading_vectors(user_item_matrix(training, items), 128, seed)
    tasks = CodedTasks(validation, items)
    rankers = {(rank,): PureSvd(items, vectors[:, :rank]) for rank in (8, 16, 32, 64, 128)}
    quality = {rank: tasks.quality(ranker.score(tasks.histories, tasks.candidates)) for rank, ranker in rankers.items()}
    return rankers[_best("svd: dimensions", quality)]


class PureSvd(Ranker):
    """See :func:`svd`; (I, D) ``vectors``."""

    def __init__(self, items: pl.DataFrame, vectors: Array) -> None:
        super().__init__(items)
        self.vectors = vectors

    def _users(self, histories: CodedLists) -> Array:
        mean = mean_of_recent(histories, None, len(self.items)) @ torch.from_numpy(self.vectors)
        return mean.numpy() * np.sqrt(histories.lengths)[:, None]

    def score(self, histories: CodedLists, candidates: CodedLists) -> Array:
        return np.einsum("nd,nd->n", self._users(histories)[candidates.owner], self.vectors[candidates.codes])

    def score_catalogue(self, histories: CodedLists) -> Array:
        return self._users(histories) @ self.vectors.T


def tfidf(validation: pl.DataFrame, items: pl.DataFrame) -> "Tfidf":
    """Variant ``tfidf``: mean cosine between a candidate's and the recent history items' words.

    Words of title and text, lower case; weight (1 + log count) log((1 + I) / (1 + items with the word)), so that words
    of nearly every item count for nothing in any language.
    ``items``: ``item_id``, ``title``, ``text``; ``validation`` as for :func:`knn`.
    """
    words, tasks = word_matrix(items), CodedTasks(validation, items)
    rankers = {(recent,): Tfidf(items, words, recent) for recent in RECENT}
    quality = {
        recent: tasks.quality(ranker.score(tasks.histories, tasks.candidates)) for recent, ranker in rankers.items()
    }
    return rankers[_best("tfidf: history", quality)]


class Tfidf(Ranker):
    """See :func:`tfidf`; sparse (I, W) ``words``."""

    def __init__(self, items: pl.DataFrame, words: torch.Tensor, recent: int | None) -> None:
        super().__init__(items)
        self.words, self.recent, self.by_row = words, recent, compressed(words)

    def score(self, histories: CodedLists, candidates: CodedLists) -> Array:
        """The words of each candidate are looked up among those of its user's profile."""
        profile = sparse_product(mean_of_recent(histories, self.recent, len(self.items)), self.words)
        keys = (profile.indices()[0] * self.words.shape[1] + profile.indices()[1]).numpy()
        row, word = self.words.indices().numpy()
        bounds = np.searchsorted(row, np.arange(len(self.items) + 1))
        owner, starts = candidates.owner, bounds[:-1][candidates.codes]
        values = np.zeros(len(owner))
        for pair, place in expanded(starts, np.diff(bounds)[candidates.codes]):
            common, at = found_at(keys, owner[pair] * self.words.shape[1] + word[place])
            weights = self.words.values().numpy()[place[common]] * profile.values().numpy()[at]
            add_at(values, pair[common], weights)
        return values

    def score_catalogue(self, histories: CodedLists) -> Array:
        profile = sparse_product(mean_of_recent(histories, self.recent, len(self.items)), self.words)
        return (self.by_row @ profile.t().to_dense()).T.contiguous().numpy()


def word_matrix(items: pl.DataFrame) -> torch.Tensor:
    """Sparse (I, W): the weights of each item's words, whose squares sum to one; rows in the order of item codes."""
    numbers: dict[str, int] = {}
    rows: list[int] = []
    words: list[int] = []
    for code, (title, text) in enumerate(items.sort("item_id").select("title", "text").iter_rows()):
        own = WORD.findall(f"{title or ''} {text or ''}".lower())
        words += [numbers.setdefault(word, len(numbers)) for word in own]
        rows += [code] * len(own)
    shape = (len(items), max(len(numbers), 1))
    counts = sparse(torch.tensor([rows, words]), torch.ones(len(rows), dtype=torch.float64), shape)
    row, word = counts.indices()
    rarity = torch.log((1 + len(items)) / (1 + torch.bincount(word, minlength=shape[1])))
    weights = (1 + counts.values().log()) * rarity[word]
    row, word, weights = row[weights > 0], word[weights > 0], weights[weights > 0]
    norm = torch.zeros(len(items), dtype=weights.dtype).index_add(0, row, weights**2).sqrt()
    return sparse(torch.stack([row, word]), (weights / norm[row]).float(), shape)


def user_item_matrix(training: pl.DataFrame, items: pl.DataFrame) -> torch.Tensor:
    """Sparse (U, I) of ones where a user met an item in training."""
    users = training["user_id"].rank("dense").to_numpy().astype(np.int64) - 1
    place = torch.from_numpy(np.unique(np.stack([users, item_codes(training["item_id"], items)]), axis=1))
    return sparse(place, torch.ones(place.shape[1]), (int(users.max(initial=0)) + 1, len(items)))


def mean_of_recent(histories: CodedLists, recent: int | None, n_items: int) -> torch.Tensor:
    """Sparse (U, I): one over their number at the last ``recent`` items of each history."""
    counted = histories.last(recent)
    place = torch.from_numpy(np.stack([counted.owner, counted.codes]))
    shares = torch.from_numpy(1 / np.maximum(counted.lengths, 1)).float()[counted.owner]
    return sparse(place, shares, (len(histories), n_items))


def sparse(place: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """A coalesced sparse matrix from (2, M) places and (M,) values."""
    return torch.sparse_coo_tensor(place, values, shape, check_invariants=True).coalesce()


def sparse_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The coalesced product of two sparse matrices."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", BETA)
        return torch.sparse.mm(left, right).coalesce()


def compressed(matrix: torch.Tensor) -> torch.Tensor:
    """A sparse matrix by rows, whose product with a dense one is several times faster."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", BETA)
        return matrix.to_sparse_csr()


def expanded(starts: Array, lengths: Array, most: int = 4_000_000) -> Iterator[tuple[Array, Array]]:
    """Every place of ranges that begin at ``starts`` and have ``lengths``, about ``most`` at a time: which range it is
    of, and the place.

    >>> [(row.tolist(), place.tolist()) for row, place in expanded(np.array([7, 0]), np.array([2, 1]))]
    [([0, 0, 1], [7, 8, 0])]
    """
    ends = np.cumsum(lengths)
    begin = 0
    while begin < len(lengths):
        done = int(ends[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, done + most, side="right")))
        own = lengths[begin:end]
        row = np.repeat(np.arange(begin, end), own)
        yield row, starts[row] + np.arange(len(row)) - np.repeat(own.cumsum() - own, own)
        begin = end


def found_at(keys: Array, wanted: Array) -> tuple[Array, Array]:
    """Which of ``wanted`` are among the sorted ``keys``, and where those are.

    >>> [part.tolist() for part in found_at(np.array([2, 4]), np.array([4, 5]))]
    [[True, False], [1]]
    """
    place = np.searchsorted(keys, wanted)
    found = np.append(keys, -1)[place] == wanted
    return found, place[found]


def add_at(total: Array, place: Array, values: Array) -> None:
    """Add ``values`` to ``total`` at sorted places, of which several may be the same."""
    if len(place):
        sums = np.bincount(place - place[0], weights=values)
        total[place[0] : place[0] + len(sums)] += sums


def leading_vectors(matrix: torch.Tensor, rank: int, seed: int, rounds: int = 8) -> Array:
    """(I, rank): the leading right singular vectors of a sparse (U, I) matrix, by seeded subspace iteration."""
    width = min(rank + 20, *matrix.shape)
    turned = matrix.t().coalesce()
    basis = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(seed))
    for _ in range(rounds):
        basis = torch.linalg.qr(turned @ (matrix @ basis)).Q
    rotation = torch.linalg.svd(matrix @ basis, full_matrices=False).Vh.T
    return (basis @ rotation)[:, :rank].numpy()
