"""What a text engine is: inputs of a prompt in, texts out, in the order of the input.

``transformers`` runs a (multimodal) language model in this process, batched; ``openai`` asks a server; ``extractive``
and ``titles`` use no model at all. :func:`~mllm_msr.processing.engine_registry.build_engine` makes one from a recipe.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, get_args

from mllm_msr.modeling.inputs import Candidate, HistoryItem
from mllm_msr.processing.prompts import Task
from mllm_msr.records.storage import digest


@dataclass(frozen=True)
class Descriptions:
    """What the prompt ``fusion`` makes one description of."""

    title: str
    text_summary: str
    image_summary: str


@dataclass(frozen=True)
class HistoryBlock:
    """What the prompt ``preference`` condenses.

    Args:
        items: oldest first.
        previous: the preference before these items; None at the first step.
    """

    items: Sequence[HistoryItem]
    previous: str | None


# An item (its image a PIL image or None) for item_summary, text_summary and image_summary; Descriptions for fusion;
# a HistoryBlock for preference.
PromptInput = Candidate | Descriptions | HistoryBlock


@dataclass(frozen=True)
class Text:
    """A generated text, and whether it ended by itself rather than at the longest length."""

    text: str
    ended: bool


class EngineUnavailable(RuntimeError):
    """The engine is at fault and not an input: stop, keep the texts so far, and say what to do."""


class NoTextOfUse(EngineUnavailable):
    """All that the engine has written is empty or refuses: it, or all inputs, are at fault."""


# Failures of one input that have a name of their own; any other is called by its type.
_REASONS = {UnicodeError: "encoding", TimeoutError: "timeout", ConnectionError: "connection", MemoryError: "memory"}


@dataclass(frozen=True)
class Failure:
    """Why one input has no text.

    Args:
        reason: one word, such as ``http-400`` or ``timeout``. It is stored and published, so it is never what a server
            or an exception said, which may quote an address, a key or an input.
        cause: the exception of a library in this process, for a traceback on demand.
    """

    reason: str
    cause: Exception | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """From an exception, by its type alone."""
        named = (reason for kind, reason in _REASONS.items() if isinstance(error, kind))
        return cls(next(named, type(error).__name__), error)


# For each input its text, or why it has none. EngineUnavailable means that further inputs are not worth trying, while
# the texts beside it count.
Answer = Text | Failure | EngineUnavailable


class Author(Protocol):
    """Who writes, as far as the keys of texts depend on it."""

    @property
    def generator(self) -> str:
        """Who writes: a model's name."""
        ...

    @property
    def revision(self) -> str:
        """Which version of it."""
        ...

    @property
    def batch_size(self) -> int:
        """How many inputs one ``generate`` should be given."""
        ...

    def prompt_hash(self, task: Task) -> str:
        """Changes whenever the prompt of ``task`` does."""
        ...

    def settings(self, task: Task) -> str:
        """Changes whenever anything else does that the texts of ``task`` depend on."""
        ...


class Engine(Author, Protocol):
    """What the summaries need of whatever writes them."""

    def generate(
        self, task: Task, inputs: Sequence[Any], seeds: Sequence[int] | None = None, again: bool = False
    ) -> list[Answer]:
        """An answer for each input.

        Args:
            inputs: of the type that the prompt of ``task`` takes, see :data:`PromptInput`.
            seeds: one for each input. A sampled text depends on its own seed and not on the rest of its batch.
            again: the first answer was no good; sample another, and give it more room.

        Raises:
            EngineUnavailable: no input can be served, whatever it is.
            Exception: no input of this batch can be served; fewer of them, or others, may well be.
        """
        ...


def load(engine: Engine) -> None:
    """Load now what an engine computes with in this process, if anything; else its first text does.

    Raises:
        EngineUnavailable: it cannot be loaded.
    """
    getattr(engine, "model", None)


@dataclass(frozen=True)
class AbsentAuthor:
    """An engine as it is known where it is not: only its workers need what it imports and loads.

    Args:
        hashes: by task, of its prompt and of its settings.
    """

    generator: str
    revision: str
    batch_size: int
    hashes: Mapping[Task, tuple[str, str]]

    @classmethod
    def of(cls, engine: Engine) -> "AbsentAuthor":
        tasks: tuple[Task, ...] = get_args(Task)
        hashes = {task: (engine.prompt_hash(task), engine.settings(task)) for task in tasks}
        return cls(engine.generator, engine.revision, engine.batch_size, hashes)

    def prompt_hash(self, task: Task) -> str:
        return self.hashes[task][0]

    def settings(self, task: Task) -> str:
        return self.hashes[task][1]


def prompt_digest(prompt: str, noun: str, *more: Any) -> str:
    """The hash of a prompt template; ``noun`` counts if the template prints it."""
    return digest(prompt, noun if "noun" in prompt else "", *more)
