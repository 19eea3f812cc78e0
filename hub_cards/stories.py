"""A few users in full for the report: what they chose, how their preference grew, how the candidates were ranked."""

import base64
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from mllm_msr.data.images import BrokenImage, thumbnail
from mllm_msr.evaluation.places import rank_of_choice
from mllm_msr.modeling.preference import split_history
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import ITEM_SUMMARIES, ITEMS, PREFERENCES, TASKS, THUMBNAILS
from mllm_msr.records.sections import HEAD_VARIANTS, OURS

N_USERS = 6  # shown in full
N_CANDIDATES = 8  # shown of each ranking, and the chosen item wherever it stands
N_BLOCKS = 4  # shown with images; earlier ones are folded


@dataclass(frozen=True)
class ItemCard:
    """An item as it is shown: its title, and its image as a data URI, if it has one."""

    title: str
    image: str | None


@dataclass(frozen=True)
class Block:
    """A history block, and the preference written after it."""

    items: tuple[ItemCard, ...]
    preference: str


@dataclass(frozen=True)
class RankedItem:
    """A candidate in a ranking.

    Args:
        place: from 1.
        score: probability of Yes.
        share: of the highest score in this ranking.
        chosen: whether the user chose it.
        gap: whether candidates between this and the one shown before it are left out.
    """

    item: ItemCard
    place: int
    score: float
    share: float
    chosen: bool
    gap: bool


@dataclass(frozen=True)
class UserStory:
    """A user as the report shows one: history blocks, the items chosen since, and the ranking."""

    user_id: str
    rank: str
    candidates: int
    blocks: tuple[Block, ...]
    recent: tuple[ItemCard, ...]
    ranking: tuple[RankedItem, ...]

    @property
    def folded(self) -> Sequence[Block]:
        """The blocks whose images are not shown."""
        return self.blocks[:-N_BLOCKS]

    @property
    def unfolded(self) -> Sequence[Block]:
        return self.blocks[-N_BLOCKS:]


@dataclass(frozen=True)
class SummaryExample:
    """An item beside its summary."""

    item: ItemCard
    summary: str


@dataclass(frozen=True)
class SummaryExamples:
    """How many summaries have which status, and a few of them."""

    counts: Mapping[str, int]
    examples: tuple[SummaryExample, ...]


Cards = Mapping[str, ItemCard]


def user_stories(run: RunFolder, scores: pl.DataFrame | None, split: str) -> list[UserStory]:
    """Users evenly spaced from the best-ranked to the worst-ranked choice, so that nothing is flattered."""
    if scores is None or scores.is_empty() or not (run.has(ITEMS) and run.has(TASKS)):
        return []
    scores = scores.filter(variant=ranked_by(scores))
    tasks = run.scan(TASKS).filter(split=split).unique("user_id", keep="first").collect()
    ranks = rank_of_choice(scores).join(tasks, on="user_id").sort(pl.col("first") + pl.col("last"), "user_id")
    chosen = ranks[_spread(len(ranks))]
    users = chosen["user_id"].to_list()
    scores = scores.filter(pl.col("user_id").is_in(users))
    items = set(scores["item_id"]) | set(chosen["history"].explode())
    cards = item_cards(run, items)
    written: dict[str, dict[int, str]] = defaultdict(dict)
    if run.has(PREFERENCES):
        preferences = run.scan(PREFERENCES).filter(pl.col("user_id").is_in(users))
        for user, step, preference in preferences.select("user_id", "step", "preference").collect().iter_rows():
            written[user][step] = preference
    stories = []
    for task in chosen.iter_rows(named=True):
        own = scores.filter(user_id=task["user_id"])
        stories.append(user_story(task, own, written.get(task["user_id"], {}), run.block_size, cards))
    return stories


def ranked_by(scores: pl.DataFrame) -> str:
    """The variant whose ranking is shown: the answer of our model, or else what ranks by item vectors."""
    names = set(scores["variant"].unique())
    return next((name for name in (OURS, "fused", *HEAD_VARIANTS) if name in names), min(names))


def user_story(
    task: Mapping[str, Any], scores: pl.DataFrame, written: Mapping[int, str], block_size: int, cards: Cards
) -> UserStory:
    """A user's story.

    Args:
        task: ``user_id``, ``history``, and the places ``first`` and ``last`` of the chosen item.
        scores: ``item_id``, ``label``, ``logit``, ``score`` of the user's candidates.
        written: the user's preference after each history block, by its number from 1; those of later blocks than the
            task's history has are left out, as they are not in force there.
        cards: of all items in history and ranking.
    """
    blocks, recent = split_history(task["history"], block_size)
    if not written:
        blocks, recent = [], task["history"]
    ordered = scores.sort("logit", "label", descending=[True, False])
    highest = ordered["score"].to_numpy().max() or 1.0
    ranking: list[RankedItem] = []
    for place, row in enumerate(ordered.iter_rows(named=True), start=1):
        if place <= N_CANDIDATES or row["label"]:
            gap = bool(ranking) and place > ranking[-1].place + 1
            share = row["score"] / highest
            ranking.append(RankedItem(cards[row["item_id"]], place, row["score"], share, bool(row["label"]), gap))
    first, last = task["first"], task["last"]
    return UserStory(
        user_id=task["user_id"],
        rank=f"ranked {first}" if first == last else f"tied for places {first}-{last}",
        candidates=len(scores),
        blocks=tuple(
            Block(tuple(cards[item] for item in block), written.get(step, "")) for step, block in enumerate(blocks, 1)
        ),
        recent=tuple(cards[item] for item in recent),
        ranking=tuple(ranking),
    )


def summary_examples(run: RunFolder) -> SummaryExamples | None:
    """Statuses and a few examples of the item summaries; None if there are none yet."""
    if not (run.has(ITEMS) and run.has(ITEM_SUMMARIES)):
        return None
    summaries = run.read(ITEM_SUMMARIES, ["item_id", "summary", "status"]).sort("item_id")
    status = pl.col("status").str.split(":").list.first()
    counts = summaries.group_by(status).len("count").sort("count", descending=True)
    rows = summaries[_spread(len(summaries))]
    cards = item_cards(run, rows["item_id"])
    examples = [SummaryExample(cards[item], summary) for item, summary in rows["item_id", "summary"].iter_rows()]
    return SummaryExamples(dict(counts.iter_rows()), tuple(examples))


def item_cards(run: RunFolder, item_ids: Iterable[str]) -> Cards:
    """Title and thumbnail of some items; only their rows are read."""
    wanted = pl.col("item_id").is_in(list(item_ids))
    items = run.scan(ITEMS).filter(wanted)
    if run.has(THUMBNAILS):  # made once, when the data was prepared
        small = run.scan(THUMBNAILS).filter(wanted)
        rows = items.select("item_id", "title").join(small, on="item_id", how="left").collect()
        images = {item: _data_uri(image) if image else None for item, _, image in rows.iter_rows()}
    else:
        rows = items.select("item_id", "title", pl.col("image").struct.field("bytes")).collect()
        images = {item: small_image(image) for item, _, image in rows.iter_rows()}
    titles = dict(rows["item_id", "title"].iter_rows())
    return {item: ItemCard(titles.get(item) or f"item {item}", images.get(item)) for item in item_ids}


def small_image(image: bytes | None) -> str | None:
    """A thumbnail as a data URI; None if there is no image or it cannot be read."""
    try:
        return _data_uri(thumbnail(image)) if image else None
    except BrokenImage:
        return None


def _data_uri(image: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(image).decode()


def _spread(length: int) -> np.ndarray:
    """At most N_USERS places spread evenly over ``length``, ends included."""
    return np.unique(np.linspace(0, length - 1, N_USERS).round().astype(np.int64))[:length] if length else np.arange(0)
