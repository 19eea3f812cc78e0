"""The engine without a model: keywords and colours, deterministic, for machines without weights.

It also answers the question whether the language model is worth its cost.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from mllm_msr.modeling.inputs import Candidate
from mllm_msr.processing.engines import Answer, Descriptions, HistoryBlock, Text
from mllm_msr.processing.prompts import Task

_COMMON = set(
    re.findall(
        r"\w+",
        """
    about after also and are been before being between both but can could did does each ever first for from had
    has have her here hers him his how into its just like made man more most much must new not now off one only
    other our out over own she should some such than that the their them then there these they this those through
    too two under until upon very was were what when where which while who whom whose why will with would you
    young your
    """,
    )
)
_COLOUR_NAMES = {
    "black": (20, 20, 20),
    "white": (240, 240, 240),
    "grey": (128, 128, 128),
    "red": (200, 40, 40),
    "orange": (235, 140, 40),
    "yellow": (240, 215, 60),
    "green": (50, 150, 70),
    "blue": (45, 95, 200),
    "purple": (130, 70, 170),
    "pink": (240, 140, 185),
    "brown": (115, 75, 45),
}


class ExtractiveEngine:
    """An item's first keywords and its dominant colours; a preference counts words, and older ones fade."""

    generator, revision, batch_size = "extractive", "1", 256

    def __init__(self, item_words: int = 10, preference_words: int = 16) -> None:
        self.item_words, self.preference_words = item_words, preference_words

    def prompt_hash(self, task: Task) -> str:
        return f"{task},{self.item_words},{self.preference_words}"

    def settings(self, task: Task) -> str:
        return ""

    def generate(
        self, task: Task, inputs: Sequence[Any], seeds: Sequence[int] | None = None, again: bool = False
    ) -> list[Answer]:
        write: dict[Task, Callable[[Any], str]] = {"preference": self._preference, "fusion": self._fusion}
        return [Text(write.get(task, self._item)(given), True) for given in inputs]

    def _fusion(self, item: Descriptions) -> str:
        return ", ".join(dict.fromkeys(_listed(item.text_summary) + _listed(item.image_summary)))

    def _item(self, item: Candidate) -> str:
        words = list(dict.fromkeys(keywords(item.text)))[: self.item_words] or keywords(item.title)
        return ", ".join(words + (dominant_colours(item.image) if item.image is not None else []))

    def _preference(self, block: HistoryBlock) -> str:
        score: dict[str, float] = {}
        for rank, word in enumerate(_listed(block.previous or "")):
            score[word] = 1.8 / (1 + 0.1 * rank)
        for item in block.items:
            for word in _listed(item.summary):
                score[word] = score.get(word, 0.0) + 1.0
        return ", ".join(sorted(score, key=lambda word: -score[word])[: self.preference_words])


class TitlesEngine:
    """No model and no words of its own: an item's summary is its title, a preference all titles, oldest first."""

    generator, revision, batch_size = "titles", "1", 256

    def prompt_hash(self, task: Task) -> str:
        return task

    def settings(self, task: Task) -> str:
        return ""

    def generate(
        self, task: Task, inputs: Sequence[Any], seeds: Sequence[int] | None = None, again: bool = False
    ) -> list[Answer]:
        if task != "preference":
            return [Text(item.title, True) for item in inputs]
        titles = ([block.previous, *(item.title for item in block.items)] for block in inputs)
        return [Text("; ".join(filter(None, parts)), True) for parts in titles]


def keywords(text: str) -> list[str]:
    """Lower-case words of three letters or more that are not among the commonest."""
    return [word for word in re.findall(r"[^\W\d_]{3,}", text.lower()) if word not in _COMMON]


def dominant_colours(image: Image.Image, count: int = 2) -> list[str]:
    """Names of the ``count`` colours that cover most of the image."""
    names = list(_COLOUR_NAMES)
    palette = torch.tensor(list(_COLOUR_NAMES.values()), dtype=torch.float32)
    small = image.convert("RGB").resize((24, 24))
    pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).reshape(-1, 3).float()
    counts = torch.bincount(torch.cdist(pixels, palette).argmin(1), minlength=len(names))
    return [names[index] for index in counts.argsort(descending=True, stable=True)[:count].tolist()]


def _listed(text: str) -> list[str]:
    return [word for word in text.split(", ") if word]
