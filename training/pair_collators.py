"""Batches of whole tasks: a user and several candidates, for training that computes what pairs share only once."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from mllm_msr.data.catalogue import Catalogue
from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor
from mllm_msr.records.storage import digest
from mllm_msr.training.collators import user_of

PICTURES = 2048  # prepared pictures kept by a collator
MEASURED = 32  # users and items


def task_rows(rows: Dataset, task_ids: Sequence[str]) -> Dataset:
    """``rows`` of the ``sft`` table with one row a task: ``item_id`` and ``label`` become lists.

    What a row shows is looked up when it is asked for, so rows may change with the epoch.

    Args:
        task_ids: of each of the rows.
    """
    members: dict[str, list[int]] = {}
    for place, task in enumerate(task_ids):
        members.setdefault(task, []).append(place)
    groups = list(members.values())

    def look_up(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for group in (groups[number] for number in batch["task"]):
            some = rows[group]
            for name in ("task_id", "user_id", "preference", "recent"):
                found.setdefault(name, []).append(some[name][0])
            for name in ("item_id", "label"):
                found.setdefault(name, []).append(list(some[name]))
        return found

    return Dataset.from_dict({"task": range(len(groups))}).with_transform(look_up)


def known_positives(examples: Dataset, tasks: Dataset) -> dict[str, set[str]]:
    """What each user is known to have chosen: never one of their negatives, whoever's positive it is.

    Args:
        examples: the ``sft`` table. tasks: the ``tasks`` table of the same split, for its histories.
    """
    known: dict[str, set[str]] = {}
    for user, history in zip(tasks["user_id"], tasks["history"], strict=True):
        known.setdefault(user, set()).update(history)
    for user, item, label in zip(examples["user_id"], examples["item_id"], examples["label"], strict=True):
        if label:
            known.setdefault(user, set()).add(item)
    return known


def log_popularity(examples: Dataset) -> dict[str, float]:
    """The log of each item's share of the positives: how often it is met as another user's."""
    positives = [item for item, label in zip(examples["item_id"], examples["label"], strict=True) if label]
    items, counts = np.unique(positives, return_counts=True)
    return dict(zip(items.tolist(), np.log(counts / counts.sum()).tolist(), strict=True))


def measured_limits(processor: MllmMsrProcessor, examples: Dataset, items: Catalogue) -> tuple[int, int]:
    """The tokens of the longest users and items, an eighth more, in sixteens: blocks that stand far apart learn worse.

    Looked at are those with the most characters, and as many items spread over the catalogue for their pictures.
    """
    texts = [
        preference + "".join(recent)
        for preference, recent in zip(examples["preference"], examples["recent"], strict=True)
    ]
    longest = sorted(range(len(texts)), key=lambda row: -len(texts[row]))[:MEASURED]
    users = [user_of(row) for row in examples.select(longest)]
    table, names = items.items, list(items)
    words = [len(title or "") + len(text or "") for title, text in zip(table["title"], table["text"], strict=True)]
    wordy = sorted(range(len(names)), key=lambda row: -words[row])[:MEASURED]
    spread = range(0, len(names), max(1, len(names) // MEASURED))
    candidates = [vars(items[names[row]]) for row in dict.fromkeys([*wordy, *spread])]
    batch = processor.blocks(users, candidates, (0, 0))
    lengths = (int(batch[kind]["attention_mask"].sum(1).max()) for kind in ("users", "items"))
    user, item = (16 * math.ceil(length * 1.125 / 16) for length in lengths)
    return user, item


@dataclass
class _Candidates:
    """Items as the processor takes them, their pictures prepared once in a while."""

    processor: MllmMsrProcessor
    items: Catalogue
    ready: Callable[[str], dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.ready = lru_cache(PICTURES)(self._prepare)

    def _prepare(self, item_id: str) -> dict[str, Any]:
        item = vars(self.items[item_id])
        return {**item, "image": self.processor.pictures([item["image"]])[0]} if item["image"] is not None else item

    def pictures(self, item_ids: Iterable[str]) -> dict[str, list[Any]]:
        """Whose pictures are in a batch, in their order, and how many tokens each takes."""
        shown = [(item, self.ready(item)["image"]) for item in item_ids if self.ready(item)["image"] is not None]
        return {"items": [item for item, _ in shown], "tokens": [picture.num_image_tokens for _, picture in shown]}


class PackedCollator(_Candidates):
    """Rows of :func:`task_rows` to whole prompts whose owners tell what may be shared (``interaction="joint"``).

    The batch has the processor's tensors (B prompts of all tasks), ``owners`` (B,) and ``labels`` (B,), 1 or 0, and
    whose ``pictures`` it shows.
    """

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        owners = [number for number, row in enumerate(rows) for _ in row["item_id"]]
        batch = self.processor(
            preferences=[rows[number]["preference"] for number in owners],
            candidates=[self.ready(item) for row in rows for item in row["item_id"]],
            recent=[user_of(rows[number])["recent"] for number in owners],
        )
        labels = torch.tensor([label for row in rows for label in row["label"]])
        pictures = self.pictures(item for row in rows for item in row["item_id"])
        return {**batch, "owners": torch.tensor(owners), "labels": labels, "pictures": pictures}


@dataclass
class LateCollator(_Candidates):
    """Rows of :func:`task_rows` to users, items and the pairs of them that are trained (``interaction="late"``).

    The batch has what the processor's ``blocks`` returns for the tasks and for all their items, each once; ``pairs``
    (2, P) and ``labels`` (P,), 1 or 0; whose ``pictures`` it shows; and ``log_q`` (P,), the log of the chance by which
    each pair's item is there.

    Args:
        limits: the most tokens of a user and an item.
        in_batch: pair every user with the items of all others, too, but for what ``known`` says the user has chosen.
        pairs_per_user: the most pairs of a user; more are left out by lot, those of the user's own task last.
        known: see :func:`known_positives`. log_q: see :func:`log_popularity`.
    """

    limits: tuple[int, int] = (512, 1024)
    in_batch: bool = True
    pairs_per_user: int | None = None
    known: Mapping[str, set[str]] = field(default_factory=dict)
    log_q: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        items = list(dict.fromkeys(item for row in rows for item in row["item_id"]))
        places = {item: place for place, item in enumerate(items)}
        pairs: list[tuple[int, int, int]] = []
        # the same for the same batch, so that a training that was interrupted goes on as it would have
        lot = np.random.default_rng(int(digest([row["task_id"] for row in rows])[:16], 16))
        for number, row in enumerate(rows):
            own = {places[item]: label for item, label in zip(row["item_id"], row["label"], strict=True)}
            known = self.known.get(row["user_id"], set())
            others = [place for item, place in places.items() if place not in own and item not in known]
            room = len(others) if self.in_batch else 0
            if self.pairs_per_user is not None:
                room = max(0, min(room, self.pairs_per_user - len(own)))
            chosen = sorted(lot.permutation(others)[:room].tolist()) if room < len(others) else others
            pairs += [(number, place, label) for place, label in own.items()]
            pairs += [(number, place, 0) for place in chosen]
        table = torch.tensor(pairs)
        floor = min(self.log_q.values(), default=0.0)  # an item that is nobody's positive is there as rarely as can be
        return {
            **self.processor.blocks([user_of(row) for row in rows], [self.ready(item) for item in items], self.limits),
            "pairs": table[:, :2].T.contiguous(),
            "labels": table[:, 2],
            "pictures": self.pictures(items),
            "log_q": torch.tensor([self.log_q.get(items[place], floor) for _, place, _ in pairs]),
        }
