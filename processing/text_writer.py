"""Texts of one prompt for many inputs: resumable, never written twice.

Every text is kept in a store under the hash of all it depends on: the engine, its prompt, and the input. So a killed
run goes on where it stopped, runs may share texts, new interactions cost only their own blocks, and a changed prompt
regenerates exactly what it touches.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from tqdm import tqdm

from mllm_msr.processing.encoded_items import EncodedItem
from mllm_msr.processing.engines import Author, Engine, PromptInput
from mllm_msr.processing.prompts import Task
from mllm_msr.processing.text_report import no_use
from mllm_msr.processing.text_requests import TextRequest, WrittenTexts, write_texts
from mllm_msr.processing.text_status import StoredText, has_failed, is_useless
from mllm_msr.processing.text_store import TextStore
from mllm_msr.processing.workers import InProcess, Workers
from mllm_msr.records.storage import digest

logger = logging.getLogger(__name__)
GIVE_UP_AFTER = 32  # inputs, if not one text of use has come of any


@dataclass(frozen=True)
class Inputs:
    """N inputs of one prompt.

    Args:
        names: for people, such as an item's id.
        facts: for each all that its text depends on, in JSON's terms; asked for more than once.
        sizes: inputs of similar size share a batch.
        load: the input at a place, made when it is needed; an item may have its image still encoded.
    """

    names: Sequence[str]
    facts: Sequence[Any]
    sizes: Sequence[Any]
    load: Callable[[int], PromptInput | EncodedItem]

    def says(self, place: int) -> bool:
        """Whether this input has a word or an image; nothing can be written of one that has not."""
        return _says(self.facts[place])


def _says(fact: Any) -> bool:
    if isinstance(fact, Mapping):
        return any(map(_says, fact.values()))
    return any(map(_says, fact)) if isinstance(fact, list | tuple) else bool(fact)


@dataclass(frozen=True)
class TextWriter:
    """Has an engine write what a store lacks.

    ``workers``: have this engine; None: this process, where it is whole.
    """

    engine: Author
    store: TextStore
    seed: int = 0
    workers: Workers[TextRequest, WrittenTexts] | None = None

    def keys(self, task: Task, facts: Iterable[Any]) -> list[str]:
        """For each input the hash of all that its text depends on."""
        engine = self.engine
        common = digest(
            task, engine.generator, engine.revision, engine.prompt_hash(task), engine.settings(task), self.seed
        )
        return [digest(common, fact) for fact in facts]

    def write(self, task: Task, inputs: Inputs, progress: tqdm) -> list[str]:
        """The key of each input, under which the store now has a text, if only an empty one whose status says why.

        Batches are cut from all inputs in order of size, not from what is missing, so that a resumed run generates the
        same batches as an uninterrupted one, by however many workers.

        Raises:
            EngineUnavailable: the engine says so, or no text is of use; what was generated until then is kept.
            OSError: the store cannot be written.
        """
        keys = self.keys(task, inputs.facts)
        place = {keys[index]: index for index in reversed(range(len(keys)))}
        order = sorted(place, key=lambda key: (inputs.sizes[place[key]], key))
        rows = self.store.rows
        there = {key for key in order if key in rows}
        useful = any(not is_useless(rows[key].status) for key in there)
        tried: list[tuple[str, StoredText]] = []  # as long as no text is of use
        workers = self.workers or InProcess(lambda: partial(write_texts, cast(Engine, self.engine)))
        progress.update(len(keys) - len(order) + len(there))  # equal inputs are written once
        for written in workers.map(self._requests(task, order, there, place, inputs)):
            if written.rows:
                self.store.add(written.request.batch, written.rows)
            names = {key: inputs.names[place[key]] for key in written.rows}
            for key, text in written.rows.items():
                if has_failed(text.status):
                    logger.warning("%s of %s failed: %s", task, names[key], text.status.partition(":")[2])
            if written.stop:
                raise written.stop
            if not useful:
                tried += [(names[key], text) for key, text in written.rows.items() if inputs.says(place[key])]
                useful = any(not is_useless(text.status) for _, text in tried)
            if not useful and len(tried) >= GIVE_UP_AFTER:
                raise no_use(task, tried) from written.cause
            progress.update(len(written.rows))
        return keys

    def _requests(
        self, task: Task, order: Sequence[str], there: Set[str], place: Mapping[str, int], inputs: Inputs
    ) -> Iterator[TextRequest]:
        """What is missing, batch by batch."""
        size = self.engine.batch_size
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            missing = [key for key in batch if key not in there]
            if missing:
                yield TextRequest(task, batch, {key: inputs.load(place[key]) for key in missing}, self.seed)
