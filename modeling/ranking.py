"""Rank candidates for many users at once, computing nothing twice.

In one causal sequence (``interaction="joint"``) everything before the candidate depends on the user alone: it runs once
for all candidates, and a picture is encoded once whatever the users. With ``late`` a user and a candidate are computed
once each, and a pair costs only the tokens that ask for the answer (``late_ranking.py``). The result is that of the
plain forward of every pair. Where it would not be, because the backbone's attention or positions are not plain, prompts
are scored whole.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .image_features import Shown, as_mapping
from .item_cache import ItemCache
from .late_ranking import LatePlan, within
from .packing import BlocksTooLong, block_limits, pack_joint


class Recommender:
    """A model and its processor, ready to rank.

    Args:
        model: ``MllmMsrForRecommendation``.
        processor: ``MllmMsrProcessor``.
        token_budget: tokens of one forward; bounds the memory it works in.
        memory_gb: what may be kept of users and candidates to be used again; by default half of the free memory of the
            model's device.
        cache: folder in which what a ``late`` model keeps of candidates outlives the process; see ``index``.
        share_prefix: ``joint`` only; by default wherever it changes nothing; `False` never; `True` refuses, with the
            reason, where scores would change. `shares_prefix` and `obstacle` say what became of it.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        token_budget: int = 8192,
        memory_gb: float | None = None,
        cache: str | os.PathLike | None = None,
        share_prefix: bool | None = None,
    ) -> None:
        self.model, self.processor, self.token_budget = model.eval(), processor, token_budget
        self.memory = int(memory_gb * 1e9) if memory_gb is not None else _free_memory(model.device) // 2
        self.longest = 64  # tokens that a pair of the longest batch so far has cost
        self.obstacle, self.window = block_limits(model.config.vlm_config)
        self.late = model.config.interaction == "late"
        if (share_prefix or self.late) and self.obstacle:
            raise ValueError(f"prompts cannot share what they have in common: {self.obstacle}")
        if cache is not None and not self.late:
            raise ValueError("a joint model computes candidates anew for every user: leave `cache` out")
        self.demanded = bool(share_prefix)
        self.shares_prefix = self.obstacle is None and share_prefix is not False
        self.cache = ItemCache(Path(cache), model, processor) if cache is not None else None

    @torch.inference_mode()
    def score(
        self,
        users: Sequence[Mapping[str, Any]],
        candidates: Sequence[Sequence[str]],
        catalogue: Mapping[str, Mapping[str, Any]],
        progress: str | None = None,
    ) -> list[np.ndarray]:
        """The logit difference of Yes over No for each user's candidates.

        Args:
            users: U of ``{"preference": str, "recent": [{"summary": str}, ...]}``.
            candidates: U lists of item ids; users of one list, as of a whole catalogue, may share the object.
            catalogue: ``{"title", "text", "image"}`` by item id; an item is asked for when it is needed.
            progress: label of a progress bar.

        Returns:
            U float32 arrays, each of shape (its number of candidates,).
        """
        users = [as_mapping(user) for user in users]
        out = [np.empty(len(row), dtype=np.float32) for row in candidates]
        names = list(dict.fromkeys(item for row in {id(row): row for row in candidates}.values() for item in row))
        code = {item: number for number, item in enumerate(names)}
        coded = {id(row): np.fromiter((code[item] for item in row), np.int64, len(row)) for row in candidates}
        rows = [coded[id(row)] for row in candidates]
        with tqdm(total=sum(map(len, rows)), desc=progress, unit="pair", disable=progress is None) as bar:
            if not rows:
                return out
            if self.late:
                plan = LatePlan(self.model, self.processor, self.token_budget, self.memory, self.cache)
                plan.score(users, rows, names, catalogue, out, bar)
            else:
                self._score_joint(users, rows, names, catalogue, out, bar)
        return out

    def rank(
        self,
        users: Sequence[Mapping[str, Any]],
        candidates: Sequence[Mapping[str, Any]],
        top_k: int | None = None,
        progress: str | None = None,
    ) -> list[list[dict[str, Any]]]:
        """Order ``candidates`` for every user.

        Returns:
            For each user the best ``top_k`` candidates, best first: the candidate with ``logit`` and ``score``, the
            probability p(yes) / (p(yes) + p(no)), added. Equal logits keep the order given.
        """
        catalogue = {str(place): candidate for place, candidate in enumerate(candidates)}
        logits = self.score(users, [list(catalogue)] * len(users), catalogue, progress)
        return [in_order(candidates, row, top_k) for row in logits]

    def index(self, catalogue: Mapping[str, Mapping[str, Any]], progress: str | None = None) -> tuple[int, int, int]:
        """Fill the ``cache`` ahead, and delete from it what is not in ``catalogue`` any more.

        Returns:
            How many candidates were computed, how many were there, and how many were deleted.
        """
        if self.cache is None:
            raise ValueError("an index needs a model with interaction='late' and Recommender(cache=folder)")
        paths = {item: self.cache.path(catalogue[item]) for item in catalogue}
        missing = [item for item, path in paths.items() if not path.is_file()]
        plan = LatePlan(self.model, self.processor, self.token_budget, self.memory, self.cache)
        with torch.inference_mode(), tqdm(total=len(missing), desc=progress, disable=progress is None) as bar:
            for count in plan.encode_items(missing, catalogue):
                bar.update(count)
        return len(missing), len(paths) - len(missing), self.cache.prune(paths.values())

    def _score_joint(
        self,
        users: Sequence[Mapping[str, Any]],
        rows: list[np.ndarray],
        names: Sequence[str],
        catalogue: Mapping[str, Mapping[str, Any]],
        out: list[np.ndarray],
        bar: Any,
    ) -> None:
        """Fill ``out``: as many candidates at a time as have pictures that may be kept, for all users."""
        shown = Shown(self.model, self.processor, catalogue)
        shown.candidates(names[:8])
        chunk = max(1, int(self.memory / max(1, shown.nbytes) * min(8, len(names))))
        for first in range(0, len(names), chunk):
            if first:
                shown.forget()
            owners, places, numbers = within(rows, first, chunk)
            start = 0
            while start < len(owners):  # as many pairs as the budget allows, going by what the last ones took
                some = slice(start, start + max(1, self.token_budget // self.longest))
                pairs = list(zip(owners[some].tolist(), places[some].tolist(), strict=True))
                items = [names[first + number] for number in numbers[some].tolist()]
                logits = self._score_pairs(users, list(zip(owners[some].tolist(), items, strict=True)), shown)
                if logits is None:
                    continue  # these take more than any before, so take fewer of them
                for (user, place), logit in zip(pairs, logits.tolist(), strict=True):
                    out[user][place] = logit
                start += len(pairs)
                bar.update(len(pairs))

    def _score_pairs(
        self, users: Sequence[Mapping[str, Any]], pairs: list[tuple[int, str]], shown: Shown
    ) -> torch.Tensor | None:
        """(B,) logits of some pairs in one forward; None if they take more tokens than allowed."""
        items = [item for _, item in pairs]
        counted = self.processor.shortened.copy()
        batch = self.processor(
            preferences=[users[user]["preference"] for user, _ in pairs],
            candidates=shown.candidates(items),
            recent=[users[user].get("recent", []) for user, _ in pairs],
        ).to(self.model.device)
        features = shown.features(items)
        packed = None
        if self.shares_prefix:
            owners = torch.tensor([user for user, _ in pairs], device=self.model.device)
            try:
                packed = pack_joint(self.model, batch, owners)
            except BlocksTooLong as error:
                if self.demanded:
                    raise ValueError(f"{error}: leave share_prefix out or set the processor's max_length") from error
        tokens = packed["input_ids"].numel() if packed else batch["input_ids"].numel()
        self.longest = max(self.longest, -(-tokens // len(pairs)))
        if tokens > self.token_budget and len(pairs) > 1:
            self.longest = max(self.longest, self.token_budget // len(pairs) + 1)
            self.processor.shortened = counted
            return None
        if packed is None:
            return self.model.score(**batch, **features).logits
        return self.model.answer_logits(self.model.answers(packed, **(dict(batch) | features)).logits)


def in_order(
    candidates: Sequence[Mapping[str, Any]], logits: np.ndarray, top_k: int | None = None
) -> list[dict[str, Any]]:
    """The best ``top_k`` candidates, best first, with ``logit`` and ``score`` added; equal logits keep their order."""
    scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
    best = np.argsort(-logits, kind="stable")[:top_k]
    return [{**candidates[i], "logit": float(logits[i]), "score": float(scores[i])} for i in best]


def _free_memory(device: torch.device) -> int:
    """Bytes that are free where a model is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # a system that does not say
        return 2 * 10**9
