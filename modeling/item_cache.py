"""The candidates of a ``late`` model on disk: computed once for all processes, users and days."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .block_attention import KVCache
from .image_features import content_key
from .inputs import Candidate
from .interfaces import RecommendationModel, RecommendationProcessor

SAMPLES = 1024  # values of each weight that go into the fingerprint of a model


@dataclass(frozen=True)
class IndexReport:
    """How many candidates were computed, were there and were deleted, and the folder that has them."""

    computed: int
    kept: int
    deleted: int
    folder: Path

    @property
    def nbytes(self) -> int:
        """Bytes of all files in the folder."""
        return sum(path.stat().st_size for path in self.folder.glob("*/*"))


class ItemCache:
    """The keys and values of candidates: one file each, named after its content, in a folder named after the model.

    So a new or changed candidate is simply not there yet, and another model or prompt finds nothing of this one's.
    Files appear whole or not at all; one that cannot be read counts as not there.

    Args:
        folder: it is made if it is not there.
    """

    def __init__(self, folder: Path, model: RecommendationModel, processor: RecommendationProcessor) -> None:
        self.device = model.device
        self.folder = Path(folder) / fingerprint(model, processor)
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, candidate: Candidate) -> Path:
        """The file of a candidate with this title, text and image; under autocast another than without it."""
        kind = self.device.type
        precision = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else ""
        content = hashlib.sha256(json.dumps([candidate.title, candidate.text, precision]).encode())
        if candidate.image is not None:
            content.update(content_key(candidate.image))
        digest = content.hexdigest()
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def load(self, path: Path) -> KVCache | None:
        """The keys and values of one candidate, if they are there."""
        try:
            tensors = load_file(path, device=str(self.device))
        except (FileNotFoundError, SafetensorError):
            return None
        keys, values = tensors["keys"], tensors["values"]
        inside = torch.ones(1, keys.shape[2], dtype=torch.bool, device=self.device)
        return KVCache([(key[None], value[None]) for key, value in zip(keys, values, strict=True)], inside)

    def save(self, path: Path, prefixes: KVCache, row: int) -> None:
        """Write one of the candidates of ``prefixes``."""
        length = int(prefixes.inside[row].sum())
        keys, values = (torch.stack([layer[side][row, :, :length] for layer in prefixes.layers]) for side in (0, 1))
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        save_file({"keys": keys.contiguous(), "values": values.contiguous()}, part)
        os.replace(part, path)

    def prune(self, paths: Iterable[Path]) -> int:
        """Delete all files but these; return how many."""
        stale = set(self.folder.glob("*/*")) - set(paths)
        for path in stale:
            path.unlink(missing_ok=True)
        return len(stale)


def fingerprint(model: RecommendationModel, processor: RecommendationProcessor) -> str:
    """A name for everything but the candidate that decides its keys and values: configuration, weights, prompt."""
    name = hashlib.sha256()
    config = {key: value for key, value in model.config.to_dict().items() if not key.startswith(("_", "transformers"))}
    prompt = [processor.prompts["late_item"], processor.item_noun, processor.image_processor.to_dict()]
    name.update(json.dumps([config, prompt, str(model.dtype)], sort_keys=True, default=str).encode())
    for key, weight in model.state_dict().items():
        values = weight.detach().flatten()
        sampled = values[:: max(1, len(values) // SAMPLES)]
        name.update(key.encode() + sampled.float().cpu().numpy().tobytes())
    return name.hexdigest()[:16]
