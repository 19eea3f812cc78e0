"""Rank candidates for many users at once, computing nothing twice.

In one causal sequence (``interaction="joint"``) everything before the candidate depends on the user alone: it is
computed once for all candidates of a forward, and an image is encoded once whatever the users. With ``late`` a user and
a candidate are computed once each, and a pair costs only the tokens that ask for the answer (``late_ranking.py``). The
result is that of the plain forward of every pair. Where it would not be, because the backbone's attention or positions
are not plain, prompts are scored whole.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm
from transformers import BatchFeature

from .core_rows import cores, each_on_a_core, rows_of
from .image_features import ImageFeatureCache, PreparedCatalogue
from .inputs import Candidate, User, as_candidates, as_users
from .interfaces import RecommendationModel, RecommendationProcessor
from .item_cache import IndexReport, ItemKeys, fingerprint
from .item_shards import ShardFolder
from .item_store import ItemStore
from .late_ranking import LatePlan, Pairs, Scores
from .onednn_linear import use_onednn
from .packing import RowTooWide, block_limits, pack_joint

SAMPLE = 8  # candidates whose images tell how many may be kept


@dataclass(frozen=True)
class RankedCandidate:
    """A candidate with its place among those given, its logit, and its score p(yes) / (p(yes) + p(no))."""

    candidate: Candidate
    index: int
    logit: float
    score: float


class Recommender:
    """A model and its processor, ready to rank.

    The model is put into evaluation mode and must stay as it is: what is kept is not computed again. Where prompts
    share what they have in common, its decoder computes attention by block attention from then on.

    Args:
        model: ``MllmMsrForRecommendation``.
        processor: ``MllmMsrProcessor``.
        token_budget: tokens of one forward; bounds the memory it works in.
        memory_gb: what may be kept of users and candidates to be used again; by default half of the free memory of the
            model's device.
        cache: folder in which what a ``late`` model keeps of candidates outlives the process; see ``index``. On a CPU
            its files are mapped, and count neither as kept nor as free memory.
        share_prefix: ``joint`` only; by default wherever it changes nothing; `False` never; `True` refuses, with the
            reason, where scores would change. `shares_prefix` and `obstacle` say what became of it.
        compile: ``late`` only; how ``torch.compile`` is to make the forward of a few answers, such as
            ``reduce-overhead`` or ``cudagraphs`` on a GPU; the first request of each size waits for it.
        cache_dtype: ``late`` only; ``int8`` keeps keys and values of candidates in eight bits, in memory and in
            ``cache``, which changes scores a little (docs/performance.md); by default as they are computed.

    Raises:
        ValueError: the backbone cannot do what is asked for, or a joint model is given what is of ``late`` only.
    """

    def __init__(
        self,
        model: RecommendationModel,
        processor: RecommendationProcessor,
        token_budget: int = 8192,
        memory_gb: float | None = None,
        cache: str | os.PathLike | None = None,
        share_prefix: bool | None = None,
        compile: str | None = None,
        cache_dtype: str | None = None,
    ) -> None:
        self.model, self.processor = model.eval(), processor
        self.obstacle, self.window = block_limits(model.config.vlm_config)
        self.late = model.config.interaction == "late"
        if (share_prefix or self.late) and self.obstacle:
            raise ValueError(f"prompts cannot share what they have in common: {self.obstacle}")
        if cache is not None and not self.late:
            raise ValueError("a joint model computes candidates anew for every user: leave `cache` out")
        if compile is not None and not self.late:
            raise ValueError("what a joint model computes has too many shapes to be compiled: leave `compile` out")
        if type(token_budget) is not int or token_budget < 1:
            raise ValueError(f"token_budget={token_budget!r}: must be a whole number of at least 1")
        if memory_gb is not None and not (isinstance(memory_gb, int | float) and 0 <= memory_gb < float("inf")):
            raise ValueError(f"memory_gb={memory_gb!r}: must be a number of at least 0; None is half of what is free")
        if cache_dtype not in (None, "int8"):
            raise ValueError(
                f"cache_dtype={cache_dtype!r}: candidates are kept as they are computed (None) or in 'int8'"
            )
        if cache_dtype is not None and not self.late:
            raise ValueError("a joint model keeps no keys and values of candidates: leave `cache_dtype` out")
        self.shares_prefix = self.obstacle is None and share_prefix is not False
        if self.shares_prefix:
            model.use_block_attention()
        if model.device.type == "cpu":
            use_onednn(model.backbone)
        memory = int(memory_gb * 1e9) if memory_gb is not None else _free_memory(model.device) // 2
        self.cache = ShardFolder(Path(cache) / fingerprint(model, processor)) if cache is not None else None
        self.plan: Plan
        if self.late:
            keys = ItemKeys(model.device, cache_dtype)
            store = ItemStore(model.device, memory // 2, self.cache, eight_bits=cache_dtype is not None)
            self.plan = LatePlan(model, processor, token_budget, memory, keys, store, compile)
        else:
            self.plan = JointPlan(model, processor, token_budget, memory, self.shares_prefix, bool(share_prefix))

    @torch.inference_mode()
    def score(
        self,
        users: Sequence[User],
        candidates: Sequence[Sequence[str]],
        catalogue: Mapping[str, Candidate],
        progress: str | None = None,
    ) -> list[np.ndarray]:
        """The logit difference of Yes over No for each user's candidates.

        Args:
            users: U users, or mappings that `User.of` takes.
            candidates: U lists of item ids, each without duplicates; users of one list, as of a whole catalogue, may
                share the object.
            catalogue: candidates, or mappings that `Candidate.of` takes, by item id; each is looked up when needed.
            progress: label of a progress bar.

        Returns:
            U float32 arrays, each of shape (its number of candidates,).

        Raises:
            TypeError, ValueError: users or candidates are not what they should be; an id is unknown or there twice.
        """
        users = as_users(users)
        rows, names = _numbered(users, candidates, catalogue)
        starts = np.cumsum([0, *map(len, rows)])
        logits = np.empty(starts[-1], dtype=np.float32)
        with tqdm(total=len(logits), desc=progress, unit="pair", leave=False, disable=progress is None) as bar:
            for scores in self.plan.scores(users, rows, names, catalogue) if names else ():
                logits[starts[scores.users] + scores.places] = scores.logits
                bar.update(len(scores.logits))
        return np.split(logits, starts[1:-1]) if rows else []

    def rank(
        self,
        users: Sequence[User],
        candidates: Sequence[Candidate],
        top_k: int | None = None,
        progress: str | None = None,
    ) -> list[list[RankedCandidate]]:
        """Order ``candidates`` for every user.

        Args:
            users: U users, or mappings that `User.of` takes.
            candidates: candidates, or mappings that `Candidate.of` takes; ids that are given must differ.
            top_k: how many to return, all by default.

        Returns:
            For each user the best ``top_k`` candidates, best first. Equal logits keep the order given.

        Raises:
            TypeError, ValueError: an argument is not what it should be; an id is there twice.
        """
        if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"top_k={top_k!r}: must be a number of at least 1, or None for all candidates")
        users, candidates = as_users(users), as_candidates(candidates)
        ids = [candidate.item_id for candidate in candidates if candidate.item_id]
        if duplicate := _duplicate(ids):
            raise ValueError(f"item {duplicate!r} is there twice among the candidates")
        catalogue = {str(place): candidate for place, candidate in enumerate(candidates)}
        logits = self.score(users, [list(catalogue)] * len(users), catalogue, progress)
        return [in_order(candidates, row, top_k) for row in logits]

    def index(self, catalogue: Mapping[str, Candidate], progress: str | None = None) -> IndexReport:
        """Fill the ``cache`` ahead, and delete from it what is damaged or not in ``catalogue`` any more."""
        if self.cache is not None:
            self.cache.check()
        missing = self.not_indexed(catalogue)
        assert self.cache is not None and isinstance(self.plan, LatePlan)
        keys = {self.plan.keys.of(catalogue, item) for item in catalogue}
        with (
            torch.inference_mode(),
            tqdm(total=len(missing), desc=progress, leave=False, disable=progress is None) as bar,
        ):
            for count in self.plan.encode_items(missing, catalogue):
                bar.update(count)
        deleted = self.cache.prune(keys)
        kept = len(catalogue) - len(missing)
        return IndexReport(len(missing), kept, deleted, self.cache.folder, self.cache.nbytes)

    def not_indexed(self, catalogue: Mapping[str, Candidate], items: Iterable[str] | None = None) -> list[str]:
        """Those of ``items``, or of the whole catalogue, that the ``cache`` has not; of equal ones the last."""
        if self.cache is None or not isinstance(self.plan, LatePlan):
            raise ValueError("an index needs a model with interaction='late' and Recommender(cache=folder)")
        self.cache.refresh()
        return self.plan.keys.missing(catalogue, catalogue if items is None else items, self.cache.places)


class Plan(Protocol):
    """How pairs are scored."""

    def scores(
        self, users: Sequence[User], rows: Sequence[np.ndarray], names: Sequence[str], catalogue: Mapping[str, Any]
    ) -> Iterator[Scores]:
        """The logits of all pairs, some at a time; ``rows`` has for each user the candidates as places in ``names``."""
        ...


class JointPlan:
    """See :class:`Recommender`, whose arguments these are.

    Args:
        memory: bytes of image features that may be kept; half of it from call to call.
        shares: whether the prompts of a user share what they begin with.
        demanded: whether it is an error if they cannot.
    """

    def __init__(
        self,
        model: RecommendationModel,
        processor: RecommendationProcessor,
        token_budget: int,
        memory: int,
        shares: bool,
        demanded: bool,
    ) -> None:
        self.model, self.processor, self.token_budget, self.memory = model, processor, token_budget, memory
        self.shares, self.demanded = shares, demanded
        self.images = ImageFeatureCache(model.backbone, processor)
        self.pair_tokens = 64  # that a pair of the longest batch so far has cost
        self.lock = Lock()

    def scores(
        self, users: Sequence[User], rows: Sequence[np.ndarray], names: Sequence[str], catalogue: Mapping[str, Any]
    ) -> Iterator[Scores]:
        """The logits of all pairs, some at a time: as many candidates as have images that may be kept, for all users.

        Args:
            rows: for each user the candidates, as places in ``names``.
        """
        prepared = PreparedCatalogue(self.images, catalogue, "recommendation")
        shown = [image for name in names[:SAMPLE] if (image := prepared[name].image) is not None]
        self.images.features(shown)
        size = sum(map(self.images.size, shown)) / min(len(names), SAMPLE)
        chunk = max(1, int(self.memory / 2 / max(1, size)))
        try:
            for first in range(0, len(names), chunk):
                if first:
                    prepared.clear()
                    self.images.evict(max_bytes=self.memory // 2)
                yield from self._chunk(users, Pairs.within(rows, first, chunk), names[first : first + chunk], prepared)
        finally:
            self.images.evict(max_bytes=self.memory // 2)

    def _chunk(
        self, users: Sequence[User], pairs: Pairs, names: Sequence[str], prepared: PreparedCatalogue
    ) -> Iterator[Scores]:
        """As many pairs at a time as the budget allows, going by what the last ones took."""

        def scores(part: Pairs) -> list[Scores]:
            with self.lock:  # what is kept of images, and the processor, are for one thread at a time
                candidates = [prepared[names[item]] for item in part.items]
                batch = self.processor([users[user] for user in part.users], candidates)
                packed = self._packed(batch, part.users)
                fits = self._fits(packed["input_ids"].numel(), len(part))
                features = self.images.features(batch.images) if fits else []
            if not fits:
                half = len(part) // 2
                return [*scores(part.take(slice(half))), *scores(part.take(slice(half, None)))]
            output = self.model.score(**packed, image_features=features)
            return [Scores(part.users, part.places, output.logits.cpu().numpy())]

        device = self.model.device
        rows = rows_of(pairs.users, device, self.token_budget, lambda: self.pair_tokens)
        for found in each_on_a_core(scores, map(pairs.take, rows), cores(device)):
            yield from found

    def _packed(self, batch: BatchFeature, users: np.ndarray) -> Mapping[str, torch.Tensor]:
        """The batch as it is computed: in one row, or as it is where prompts cannot share."""
        if not self.shares:
            return batch.to(self.model.device)
        try:
            return pack_joint(self.model, batch, torch.from_numpy(users))
        except RowTooWide as error:
            if self.demanded:
                raise ValueError(f"{error}: leave share_prefix out or set the processor's max_length") from error
            return batch.to(self.model.device)

    def _fits(self, tokens: int, pairs: int) -> bool:
        """Whether so many pairs may take so many tokens; else fewer are to be taken next time."""
        self.pair_tokens = max(self.pair_tokens, -(-tokens // pairs))
        if tokens <= self.token_budget or pairs == 1:
            return True
        self.pair_tokens = max(self.pair_tokens, self.token_budget // pairs + 1)
        return False


def in_order(candidates: Sequence[Candidate], logits: np.ndarray, top_k: int | None = None) -> list[RankedCandidate]:
    """The best ``top_k`` candidates, best first; equal logits keep their order."""
    scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
    best = np.argsort(-logits, kind="stable")[:top_k]
    return [RankedCandidate(candidates[i], int(i), float(logits[i]), float(scores[i])) for i in best]


def _numbered(
    users: Sequence[User], candidates: Sequence[Sequence[str]], catalogue: Mapping[str, Any]
) -> tuple[list[np.ndarray], list[str]]:
    """Each user's candidates as places in a list of distinct ids, and that list; ValueError if an id is wrong."""
    if len(users) != len(candidates):
        raise ValueError(f"there are {len(users)} users, but {len(candidates)} lists of candidates: give one for each")
    distinct = {id(row): row for row in candidates}
    for row in distinct.values():
        if isinstance(row, str):
            raise TypeError(f"the candidates of a user are a list of item ids, not the text {row!r}")
        if (duplicate := _duplicate(row)) is not None:
            raise ValueError(f"item {duplicate!r} is there twice among the candidates of a user")
    names = list(dict.fromkeys(item for row in distinct.values() for item in row))
    for item in names:
        if item not in catalogue:
            raise ValueError(f"item {item!r} is among the candidates, but not in the catalogue")
    place = {item: number for number, item in enumerate(names)}
    numbered = {key: np.fromiter((place[item] for item in row), np.int64, len(row)) for key, row in distinct.items()}
    return [numbered[id(row)] for row in candidates], names


def _duplicate(ids: Sequence[str]) -> str | None:
    """An id that is there twice, if any."""
    return next((item for item, count in Counter(ids).items() if count > 1), None)


def _free_memory(device: torch.device) -> int:
    """Bytes that are free where a model is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # a system that does not say
        return 2 * 10**9
