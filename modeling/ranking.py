"""Rank candidates for many users at once, computing nothing twice.

In one causal sequence (``interaction="joint"``) everything before the candidate depends on the user alone. So the
user's prefix runs once and its keys and values serve all candidates, and a picture is encoded once whatever the users.
The result is that of the plain forward of every pair.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache

# Families whose positions are the plain running count, so that a suffix may continue a cached prefix as it is.
PLAIN_POSITIONS = frozenset({"llava"})
Pair = tuple[int, int]  # the user's number, and the candidate's place in that user's list


class Recommender:
    """A model and its processor, ready to rank.

    Args:
        model: ``MllmMsrForRecommendation``.
        processor: ``MllmMsrProcessor``.
        token_budget: tokens of one forward; bounds memory.
    """

    def __init__(self, model: Any, processor: Any, token_budget: int = 8192) -> None:
        self.model, self.processor, self.token_budget = model.eval(), processor, token_budget
        self.longest = 64  # tokens of the longest row met so far
        self.shares_prefix = model.config.vlm_config.model_type in PLAIN_POSITIONS

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
            candidates: U lists of item ids.
            catalogue: ``{"title", "text", "image"}`` by item id.
            progress: label of a progress bar.

        Returns:
            U float32 arrays, each of shape (its number of candidates,).
        """
        out = [np.empty(len(row), dtype=np.float32) for row in candidates]
        pairs = [(user, place) for user, row in enumerate(candidates) for place in range(len(row))]
        with tqdm(total=len(pairs), desc=progress, unit="pair", disable=progress is None) as bar:
            score_all = self._score_shared if self.shares_prefix else self._score_plain
            for (user, place), logit in score_all(users, candidates, catalogue, pairs):
                out[user][place] = logit
                bar.update()
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
        ranked = []
        for row in logits:
            order = np.argsort(-row, kind="stable")[:top_k]
            scores = 1 / (1 + np.exp(-row.astype(np.float64)))
            ranked.append([{**candidates[i], "logit": float(row[i]), "score": float(scores[i])} for i in order])
        return ranked

    def _score_plain(self, users, candidates, catalogue, pairs) -> Iterator[tuple[Pair, float]]:
        """Every pair a full sequence; for backbones whose prefix cannot simply be continued."""
        for chunk in self._chunks(pairs):
            batch = self._batch(users, candidates, catalogue, chunk)
            self.longest = max(self.longest, batch["input_ids"].shape[1])
            yield from zip(chunk, self.model.score(**batch).logits.tolist(), strict=True)

    def _score_shared(self, users, candidates, catalogue, pairs) -> Iterator[tuple[Pair, float]]:
        """Each user's prefix once, then each candidate's suffix on a copy of its keys and values."""
        features: dict[str, list[torch.Tensor]] = {}
        for chunk in self._chunks(pairs):
            batch = self._batch(users, candidates, catalogue, chunk)
            rows = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
            shown = [candidates[user][place] for user, place in chunk]
            self._encode_pictures(batch, shown, catalogue, features)
            owners = sorted({user for user, _ in chunk})
            owner = torch.tensor([owners.index(user) for user, _ in chunk], device=self.model.device)
            lengths = [
                self._shared_length([row for row, (user, _) in zip(rows, chunk, strict=True) if user == one])
                for one in owners
            ]
            first = [next(row for row, (user, _) in zip(rows, chunk, strict=True) if user == one) for one in owners]
            prefix, prefix_mask = pad_left([row[:length] for row, length in zip(first, lengths, strict=True)])
            cache = DynamicCache(config=self.model.config.get_text_config())
            self.model(
                input_ids=prefix,
                attention_mask=prefix_mask,
                position_ids=positions(prefix_mask),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache.batch_select_indices(owner)
            suffix, suffix_mask = pad_left([row[lengths[k] :] for row, k in zip(rows, owner.tolist(), strict=True)])
            mask = torch.cat([prefix_mask[owner], suffix_mask], dim=1)
            self.longest = max(self.longest, suffix.shape[1])
            pictures = [feature for item in shown for feature in features.get(item, [])]
            logits = self.model.score(
                input_ids=suffix,
                attention_mask=mask,
                position_ids=positions(mask)[:, -suffix.shape[1] :],
                past_key_values=cache,
                use_cache=True,
                **({"image_features": pictures} if pictures else {}),
            ).logits
            yield from zip(chunk, logits.tolist(), strict=True)

    def _chunks(self, pairs: list[Pair]) -> Iterator[list[Pair]]:
        """Consecutive pairs, as many as the token budget allows for the longest row met so far."""
        start = 0
        while start < len(pairs):
            count = max(1, self.token_budget // self.longest)
            yield pairs[start : start + count]
            start += count

    def _batch(self, users, candidates, catalogue, chunk: list[Pair]) -> Any:
        batch = self.processor(
            preferences=[users[user]["preference"] for user, _ in chunk],
            candidates=[catalogue[candidates[user][place]] for user, place in chunk],
            recent=[users[user].get("recent", []) for user, _ in chunk],
        )
        return batch.to(self.model.device)

    def _encode_pictures(self, batch, shown, catalogue, features: dict[str, list[torch.Tensor]]) -> None:
        """Fill ``features`` for the items of the chunk that it lacks, each item once."""
        new = list(
            dict.fromkeys(item for item in shown if item not in features and catalogue[item]["image"] is not None)
        )
        if new:
            at = [item for item in shown if catalogue[item]["image"] is not None]
            rows = [at.index(item) for item in new]
            encoded = self.model.image_features(pixel_values=batch["pixel_values"][rows])
            features.update({item: [feature] for item, feature in zip(new, encoded, strict=True)})

    def _shared_length(self, rows: list[torch.Tensor]) -> int:
        """Leading tokens that all rows of one user have in common, up to the first picture and before the last token."""
        length = min(len(row) for row in rows) - 1
        same = torch.stack([row[:length] == rows[0][:length] for row in rows]).all(0)
        same &= rows[0][:length] != self.model.config.vlm_config.image_token_id
        return int(same.long().cumprod(0).sum())


def pad_left(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths as (N, L) ids, zeros on the left, and their (N, L) mask."""
    ids = pad_sequence(rows, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    return ids, mask


def positions(mask: torch.Tensor) -> torch.Tensor:
    """The place of each token among those its row attends to; 0 for padding. Same shape as ``mask``."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
