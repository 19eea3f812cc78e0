"""The items of a data set by id, as the model is shown them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

from datasets import Dataset

from mllm_msr.modeling.inputs import Candidate


@dataclass(eq=False)
class Catalogue(Mapping[str, Candidate]):
    """Items by id, their images decoded only when asked for.

    Args:
        items: ``item_id``, ``title``, ``text``, ``image`` (an ``Image`` feature, null where there is none).
        new: further items, which come last.
    """

    items: Dataset
    new: Mapping[str, Candidate] = field(default_factory=dict)
    index: dict[str, int] = field(init=False)
    _contents: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.index = {item_id: row for row, item_id in enumerate(self.items["item_id"])}

    @cached_property
    def titles(self) -> dict[str, str]:
        """Item id to title; no image is decoded for it."""
        titles = {item: title or "" for item, title in zip(self.items["item_id"], self.items["title"], strict=True)}
        return titles | {item: candidate.title for item, candidate in self.new.items()}

    def __iter__(self) -> Iterator[str]:
        return chain(self.index, self.new)

    def __len__(self) -> int:
        return len(self.index) + len(self.new)

    def __contains__(self, item_id: object) -> bool:
        return item_id in self.index or item_id in self.new

    def __getitem__(self, item_id: str) -> Candidate:
        """One item; KeyError names an unknown id."""
        if item_id in self.new:
            return self.new[item_id]
        if item_id not in self.index:
            raise KeyError(f"item {item_id!r} is not in the items table ({len(self.index)} items)")
        row = self.items[self.index[item_id]]
        return Candidate(item_id, row["title"] or "", row["text"] or "", row["image"])

    def content(self, item_id: str) -> str:
        """``Candidate.content`` of an item, for which it is decoded once."""
        if item_id not in self._contents:
            self._contents[item_id] = self[item_id].content
        return self._contents[item_id]
