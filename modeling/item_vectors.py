"""Item vectors: the mean over an item's tokens of the last hidden state of a language model, with images or without.

The tokens are those of the item's prompt (``late_item``: title, text and image), without the chat around it and without
any user; of a model without a chat, those of title and text alone. The model is any of transformers that has a last
hidden state: an image-text-to-text model, a causal language model, an encoder of texts, or the encoder of an
encoder-decoder. Letters: N items, B items of a batch, L tokens, F hidden.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel

from .inputs import Candidate

LARGEST = torch.finfo(torch.half).max
CPU_BUDGET, BUDGET = 1024, 8192  # tokens of a forward: what stays in the caches of a core, and what fills a GPU


def load_item_model(name_or_path: str, revision: str | None = None, dtype: str | None = None) -> Any:
    """The model without the head that predicts tokens, on the accelerator if there is one."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    dtype = dtype or ("auto" if accelerator else "float32")
    model = AutoModel.from_pretrained(name_or_path, revision=revision or "main", dtype=dtype).eval()
    if model.config.model_type == "mllm_msr":  # a trained recommender: its backbone
        model = model.base_model
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    return model if accelerator is None else model.to(accelerator)


@dataclass(frozen=True)
class PlainInputs:
    """What stands for the processor of a model without a chat, such as an encoder of sentences; it sees no image.

    Args:
        tokenizer: the model's; what has no token to pad with pads with the one that ends a text.
        max_length: the most tokens of an item; what is longer is cut.
    """

    tokenizer: Any
    max_length: int
    backbone_processor_class: None = None

    def __post_init__(self) -> None:
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def late_items(self, items: Sequence[Candidate]) -> Any:
        """A batch of titles and texts."""
        texts = [f"{item.title}\n{item.text}".strip() for item in items]
        return self.tokenizer(texts, padding=True, return_tensors="pt", truncation=True, max_length=self.max_length)


@torch.inference_mode()
def encode_items(model: Any, processor: Any, items: Sequence[Candidate], token_budget: int | None = None) -> np.ndarray:
    """(N, F) float16: the vector of each item; items of like length go together.

    Args:
        processor: of the same repository; of a text-only model it shows no images.
        token_budget: tokens of one forward, padding included; by default what suits the model's device.

    Raises:
        ValueError: the model gives no last hidden state.
    """
    token_budget = token_budget or (CPU_BUDGET if model.device.type == "cpu" else BUDGET)
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
    states = getattr(model(**inputs, return_dict=True), "last_hidden_state", None)
    if states is None:
        raise ValueError(f"a model of the type {model.config.model_type!r} gives no last hidden state")
    real = inputs["attention_mask"].to(torch.float32)[..., None]
    return to_half((states.float() * real).sum(dim=1) / real.sum(dim=1))


def to_half(vectors: Tensor) -> Tensor:
    """In half precision; what is beyond it is its largest number."""
    return vectors.clamp(-LARGEST, LARGEST).half()


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
