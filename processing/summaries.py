"""Item summaries and recurrent preferences (paper, "Image Summary" and "User preference"): resumable, never twice.

Every text is kept in a store under the hash of all it depends on: the engine, its prompt, and the input. So a killed
run goes on where it stopped, several processes share the work, two runs share texts, new interactions cost only their
own blocks, and a changed prompt regenerates exactly what it touches.
"""

import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import polars as pl
from PIL import Image
from tqdm import tqdm

from mllm_msr.data.images import BrokenImage, decode
from mllm_msr.processing.engines import Engine, EngineUnavailable, SummaryOptions, Task, Text
from mllm_msr.processing.text_store import TextStore
from mllm_msr.records.storage import digest

logger = logging.getLogger(__name__)
Load = Callable[[list[int]], list[Mapping[str, Any]]]
Known = tuple[str, str]  # text, status
GIVE_UP_AFTER = 32  # inputs, if not one text has come of any
POLL = 0.5  # seconds between looks at what other processes are generating
_REFUSAL = re.compile(
    r"^\W*(i'?m (really |very )?sorry|i am (really |very )?sorry|sorry,|i apologi[sz]e|as an ai\b|unfortunately, i\b|"
    r"i('m| am) (unable|not able)|i (cannot|can't|can not|could not|couldn't|do not|don't) "
    r"(help|assist|comply|provide|describe|see|view|identify|fulfil+|do that|have access|answer|infer))",
    re.IGNORECASE,
)


def assess(text: str, ended: bool) -> str:
    """ "ok", or what makes a generated text suspect: empty, refused, looping, or over-long (unfinished).

    * empty: not a word
    * refused: it begins with an apology, or with what the model cannot do, instead of a description
    * looping: it ends with the same two to six words three times in a row, or the same word six times
    * unfinished: it reached the longest length without an end

    >>> assess("likes red mugs", True), assess("", True), assess("and on and", False)
    ('ok', 'suspect:empty', 'suspect:unfinished')
    >>> assess("a b " * 9, True), assess("I'm sorry, but I can't help with that.", True)
    ('suspect:looping', 'suspect:refused')
    """
    words = text.split()
    if not words:
        return "suspect:empty"
    if _REFUSAL.match(text.replace("\u2019", "'")):
        return "suspect:refused"
    for n, times in ((1, 6), *((n, 3) for n in range(2, 7))):
        if len(words) >= times * n and words[-times * n :] == words[-n:] * times:
            return "suspect:looping"
    return "ok" if ended else "suspect:unfinished"


def generate_missing(
    engine: Engine,
    task: Task,
    keys: Sequence[str],
    sizes: Sequence[Any],
    load: Load,
    store: TextStore,
    progress: tqdm,
    seed: int = 0,
) -> None:
    """Generate the texts of ``keys`` that ``store`` lacks; afterwards it has a row for each, if only "failed:why".

    Batches are cut from all keys in order of size, not from what is missing, so a resumed run generates in the same
    company as an uninterrupted one, and processes that share the folder see the same batches. What another process
    has claimed is waited for at the end.

    Raises:
        EngineUnavailable: with all that was generated until then kept.
        OSError: the store cannot be written.
    """
    first = {key: index for index, key in reversed(list(enumerate(keys)))}
    order = sorted(first, key=lambda key: (sizes[first[key]], key))
    batches = [order[start : start + engine.batch_size] for start in range(0, len(order), engine.batch_size)]
    in_vain = 0
    while batches:
        others: list[list[str]] = []
        for batch in batches:
            if all(key in store.rows for key in batch):
                progress.update(len(batch))
                continue
            with store.claim(batch) as mine:
                if mine:
                    store.refresh(batch)
                    if missing := [key for key in batch if key not in store.rows]:
                        generate_batch(engine, task, batch, missing, [first[key] for key in missing], load, store, seed)
                        failures = [store.rows[key][1] for key in missing if _kind(store.rows[key][1]) == "failed"]
                        in_vain = in_vain + len(failures) if len(failures) == len(missing) else 0
                        if in_vain >= GIVE_UP_AFTER and not any(store.rows.get(key, ("",))[0] for key in keys):
                            raise EngineUnavailable(f"{task}: all of the first {in_vain} inputs {failures[-1]}")
                    progress.update(len(batch))
                else:
                    others.append(batch)
        if len(others) == len(batches):
            time.sleep(POLL)
        for batch in others:
            store.refresh(batch)
        batches = others


def generate_batch(
    engine: Engine,
    task: Task,
    batch: Sequence[str],
    keys: list[str],
    indices: list[int],
    load: Load,
    store: TextStore,
    seed: int,
) -> None:
    """Generate ``keys`` of ``batch`` into the store. A suspect text is tried once more, sampled and with more room."""
    seeds = {key: int(digest(seed, key)[:12], 16) for key in keys}

    def ask(chosen: list[int], again: bool) -> Iterator[tuple[int, Text | Exception]]:
        """On an error halve the inputs until the one at fault stands alone."""
        if not chosen:
            return
        wanted = [seeds[keys[n]] + again for n in chosen]
        try:
            outcome = engine.generate(task, load([indices[n] for n in chosen]), wanted, again)
        except EngineUnavailable as error:
            yield chosen[0], error
            return
        except Exception as error:
            if len(chosen) == 1:
                yield chosen[0], error
                return
            half = len(chosen) // 2
            yield from ask(chosen[:half], again)
            yield from ask(chosen[half:], again)
            return
        yield from zip(chosen, outcome, strict=True)

    answers = dict(ask(list(range(len(keys))), again=False))
    stopped = [one for one in answers.values() if isinstance(one, EngineUnavailable)]
    doubtful = [n for n, one in answers.items() if isinstance(one, Text) and assess(one.text, one.ended) != "ok"]
    seconds = dict(ask([] if stopped else doubtful, again=True))
    stopped += [one for one in seconds.values() if isinstance(one, EngineUnavailable)]
    rows: dict[str, Known] = {}
    for n, one in answers.items():
        if isinstance(one, Text) and not (stopped and n in doubtful):
            second = seconds.get(n)
            if isinstance(second, Text) and assess(second.text, second.ended) == "ok":
                one = second
            rows[keys[n]] = (one.text, assess(one.text, one.ended))
        elif isinstance(one, Exception) and not stopped:
            why = " ".join(f"{type(one).__name__}: {one}".split())[:300]
            rows[keys[n]] = ("", f"failed:{why}")
            logger.warning("%s failed: %s", task, why)
    if rows:
        store.add(batch, rows)
    if stopped:
        raise stopped[0]


def summarize_items(
    items: pl.DataFrame, engine: Engine, store: TextStore, options: SummaryOptions | None = None
) -> pl.DataFrame:
    """One summary an item from its picture and words, with one prompt or the paper's three.

    With three, equal pictures are described once and equal words too, whatever else the items have; an item that has
    only a picture or only words needs no fusion.

    Args:
        items: ``item_id``, ``title``, ``text``, ``image`` (struct with ``bytes``, or null).

    Returns:
        ``item_id``, ``summary``, ``status``, ``generator``, ``revision``, ``prompt_hash``, in the order of ``items``.
        The status is that of the worst text the summary rests on.
    """
    options = options or SummaryOptions(engine="extractive")
    rows = items.select("title", "text", pl.col("image").struct.field("bytes")).rows()
    pictures = [image if options.images else None for *_, image in rows]
    marks = [hashlib.sha256(image).hexdigest() if image else None for image in pictures]
    words = [{"title": title, "text": text} for title, text, _ in rows]
    lengths = [len(title) + len(text) for title, text, _ in rows]

    def write(task: Task, facts: list[Any], sizes: list[Any], load: Load) -> list[Known]:
        keys = text_keys(engine, task, options.seed, facts)
        with tqdm(total=len(set(keys)), desc=task.replace("_", " "), unit="text") as progress:
            generate_missing(engine, task, keys, sizes, load, store, progress, options.seed)
        return [store.rows[key] for key in keys]

    def seen(i: int) -> dict[str, Any]:
        return {"image": _picture(pictures[i])}

    tasks: tuple[Task, ...] = ("item_summary",)
    if options.item_prompts == "single":
        facts = [[title, text, mark] for (title, text, _), mark in zip(rows, marks, strict=True)]
        longest: dict[str, int] = {}  # of the items with the same picture, which go together so that it is encoded once
        for mark, length in zip(marks, lengths, strict=True):
            if mark:
                longest[mark] = max(length, longest.get(mark, 0))
        sizes = [(longest.get(mark or "", n), mark or "", n) for mark, n in zip(marks, lengths, strict=True)]
        texts = write("item_summary", facts, sizes, lambda chosen: [{**words[i], **seen(i)} for i in chosen])
    else:
        tasks = ("image_summary", "text_summary", "fusion")
        shown = [i for i, mark in enumerate(marks) if mark]
        told = [i for i, one in enumerate(words) if one["title"] or one["text"]]
        in_picture = write(
            "image_summary",
            [marks[i] for i in shown],
            [0] * len(shown),
            lambda chosen: [seen(shown[n]) for n in chosen],
        )
        in_words = write(
            "text_summary",
            [words[i] for i in told],
            [lengths[i] for i in told],
            lambda chosen: [words[told[n]] for n in chosen],
        )
        looks, sense = dict(zip(shown, in_picture, strict=True)), dict(zip(told, in_words, strict=True))
        texts = [worst(sense.get(i), looks.get(i)) for i in range(len(rows))]
        both = [i for i in shown if i in sense and looks[i][0] and sense[i][0]]
        parts = [{"title": words[i]["title"], "text_summary": sense[i][0], "image_summary": looks[i][0]} for i in both]
        fused = write(
            "fusion", list(parts), [len(str(one)) for one in parts], lambda chosen: [parts[n] for n in chosen]
        )
        for i, one in zip(both, fused, strict=True):
            status = worst(sense[i], looks[i], one)[1]
            texts[i] = (one[0] or texts[i][0], status)
    return items.select(
        "item_id",
        pl.Series("summary", [text for text, _ in texts], pl.String),
        pl.Series("status", [status for _, status in texts], pl.String),
        *_provenance(engine, tasks),
    )


def worst(*texts: Known | None) -> Known:
    """The first text that is not empty, with the worst status of all; an item with nothing to tell has failed."""
    known = [one for one in texts if one is not None]
    by_rank = sorted(
        (status for _, status in known), key=lambda status: ("failed", "suspect", "ok").index(_kind(status))
    )
    text = next((text for text, _ in known if text), "")
    return text, by_rank[0] if by_rank else "failed:the item has neither words nor a picture"


def _kind(status: str) -> str:
    return status.partition(":")[0]


def summarize_users(
    interactions: pl.DataFrame,
    titles: Mapping[str, str],
    summaries: Mapping[str, str],
    engine: Engine,
    store: TextStore,
    options: SummaryOptions | None = None,
) -> pl.DataFrame:
    """Every user's preference after each whole block of items: h_k = LLM(block_k, h_(k-1)), h_0 absent.

    Step k of all users is one wave, since it needs only their step k - 1. Without recurrence (the paper's ablation)
    h_k = LLM(block_1, ..., block_k), all at once. If h_k is empty or has failed, h_(k-1) stands in its place.

    Args:
        interactions: ``user_id``, ``item_id``, ``timestamp``; a user's rows oldest first.
        titles, summaries: by item id.

    Returns:
        ``user_id``, ``step`` (from 1), ``preference``, ``read_item_ids`` (all that the text rests on),
        ``last_timestamp``, ``status``, ``generator``, ``revision``, ``prompt_hash``.
    """
    options = options or SummaryOptions(engine="extractive")
    block = options.block_size
    users = interactions.group_by("user_id", maintain_order=True).agg("item_id", "timestamp").rows()
    steps = [(n, step) for n, (_, history, _) in enumerate(users) for step in range(1, len(history) // block + 1)]
    last = max((step for _, step in steps), default=0)
    waves = [[one for one in steps if one[1] == step] for step in range(1, last + 1)] if options.recurrent else [steps]
    current: dict[int, str] = {}
    out: list[tuple[Any, ...]] = []

    def asked(n: int, step: int) -> dict[str, Any]:
        items = users[n][1][(step - 1) * block if options.recurrent else 0 : step * block]
        return {
            "items": [{"title": titles[item], "summary": summaries[item]} for item in items],
            "previous": current.get(n) if options.recurrent else None,
        }

    with tqdm(total=len(steps), desc="preferences", unit="block") as progress:
        for wave in waves:

            def load(indices: list[int], wave: list[tuple[int, int]] = wave) -> list[Mapping[str, Any]]:
                return [asked(*wave[i]) for i in indices]

            keys = text_keys(engine, "preference", options.seed, (asked(*one) for one in wave))
            sizes = [len(str(asked(*one))) for one in wave]
            before = progress.n
            generate_missing(engine, "preference", keys, sizes, load, store, progress, options.seed)
            progress.update(before + len(wave) - progress.n)  # equal inputs were generated once
            for (n, step), key in zip(wave, keys, strict=True):
                text, status = store.rows[key]
                current[n] = text or current.get(n, "")
                user, history, times = users[n]
                out.append((user, step, current[n], history[: step * block], times[step * block - 1], status))
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
    return frame.with_columns(*_provenance(engine, ("preference",))).sort("user_id", "step")


def text_keys(engine: Engine, task: Task, seed: int, facts: Any) -> list[str]:
    """For each input the hash of all that its text depends on."""
    common = digest(task, engine.generator, engine.revision, engine.prompt_hash(task), engine.settings(task), seed)
    return [digest(common, one) for one in facts]


def _provenance(engine: Engine, tasks: Sequence[Task]) -> list[pl.Expr]:
    hashes = [engine.prompt_hash(task) for task in tasks]
    facts = {"generator": engine.generator, "revision": engine.revision}
    facts["prompt_hash"] = hashes[0] if len(hashes) == 1 else digest(*hashes)
    return [pl.lit(value).alias(name) for name, value in facts.items()]


def _picture(image: bytes | None) -> Image.Image | None:
    """The decoded picture, or None: prepared images are sound, and one that is not must not stop a million others."""
    try:
        return decode(image) if image else None
    except BrokenImage as error:
        logger.warning("an image was left out of its summary: %s", error)
        return None
