"""Images as the backbone takes them, prepared one at a time so that each can be part of any batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import ImageProcessingMixin, ProcessorMixin

SAME_FOR_IMAGES = {"SmolVLMProcessor": "Idefics3Processor"}  # and without a package that spells out numbers for videos
PIXELS = ("pixel_values", "pixel_attention_mask", "image_sizes", "batch_num_images")  # what features replace


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image as the backbone takes it.

    Args:
        text: how it is written in a prompt, image tokens included.
        num_image_tokens: how many tokens of the prompt its features take the place of.
        tensors: the image processor's; the first dimension of each counts rows, of which an image may have several.
    """

    text: str
    num_image_tokens: int
    tensors: dict[str, torch.Tensor]

    def light(self) -> "PreparedImage":
        """The same without its pixels, for batches whose `image_features` are given."""
        kept = {name: tensor for name, tensor in self.tensors.items() if name not in PIXELS}
        return PreparedImage(self.text, self.num_image_tokens, kept)


class NoImages(ImageProcessingMixin):
    """What stands for the image processor of a text-only language model, which sees no images."""


def collate_images(images: Sequence[PreparedImage]) -> dict[str, torch.Tensor]:
    """The tensors of several images in one, padded with zeros where their sizes differ."""
    names = images[0].tensors if images else ()
    return {name: _stack([image.tensors[name] for image in images]) for name in names}


def _stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [size - own for size, own in zip(shape, tensor.shape[1:], strict=True)]
        padded.append(torch.nn.functional.pad(tensor, [side for size in reversed(missing) for side in (0, size)]))
    return torch.cat(padded)


def build_backbone_processor(name: str, image_processor: Any, tokenizer: Any, kwargs: dict[str, Any]) -> ProcessorMixin:
    """The backbone's own processor for images only: it needs no video processor, and so no torchvision."""
    original: Any = getattr(transformers, SAME_FOR_IMAGES.get(name, name))

    class ImageOnly(original):
        def check_argument_for_proper_class(self, argument_name, argument):
            if argument is None:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    parts = {"image_processor": image_processor, "tokenizer": tokenizer}
    absent = dict.fromkeys(set(original.get_attributes()) - set(parts))
    return ImageOnly(**parts, **absent, **kwargs)
