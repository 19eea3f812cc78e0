"""Item summaries and recurrent preferences (paper, "Image Summary" and "User preference")."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain

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
    check_texts(task, list(different.values()))
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
    keys: dict[tuple[int, int], str] = {}  # of texts, by user and step
    different: dict[str, str] = {}  # of different inputs the key and a user
    total = sum(whole_blocks(len(history), size) for history in histories)
    with tqdm(total=total, desc="preferences", unit="block", leave=False) as progress:

        def write(steps: list[PreferenceStep[HistoryItem]]) -> list[str]:
            blocks = [HistoryBlock(step.items, step.previous) for step in steps]
            names, facts = [users[step.user][0] for step in steps], [asdict(block) for block in blocks]
            inputs = Inputs(names, facts, [len(str(fact)) for fact in facts], blocks.__getitem__)
            written = writer.write("preference", inputs, progress)
            keys.update({(step.user, step.step): key for step, key in zip(steps, written, strict=True)})
            different.update({key: names[place] for place, key in enumerate(written) if inputs.says(place)})
            return [store.rows[key].text for key in written]

        waves = list(preference_waves(histories, size, write, options.recurrent))
    check_texts("preference", [(user, store.rows[key]) for key, user in different.items()])
    provenance, rows = _provenance(engine, ("preference",)), []
    for step, preference in chain.from_iterable(waves):
        user, history, times = users[step.user]
        read, status = step.step * size, store.rows[keys[step.user, step.step]].status
        rows.append((user, step.step, preference, history[:read], times[read - 1], status, *provenance))
    return PREFERENCES.frame(rows).sort("user_id", "step")


def _provenance(engine: Author, tasks: Sequence[Task]) -> tuple[str, str, str]:
    """Who wrote the texts of ``tasks``, in which version, and from which prompts."""
    hashes = [engine.prompt_hash(task) for task in tasks]
    return engine.generator, engine.revision, hashes[0] if len(hashes) == 1 else digest(*hashes)
