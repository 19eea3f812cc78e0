"""Rank candidates for many users at once, computing nothing twice.

In one causal sequence (``interaction="joint"``) everything before the candidate depends on the user alone. So the
user's prefix runs once and its keys and values serve all candidates, and a picture is encoded once whatever the users.
The result is that of the plain forward of every pair.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache

# Families whose positions are the plain running count, so that a suffix may continue a cached prefix as it is.
PLAIN_POSITIONS = frozenset({"llava", "llava_next", "llava_onevision", "idefics3", "smolvlm", "internvl"})


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
        shown = _Shown(self.model, self.processor, catalogue)
        score_chunk = self._score_shared if self.shares_prefix else self._score_plain
        with tqdm(total=len(pairs), desc=progress, unit="pair", disable=progress is None) as bar:
            start = 0
            while start < len(pairs):  # as many pairs as the budget allows for the longest row met so far
                chunk = pairs[start : start + max(1, self.token_budget // self.longest)]
                items = [candidates[user][place] for user, place in chunk]
                batch = self.processor(
                    preferences=[users[user]["preference"] for user, _ in chunk],
                    candidates=shown.candidates(items),
                    recent=[users[user].get("recent", []) for user, _ in chunk],
                ).to(self.model.device)
                logits = score_chunk(batch, shown.features(items), [user for user, _ in chunk])
                for (user, place), logit in zip(chunk, logits.tolist(), strict=True):
                    out[user][place] = logit
                start += len(chunk)
                bar.update(len(chunk))
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

    def _score_plain(self, batch: Any, features: list[torch.Tensor], users: list[int]) -> torch.Tensor:
        """Every pair a full sequence; for backbones whose prefix cannot simply be continued."""
        self.longest = max(self.longest, batch["input_ids"].shape[1])
        return self.model.score(**batch, **({"image_features": features} if features else {})).logits

    def _score_shared(self, batch: Any, features: list[torch.Tensor], users: list[int]) -> torch.Tensor:
        """Each user's prefix once, then each candidate's suffix on a copy of its keys and values."""
        rows = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        grouped: dict[int, list[torch.Tensor]] = {}
        for user, row in zip(users, rows, strict=True):
            grouped.setdefault(user, []).append(row)
        lengths = {user: self._shared_length(some) for user, some in grouped.items()}
        prefix, prefix_mask = pad_left([some[0][: lengths[user]] for user, some in grouped.items()])
        cache = DynamicCache(config=self.model.config.get_text_config())
        self.model(
            input_ids=prefix,
            attention_mask=prefix_mask,
            position_ids=positions(prefix_mask),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        numbers = {user: number for number, user in enumerate(grouped)}
        owner = torch.tensor([numbers[user] for user in users], device=self.model.device)
        cache.batch_select_indices(owner)
        suffix, suffix_mask = pad_left([row[lengths[user] :] for user, row in zip(users, rows, strict=True)])
        self.longest = max(self.longest, suffix.shape[1])
        mask = torch.cat([prefix_mask[owner], suffix_mask], dim=1)
        return self.model.score(
            input_ids=suffix,
            attention_mask=mask,
            position_ids=positions(mask)[:, -suffix.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            **({"image_features": features} if features else {}),
        ).logits

    def _shared_length(self, rows: list[torch.Tensor]) -> int:
        """Leading tokens that all rows of one user share, up to the first picture and before the last token."""
        length = min(len(row) for row in rows) - 1
        same = torch.stack([row[:length] == rows[0][:length] for row in rows]).all(0)
        same &= rows[0][:length] != self.model.config.vlm_config.image_token_id
        return int(same.long().cumprod(0).sum())


class _Shown:
    """The catalogue's pictures, each prepared and encoded once, when it is first needed."""

    def __init__(self, model: Any, processor: Any, catalogue: Mapping[str, Mapping[str, Any]]) -> None:
        self.model, self.processor, self.catalogue = model, processor, catalogue
        self.known: dict[str, tuple[Any, torch.Tensor]] = {}  # item -> its picture without pixels, its features

    def candidates(self, items: list[str]) -> list[dict[str, Any]]:
        """What the processor is given: pictures that are already prepared stand in for images."""
        new = [item for item in dict.fromkeys(items) if self._has_image(item) and item not in self.known]
        pictures = self.processor.pictures([self.catalogue[item]["image"] for item in new])
        for alike in _alike(dict(zip(new, pictures, strict=True))):
            names = alike[0][1].tensors
            tensors = {name: torch.cat([picture.tensors[name] for _, picture in alike]) for name in names}
            features = self.model.image_features(
                [picture.num_image_tokens for _, picture in alike],
                **{name: tensor.to(self.model.device) for name, tensor in tensors.items()},
            )
            for (item, picture), feature in zip(alike, features, strict=True):
                self.known[item] = (picture.light(), feature)
        return [
            {**self.catalogue[item], "image": self.known[item][0] if item in self.known else None} for item in items
        ]

    def features(self, items: list[str]) -> list[torch.Tensor]:
        return [self.known[item][1] for item in items if item in self.known]

    def _has_image(self, item: str) -> bool:
        return self.catalogue[item].get("image") is not None


def _alike(pictures: dict[str, Any]) -> list[list[tuple[str, Any]]]:
    """Pictures grouped by the shapes of their tensors, so that each group can be encoded as one batch."""
    groups: dict[Any, list[tuple[str, Any]]] = {}
    for item, picture in pictures.items():
        shapes = tuple((name, tensor.shape) for name, tensor in picture.tensors.items())
        groups.setdefault(shapes, []).append((item, picture))
    return list(groups.values())


def pad_left(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths as (N, L) ids, zeros on the left, and their (N, L) mask."""
    ids = pad_sequence(rows, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    return ids, mask


def positions(mask: torch.Tensor) -> torch.Tensor:
    """The place of each token among those its row attends to; 0 for padding. Same shape as ``mask``."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
