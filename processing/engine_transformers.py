"""Texts from a model in this process: any image-text-to-text model, or for texts alone any causal language model."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mllm_msr.modeling.generated_text import marks_reasoning, tidy
from mllm_msr.modeling.image_features import ImageFeatureCache, encoder_outputs
from mllm_msr.modeling.inputs import content_key
from mllm_msr.modeling.naming import pinned
from mllm_msr.processing.decoding import OwnSeeds, Speed, decode, decode_continuously, decode_static, end_tokens
from mllm_msr.processing.engines import Answer, EngineUnavailable, Text, prompt_digest
from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor, PromptBatch
from mllm_msr.processing.prompts import MAX_NEW_TOKENS, Task
from mllm_msr.records.storage import folder_digest

logger = logging.getLogger(__name__)
AGAIN = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1, "room": 1.5}  # for a second answer


class TransformersEngine:
    """Batched generation, greedy or sampled. A text that has ended leaves its batch; equal images are encoded once.

    The model is loaded when the first text is wanted. A batch of more than ``token_budget`` tokens is divided; one that
    does not fit into memory is halved, and what then fits becomes the budget.

    Args:
        name_or_path: a model repository or folder.
        processor: its prompts; built from ``name_or_path`` if absent.
        label: what is written as the generator of a text, if not ``name_or_path``.
        max_new_tokens: the longest text, in tokens, by task.
        token_budget: rows times (longest prompt + longest text) of what is generated at once.
        device_map: as for ``from_pretrained``; without one the model goes to this process's accelerator
            (``LOCAL_RANK``), if there is one.
        dtype, attn_implementation, quantization_config: as for ``from_pretrained``.
        decoding: how greedy texts are written: "dropping" rows that have ended; "static", by a static cache and, on a
            GPU, a compiled step; "continuous", by transformers' continuous batching where a prompt shows no image.
            Sampled texts, and those with a penalty, are written by dropping.

    ``speed`` says what reading and writing have taken where rows are dropped.
    """

    def __init__(
        self,
        name_or_path: str,
        processor: MllmMsrProcessor | None = None,
        *,
        label: str | None = None,
        revision: str | None = None,
        batch_size: int = 16,
        token_budget: int | None = None,
        max_new_tokens: Mapping[str, int] | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        dtype: str = "auto",
        device_map: Any = None,
        attn_implementation: str | None = None,
        quantization_config: Any = None,
        decoding: Literal["dropping", "static", "continuous"] = "dropping",
    ) -> None:
        self.name_or_path, self.generator = name_or_path, label or name_or_path
        self.batch_size, self.token_budget = batch_size, token_budget
        self.max_new_tokens = {**MAX_NEW_TOKENS, **(max_new_tokens or {})}
        self.temperature, self.top_p = temperature, top_p
        self.dtype, self.device_map, self.attn_implementation = dtype, device_map, attn_implementation
        self.quantization_config, self.decoding, self.speed = quantization_config, decoding, Speed()
        revision = pinned(name_or_path, revision)
        self.processor = processor or MllmMsrProcessor.from_backbone(name_or_path, revision=revision)
        self.config = AutoConfig.from_pretrained(name_or_path, revision=revision)
        self._commit = revision

    @cached_property
    def revision(self) -> str:
        local = Path(self.name_or_path)
        return folder_digest(local) if local.is_dir() else self._commit or ""

    @cached_property
    def model(self) -> Any:
        takes_images = self.config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        auto_class = AutoModelForImageTextToText if takes_images else AutoModelForCausalLM
        try:
            model = auto_class.from_pretrained(
                self.name_or_path,
                revision="main" if Path(self.name_or_path).is_dir() else self.revision or "main",
                dtype=self.dtype,
                device_map=self.device_map,
                attn_implementation=self.attn_implementation,
                quantization_config=self.quantization_config,
            ).eval()
        except Exception as error:
            raise EngineUnavailable(
                f"{self.generator} cannot be loaded ({type(error).__name__}): check summaries.model, revision, dtype, "
                "device_map, attn_implementation and quantization_config"
            ) from error
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if accelerator and model.device.type == "cpu" and self.device_map is None:
            rank = int(os.environ.get("LOCAL_RANK", 0)) % torch.accelerator.device_count()
            model = model.to(torch.device(accelerator.type, rank))
        if model.device.type == "cpu" and self.dtype == "auto":
            model = model.float()  # half precision is slow on most CPUs
        return model

    @cached_property
    def images(self) -> ImageFeatureCache:
        """The images of the latest prompts."""
        return ImageFeatureCache(self.model, self.processor)

    def prompt_hash(self, task: Task) -> str:
        template = self.processor.chat_template or self.processor.tokenizer.chat_template
        return prompt_digest(self.processor.prompts[task], self.processor.item_noun, template)

    def settings(self, task: Task) -> str:
        how = f"temperature {self.temperature}, top_p {self.top_p}" if self.temperature else "greedy"
        quantised = str(self.quantization_config) if self.quantization_config else None
        more = [self.dtype, self.processor.max_length, quantised, AGAIN]
        return f"{how}, {self.max_new_tokens[task]}, {more}"

    @torch.inference_mode()
    def generate(
        self, task: Task, inputs: Sequence[Any], seeds: Sequence[int] | None = None, again: bool = False
    ) -> list[Answer]:
        seeds = seeds or [0] * len(inputs)
        batch = self._encode(task, inputs)
        limit = int(self.max_new_tokens[task] * (AGAIN["room"] if again else 1))
        rows, width = batch["input_ids"].shape
        tokens = rows * (width + limit)
        parts = 1 if self.token_budget is None else min(rows, -(-tokens // self.token_budget))
        if parts == 1:
            try:
                return self._answer(batch, limit, seeds, again)
            except RuntimeError as error:
                if "CUDA error" in str(error):  # after which the accelerator does nothing more in this process
                    raise EngineUnavailable("the accelerator has failed; run again to go on") from error
                if rows == 1 or not _is_out_of_memory(error):
                    raise
            parts, self.token_budget = 2, tokens // 2  # outside the handler, whose traceback holds the tensors
            logger.warning("out of memory with %d prompts of %d tokens: from now on smaller batches", rows, width)
            del batch
            self.images.evict(max_images=0)
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
        size = -(-rows // parts)
        texts: list[Answer] = []
        for start in range(0, rows, size):
            texts += self.generate(task, inputs[start : start + size], seeds[start : start + size], again)
        return texts

    def _encode(self, task: Task, inputs: Sequence[Any]) -> PromptBatch:
        if task == "preference":
            return self.processor.preference([block.items for block in inputs], [block.previous for block in inputs])
        if task != "fusion" and any(item.image is not None for item in inputs):
            self.images.evict(max_images=self.batch_size)
            inputs = [
                item if item.image is None else replace(item, image=self._stand_in(item.image)) for item in inputs
            ]
        return self.processor.item_summary(inputs, task)

    def _stand_in(self, image: Any) -> Any:
        return self.images.stand_in(content_key(image), image)

    def _answer(self, batch: PromptBatch, limit: int, seeds: Sequence[int], again: bool) -> list[Answer]:
        model: Any = self.model
        batch.to(model.device, model.dtype)
        if features := self.images.features(batch.images):
            batch["mm_encoder_outputs"] = encoder_outputs(model, features)
        temperature = max(self.temperature, AGAIN["temperature"]) if again else self.temperature
        penalty = max(model.generation_config.repetition_penalty or 1.0, AGAIN["repetition_penalty"] if again else 1.0)
        steps = LogitsProcessorList()
        if penalty > 1:  # of what is written: a prompt's padding depends on the batch
            steps.append(RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=batch["input_ids"].shape[1]))
        if temperature:
            top_p = min(self.top_p, AGAIN["top_p"]) if again else self.top_p
            steps += [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)]
        greedy = not temperature and penalty <= 1
        if greedy and self.decoding == "continuous" and not batch.images:
            rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].sum(1).tolist(), strict=True)
            new = decode_continuously(model, [row[-count:] for row, count in rows], limit)
        elif greedy and self.decoding == "static":
            new = decode_static(model, {**batch}, limit)
        else:
            new = self._dropping(batch, limit, steps, OwnSeeds(seeds, model.device) if temperature else None)
        ends = end_tokens(model)
        return [Text(self._decode(row), bool(ends.intersection(row))) for row in new]

    def _dropping(
        self, batch: PromptBatch, limit: int, steps: LogitsProcessorList, own_seeds: OwnSeeds | None
    ) -> list[list[int]]:
        """The new tokens of each row, by :func:`decode`."""
        return self.model.generate(
            **batch,
            max_new_tokens=limit,
            do_sample=False,
            use_cache=True,
            repetition_penalty=1.0,
            logits_processor=steps,
            cache_implementation="dynamic",
            custom_generate=decode,
            own_seeds=own_seeds,
            speed=self.speed,
        )

    def _decode(self, row: list[int]) -> str:
        """The text of some tokens, without special ones and without reasoning, whose marks may be special."""
        return tidy(self.processor.tokenizer.decode([token for token in row if token not in self._unprinted]))

    @cached_property
    def _unprinted(self) -> set[int]:
        added = self.processor.tokenizer.added_tokens_decoder.items()
        return {index for index, token in added if token.special and not marks_reasoning(token.content)}


def _is_out_of_memory(error: BaseException) -> bool:
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in words or "can't allocate memory" in words
