"""The candidates' pictures while ranking: each prepared and encoded once, when it is first needed."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .families import FAMILIES


def as_mapping(candidate: Any) -> dict[str, Any]:
    """The fields of a user or a candidate."""
    if isinstance(candidate, Mapping):
        return dict(candidate)
    fields = dict(vars(candidate))
    return fields | {"recent": [vars(item) for item in fields["recent"]]} if "recent" in fields else fields


class Shown:
    """A catalogue whose pictures stand for themselves, prepared, in any batch of the processor.

    A backbone of a family not known to take picture features gets the pixels, prepared once.
    """

    def __init__(self, model: Any, processor: Any, catalogue: Mapping[str, Mapping[str, Any]]) -> None:
        self.model, self.processor, self.catalogue = model, processor, catalogue
        self.takes_features = model.config.vlm_config.model_type in FAMILIES
        self.shows = processor.prints_image("late_item" if model.config.interaction == "late" else "recommendation")
        self.ready: dict[str, tuple[dict[str, Any], torch.Tensor | None]] = {}  # as candidate, and its features

    def forget(self) -> None:
        self.ready.clear()

    @property
    def nbytes(self) -> int:
        return sum(features.nbytes for _, features in self.ready.values() if features is not None)

    def candidates(self, items: Sequence[str]) -> list[dict[str, Any]]:
        """What the processor is given."""
        new = {item: as_mapping(self.catalogue[item]) for item in dict.fromkeys(items) if item not in self.ready}
        pictured = [item for item, one in new.items() if self.shows and one.get("image") is not None]
        pictures = dict(zip(pictured, self.processor.pictures([new[i]["image"] for i in pictured]), strict=True))
        features = self._encode(pictures) if self.takes_features else {}
        for item, one in new.items():
            if item in pictures:
                one["image"] = pictures[item].light() if item in features else pictures[item]
            self.ready[item] = one, features.get(item)
        return [self.ready[item][0] for item in items]

    def features(self, items: Sequence[str]) -> dict[str, list[torch.Tensor]]:
        """The pictures of a batch of these items as an argument of the model's forward, if there are any."""
        some = [self.ready[item][1] for item in items]
        known = [features for features in some if features is not None]
        return {"image_features": known} if known else {}

    def _encode(self, pictures: dict[str, Any]) -> dict[str, torch.Tensor]:
        """What the decoder sees of each picture; those whose tensors have the same shapes are encoded together."""
        groups: dict[Any, list[str]] = {}
        for item, picture in pictures.items():
            shapes = tuple((name, tensor.shape) for name, tensor in picture.tensors.items())
            groups.setdefault(shapes, []).append(item)
        out: dict[str, torch.Tensor] = {}
        for alike in groups.values():
            first = pictures[alike[0]].tensors
            tensors = {name: torch.cat([pictures[item].tensors[name] for item in alike]) for name in first}
            features = self.model.image_features(
                [pictures[item].num_image_tokens for item in alike],
                **{name: tensor.to(self.model.device) for name, tensor in tensors.items()},
            )
            out.update(zip(alike, features, strict=True))
        return out
