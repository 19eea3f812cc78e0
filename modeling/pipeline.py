"""`pipeline("sequential-recommendation", model=...)`: a user and candidates in, the candidates ranked out."""

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from transformers import BatchFeature, Pipeline

from .lora import without_adapter
from .ranking import Recommender, in_order

TASK = "sequential-recommendation"
CUSTOM_PIPELINES = {
    TASK: {"impl": "pipeline.SequentialRecommendationPipeline", "pt": ["AutoModel"], "type": "multimodal"}
}


class SequentialRecommendationPipeline(Pipeline):
    """Rank candidates for a user.

    A request is `{"preference": str, "candidates": [...]}`, or has, in place of the preference, the `history` of what
    the user has chosen, oldest first, from which the backbone writes one as in the paper: each item described (unless
    it has a `summary`), then block after block condensed. Items are `{"title", "text", "image"}`, of which only the
    title is needed. Items chosen after the preference was written can be given as `recent`. The answer has the
    candidates, best first, with `logit` and `score` added; several requests give a list of answers, and `batch_size`
    of them share their forward passes.

    Example:

    ```python
    rank = pipeline("sequential-recommendation", model="org/mllm-msr", trust_remote_code=True)
    rank({"preference": "quiet red films", "candidates": [{"title": "The Sea", "image": poster}, {"title": "Noise"}]})
    # [{"title": "The Sea", "image": ..., "logit": 1.3, "score": 0.79}, {"title": "Noise", ...}]
    ```

    Args:
        top_k: how many candidates to return, all by default.
        block_size: items of the history condensed at a time (paper: 3).
        max_new_tokens: of each text written from a history (128).
        write_batch_size: how many texts are written at a time (8).
    """

    model: Any  # MllmMsrForRecommendation
    processor: Any  # MllmMsrProcessor
    _load_processor: Any = True
    _load_tokenizer: Any = False
    _load_image_processor: Any = False
    _load_feature_extractor: Any = False
    _load_video_processor: Any = False

    def _sanitize_parameters(self, **given: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return {}, given, {}  # all are of the forward step, which knows their defaults

    def preprocess(self, input_: Any, **preprocess_parameters: Any) -> dict[str, Any]:
        if ("preference" in input_) == ("history" in input_) or not input_.get("candidates"):
            raise ValueError("a request has `candidates` and either a `preference` or a `history`")
        return {"requests": [input_]}

    def get_iterator(
        self,
        inputs: Iterable[Any],
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[Any]:
        """Answers in the order of the requests, `batch_size` at a time: they are no tensors to be collated."""
        waiting = iter(inputs)
        while some := list(islice(waiting, batch_size)):
            requests = [self.preprocess(request, **preprocess_params)["requests"][0] for request in some]
            yield from self.forward({"requests": requests}, **forward_params)

    def _forward(self, input_tensors: dict[str, Any], **forward_parameters: Any) -> Any:
        requests = input_tensors["requests"]
        options = {"block_size": 3, "max_new_tokens": 128, "write_batch_size": 8} | forward_parameters
        top_k = options.pop("top_k", None)
        with without_adapter(self.model):
            written = iter(self._condense([one["history"] for one in requests if "history" in one], **options))
        users = [
            {"preference": next(written) if "history" in one else one["preference"], "recent": one.get("recent", [])}
            for one in requests
        ]
        shown = [[{"text": "", "image": None, **candidate} for candidate in one["candidates"]] for one in requests]
        catalogue = {f"{number} {place}": one for number, row in enumerate(shown) for place, one in enumerate(row)}
        names = [[f"{number} {place}" for place in range(len(row))] for number, row in enumerate(shown)]
        logits = Recommender(self.model, self.processor).score(users, names, catalogue)
        return [in_order(items, row, top_k) for items, row in zip(shown, logits, strict=True)]

    def postprocess(self, model_outputs: Any, **postprocess_parameters: Any) -> Any:
        return model_outputs[0]

    def _condense(
        self, histories: list[list[dict[str, Any]]], block_size: int, max_new_tokens: int, write_batch_size: int
    ) -> list[str]:
        """A preference for each history; step k of all of them before step k + 1."""

        def write(prompts: Callable[[list[Any]], BatchFeature], rows: list[Any]) -> Iterator[str]:
            for start in range(0, len(rows), write_batch_size):
                yield from self._write(prompts(rows[start : start + write_batch_size]), max_new_tokens)

        new = [item for history in histories for item in history if not item.get("summary")]
        written = write(self.processor.item_summary, new)
        described = [
            [{"title": item.get("title", ""), "summary": item.get("summary") or next(written)} for item in history]
            for history in histories
        ]
        preferences = [""] * len(histories)
        for start in range(0, max(map(len, histories), default=0), block_size):
            going = [number for number, history in enumerate(histories) if start < len(history)]
            rows = [(described[number][start : start + block_size], preferences[number]) for number in going]
            texts = write(lambda some: self.processor.preference(*map(list, zip(*some, strict=True))), rows)
            for number, text in zip(going, texts, strict=True):
                preferences[number] = text
        return preferences

    def _write(self, batch: BatchFeature, max_new_tokens: int) -> list[str]:
        batch = batch.to(self.model.device)
        with torch.inference_mode():
            ids = self.model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        texts = self.processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save model and processor; the model brings this pipeline's code along."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)
