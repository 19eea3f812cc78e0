"""Rows of the ``sft`` table to batches whose only supervised token is the answer."""

from dataclasses import dataclass
from typing import Any

from mllm_msr.data.catalogue import Catalogue
from mllm_msr.processing.examples import user_of
from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor


@dataclass
class AnswerCollator:
    """Batch ``sft`` rows for ``SFTTrainer``.

    Example:
        rows ``{"preference": "Likes red mugs", "recent": [], "item_id": "7", "label": 1}`` become ``input_ids``,
        ``attention_mask`` (B, L), the backbone's pixel values, and ``labels`` (B, L): -100 but for the Yes or No.
    """

    processor: MllmMsrProcessor
    items: Catalogue

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        batch = self.processor(
            users=[user_of(row["preference"], row["recent"]) for row in rows],
            candidates=[self.items[row["item_id"]] for row in rows],
            labels=[row["label"] for row in rows],
        )
        return dict(batch)
