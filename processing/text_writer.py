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
from mllm_msr.processing.text_status import OK, StoredText, assess, failed
from mllm_msr.processing.text_store import TextStore
from mllm_msr.records.sections import Task
from mllm_msr.records.storage import digest

logger = logging.getLogger(__name__)
GIVE_UP_AFTER = 32  # inputs, if not one text has come of any
POLL = 0.5  # seconds between looks at what other processes are generating


@dataclass(frozen=True)
class Inputs:
    """N inputs of one prompt.

    Args:
        facts: for each all that its text depends on, in JSON's terms.
        sizes: inputs of similar size share a batch.
        load: the input at a place, made when it is needed.
    """

    facts: Sequence[Any]
    sizes: Sequence[Any]
    load: Callable[[int], PromptInput]


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

    def write(self, task: Task, inputs: Inputs, progress: tqdm) -> list[StoredText]:
        """A text for each input, if only an empty one whose status says why; equal inputs are written once.

        Batches are cut from all inputs in order of size, not from what is missing, so that a resumed run generates the
        same batches as an uninterrupted one, and processes that share the folder see the same ones. What another
        process has claimed is waited for at the end.

        Raises:
            EngineUnavailable: with all that was generated until then kept.
            OSError: the store cannot be written.
        """
        keys = self.keys(task, inputs.facts)
        place = {key: index for index, key in reversed(list(enumerate(keys)))}
        order = sorted(place, key=lambda key: (inputs.sizes[place[key]], key))
        size, rows = self.engine.batch_size, self.store.rows
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        in_vain = 0
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
                        failures = self._generate(task, batch, missing, inputs.load)
                        in_vain = in_vain + len(failures) if len(failures) == len(missing) else 0
                        if in_vain >= GIVE_UP_AFTER and not any(rows[key].text for key in keys if key in rows):
                            last = failures[-1]
                            raise EngineUnavailable(
                                f"{task}: all of the first {in_vain} inputs failed, the last with {last.reason}"
                            ) from last.cause
                    progress.update(len(batch))
            if len(claimed_by_others) == len(batches):
                time.sleep(POLL)
            for batch in claimed_by_others:
                self.store.refresh(batch)
            batches = claimed_by_others
        return [rows[key] for key in keys]

    def _generate(
        self, task: Task, batch: Sequence[str], missing: Mapping[str, int], load: Callable[[int], PromptInput]
    ) -> list[Failure]:
        """Store the texts of ``missing``, keys of ``batch`` with the places of their inputs; the failures among them.

        A suspect text is tried once more, sampled and with more room.
        """
        answers = self._ask(task, missing, load, again=False)
        stop = next((answer for answer in answers.values() if isinstance(answer, EngineUnavailable)), None)
        doubtful = {
            key: missing[key]
            for key, answer in answers.items()
            if isinstance(answer, Text) and assess(answer.text, answer.ended) != OK
        }
        second = self._ask(task, doubtful, load, again=True) if stop is None else {}
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
                logger.warning("%s failed: %s", task, answer.reason)
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
