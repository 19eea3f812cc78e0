"""A decoding loop for ``generate(custom_generate=decode)`` that does no work twice, nor for a text that has ended.

Beside it are two ways of transformers' own for greedy texts on a GPU, where a step waits for its launches: a static
cache with a compiled step, and continuous batching.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CompileConfig, ContinuousBatchingConfig, DynamicCache
from transformers.cache_utils import DynamicLayer

from mllm_msr.modeling.compiled_answers import padded_size

ROOM = 64  # tokens
BY_ROW = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")  # (..., B, L)
OF_ALL = ("past_key_values", "use_cache", "logits_to_keep")  # other arguments of prompts without images
SHORTER = 0.9  # prompts that are so much shorter than others are read apart from them,
WORTH = 128  # where that saves so many tokens of padding
PAGE = 64  # tokens


@dataclass
class Speed:
    """How long :func:`decode` has taken for how many tokens: prompts that were read, and texts that were written."""

    read: int = 0
    written: int = 0
    reading: float = 0.0  # seconds
    writing: float = 0.0

    def __str__(self) -> str:
        reading, writing = (
            count / max(spent, 1e-9) for count, spent in ((self.read, self.reading), (self.written, self.writing))
        )
        return f"read {self.read:,} tokens, {reading:,.0f} a second; wrote {self.written:,}, {writing:,.0f} a second"


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
    speed: Speed | None = None,
    **inputs: Any,
) -> list[list[int]]:
    """The new tokens of each of B rows: the most likely ones, or random samples if there are ``own_seeds``.

    They are those of stock greedy search. But that computes a row until the longest is done, which with texts of
    unequal lengths is most of the work; this drops a row, and its keys and values, as soon as it has ended.

    Args:
        input_ids: (B, L) prompts, padded on the left.
        speed: is added to.
        inputs: whatever else ``generate`` has prepared, such as the (dynamic) KV cache and the positions.
    """
    start = input_ids.shape[1]
    texts: list[list[int]] = [[] for _ in input_ids]
    places = list(range(len(input_ids)))  # of each remaining row its place in the whole batch
    cache, first = inputs["past_key_values"], True
    step, speed, begun = key_step(model), speed or Speed(), time.perf_counter()
    mask = inputs.get("attention_mask")
    speed.read += input_ids.numel() if mask is None else int(mask.sum())
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
        ended = stopping_criteria(input_ids, None).tolist()  # for which the host waits anyway
        spent, begun = time.perf_counter() - begun, time.perf_counter()
        speed.written += len(places)
        speed.reading, speed.writing = speed.reading + spent * first, speed.writing + spent * (not first)
        first = False
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


def decode_static(
    model: Any, batch: dict[str, Any], limit: int, compiling: dict[str, Any] | None = None
) -> list[list[int]]:
    """The greedy tokens of each row, by a static cache; on an accelerator transformers compiles each step after the
    first, once for all batches of a size.

    Args:
        batch: arguments of ``generate``, prompts padded on the left.
        limit: the most new tokens of a text.
        compiling: options of ``CompileConfig``, also on a CPU then; by default those of transformers.
    """
    config: Any = None
    if compiling is not None:
        config = CompileConfig(**compiling)
        config._compile_all_devices = True
    start = batch["input_ids"].shape[1]
    ids = model.generate(
        **batch,
        max_new_tokens=limit,
        do_sample=False,
        cache_implementation="static",
        max_cache_len=padded_size(start + limit),
        compile_config=config,
    )
    return [up_to_end(row, model) for row in ids[:, start:].tolist()]


def decode_continuously(model: Any, prompts: list[list[int]], limit: int, **options: Any) -> list[list[int]]:
    """The greedy tokens for each prompt of any number, by transformers' continuous batching: a text that ends makes
    room for the next.

    Args:
        prompts: token ids, without images.
        limit: the most new tokens of a text.
        options: of ``ContinuousBatchingConfig``.
    """
    config = copy.deepcopy(model.generation_config)
    config.update(do_sample=False, max_new_tokens=limit)
    if model.device.type == "cpu":  # where it would take all memory that is free
        pages = sum(-(-(len(prompt) + limit) // PAGE) + 1 for prompt in prompts)
        options = {"page_size": PAGE, "num_blocks": pages, "max_batch_tokens": 1024, **options}
    how = ContinuousBatchingConfig(drop_unsupported_processors=False, **options)
    with torch.inference_mode(False):  # as the thread that it computes in is
        outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=how)
    if len(outputs) < len(prompts) or any(output.error is not None for output in outputs.values()):
        errors = {str(output.error) for output in outputs.values()} - {"None"}
        raise RuntimeError(f"continuous batching has failed: {', '.join(errors) or 'texts are missing'}")
    return [output.generated_tokens for output in outputs.values()]


def up_to_end(tokens: list[int], model: Any) -> list[int]:
    """The tokens of a text up to the first that ends it."""
    ends = end_tokens(model)
    last = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: last + 1]


def end_tokens(model: Any) -> set[int]:
    """The tokens that end a text."""
    end = model.generation_config.eos_token_id
    return {end} if isinstance(end, int) else set(end or ())


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
