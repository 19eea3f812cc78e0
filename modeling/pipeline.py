"""`pipeline("sequential-recommendation", model=...)`: a user and candidates in, the candidates ranked out."""

import os
from typing import Any

import torch
from transformers import BatchFeature, Pipeline

from .lora import without_adapter
from .ranking import Recommender

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
    candidates, best first, with `logit` and `score` added; several requests give a list of answers.

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
        return {"request": input_}

    def _forward(self, input_tensors: dict[str, Any], **forward_parameters: Any) -> Any:
        request, options = input_tensors["request"], {"block_size": 3, "max_new_tokens": 128} | forward_parameters
        preference = request.get("preference")
        if preference is None:
            with without_adapter(self.model):
                preference = self._condense(request["history"], options["block_size"], options["max_new_tokens"])
        user = {"preference": preference, "recent": request.get("recent", [])}
        candidates = [{"text": "", "image": None, **candidate} for candidate in request["candidates"]]
        return Recommender(self.model, self.processor).rank([user], candidates, options.get("top_k"))[0]

    def postprocess(self, model_outputs: Any, **postprocess_parameters: Any) -> Any:
        return model_outputs

    def _condense(self, history: list[dict[str, Any]], block_size: int, max_new_tokens: int) -> str:
        new = [item for item in history if not item.get("summary")]
        written = iter(self._write(self.processor.item_summary(new), max_new_tokens) if new else [])
        items = [{"title": item["title"], "summary": item.get("summary") or next(written)} for item in history]
        preference = ""
        for start in range(0, len(items), block_size):
            block = self.processor.preference([items[start : start + block_size]], [preference])
            preference = self._write(block, max_new_tokens)[0]
        return preference

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
