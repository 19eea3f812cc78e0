"""Texts of one prompt for many inputs: resumable, never written twice, by any number of processes.

Every text is kept in a store under the hash of all it depends on: the engine, its prompt, and the input. So a killed
run goes on where it stopped, several processes share the work, two runs share texts, new interactions cost only their
own blocks, and a changed prompt regenerates exactly what it touches.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from mllm_msr.processing.engines import Answer, Engine, EngineUnavailable, Failure, PromptInput, Text
from mllm_msr.processing.prompts import Task
from mllm_msr.processing.text_report import no_use
from mllm_msr.processing.text_status import OK, StoredText, assess, failed, is_useless
from mllm_msr.processing.text_store import TextStore
from mllm_msr.records.storage import digest

logger = logging.getLogger(__name__)
GIVE_UP_AFTER = 32  # inputs, if not one text of use has come of any
POLL = 0.5  # seconds between looks at what other processes are generating


@dataclass(frozen=True)
class Inputs:
    """N inputs of one prompt.

    Args:
        names: for people, such as an item's id.
        facts: for each all that its text depends on, in JSON's terms.
        sizes: inputs of similar size share a batch.
        load: the input at a place, made when it is needed.
    """

    names: Sequence[str]
    facts: Sequence[Any]
    sizes: Sequence[Any]
    load: Callable[[int], PromptInput]

    def says(self, place: int) -> bool:
        """Whether this input has a word or an image; nothing can be written of one that has not."""
        return _says(self.facts[place])


def _says(fact: Any) -> bool:
    if isinstance(fact, Mapping):
        return any(map(_says, fact.values()))
    return any(map(_says, fact)) if isinstance(fact, list | tuple) else bool(fact)


@dataclass(frozen=True)
class TextWriter:
    """Has an engine write what a store lacks."""

    engine: Engine
    store: TextStore
    seed: int = 0

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
        same batches as an uninterrupted one, and processes that share the folder see the same ones. What another
        process has claimed is waited for at the end.

        Raises:
            EngineUnavailable: the engine says so, or no text is of use; what was generated until then is kept.
            OSError: the store cannot be written.
        """
        keys = self.keys(task, inputs.facts)
        place = {key: index for index, key in reversed(list(enumerate(keys)))}
        order = sorted(place, key=lambda key: (inputs.sizes[place[key]], key))
        size, rows = self.engine.batch_size, self.store.rows
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        useful = any(key in rows and not is_useless(rows[key].status) for key in order)
        tried: list[tuple[str, StoredText]] = []  # as long as no text is of use
        while batches:
            claimed_by_others: list[list[str]] = []
            for batch in batches:
                if all(key in rows for key in batch):
                    progress.update(len(batch))
                    continue
                with self.store.claim(batch) as is_ours:
                    if not is_ours:
                        claimed_by_others.append(batch)
                        continue
                    self.store.refresh(batch)
                    if missing := {key: place[key] for key in batch if key not in rows}:
                        failures = self._generate(task, batch, missing, inputs)
                        if not useful:
                            tried += [(inputs.names[n], rows[key]) for key, n in missing.items() if inputs.says(n)]
                            useful = any(not is_useless(text.status) for _, text in tried)
                        if not useful and len(tried) >= GIVE_UP_AFTER:
                            raise no_use(task, tried) from (failures[-1].cause if failures else None)
                    progress.update(len(batch))
            if len(claimed_by_others) == len(batches):
                time.sleep(POLL)
            for batch in claimed_by_others:
                self.store.refresh(batch)
            batches = claimed_by_others
        progress.update(len(keys) - len(order))  # equal inputs were written once
        return keys

    def _generate(self, task: Task, batch: Sequence[str], missing: Mapping[str, int], inputs: Inputs) -> list[Failure]:
        """Store the texts of ``missing``, keys of ``batch`` with the places of their inputs; the failures among them.

        A suspect text is tried once more, sampled and with more room.
        """
        answers = self._ask(task, missing, inputs.load, again=False)
        stop = next((answer for answer in answers.values() if isinstance(answer, EngineUnavailable)), None)
        doubtful = {
            key: missing[key]
            for key, answer in answers.items()
            if isinstance(answer, Text) and assess(answer.text, answer.ended) != OK
        }
        second = self._ask(task, doubtful, inputs.load, again=True) if stop is None else {}
        stop = stop or next((answer for answer in second.values() if isinstance(answer, EngineUnavailable)), None)
        rows: dict[str, StoredText] = {}
        failures: list[Failure] = []
        for key, answer in answers.items():
            if isinstance(answer, Text) and not (stop and key in doubtful):
                retried = second.get(key)
                if isinstance(retried, Text) and assess(retried.text, retried.ended) == OK:
                    answer = retried
                rows[key] = StoredText(answer.text, assess(answer.text, answer.ended))
            elif isinstance(answer, Failure) and not stop:
                rows[key] = StoredText("", failed(answer.reason))
                failures.append(answer)
                logger.warning("%s of %s failed: %s", task, inputs.names[missing[key]], answer.reason)
        if rows:
            self.store.add(batch, rows)
        if stop:
            raise stop
        return failures

    def _ask(
        self, task: Task, places: Mapping[str, int], load: Callable[[int], PromptInput], again: bool
    ) -> dict[str, Answer]:
        """The engine's answers by key. On an error the inputs are halved until the one at fault stands alone."""
        if not places:
            return {}
        keys = list(places)
        seeds = [int(digest(self.seed, key)[:12], 16) + again for key in keys]
        try:
            answers = self.engine.generate(task, [load(places[key]) for key in keys], seeds, again)
        except EngineUnavailable as error:
            return {keys[0]: error}
        except Exception as error:  # whatever the libraries of an engine raise for an input
            if len(keys) == 1:
                return {keys[0]: Failure.of(error)}
            half = len(keys) // 2
            return {
                key: answer
                for part in (keys[:half], keys[half:])
                for key, answer in self._ask(task, {key: places[key] for key in part}, load, again).items()
            }
        return dict(zip(keys, answers, strict=True))
