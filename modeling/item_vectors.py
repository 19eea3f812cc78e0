"""Item vectors: the mean over an item's tokens of the last hidden state of a language model, with images or without.

The tokens are those of the item's prompt (``late_item``: title, text and image), without the chat around it and without
any user. The model is any of transformers that has a last hidden state: an image-text-to-text model, a causal language
model, or an encoder of sentences. Letters: N items, B items of a batch, L tokens, F hidden.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel

from .inputs import Candidate

LARGEST = 65504.0  # of half precision


def load_item_model(name_or_path: str, revision: str | None = None, dtype: str | None = None) -> Any:
    """The model without the head that predicts tokens, on the accelerator if there is one."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    dtype = dtype or ("auto" if accelerator else "float32")
    model = AutoModel.from_pretrained(name_or_path, revision=revision or "main", dtype=dtype).eval()
    if model.config.model_type == "mllm_msr":  # a trained recommender: its backbone
        model = model.base_model
    return model if accelerator is None else model.to(accelerator)


@dataclass(frozen=True)
class SentenceInputs:
    """What stands for the processor of an encoder of sentences, which knows no chat and sees no image.

    Args:
        tokenizer: the encoder's.
        max_length: the most tokens of an item; what is longer is cut.
    """

    tokenizer: Any
    max_length: int | None = None
    backbone_processor_class: None = None

    def late_items(self, items: Sequence[Candidate]) -> Any:
        """A batch of titles and texts."""
        texts = [f"{item.title}\n{item.text}".strip() for item in items]
        limit = {} if self.max_length is None else {"truncation": True, "max_length": self.max_length}
        return self.tokenizer(texts, padding=True, return_tensors="pt", **limit)


@torch.inference_mode()
def encode_items(model: Any, processor: Any, items: Sequence[Candidate], token_budget: int = 8192) -> np.ndarray:
    """(N, F) float16: the vector of each item; items of like length go together.

    Args:
        processor: of the same repository; of a text-only model it shows no images.
        token_budget: tokens of one forward, padding included.
    """
    if processor.backbone_processor_class is None:
        items = [replace(item, image=None) for item in items]
    ready = [
        item if item.image is None else replace(item, image=processor.prepare_images([item.image])[0]) for item in items
    ]
    texts = processor.tokenizer([f"{item.title}\n{item.text}" for item in ready], add_special_tokens=False)
    lengths = np.array([len(ids) for ids in texts["input_ids"]]) + FRAME
    lengths += np.array([0 if item.image is None else item.image.num_image_tokens for item in ready])
    vectors: dict[int, np.ndarray] = {}
    for places in batches_of_tokens(lengths, token_budget):
        batch = processor.late_items([ready[place] for place in places]).to(model.device)
        for place, vector in zip(places, mean_states(model, batch).cpu().numpy(), strict=True):
            vectors[place] = vector
    return np.stack([vectors[place] for place in range(len(ready))]) if ready else np.empty((0, 0), np.float16)


FRAME = 16  # tokens, about, that the prompt adds to an item's words


def mean_states(model: Any, batch: Any) -> Tensor:
    """(B, F) float16: the mean of the last hidden state over the real tokens of a batch that is padded on the left."""
    inputs = dict(batch)
    if not any(name.startswith("pixel") for name in inputs):  # positions that count from the first place are then right
        inputs = {name: pad_right(value, batch["attention_mask"]) for name, value in inputs.items()}
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{model.config.model_type}: an encoder with a decoder has no one last hidden state")
    states = model(**inputs, return_dict=True).last_hidden_state.float()
    real = inputs["attention_mask"].to(states.dtype)[..., None]
    mean = (states * real).sum(dim=1) / real.sum(dim=1)
    return mean.clamp(-LARGEST, LARGEST).half()


def pad_right(values: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, L) values padded on the left, padded on the right instead.

    >>> pad_right(torch.tensor([[0, 7, 8]]), torch.tensor([[0, 1, 1]])).tolist()
    [[7, 8, 0]]
    """
    start = attention_mask.argmax(dim=1, keepdim=True)
    place = (torch.arange(values.shape[1], device=values.device) + start) % values.shape[1]
    return values.gather(1, place)


def batches_of_tokens(lengths: np.ndarray, token_budget: int) -> Iterator[np.ndarray]:
    """Every place of (N,) lengths once, the longest first, in batches of at most ``token_budget`` tokens if padded.

    >>> [batch.tolist() for batch in batches_of_tokens(np.array([2, 5, 3]), 7)]
    [[1], [2, 0]]
    """
    order = np.argsort(-lengths, kind="stable")
    while len(order):
        size = max(1, int(token_budget // max(lengths[order[0]], 1)))
        yield order[:size]
        order = order[size:]
