"""Item summaries and recurrent preferences (paper, "Image Summary" and "User preference"): resumable, never twice.

Every text is kept in a store under the hash of all it depends on: the engine, its prompt, and the input. So a killed
run goes on where it stopped, two runs share work, new interactions cost only their own blocks, and a changed prompt
regenerates exactly what it touches.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from tqdm import tqdm

from mllm_msr.processing.engines import Engine, Task
from mllm_msr.processing.images import BrokenImage, decode
from mllm_msr.processing.storage import digest, write_parquet

logger = logging.getLogger(__name__)


class TextStore:
    """Texts by content key in a folder of Parquet shards, each of which appears whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, tuple[str, str]] = {}  # key -> (text, status)
        for shard in sorted(folder.glob("*.parquet")):
            for key, text, status in pl.read_parquet(shard).select("key", "text", "status").iter_rows():
                self.rows[key] = (text, status)

    def add(self, rows: list[tuple[str, str, str]]) -> None:
        """Keep ``(key, text, status)`` rows as one new shard."""
        frame = pl.DataFrame(rows, schema={"key": pl.String, "text": pl.String, "status": pl.String}, orient="row")
        write_parquet(frame, self.folder / f"{digest(*(row[0] for row in rows))}.parquet")
        self.rows.update({key: (text, status) for key, text, status in rows})


def assess(text: str, ended: bool) -> str:
    """ "ok", or what makes a generated text suspect: empty, unfinished, or looping.

    Looping means that the last six words occur at least three times in a row at the end.

    >>> assess("likes red mugs", True), assess("", True), assess("and on and", False)
    ('ok', 'suspect:empty', 'suspect:unfinished')
    >>> assess("a b " * 9, True)
    'suspect:looping'
    """
    words = text.split()
    if not words:
        return "suspect:empty"
    if any(len(words) >= 3 * n and words[-n:] == words[-2 * n : -n] == words[-3 * n : -2 * n] for n in range(2, 7)):
        return "suspect:looping"
    return "ok" if ended else "suspect:unfinished"


def generate_missing(
    engine: Engine,
    task: Task,
    keys: Sequence[str],
    sizes: Sequence[int],
    load: Callable[[list[int]], list[Mapping[str, Any]]],
    store: TextStore,
    progress: tqdm,
) -> dict[str, str]:
    """Generate the texts of ``keys`` that ``store`` lacks; return ``{key: reason}`` for those that failed.

    Batches are cut from all keys in order of size, not from what is missing, so a resumed run generates in the same
    company, hence to the same text, as an uninterrupted one. A batch that fails is tried again one by one.
    """
    failed: dict[str, str] = {}
    first = {key: index for index, key in reversed(list(enumerate(keys)))}
    order = sorted(first, key=lambda key: (sizes[first[key]], key))
    for start in range(0, len(order), engine.batch_size):
        batch = order[start : start + engine.batch_size]
        missing = [key for key in batch if key not in store.rows]
        if missing:
            store_batch(engine, task, missing, [first[key] for key in missing], load, store, failed)
        progress.update(len(batch))
    return failed


def store_batch(
    engine: Engine,
    task: Task,
    keys: list[str],
    indices: list[int],
    load: Callable[[list[int]], list[Mapping[str, Any]]],
    store: TextStore,
    failed: dict[str, str],
) -> None:
    """Generate one batch into the store; on an error halve it until the input at fault stands alone in ``failed``."""
    try:
        outcome = engine.generate(task, load(indices))
    except Exception as error:
        if len(keys) == 1:
            failed[keys[0]] = f"{type(error).__name__}: {error}"
            logger.warning("%s failed: %s", task, failed[keys[0]])
            return
        half = len(keys) // 2
        store_batch(engine, task, keys[:half], indices[:half], load, store, failed)
        store_batch(engine, task, keys[half:], indices[half:], load, store, failed)
        return
    store.add([(key, text, assess(text, ended)) for key, (text, ended) in zip(keys, outcome, strict=True)])


def summarize_items(items: pl.DataFrame, engine: Engine, store: TextStore) -> pl.DataFrame:
    """One summary an item from its picture and words.

    Args:
        items: ``item_id``, ``title``, ``text``, ``image`` (struct with ``bytes``, or null).

    Returns:
        ``item_id``, ``summary``, ``status``, ``generator``, ``revision``, ``prompt_hash``, in the order of ``items``.
    """
    prompt_hash = engine.prompt_hash("item_summary")
    rows = items.select("title", "text", pl.col("image").struct.field("bytes")).rows()
    keys = [
        digest(engine.identity, prompt_hash, title, text, hashlib.sha256(image).hexdigest() if image else None)
        for title, text, image in rows
    ]

    def load(indices: list[int]) -> list[Mapping[str, Any]]:
        return [{"title": rows[i][0], "text": rows[i][1], "image": _picture(rows[i][2])} for i in indices]

    sizes = [len(title) + len(text) for title, text, _ in rows]
    with tqdm(total=len(set(keys)), desc="item summaries", unit="item") as progress:
        failed = generate_missing(engine, "item_summary", keys, sizes, load, store, progress)
    texts = [store.rows.get(key, ("", f"failed:{failed.get(key)}")) for key in keys]
    return items.select(
        "item_id",
        pl.Series("summary", [text for text, _ in texts], pl.String),
        pl.Series("status", [status for _, status in texts], pl.String),
        *_provenance(engine, prompt_hash),
    )


def summarize_users(
    interactions: pl.DataFrame,
    titles: Mapping[str, str],
    summaries: Mapping[str, str],
    engine: Engine,
    store: TextStore,
    block_size: int = 3,
) -> pl.DataFrame:
    """Every user's preference after each whole block of items: h_k = LLM(block_k, h_(k-1)), h_0 absent.

    Step k of all users is one wave, since it needs only their step k - 1.

    Args:
        interactions: ``user_id``, ``item_id``, ``timestamp``; a user's rows oldest first.
        titles, summaries: by item id.

    Returns:
        ``user_id``, ``step`` (from 1), ``preference``, ``read_item_ids`` (all that the text rests on), ``last_timestamp``,
        ``status``, ``generator``, ``revision``, ``prompt_hash``.
    """
    prompt_hash = engine.prompt_hash("preference")
    users = interactions.group_by("user_id", maintain_order=True).agg("item_id", "timestamp").rows()
    waves = max((len(history) // block_size for _, history, _ in users), default=0)
    current: dict[str, str | None] = {}
    out: list[tuple[Any, ...]] = []
    total = sum(len(history) // block_size for _, history, _ in users)
    with tqdm(total=total, desc="preferences", unit="block") as progress:
        for step in range(1, waves + 1):
            alive = [row for row in users if len(row[1]) >= step * block_size]
            inputs = [
                {
                    "items": [
                        {"title": titles[item], "summary": summaries[item]}
                        for item in history[(step - 1) * block_size : step * block_size]
                    ],
                    "previous": current.get(user),
                }
                for user, history, _ in alive
            ]
            keys = [digest(engine.identity, prompt_hash, one) for one in inputs]
            sizes = [len(str(one)) for one in inputs]

            def load(indices: list[int], inputs: list[dict[str, Any]] = inputs) -> list[Mapping[str, Any]]:
                return [inputs[i] for i in indices]

            before = progress.n
            failed = generate_missing(engine, "preference", keys, sizes, load, store, progress)
            progress.update(before + len(alive) - progress.n)  # equal inputs were generated once
            for (user, history, times), key in zip(alive, keys, strict=True):
                text, status = store.rows.get(key, (current.get(user) or "", f"failed:{failed.get(key)}"))
                current[user] = text
                read = step * block_size
                out.append((user, step, text, history[:read], times[read - 1], status))
    frame = pl.DataFrame(
        out,
        schema={
            "user_id": pl.String,
            "step": pl.Int64,
            "preference": pl.String,
            "read_item_ids": pl.List(pl.String),
            "last_timestamp": pl.Int64,
            "status": pl.String,
        },
        orient="row",
    )
    return frame.with_columns(*_provenance(engine, prompt_hash)).sort("user_id", "step")


def _provenance(engine: Engine, prompt_hash: str) -> list[pl.Expr]:
    facts = {**engine.identity, "prompt_hash": prompt_hash}
    return [pl.lit(facts[name]).alias(name) for name in ("generator", "revision", "prompt_hash")]


def _picture(image: bytes | None):
    """The decoded picture, or None: prepared images are sound, and one that is not must not stop a million others."""
    try:
        return decode(image) if image else None
    except BrokenImage as error:
        logger.warning("an image was left out of its summary: %s", error)
        return None
