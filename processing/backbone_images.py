"""Pictures as the backbone takes them, made ready one at a time so that each can be in any batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import ProcessorMixin

SAME_FOR_PICTURES = {
    "SmolVLMProcessor": "Idefics3Processor"
}  # and without a package that spells out numbers for videos
PIXELS = (
    "pixel_values",
    "pixel_attention_mask",
    "image_sizes",
    "batch_num_images",
)  # what a picture's features replace


@dataclass(frozen=True)
class Picture:
    """A picture as the backbone takes it: how it is written in a prompt, and its tensors (first dimension: rows)."""

    text: str
    num_image_tokens: int
    tensors: dict[str, torch.Tensor]

    def light(self) -> "Picture":
        """Without its pixels, for batches whose `image_features` are known."""
        kept = {name: tensor for name, tensor in self.tensors.items() if name not in PIXELS}
        return Picture(self.text, self.num_image_tokens, kept)


def collate_pictures(pictures: Sequence[Picture]) -> dict[str, torch.Tensor]:
    """The tensors of several pictures in one, padded with zeros where their sizes differ."""
    names = pictures[0].tensors if pictures else ()
    return {name: _stack([picture.tensors[name] for picture in pictures]) for name in names}


def _stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [size - own for size, own in zip(shape, tensor.shape[1:], strict=True)]
        padded.append(torch.nn.functional.pad(tensor, [side for size in reversed(missing) for side in (0, size)]))
    return torch.cat(padded)


def build_backbone_processor(name: str, image_processor: Any, tokenizer: Any, kwargs: dict[str, Any]) -> ProcessorMixin:
    """The backbone's own processor for pictures only: it needs no video processor, and so no torchvision."""
    original: Any = getattr(transformers, SAME_FOR_PICTURES.get(name, name))

    class ImageOnly(original):
        def check_argument_for_proper_class(self, argument_name, argument):
            if argument is None:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    parts = {"image_processor": image_processor, "tokenizer": tokenizer}
    absent = dict.fromkeys(set(original.get_attributes()) - set(parts))
    return ImageOnly(**parts, **absent, **kwargs)
