"""What a ``late`` model keeps of candidates, on disk: computed once for all processes, users and days."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .block_attention import Past
from .image_features import as_mapping

SAMPLES = 1024  # values of each weight that go into the fingerprint of a model


class ItemCache:
    """One file a candidate, named after its content, in a folder named after the model and its item prompt.

    So a new or changed candidate is simply not there yet, and another model finds nothing of this one's. Files appear
    whole or not at all; one that cannot be read counts as not there.

    Args:
        folder: it is made if it is not there.
    """

    def __init__(self, folder: Path, model: Any, processor: Any) -> None:
        self.folder = Path(folder) / fingerprint(model, processor)
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, item: Mapping[str, Any]) -> Path:
        """The file of a candidate with this title, text and image."""
        item = as_mapping(item)
        name = hashlib.sha256()
        for part in (item.get("title") or "", item.get("text") or ""):
            name.update(json.dumps(part).encode())
        image = item.get("image")
        for picture in image if isinstance(image, (list, tuple)) else [] if image is None else [image]:
            name.update(f"{picture.size}{picture.mode}".encode() + picture.tobytes())
        digest = name.hexdigest()
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def load(self, path: Path, device: torch.device) -> Past | None:
        """The keys and values of one candidate, if they are there."""
        try:
            tensors = load_file(path, device=str(device))
        except (FileNotFoundError, SafetensorError):
            return None
        keys, values = tensors["keys"], tensors["values"]
        length = torch.tensor([keys.shape[2]], device=device)
        return Past([(key[None], value[None]) for key, value in zip(keys, values, strict=True)], length)

    def save(self, path: Path, past: Past, row: int) -> None:
        """Write one of the candidates of ``past``."""
        length = int(past.lengths[row])
        keys, values = (torch.stack([layer[side][row, :, :length] for layer in past.layers]) for side in (0, 1))
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        save_file({"keys": keys.contiguous(), "values": values.contiguous()}, part)
        os.replace(part, path)

    def prune(self, kept: Iterable[Path]) -> int:
        """Delete the files of candidates that are no more; return how many."""
        stale = set(self.folder.glob("*/*")) - set(kept)
        for path in stale:
            path.unlink(missing_ok=True)
        return len(stale)


def fingerprint(model: Any, processor: Any) -> str:
    """A name for everything but the candidate that decides its keys and values: configuration, weights, prompt."""
    name = hashlib.sha256()
    config = {key: value for key, value in model.config.to_dict().items() if not key.startswith(("_", "transformers"))}
    said = [processor.prompts["late_item"], processor.item_noun, processor.image_processor.to_dict()]
    name.update(json.dumps([config, said, str(model.dtype)], sort_keys=True, default=str).encode())
    for key, weight in model.state_dict().items():
        values = weight.detach().flatten()
        some = values[:: max(1, len(values) // SAMPLES)]
        name.update(key.encode() + some.float().cpu().numpy().tobytes())
    return name.hexdigest()[:16]
