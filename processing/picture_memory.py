"""Pictures prepared and encoded once, however many prompts show them."""

import hashlib
import inspect
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mllm_msr.processing.backbone_images import Picture, collate_pictures
from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor

KEY = "picture_keys"  # a tensor of each stand-in, so that a batch tells which pictures its prompts show


def takes_features(model: Any) -> bool:
    """Whether ``model`` can be given encoded pictures in place of pixels."""
    given = inspect.signature(model.forward).parameters
    return "mm_encoder_outputs" in given and hasattr(model.base_model, "get_image_features")


class PictureMemory:
    """The pictures of the latest prompts, by content: without pixels, and what the decoder sees of them."""

    def __init__(self, processor: MllmMsrProcessor) -> None:
        self.processor = processor
        self.pictures: dict[int, Picture] = {}  # with pixels until they are encoded
        self.features: dict[int, list[torch.Tensor]] = {}  # (rows, ..., D), and the same for layers that see it again
        self.in_one = False  # the decoder takes the features of all pictures in one tensor, not one for each

    def stand_in(self, image: Image.Image) -> Picture:
        """What to give to the processor in place of ``image``."""
        content = f"{image.mode} {image.size}".encode() + image.tobytes()
        key = int.from_bytes(hashlib.sha256(content).digest()[:7])
        if key not in self.pictures:
            self.pictures[key] = self.processor.pictures([image])[0]
        self.pictures[key] = known = self.pictures.pop(key)  # the latest is the last
        light = known.light()
        return Picture(light.text, light.num_image_tokens, {**light.tensors, KEY: torch.tensor([key])})

    def forget(self, all_but: int = 0) -> None:
        """Keep only the latest pictures."""
        for key in list(self.pictures)[: len(self.pictures) - all_but]:
            del self.pictures[key]
            self.features.pop(key, None)

    @torch.inference_mode()
    def shown(self, model: Any, keys: list[int]) -> dict[str, Any]:
        """``mm_encoder_outputs`` for prompts that show the pictures of ``keys``, in this order."""
        groups: dict[Any, list[int]] = {}  # those whose tensors have equal shapes are encoded in one batch
        for key in dict.fromkeys(keys):
            if key not in self.features:
                shapes = tuple((name, tensor.shape) for name, tensor in self.pictures[key].tensors.items())
                groups.setdefault(shapes, []).append(key)
        for alike in groups.values():
            self._encode(model, alike)
        pooled, *deep = zip(*(self.features[key] for key in keys), strict=True)
        features: Any = torch.cat(pooled) if self.in_one else pooled
        output: Any = BaseModelOutputWithPooling(pooler_output=features)
        if deep:
            output.deepstack_features = deep
        return {"image": output}

    def _encode(self, model: Any, alike: list[int]) -> None:
        encode = model.base_model.get_image_features
        known = set(inspect.signature(encode).parameters) | {"pixel_values"}
        pictures = [self.pictures[key] for key in alike]
        tensors = BatchFeature(collate_pictures(pictures)).to(model.device, model.dtype)
        output = encode(**{name: tensor for name, tensor in tensors.items() if name in known}, return_dict=True)
        pooled = output.pooler_output
        if isinstance(pooled, torch.Tensor):
            self.in_one = True
            tokens = pooled[0].numel() // pooled.shape[-1]  # of a row; a picture may have several, its crops
            pooled = pooled.split([picture.num_image_tokens // tokens for picture in pictures])
        deep = getattr(output, "deepstack_features", None) or []
        for key, picture, *layers in zip(alike, pictures, pooled, *deep, strict=True):
            self.features[key], self.pictures[key] = layers, picture.light()
