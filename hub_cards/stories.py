"""A few users in full for the report: what they chose, how their preference grew, how the candidates were ranked."""

import base64
import io
from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image, UnidentifiedImageError

from mllm_msr.hub_cards.results import OURS

N_USERS = 6  # shown in full
N_CANDIDATES = 8  # shown of each ranking, and the chosen item wherever it stands
N_BLOCKS = 4  # shown with pictures; earlier ones are folded
THUMBNAIL = 96  # pixels, longer edge


def best_groups(scores: pl.DataFrame) -> pl.DataFrame:
    """Per user: the best group of equal scores with a positive; its size n, its positives p, how many stand above."""
    groups = scores.group_by("user_id", "logit").agg(pl.len().alias("n"), pl.col("label").sum().alias("p"))
    groups = groups.sort("user_id", "logit", descending=[False, True])
    groups = groups.with_columns(above=pl.col("n").cast(pl.Int64).cum_sum().over("user_id") - pl.col("n"))
    return groups.filter(pl.col("p") > 0).unique("user_id", keep="first", maintain_order=True).cast({"n": pl.Int64})


def user_stories(run: Path, scores: pl.DataFrame | None, split: str) -> list[dict]:
    """The users shown: evenly spaced from the best-ranked to the worst-ranked choice, so nothing is flattered."""
    needed = ("data/items.parquet", "data/tasks.parquet")
    if scores is None or scores.is_empty() or not all((run / path).exists() for path in needed):
        return []
    rows = scores["variant"].unique().sort().to_list()
    scores = scores.filter(pl.col("variant") == (OURS if OURS in rows else rows[0]))
    tasks = pl.read_parquet(run / "data/tasks.parquet").filter(pl.col("split") == split)
    tasks = tasks.unique("user_id", keep="first")
    groups = best_groups(scores).join(tasks, on="user_id").with_columns(rank=pl.col("above") + (pl.col("n") + 1) / 2)
    groups = groups.sort("rank", "user_id")
    preferences = None
    if (run / "summaries/preferences.parquet").exists():
        preferences = pl.read_parquet(run / "summaries/preferences.parquet")
    users = [user_story(row, scores, preferences) for row in groups[_spread(len(groups))].iter_rows(named=True)]
    wanted = {entry["item_id"] for user in users for entry in user["ranking"]}
    wanted |= {item for user in users for block in user["blocks"] for item in block["items"]}
    wanted |= {item for user in users for item in user["recent"]}
    cards = _cards(run, wanted)
    for user in users:
        for block in user["blocks"]:
            block["cards"] = [cards[item] for item in block["items"]]
            block["titles"] = [card["title"] for card in block["cards"]]
        user["recent"] = [cards[item] for item in user["recent"]]
        for entry in user["ranking"]:
            entry |= cards[entry["item_id"]]
    return users


def _spread(length: int) -> np.ndarray:
    """At most N_USERS places spread evenly over ``length``, ends included."""
    return np.unique(np.linspace(0, length - 1, N_USERS).round().astype(np.int64))[:length] if length else np.arange(0)


def summary_examples(run: Path) -> dict:
    """How many item summaries have which status, and a few of them beside their pictures."""
    if not all((run / path).exists() for path in ("data/items.parquet", "summaries/items.parquet")):
        return {}
    summaries = pl.read_parquet(run / "summaries/items.parquet").sort("item_id")
    counts = (
        summaries.group_by(pl.col("status").str.split(":").list.first()).len("count").sort("count", descending=True)
    )
    some = summaries[_spread(len(summaries))]
    cards = _cards(run, set(some["item_id"]))
    shown = [cards[row["item_id"]] | {"summary": row["summary"]} for row in some.iter_rows(named=True)]
    return {"counts": dict(counts.iter_rows()), "shown": shown}


def _cards(run: Path, item_ids: set[str]) -> dict[str, dict]:
    """Title and thumbnail of every item of ``item_ids``; only their rows are read."""
    chosen = pl.col("item_id").is_in(list(item_ids))
    items = pl.scan_parquet(run / "data/items.parquet").filter(chosen)
    if (run / "data/thumbnails.parquet").is_file():  # made once, when the data was prepared
        small = pl.scan_parquet(run / "data/thumbnails.parquet").filter(chosen)
        image = pl.struct(bytes="thumbnail", path=pl.lit(None, pl.String)).alias("image")
        items = items.select("item_id", "title").join(small, on="item_id", how="left").with_columns(image)
    rows = {row["item_id"]: row for row in items.collect().iter_rows(named=True)}
    return {item: _card(item, rows.get(item, {})) for item in item_ids}


def _card(item_id: str, row: dict) -> dict:
    return {"title": row.get("title") or f"item {item_id}", "picture": thumbnail(row.get("image"))}


def user_story(task: dict, scores: pl.DataFrame, preferences: pl.DataFrame | None) -> dict:
    """A user's story by item ids: blocks with the preference after each, items not yet summarised, the ranking."""
    blocks: list[dict] = []
    read: list[str] = []
    if preferences is not None:
        steps = preferences.filter(
            (pl.col("user_id") == task["user_id"]) & (pl.col("last_timestamp") <= task["cutoff"])
        )
        for step in steps.sort("step").iter_rows(named=True):
            if not set(step["read_item_ids"]) <= set(task["history"]):
                continue
            fresh = step["read_item_ids"][len(read) :]
            blocks.append({"step": step["step"], "preference": step["preference"], "items": fresh})
            read = step["read_item_ids"]
    own = scores.filter(pl.col("user_id") == task["user_id"]).sort("logit", "label", descending=[True, False])
    ranking = [
        {"place": place, "item_id": row["item_id"], "chosen": row["label"] == 1, "score": row["score"]}
        for place, row in enumerate(own.iter_rows(named=True), start=1)
    ]
    shown = [entry for entry in ranking if entry["place"] <= N_CANDIDATES or entry["chosen"]]
    highest = max(entry["score"] for entry in ranking) or 1.0
    for before, entry in zip([None, *shown], shown, strict=False):
        entry["bar"] = entry["score"] / highest
        entry["gap"] = before is not None and entry["place"] > before["place"] + 1
    first, final = task["above"] + 1, task["above"] + task["n"]
    return {
        "user_id": task["user_id"],
        "rank": f"ranked {first}" if first == final else f"tied for places {first}-{final}",
        "candidates": len(ranking),
        "blocks": blocks,
        "shown_from": max(0, len(blocks) - N_BLOCKS),
        "recent": task["history"][len(read) :],
        "ranking": shown,
    }


def thumbnail(image: dict | None) -> str | None:
    """A small JPEG as a data URI from ``{"bytes", "path"}``; None if there is no picture or it cannot be read."""
    if not image or not image.get("bytes"):
        return None
    try:
        with Image.open(io.BytesIO(image["bytes"])) as opened:
            opened.draft("RGB", (2 * THUMBNAIL, 2 * THUMBNAIL))
            small = opened.convert("RGBA")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
        return None
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    white = Image.new("RGB", small.size, "white")
    white.paste(small, mask=small.getchannel("A"))
    buffer = io.BytesIO()
    white.save(buffer, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
