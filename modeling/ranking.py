"""Rank candidates for many users at once, computing nothing twice.

In one causal sequence (``interaction="joint"``) everything before the candidate depends on the user alone. So the
user's prefix runs once and its keys and values serve all candidates, and a picture is encoded once whatever the users.
The result is that of the plain forward of every pair. Where it would not be, because the backbone's attention or
positions are not plain, pairs are scored one whole prompt each.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .families import FAMILIES

SHIFTING_ROPE = frozenset({"dynamic", "longrope"})  # rotations that depend on the length of the whole prompt


class Recommender:
    """A model and its processor, ready to rank.

    Args:
        model: ``MllmMsrForRecommendation``.
        processor: ``MllmMsrProcessor``.
        token_budget: tokens of one forward; bounds memory.
        share_prefix: by default wherever it changes nothing; `False` never; `True` refuses, with the reason, where
            scores would change. `shares_prefix` and `obstacle` say what became of it.
    """

    def __init__(self, model: Any, processor: Any, token_budget: int = 8192, share_prefix: bool | None = None) -> None:
        self.model, self.processor, self.token_budget = model.eval(), processor, token_budget
        self.longest = 64  # tokens of the longest row met so far
        self.obstacle, self.window = prefix_limits(model.config.vlm_config)
        if share_prefix and self.obstacle:
            raise ValueError(f"prefixes cannot be shared: {self.obstacle}; leave share_prefix out")
        self.demanded = bool(share_prefix)
        self.shares_prefix = self.obstacle is None and share_prefix is not False

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
        with tqdm(total=len(pairs), desc=progress, unit="pair", disable=progress is None) as bar:
            start = 0
            while start < len(pairs):  # as many pairs as the budget allows for the longest row met so far
                chunk = pairs[start : start + max(1, self.token_budget // self.longest)]
                items = [candidates[user][place] for user, place in chunk]
                counted = self.processor.shortened.copy()
                batch = self.processor(
                    preferences=[users[user]["preference"] for user, _ in chunk],
                    candidates=shown.candidates(items),
                    recent=[users[user].get("recent", []) for user, _ in chunk],
                ).to(self.model.device)
                owners = [user for user, _ in chunk]
                lengths = self._shared_lengths(batch, owners)
                width = int((batch["attention_mask"].sum(1) - lengths).max())
                self.longest = max(self.longest, width)
                if len(chunk) > max(1, self.token_budget // self.longest):
                    self.processor.shortened = counted
                    continue  # these rows are longer than any before, so take fewer of them
                score = self._score_shared if lengths.any() else self._score_plain
                logits = score(batch, shown.features(items), owners, lengths)
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
        return [in_order(candidates, row, top_k) for row in logits]

    def _shared_lengths(self, batch: Any, owners: list[int]) -> torch.Tensor:
        """(B,) how many leading tokens each row shares with its owner's others; 0 where sharing would change scores.

        They end before the first picture and before the last token, at which the answer is read.
        """
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        lengths = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        if not self.shares_prefix:
            return lengths
        rows = [row[kept] for row, kept in zip(ids, mask, strict=True)]
        for owner in set(owners):
            own = [number for number, other in enumerate(owners) if other == owner]
            length = min(len(rows[number]) for number in own) - 1
            first = rows[own[0]][:length]
            same = torch.stack([rows[number][:length] == first for number in own]).all(0)
            same &= first != self.model.config.vlm_config.image_token_id
            lengths[own] = same.long().cumprod(0).sum()
        width = int(lengths.max() + (mask.sum(1) - lengths).max())
        if self.window is not None and width > self.window:
            if self.demanded:
                raise ValueError(
                    f"prefixes cannot be shared: prompts of {width} tokens are longer than the sliding window of "
                    f"{self.window}; leave share_prefix out or set the processor's max_length"
                )
            lengths.zero_()
        return lengths

    def _score_plain(
        self, batch: Any, features: list[torch.Tensor], owners: list[int], lengths: torch.Tensor
    ) -> torch.Tensor:
        """Every pair a full sequence."""
        return self.model.score(**batch, **({"image_features": features} if features else {})).logits

    def _score_shared(
        self, batch: Any, features: list[torch.Tensor], owners: list[int], lengths: torch.Tensor
    ) -> torch.Tensor:
        """Each owner's prefix once, then each candidate's suffix on a copy of its keys and values."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        where = self._positions(batch)  # (B, L) or (3, B, L)
        place = torch.arange(ids.shape[1], device=ids.device)
        begin = ids.shape[1] - mask.sum(1)
        cut = begin + lengths  # (B,) the column at which a row's suffix begins

        numbers = {owner: number for number, owner in enumerate(dict.fromkeys(owners))}
        first = torch.tensor([owners.index(owner) for owner in numbers], device=ids.device)  # (U,) a row of each
        width = int(lengths.max())
        columns = cut[first, None] - width + place[:width]  # (U, width)
        prefix_mask = (columns >= begin[first, None]).long()
        columns = columns.clamp(min=0)
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        self.model(
            input_ids=ids[first].gather(1, columns),
            attention_mask=prefix_mask,
            position_ids=torch.take_along_dim(where[..., first, :], columns.expand(*where.shape[:-2], -1, -1), -1),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        row_of = torch.tensor([numbers[owner] for owner in owners], device=ids.device)  # (B,)
        cache.batch_select_indices(row_of)

        rest = slice(int(cut.min()), None)
        more: dict[str, Any] = {"image_features": features} if features else {}
        if "token_type_ids" in batch:  # pictures whose tokens see each other; there are none in a prefix
            types = batch["token_type_ids"] * (place >= cut[:, None])
            more["token_type_ids"] = torch.nn.functional.pad(types[:, rest], (width, 0))
        return self.model.score(
            input_ids=ids[:, rest],
            attention_mask=torch.cat([prefix_mask[row_of], (place >= cut[:, None]).long()[:, rest]], dim=1),
            position_ids=where[..., rest],
            past_key_values=cache,
            use_cache=True,
            **more,
        ).logits

    def _positions(self, batch: Any) -> torch.Tensor:
        """The position of each token of a batch, as the backbone counts them: (B, L), or (3, B, L) with rows and
        columns of pictures."""
        mask = batch["attention_mask"]
        if not FAMILIES[self.model.config.vlm_config.model_type].grid_positions:
            return (mask.cumsum(-1) - 1).clamp(min=0)
        return self.model.base_model.get_rope_index(
            batch["input_ids"], batch["mm_token_type_ids"], batch.get("image_grid_thw"), attention_mask=mask
        )[0]


def in_order(
    candidates: Sequence[Mapping[str, Any]], logits: np.ndarray, top_k: int | None = None
) -> list[dict[str, Any]]:
    """The best ``top_k`` candidates, best first, with ``logit`` and ``score`` added; equal logits keep their order."""
    scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
    best = np.argsort(-logits, kind="stable")[:top_k]
    return [{**candidates[i], "logit": float(logits[i]), "score": float(scores[i])} for i in best]


def prefix_limits(vlm_config: Any) -> tuple[str | None, int | None]:
    """Why a backbone's prompts cannot continue a shared prefix, if so, and up to how many tokens they can, if limited.

    Sliding windows are measured over padding, too, so they are left alone until a batch is too wide for them; up to
    there they are plain attention.
    """
    if vlm_config.model_type not in FAMILIES:
        return f"it is not known how {vlm_config.model_type} counts positions", None
    text = vlm_config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = {each.get("rope_type") for each in (rope, *rope.values()) if isinstance(each, dict)}
    if kinds & SHIFTING_ROPE:
        return f"rotary positions of type {kinds & SHIFTING_ROPE} depend on the whole prompt", None
    layers = DynamicCache(config=text).layers  # what transformers itself would keep of each layer
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return f"the layers {sorted(set(text.layer_types))} of {text.model_type} are not all plain attention", None
    windows = [layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
    return None, min(windows, default=None)


class _Shown:
    """The catalogue's pictures, each prepared and encoded once, when it is first needed.

    A backbone of a family not known to take such features gets the pixels, prepared once.
    """

    def __init__(self, model: Any, processor: Any, catalogue: Mapping[str, Mapping[str, Any]]) -> None:
        self.model, self.processor, self.catalogue = model, processor, catalogue
        self.known: dict[str, tuple[Any, torch.Tensor]] = {}  # item -> its picture without pixels, its features
        self.takes_features = model.config.vlm_config.model_type in FAMILIES
        self.prepared: dict[str, Any] = {}  # item -> its picture with pixels, for want of features

    def candidates(self, items: list[str]) -> list[dict[str, Any]]:
        """What the processor is given: pictures that are already prepared stand in for images."""
        seen = self.known if self.takes_features else self.prepared
        new = [item for item in dict.fromkeys(items) if self._has_image(item) and item not in seen]
        pictures = self.processor.pictures([self.catalogue[item]["image"] for item in new])
        if not self.takes_features:
            self.prepared.update(zip(new, pictures, strict=True))
            return [{**self.catalogue[item], "image": self.prepared.get(item)} for item in items]
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
