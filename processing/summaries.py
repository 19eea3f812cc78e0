"""Item summaries and recurrent preferences (paper, "Image Summary" and "User preference")."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import polars as pl
from tqdm import tqdm

from mllm_msr.modeling.inputs import HistoryItem
from mllm_msr.modeling.preference import PreferenceStep, preference_waves, whole_blocks
from mllm_msr.processing.encoded_items import EncodedItem
from mllm_msr.processing.engines import Author, Descriptions, HistoryBlock
from mllm_msr.processing.prompts import Task
from mllm_msr.processing.text_report import check_texts
from mllm_msr.processing.text_requests import TextRequest, WrittenTexts
from mllm_msr.processing.text_status import StoredText, combine
from mllm_msr.processing.text_store import TextStore
from mllm_msr.processing.text_writer import Inputs, TextWriter
from mllm_msr.processing.workers import Workers
from mllm_msr.records.schema import ITEM_SUMMARIES, PREFERENCES
from mllm_msr.records.sections import SummaryOptions
from mllm_msr.records.storage import digest

TextWorkers = Workers[TextRequest, WrittenTexts]
WITHOUT_MODEL = SummaryOptions(engine="extractive")
KEY = 32  # letters of a text's key
AT_ONCE = 4096  # users whose rows are made of their texts together


def summarize_items(
    items: pl.DataFrame,
    engine: Author,
    store: TextStore,
    options: SummaryOptions = WITHOUT_MODEL,
    workers: TextWorkers | None = None,
) -> pl.DataFrame:
    """One summary for each item, from its image and words, with one prompt or the paper's three.

    Args:
        items: ``item_id``, ``title``, ``text``, ``image`` (struct with ``bytes``, or null).
        workers: who writes, with the same engine; None: this process.

    Returns:
        The table ``ITEM_SUMMARIES``, in the order of ``items``. The status is that of the worst text that the summary
        rests on.

    Raises:
        EngineUnavailable: the engine can serve no input, or no text is of use; what it has written until then is kept.
    """
    columns = items.select("item_id", "title", "text", pl.col("image").struct.field("bytes"))
    ids, titles, words, images = (column.to_list() for column in columns.iter_columns())
    sources = _ItemSources(ids, titles, words, images if options.images else [None] * len(ids))
    writer = TextWriter(engine, store, options.seed, workers)
    if options.item_prompts == "single":
        tasks: tuple[Task, ...] = ("item_summary",)
        texts = _with_one_prompt(writer, sources)
    else:
        tasks = ("image_summary", "text_summary", "fusion")
        texts = _with_three_prompts(writer, sources)
    provenance = _provenance(engine, tasks)
    return ITEM_SUMMARIES.frame([(item_id, *text, *provenance) for item_id, text in zip(ids, texts, strict=True)])


@dataclass(frozen=True)
class _ItemSources:
    """What the summaries of N items are written from."""

    ids: list[str]
    titles: list[str]
    texts: list[str]
    images: list[bytes | None]

    @cached_property
    def image_hashes(self) -> list[str | None]:
        return [hashlib.sha256(image).hexdigest() if image else None for image in self.images]

    @cached_property
    def lengths(self) -> list[int]:
        """Characters of title and text."""
        return [len(title) + len(text) for title, text in zip(self.titles, self.texts, strict=True)]

    def item(self, place: int, words: bool = True, image: bool = True) -> EncodedItem:
        """The item in this place, or only its words or its image."""
        title, text = (self.titles[place], self.texts[place]) if words else ("", "")
        return EncodedItem(self.ids[place], title, text, self.images[place] if image else None)


def _with_one_prompt(writer: TextWriter, items: _ItemSources) -> list[StoredText]:
    longest: dict[str, int] = {}  # of the items with the same image, which go together so that it is encoded once
    for image, length in zip(items.image_hashes, items.lengths, strict=True):
        if image:
            longest[image] = max(length, longest.get(image, 0))
    sizes = [
        (longest.get(image or "", length), image or "", length)
        for image, length in zip(items.image_hashes, items.lengths, strict=True)
    ]
    facts = [list(fact) for fact in zip(items.titles, items.texts, items.image_hashes, strict=True)]
    return _write(writer, "item_summary", Inputs(items.ids, facts, sizes, items.item))


def _with_three_prompts(writer: TextWriter, items: _ItemSources) -> list[StoredText]:
    """The image and the words described apart, then fused.

    Equal images are described once and equal words too, whatever else the items have. An item that has only an image
    or only words needs no fusion.
    """
    with_image = [place for place, image in enumerate(items.image_hashes) if image]
    with_words = [place for place, length in enumerate(items.lengths) if length]
    of_images = _write(
        writer,
        "image_summary",
        Inputs(
            [items.ids[place] for place in with_image],
            [items.image_hashes[place] for place in with_image],
            [0] * len(with_image),
            lambda n: items.item(with_image[n], words=False),
        ),
    )
    of_words = _write(
        writer,
        "text_summary",
        Inputs(
            [items.ids[place] for place in with_words],
            [{"title": items.titles[place], "text": items.texts[place]} for place in with_words],
            [items.lengths[place] for place in with_words],
            lambda n: items.item(with_words[n], image=False),
        ),
    )
    image_texts = dict(zip(with_image, of_images, strict=True))
    word_texts = dict(zip(with_words, of_words, strict=True))
    texts = [combine(word_texts.get(place), image_texts.get(place)) for place in range(len(items.ids))]
    both = [place for place in with_image if place in word_texts and image_texts[place].text and word_texts[place].text]
    pairs = [Descriptions(items.titles[place], word_texts[place].text, image_texts[place].text) for place in both]
    facts = [asdict(pair) for pair in pairs]
    names, sizes = [items.ids[place] for place in both], [len(str(fact)) for fact in facts]
    fused = _write(writer, "fusion", Inputs(names, facts, sizes, pairs.__getitem__))
    for place, text in zip(both, fused, strict=True):
        status = combine(word_texts[place], image_texts[place], text).status
        texts[place] = StoredText(text.text or texts[place].text, status)
    return texts


def _write(writer: TextWriter, task: Task, inputs: Inputs) -> list[StoredText]:
    """The texts of all inputs of a task, checked as a whole."""
    with tqdm(total=len(inputs.facts), desc=task.replace("_", " "), unit="text", leave=False) as progress:
        keys = writer.write(task, inputs, progress)
    texts = [writer.store.rows[key] for key in keys]
    different = {key: (inputs.names[place], texts[place]) for place, key in enumerate(keys) if inputs.says(place)}
    check_texts(task, different.values)
    return texts


def summarize_users(
    interactions: pl.DataFrame,
    titles: Mapping[str, str],
    summaries: Mapping[str, str],
    engine: Author,
    store: TextStore,
    options: SummaryOptions = WITHOUT_MODEL,
    workers: TextWorkers | None = None,
) -> pl.DataFrame:
    """Every user's preference after each whole history block, see :mod:`mllm_msr.modeling.preference`.

    Args:
        interactions: ``user_id``, ``item_id``, ``timestamp``; a user's rows oldest first.
        titles, summaries: by item id.
        workers: who writes, with the same engine; None: this process.

    Returns:
        The table ``PREFERENCES``, by user and step. ``read_item_ids`` are all items that a text rests on. Where a text
        is empty or has failed, the one before it stands in its place.

    Raises:
        EngineUnavailable: the engine can serve no input, or no text is of use; what it has written until then is kept.
    """
    size, writer = options.block_size, TextWriter(engine, store, options.seed, workers)
    users = interactions.group_by("user_id", maintain_order=True).agg("item_id", "timestamp").rows()
    described = {item: HistoryItem(titles[item], summaries[item]) for item in interactions["item_id"].unique()}
    histories = [[described[item] for item in history] for _, history, _ in users]
    texts = _UserTexts(store, [b""] * len(users), set())
    total = sum(whole_blocks(len(history), size) for history in histories)
    with tqdm(total=total, desc="preferences", unit="block", leave=False) as progress:

        def write(steps: list[PreferenceStep[HistoryItem]]) -> list[str]:
            facts = _Made(len(steps), lambda place: _facts(steps[place]))
            inputs = Inputs(
                _Made(len(steps), lambda place: users[steps[place].user][0]),
                facts,
                [len(str(fact)) for fact in facts],
                lambda place: HistoryBlock(steps[place].items, steps[place].previous),
            )
            keys = writer.write("preference", inputs, progress)
            for place, (step, key) in enumerate(zip(steps, keys, strict=True)):
                texts.add(step.user, key, inputs.says(place))
            return [store.rows[key].text for key in keys]

        for _ in preference_waves(histories, size, write, options.recurrent):
            pass
    check_texts("preference", lambda: texts.different([user for user, *_ in users]))
    provenance, tables = _provenance(engine, ("preference",)), []
    places = sorted(range(len(users)), key=lambda place: users[place][0])
    for start in range(0, len(places), AT_ONCE):
        rows = []
        for place in places[start : start + AT_ONCE]:
            user, history, times = users[place]
            preference = ""
            for step, text in enumerate(texts.of(place), 1):
                read, preference = step * size, text.text or preference
                rows.append((user, step, preference, history[:read], times[read - 1], text.status, *provenance))
        tables.append(PREFERENCES.frame(rows))
    return pl.concat(tables, rechunk=True) if tables else PREFERENCES.frame([])


@dataclass(frozen=True)
class _UserTexts:
    """Which texts are whose, at the place of each user: by their keys alone, as there may be many million.

    Args:
        keys: of all steps in their order, as bytes.
        silent: keys of texts about nothing.
    """

    store: TextStore
    keys: list[bytes]
    silent: set[str]

    def add(self, place: int, key: str, says: bool) -> None:
        """The text of a user's next step, and whether its input says anything."""
        self.keys[place] += bytes.fromhex(key)
        if not says:
            self.silent.add(key)

    def of(self, place: int) -> Iterator[StoredText]:
        """A user's texts, step by step."""
        return (self.store.rows[key] for key in self._keys(place))

    def different(self, users: Sequence[str]) -> Iterator[tuple[str, StoredText]]:
        """The texts of different inputs that say something, each with a user's name."""
        seen: set[bytes] = set()
        for place, user in enumerate(users):
            for key in self._keys(place):
                if (short := bytes.fromhex(key)) not in seen and key not in self.silent:
                    seen.add(short)
                    yield user, self.store.rows[key]

    def _keys(self, place: int) -> list[str]:
        keys = self.keys[place].hex()
        return [keys[start : start + KEY] for start in range(0, len(keys), KEY)]


class _Made(Sequence[Any]):
    """A sequence whose values are made when they are asked for, and not kept."""

    def __init__(self, count: int, make: Callable[[int], Any]) -> None:
        self.size, self.make = count, make

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: Any) -> Any:
        if not 0 <= place < self.size:
            raise IndexError(place)
        return self.make(place)


def _facts(step: PreferenceStep[HistoryItem]) -> dict[str, Any]:
    """``asdict`` of a history block, made faster."""
    items = [{"title": item.title, "summary": item.summary} for item in step.items]
    return {"items": items, "previous": step.previous}


def _provenance(engine: Author, tasks: Sequence[Task]) -> tuple[str, str, str]:
    """Who wrote the texts of ``tasks``, in which version, and from which prompts."""
    hashes = [engine.prompt_hash(task) for task in tasks]
    return engine.generator, engine.revision, hashes[0] if len(hashes) == 1 else digest(*hashes)
