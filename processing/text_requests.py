"""What one batch of texts is asked for by, and how an engine answers it: the part of the work that may be elsewhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mllm_msr.processing.encoded_items import EncodedItem
from mllm_msr.processing.engines import Answer, Engine, EngineUnavailable, Failure, PromptInput, Text
from mllm_msr.processing.prompts import Task
from mllm_msr.processing.text_status import OK, StoredText, assess, failed
from mllm_msr.records.storage import digest


@dataclass(frozen=True)
class TextRequest:
    """N texts of one prompt.

    Args:
        batch: keys of all texts that are stored as one file; some may be there already.
        inputs: what to write from, by key; an item with its image still encoded.
        seed: of the run.
    """

    task: Task
    batch: Sequence[str]
    inputs: Mapping[str, PromptInput | EncodedItem]
    seed: int


@dataclass(frozen=True)
class WrittenTexts:
    """What came of a request.

    Args:
        rows: the texts by key; those not tried because the engine gave up are not among them.
        stop: why no further request is worth trying.
        cause: the exception behind one of the failures, of a library in this process.
    """

    request: TextRequest
    rows: dict[str, StoredText]
    stop: EngineUnavailable | None = None
    cause: Exception | None = None

    def __reduce__(self) -> tuple[object, ...]:
        """Without the inputs, which whoever asked has, and without the cause, which may refer to anything."""
        return _arrived, (self.request.task, self.request.batch, self.request.seed, self.rows, self.stop)


def _arrived(
    task: Task, batch: Sequence[str], seed: int, rows: dict[str, StoredText], stop: EngineUnavailable | None
) -> WrittenTexts:
    return WrittenTexts(TextRequest(task, batch, {}, seed), rows, stop)


def write_texts(engine: Engine, request: TextRequest) -> WrittenTexts:
    """Have an engine write; a suspect text is tried once more, sampled and with more room."""
    answers = _ask(engine, request, list(request.inputs), again=False)
    stop = next((answer for answer in answers.values() if isinstance(answer, EngineUnavailable)), None)
    doubtful = [
        key for key, answer in answers.items() if isinstance(answer, Text) and assess(answer.text, answer.ended) != OK
    ]
    second = _ask(engine, request, doubtful, again=True) if stop is None else {}
    stop = stop or next((answer for answer in second.values() if isinstance(answer, EngineUnavailable)), None)
    rows: dict[str, StoredText] = {}
    cause: Exception | None = None
    for key, answer in answers.items():
        if isinstance(answer, Text) and not (stop and key in doubtful):
            retried = second.get(key)
            if isinstance(retried, Text) and assess(retried.text, retried.ended) == OK:
                answer = retried
            rows[key] = StoredText(answer.text, assess(answer.text, answer.ended))
        elif isinstance(answer, Failure) and not stop:
            rows[key] = StoredText("", failed(answer.reason))
            cause = answer.cause or cause
    return WrittenTexts(request, rows, stop, cause)


def _ask(engine: Engine, request: TextRequest, keys: Sequence[str], again: bool) -> dict[str, Answer]:
    """The engine's answers by key. On an error the inputs are halved until the one at fault stands alone."""
    if not keys:
        return {}
    seeds = [int(digest(request.seed, key)[:12], 16) + again for key in keys]
    try:
        given = [request.inputs[key] for key in keys]
        inputs = [each.decoded() if isinstance(each, EncodedItem) else each for each in given]
        answers = engine.generate(request.task, inputs, seeds, again)
    except EngineUnavailable as error:
        return {keys[0]: error}
    except Exception as error:  # whatever the libraries of an engine raise for an input
        if len(keys) == 1:
            return {keys[0]: Failure.of(error)}
        half = len(keys) // 2
        return {
            key: answer
            for part in (keys[:half], keys[half:])
            for key, answer in _ask(engine, request, part, again).items()
        }
    return dict(zip(keys, answers, strict=True))
