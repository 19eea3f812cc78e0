"""Images that prompts show: each prepared once and encoded once, whatever the number of prompts."""

import inspect
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedModel
from transformers.utils import ModelOutput

from .families import FAMILIES
from .inputs import Candidate, content_key
from .interfaces import PreparedImage, RecommendationProcessor


@dataclass
class EncodedImages(ModelOutput):
    """What backbones take for images that have been through the vision tower already."""

    pooler_output: torch.Tensor | tuple[torch.Tensor, ...] | None = None
    deepstack_features: list[tuple[torch.Tensor, ...]] | None = None


def takes_features(backbone: PreTrainedModel) -> bool:
    """Whether it is known how a backbone is given encoded images in place of pixels."""
    return backbone.config.model_type in FAMILIES


@torch.no_grad()
def encode_images(backbone: Any, images: Sequence[PreparedImage]) -> list[torch.Tensor]:
    """What the decoder of an image-text-to-text model sees of each image; those of equal shapes are one batch.

    Returns:
        For each image (tokens, F), where F is the decoder's width times one plus the number of its layers that see the
        image again (Qwen3-VL).
    """
    encode = backbone.base_model.get_image_features
    parameters = set(inspect.signature(encode).parameters) | {"pixel_values"}
    groups: dict[Any, list[int]] = {}
    for number, image in enumerate(images):
        shapes = tuple((name, tensor.shape) for name, tensor in image.tensors.items())
        groups.setdefault(shapes, []).append(number)
    features: dict[int, torch.Tensor] = {}
    for numbers in groups.values():
        names = parameters.intersection(images[numbers[0]].tensors)
        joined = {name: torch.cat([images[number].tensors[name] for number in numbers]) for name in names}
        output = encode(**BatchFeature(joined).to(backbone.device, backbone.dtype), return_dict=True)
        pooled = output.pooler_output
        if isinstance(pooled, torch.Tensor):
            pooled = pooled.reshape(-1, pooled.shape[-1]).split([images[number].num_image_tokens for number in numbers])
        deep = getattr(output, "deepstack_features", None) or []
        for number, *layers in zip(numbers, pooled, *deep, strict=True):
            features[number] = torch.cat(layers, -1)
    return [features[number] for number in range(len(images))]


def encoder_outputs(backbone: PreTrainedModel, features: Sequence[torch.Tensor]) -> dict[str, EncodedImages]:
    """The argument `mm_encoder_outputs` of a backbone for what :func:`encode_images` returned for a batch's images."""
    if not takes_features(backbone):
        raise ValueError(f"it is not known how {backbone.config.model_type} takes features; give pixel_values")
    depth = features[0].shape[-1] // backbone.config.get_text_config().hidden_size
    pooled, *deep = zip(*(image.chunk(depth, -1) for image in features), strict=True)
    one_tensor = FAMILIES[backbone.config.model_type].one_tensor
    return {"image": EncodedImages(torch.cat(pooled) if one_tensor else pooled, deep or None)}


class ImageFeatureCache:
    """Images by a key, an item's id or :func:`content_key`; the oldest can be dropped.

    A prompt is given a stand-in for an image, which carries no pixels if the backbone takes features.

    Args:
        backbone: an image-text-to-text model.
        processor: it prepares the images.
        device: where features are kept; by default where they are computed.
    """

    def __init__(
        self, backbone: PreTrainedModel, processor: RecommendationProcessor, device: torch.device | None = None
    ) -> None:
        self.backbone, self.processor, self.device = backbone, processor, device
        self._stand_ins: dict[Hashable, PreparedImage] = {}  # the latest asked for is the last
        self._pixels: dict[PreparedImage, PreparedImage] = {}  # of stand-ins that are not encoded yet
        self._features: dict[PreparedImage, torch.Tensor] = {}
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._stand_ins)

    def size(self, stand_in: PreparedImage) -> int:
        """Bytes that are kept of an image."""
        prepared = self._pixels.get(stand_in, stand_in)
        held = [*prepared.tensors.values(), *([self._features[stand_in]] if stand_in in self._features else [])]
        return sum(tensor.nbytes for tensor in held)

    def stand_in(self, key: Hashable, image: Any) -> PreparedImage:
        """What to give to the processor in place of the image with this key."""
        if key in self._stand_ins:
            stand_in = self._stand_ins.pop(key)
        else:
            (prepared,) = self.processor.prepare_images([image])
            stand_in = prepared
            if takes_features(self.backbone):
                stand_in = prepared.light()
                self._pixels[stand_in] = prepared
            self.nbytes += self.size(stand_in)
        self._stand_ins[key] = stand_in
        return stand_in

    def features(self, stand_ins: Sequence[PreparedImage]) -> list[torch.Tensor]:
        """What the decoder sees of the images of a batch; empty if the stand-ins carry their pixels."""
        if not takes_features(self.backbone):
            return []
        new = [image for image in dict.fromkeys(stand_ins) if image in self._pixels]
        encoded = encode_images(self.backbone, [self._pixels[image] for image in new])
        for stand_in, features in zip(new, encoded, strict=True):
            self.nbytes -= self.size(stand_in)
            self._features[stand_in] = features.to(self.device or features.device)
            del self._pixels[stand_in]
            self.nbytes += self.size(stand_in)
        return [self._features[image] for image in stand_ins]

    def evict(self, max_images: int | None = None, max_bytes: int | None = None) -> None:
        """Drop the oldest images until no more than these are left."""
        while self._stand_ins and not (
            (max_images is None or len(self) <= max_images) and (max_bytes is None or self.nbytes <= max_bytes)
        ):
            stand_in = self._stand_ins.pop(next(iter(self._stand_ins)))
            self.nbytes -= self.size(stand_in)
            self._pixels.pop(stand_in, None)
            self._features.pop(stand_in, None)


class PreparedCatalogue:
    """Candidates by id, as the processor takes them: each looked up once, its image replaced by its stand-in.

    Args:
        catalogue: candidates, or mappings that `Candidate.of` takes, by item id.
        prompt: the template that is to show them; where it shows no image, none is prepared.
    """

    def __init__(self, images: ImageFeatureCache, catalogue: Mapping[str, Any], prompt: str) -> None:
        self.images, self.catalogue = images, catalogue
        self._shows_image = images.processor.prints_image(prompt)
        self._candidates: dict[str, Candidate] = {}

    def __getitem__(self, item_id: str) -> Candidate:
        if item_id not in self._candidates:
            candidate = Candidate.of(self.catalogue[item_id])
            if candidate.image is not None:
                candidate = replace(candidate, image=self._stand_in(candidate.image) if self._shows_image else None)
            self._candidates[item_id] = candidate
        return self._candidates[item_id]

    def _stand_in(self, image: Any) -> PreparedImage:
        """An image is known by its content, or, if it came prepared, as itself; in other catalogues as well."""
        return self.images.stand_in(image if hasattr(image, "tensors") else content_key(image), image)

    def clear(self) -> None:
        """Forget all candidates, but not their images."""
        self._candidates.clear()
