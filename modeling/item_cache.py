"""Names for what a ``late`` model keeps of candidates: the folder of a model, the key of a candidate."""

import hashlib
import json
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .inputs import Candidate, User
from .interfaces import RecommendationModel, RecommendationProcessor

SAMPLE = Candidate(title="The 3 rêves of 漢字", text="a sea-green (blue?) ship")
SAMPLES = 1024  # values of each weight that go into the fingerprint of a model


@dataclass(frozen=True)
class IndexReport:
    """How many candidates were computed, were there and were dropped, and the folder that has them, with its bytes."""

    computed: int
    kept: int
    deleted: int
    folder: Path
    nbytes: int


class ItemKeys:
    """Names for the keys and values of candidates and users: after what they say, and others under autocast than
    without, and for candidates that are kept in another type.

    So what is new or has changed is simply not there yet. A catalogue may have a method ``content``, which gives
    ``Candidate.content`` of an item, so that none is decoded only to be found.
    """

    def __init__(self, device: torch.device, cache_dtype: str | None = None) -> None:
        self.kind, self.kept_as = device.type, cache_dtype or ""

    def of(self, catalogue: Mapping[str, Any], item_id: str) -> str:
        content: Any = getattr(catalogue, "content", None)
        named = content(item_id) if content else Candidate.of(catalogue[item_id]).content
        return named + self._precision + self.kept_as

    def missing(self, catalogue: Mapping[str, Any], items: Iterable[str], there: Container[str]) -> list[str]:
        """Those of ``items`` whose names are not ``there``; of equal ones the last."""
        keys = {self.of(catalogue, item): item for item in items}
        return [item for key, item in keys.items() if key not in there]

    def of_user(self, user: User) -> str:
        return user.content + self._precision

    @property
    def _precision(self) -> str:
        return str(torch.get_autocast_dtype(self.kind)) if torch.is_autocast_enabled(self.kind) else ""


def fingerprint(model: RecommendationModel, processor: RecommendationProcessor) -> str:
    """A name for everything but the candidate that decides its keys and values: configuration, weights, prompt."""
    name = hashlib.sha256()
    config = {key: value for key, value in model.config.to_dict().items() if not key.startswith(("_", "transformers"))}
    prompt = [processor.prompts["late_item"], processor.item_noun, processor.image_processor.to_dict()]
    prompt += [processor.chat_template, processor.late_items([SAMPLE], None)["input_ids"].tolist()]  # as tokens, too
    name.update(json.dumps([config, prompt, str(model.dtype)], sort_keys=True, default=str).encode())
    for key, weight in model.state_dict().items():
        values = weight.detach().flatten()
        sampled = values[:: max(1, len(values) // SAMPLES)]
        name.update(key.encode() + sampled.float().cpu().numpy().tobytes())
    return name.hexdigest()[:16]
