"""Texts from vLLM in this process, which batches requests of any lengths by itself; for bulk on a GPU."""

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mllm_msr.modeling.generated_text import tidy
from mllm_msr.modeling.naming import pinned
from mllm_msr.processing.chat import chat_parts, harmless
from mllm_msr.processing.engines import Answer, EngineUnavailable, Text, prompt_digest
from mllm_msr.processing.prompts import MAX_NEW_TOKENS, Task
from mllm_msr.records.storage import folder_digest

AGAIN = {"temperature": 0.7, "top_p": 0.9, "room": 1.5}  # for a second answer


class VllmEngine:
    """A model that vLLM knows; it is loaded when the first text is wanted.

    Args:
        name_or_path: a model repository or folder.
        prompts: templates by task.
        noun: what an item is called in the prompts.
        label: what is written as the generator of a text.
        max_length: tokens of a prompt and its text; None: what the model can.
        gpus: over which its weights are divided.
        batch_size: requests that vLLM is given at a time.

    Raises:
        ValueError: vLLM is not installed.
    """

    def __init__(
        self,
        name_or_path: str,
        prompts: Mapping[str, str],
        noun: str = "item",
        *,
        label: str | None = None,
        revision: str | None = None,
        max_new_tokens: Mapping[str, int] | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        dtype: str = "auto",
        max_length: int | None = None,
        gpus: int = 1,
        batch_size: int = 256,
    ) -> None:
        if find_spec("vllm") is None:
            raise ValueError("summaries.engine: vLLM is not installed: `pip install vllm`, or choose another")
        self.name_or_path, self.generator, self.prompts, self.noun = name_or_path, label or name_or_path, prompts, noun
        self.max_new_tokens = {**MAX_NEW_TOKENS, **(max_new_tokens or {})}
        self.temperature, self.top_p, self.dtype, self.max_length = temperature, top_p, dtype, max_length
        self.gpus, self.batch_size, self._asked_revision = gpus, batch_size, revision

    @cached_property
    def revision(self) -> str:
        if (local := Path(self.name_or_path)).is_dir():
            return folder_digest(local)
        return pinned(self.name_or_path, self._asked_revision) or ""

    @cached_property
    def model(self) -> Any:
        # All in this process: one that waits for another would wait for ever if that is killed.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM
        from vllm.platforms import current_platform

        # On a CPU vLLM (0.32) ends when a prompt that is read in parts has a seed of its own.
        parts = {"enable_chunked_prefill": False} if current_platform.is_cpu() else {}
        try:
            return LLM(
                model=self.name_or_path,
                revision=None if Path(self.name_or_path).is_dir() else self.revision or None,
                dtype=self.dtype,
                max_model_len=self.max_length,
                tensor_parallel_size=self.gpus,
                limit_mm_per_prompt={"image": 1},
                **parts,
            )
        except Exception as error:
            raise EngineUnavailable(
                f"{self.generator} cannot be loaded by vLLM ({type(error).__name__}): check summaries.model, revision, "
                "dtype and max_length"
            ) from error

    def prompt_hash(self, task: Task) -> str:
        return prompt_digest(self.prompts[task], self.noun, "vllm")

    def settings(self, task: Task) -> str:
        how = f"temperature {self.temperature}, top_p {self.top_p}" if self.temperature else "greedy"
        return f"{how}, {self.max_new_tokens[task]}, {[self.dtype, self.max_length, AGAIN]}"

    def generate(
        self, task: Task, inputs: Sequence[Any], seeds: Sequence[int] | None = None, again: bool = False
    ) -> list[Answer]:
        from vllm import SamplingParams

        model = self.model
        limit = int(self.max_new_tokens[task] * (AGAIN["room"] if again else 1))
        how = [
            SamplingParams(
                max_tokens=limit,
                temperature=max(self.temperature, AGAIN["temperature"]) if again else self.temperature,
                top_p=min(self.top_p, AGAIN["top_p"]) if again else self.top_p,
                seed=seed % 2**31,
            )
            for seed in seeds or [0] * len(inputs)
        ]
        try:
            outputs = model.chat([self._messages(task, given) for given in inputs], how, use_tqdm=False)
        except Exception as error:
            if not model.llm_engine.has_unfinished_requests():  # an input was refused, and the others let go
                raise
            raise EngineUnavailable(
                f"{self.generator}: vLLM stopped while it wrote ({type(error).__name__}); the texts so far count: "
                "free memory or set summaries.batch_size lower if it ran out, then run again"
            ) from error
        texts = [output.outputs[0] for output in outputs]
        return [Text(tidy(text.text), text.finish_reason != "length") for text in texts]

    def _messages(self, task: Task, given: Any) -> list[dict[str, Any]]:
        parts = chat_parts(self.prompts[task], harmless(given), self.noun)
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image_pil", "image_pil": part}
            for part in parts
        ]
        return [{"role": "user", "content": content}]
