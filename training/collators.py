"""Rows of the ``sft`` table to batches whose only supervised token is the answer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mllm_msr.data.catalogue import Catalogue
from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor


def user_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the processor takes of a row's user: ``preference``, and ``recent`` as items of which only that is known."""
    return {"preference": row["preference"], "recent": [{"summary": summary} for summary in row["recent"]]}


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
            preferences=[row["preference"] for row in rows],
            candidates=[vars(self.items[row["item_id"]]) for row in rows],
            labels=[row["label"] for row in rows],
            recent=[user_of(row)["recent"] for row in rows],
        )
        return dict(batch)
