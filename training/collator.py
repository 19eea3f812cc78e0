"""Rows of the ``sft`` table to batches whose only supervised token is the answer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor


@dataclass(eq=False)
class ItemTable(Mapping):
    """Items by id, their pictures decoded only when asked for.

    Args:
        items: ``item_id``, ``title``, ``text``, ``image`` (an ``Image`` feature, null where there is none).
    """

    items: Dataset
    index: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.index = {item_id: row for row, item_id in enumerate(self.items["item_id"])}

    def __iter__(self) -> Iterator[str]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item_id: str) -> dict[str, Any]:
        """``{"title", "text", "image"}`` of one item; KeyError names an unknown id."""
        if item_id not in self.index:
            raise KeyError(f"item {item_id!r} is not in the items table ({len(self.index)} items)")
        row = self.items[self.index[item_id]]
        return {name: row[name] for name in ("title", "text", "image")}


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
    items: ItemTable

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        batch = self.processor(
            preferences=[row["preference"] for row in rows],
            candidates=[self.items[row["item_id"]] for row in rows],
            labels=[row["label"] for row in rows],
            recent=[user_of(row)["recent"] for row in rows],
        )
        return dict(batch)
