"""A decoding loop for ``generate(custom_generate=decode)`` that does no work twice, nor for a text that has ended."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 64  # tokens
BY_ROW = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")  # (..., B, L)
OF_ALL = ("past_key_values", "use_cache", "logits_to_keep")  # other arguments of prompts without images
SHORTER = 0.9  # prompts that are so much shorter than others are read apart from them,
WORTH = 128  # where that saves so many tokens of padding


class OwnSeeds:
    """Sampling with a seed for each row, by Gumbel noise: the largest noisy logit is a random sample of the softmax.

    The noise of a row comes from its own generator, so that the rest of the batch changes nothing.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        """scores (B, V) -> (B, V) in float32."""
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() - noise.log()

    def keep(self, rows: Sequence[int]) -> None:
        self.generators = [self.generators[row] for row in rows]


class RoomyLayer(DynamicLayer):
    """A layer of the KV cache with room for further tokens; the stock layer copies all keys and values at each one.

    Args:
        step: attention sees a multiple of so many keys, of which those without a token are masked. More than 1 is for
            kernels that are planned anew for every number of keys.
    """

    def __init__(self, step: int = 1) -> None:
        super().__init__()
        self.step = step
        self.buffers: list[torch.Tensor] = []  # (B, heads, tokens and room, D) each

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = (key_states, value_states)
        start, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        if not self.buffers or end > self.buffers[0].shape[-2]:
            earlier, self.buffers = self.buffers, []
            for n, states in enumerate(new):
                self.buffers.append(states.new_zeros((*states.shape[:-2], self._stepped(end) + ROOM, states.shape[-1])))
                if start:
                    self.buffers[n][..., :start, :] = earlier[n][..., :start, :]
        for buffer, states in zip(self.buffers, new, strict=True):
            buffer[..., start:end, :] = states
        self._look(end)
        keys, values = (buffer[..., : self._stepped(end), :] for buffer in self.buffers)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._stepped(self.get_seq_length() + query_length), 0

    def fill(self, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]) -> None:
        """Take over the keys and values (rows, heads, L, D) of some of the rows of a cache of ``shape`` (B, tokens),
        at its end."""
        batch, end = shape
        if not self.buffers:
            self.lazy_initialization(keys, values)
            room = self._stepped(end) + ROOM
            self.buffers = [each.new_zeros(batch, each.shape[1], room, each.shape[3]) for each in (keys, values)]
        for buffer, states in zip(self.buffers, (keys, values), strict=True):
            buffer[rows, :, end - states.shape[2] : end] = states
        self._look(end)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Copy only the rows that change their places."""
        end, index = self.get_seq_length(), beam_idx.to(self.device)
        moved = (index != torch.arange(len(index), device=index.device)).nonzero()[:, 0]
        for n, buffer in enumerate(self.buffers):
            buffer[moved, :, :end] = buffer[index[moved], :, :end]
            self.buffers[n] = buffer[: len(index)]
        self._look(end)

    def _look(self, end: int) -> None:
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.buffers)

    def _stepped(self, end: int) -> int:
        return -(-end // self.step) * self.step


def key_step(model: Any) -> int:
    """Attention of CUDA is planned for every number of keys anew, which takes longer than a few keys more."""
    return ROOM if model.device.type == "cuda" and model.get_decoder().config._attn_implementation == "sdpa" else 1


def decode(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    own_seeds: OwnSeeds | None = None,
    **inputs: Any,
) -> list[list[int]]:
    """The new tokens of each of B rows: the most likely ones, or random samples if there are ``own_seeds``.

    They are those of stock greedy search. But that computes a row until the longest is done, which with texts of
    unequal lengths is most of the work; this drops a row, and its keys and values, as soon as it has ended.

    Args:
        input_ids: (B, L) prompts, padded on the left.
        inputs: whatever else ``generate`` has prepared, such as the (dynamic) KV cache and the positions.
    """
    start = input_ids.shape[1]
    texts: list[list[int]] = [[] for _ in input_ids]
    places = list(range(len(input_ids)))  # of each remaining row its place in the whole batch
    cache, first = inputs["past_key_values"], True
    step = key_step(model)
    cache.layers = [RoomyLayer(step) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    while places:
        if first:
            outputs = _read(model, input_ids, inputs)
        else:
            arguments = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **inputs)
            outputs = model(**arguments, return_dict=True)
        inputs = model._update_model_kwargs_for_generation(outputs, inputs)
        scores = logits_processor(input_ids, outputs.logits[:, -1].float())
        tokens = (own_seeds(scores) if own_seeds else scores).argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, tokens], dim=-1)
        first = False
        ended = stopping_criteria(input_ids, None).tolist()
        if not any(ended):
            continue
        for row, place in enumerate(places):
            if ended[row]:
                texts[place] = input_ids[row, start:].tolist()
        count = ended.count(False)
        last = (row for row in range(count, len(ended)) if not ended[row])
        left = [next(last) if ended[row] else row for row in range(count)]  # the last ones fill the gaps
        places = [places[row] for row in left]
        if left:
            index = torch.tensor(left, device=input_ids.device)
            input_ids = input_ids[index]
            cache.reorder_cache(index)
            for name in BY_ROW:
                if inputs.get(name) is not None:
                    inputs[name] = inputs[name].index_select(-2, index)
            if own_seeds:
                own_seeds.keep(left)
    return texts


def _read(model: Any, input_ids: torch.Tensor, inputs: dict[str, Any]) -> Any:
    """What the model's forward returns for the prompts, with their keys and values in the cache.

    Prompts are read together with others that are about as long, so that little of it is padding.
    """
    cache: Any = inputs["past_key_values"]
    mask: Any = inputs.get("attention_mask")
    groups = [torch.arange(len(input_ids), device=input_ids.device)]
    without_images = all(name in (*BY_ROW, *OF_ALL) or not value for name, value in inputs.items())
    if without_images and mask is not None and all(type(layer) is RoomyLayer for layer in cache.layers):
        groups = _of_similar_lengths(mask.sum(1))
    if len(groups) == 1:
        arguments = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **inputs)
        return model(**arguments, return_dict=True)
    logits: list[torch.Tensor] = []
    for rows in groups:
        width = int(mask[rows].sum(1).max())
        some = {
            name: value[..., rows, -width:] if name in BY_ROW and value is not None else value
            for name, value in inputs.items()
        }
        some["past_key_values"] = DynamicCache()
        arguments = model.prepare_inputs_for_generation(input_ids[rows, -width:], is_first_iteration=True, **some)
        outputs = model(**arguments, return_dict=True)
        logits.append(outputs.logits[:, -1:])
        for whole, layer in zip(cache.layers, outputs.past_key_values.layers, strict=True):
            whole.fill(rows, layer.keys, layer.values, tuple(input_ids.shape))
    outputs.logits = torch.cat(logits)[torch.cat(groups).argsort()]
    outputs.past_key_values = cache
    return outputs


def _of_similar_lengths(lengths: torch.Tensor) -> list[torch.Tensor]:
    """The places of ``lengths``, (B,), in groups, the longest first."""
    order = lengths.argsort(descending=True, stable=True)
    sizes = lengths[order].tolist()
    begins = [0]
    for place, size in enumerate(sizes):
        if size < SHORTER * sizes[begins[-1]] and (sizes[begins[-1]] - size) * (len(sizes) - place) >= WORTH:
            begins.append(place)
    return list(order.tensor_split(begins[1:]))
