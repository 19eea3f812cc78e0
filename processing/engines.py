"""Text engines: prompt variables in, texts out, in the order of the input.

``transformers`` runs a (multimodal) language model in this process, batched; ``openai`` asks a server; ``extractive``
and ``titles`` use no model at all. An engine is whatever offers what :class:`Engine` names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Protocol

from mllm_msr.processing.prompts import PROMPTS
from mllm_msr.records.recipe import backbone_path
from mllm_msr.records.storage import digest

Task = Literal["item_summary", "text_summary", "image_summary", "fusion", "preference"]
MAX_NEW_TOKENS = {  # the paper's two descriptions of an item get equal room, so that text does not drown the picture
    "item_summary": 96,
    "text_summary": 80,
    "image_summary": 80,
    "fusion": 96,
    "preference": 256,
}


class EngineUnavailable(RuntimeError):
    """Not one input is at fault but the engine: stop, keep what there is, and say what to do."""


@dataclass(frozen=True)
class Text:
    """A generated text, and whether it ended by itself rather than at the longest length."""

    text: str
    ended: bool


class Engine(Protocol):
    """What the summaries need of whatever writes them."""

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

    def generate(
        self, task: Task, inputs: Sequence[Mapping[str, Any]], seeds: Sequence[int] | None = None, again: bool = False
    ) -> list[Text | Exception]:
        """A text for each input, or why this one has none.

        Args:
            inputs: the variables of the prompt: ``title``, ``text``, ``image`` (PIL or None) for item_summary, some of
                them for text_summary and image_summary; ``title``, ``text_summary``, ``image_summary`` for fusion;
                ``items`` (each ``title``, ``summary``) and ``previous`` (text or None) for preference.
            seeds: one an input: where texts are sampled, a text depends on its own seed and not on its company.
            again: the first answer was no good; sample another, and give it more room.

        Raises an error if no input can be served; :class:`EngineUnavailable` means that trying others is no use either.
        """
        ...


def prompt_digest(prompt: str, noun: str, *more: Any) -> str:
    """The hash of a prompt template; ``noun`` counts if the template prints it."""
    return digest(prompt, noun if "noun" in prompt else "", *more)


@dataclass(frozen=True)
class SummaryOptions:
    """The ``summaries`` section of a recipe."""

    engine: Literal["transformers", "openai", "extractive", "titles"] = "transformers"
    model: str = ""  # Hub id or folder; for a server, the name it goes by there
    revision: str | None = None  # of a Hub model; for a server, any name: texts of another are made anew
    # what is asked
    item_prompts: Literal["single", "paper"] = "single"  # one prompt an item, or image, text and their fusion apart
    images: bool = True  # False: the ablation without pictures
    recurrent: bool = True  # False: the ablation with the whole history in one prompt
    block_size: int = 3
    max_length: int | None = None  # tokens of a prompt; longer ones lose text, of the history first (transformers)
    # how it is answered
    max_new_tokens: dict[str, int] = field(default_factory=dict)  # by prompt, over MAX_NEW_TOKENS
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    seed: int = 0
    dtype: str = "auto"
    quantization_config: dict[str, Any] | None = None
    # by what means: no text depends on these
    batch_size: int = 16  # inputs at a time, and texts saved at a time
    token_budget: int | None = None  # tokens of a batch, padding and answers included: larger ones are divided
    device_map: Any = None
    attn_implementation: str | None = None
    base_url: str | None = None  # of an OpenAI-compatible server; the key is in the environment, OPENAI_API_KEY
    concurrency: int = 8  # requests in flight
    requests_per_minute: float | None = None
    timeout: float = 120.0  # seconds
    tries: int = 5
    cache: str | None = None  # folder of all texts by content, to be shared by runs (default: the run's own)

    def __post_init__(self) -> None:
        for name, known in (
            ("engine", ("transformers", "openai", "extractive", "titles")),
            ("item_prompts", ("single", "paper")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"summaries.{name}: {getattr(self, name)!r} is none of {', '.join(known)}")
        if not self.model and self.engine not in ("extractive", "titles"):
            raise ValueError(f"summaries.model: name the model of the {self.engine} engine")
        for name in ("block_size", "batch_size", "concurrency", "tries"):
            if getattr(self, name) < 1:
                raise ValueError(f"summaries.{name}: {getattr(self, name)} must be at least 1")
        if unknown := self.max_new_tokens.keys() - MAX_NEW_TOKENS.keys():
            raise ValueError(f"summaries.max_new_tokens: unknown {sorted(unknown)}; known are {sorted(MAX_NEW_TOKENS)}")

    @classmethod
    def from_recipe(cls, section: Mapping[str, Any]) -> "SummaryOptions":
        """Raises ``ValueError`` that names an unknown key."""
        known = {one.name for one in fields(cls)}
        if unknown := section.keys() - known:
            raise ValueError(f"summaries: unknown keys {sorted(unknown)}; known are {sorted(known)}")
        return cls(**section)

    def facts(self) -> dict[str, Any]:
        """All that a text depends on."""
        means = [one.name for one in fields(self)]
        means = means[means.index("batch_size") :]
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name not in means}


def build_engine(options: SummaryOptions, prompts: Mapping[str, str] | None = None, noun: str = "item") -> Engine:
    """The engine of a recipe. Nothing is loaded before the first text is wanted."""
    limits = MAX_NEW_TOKENS | options.max_new_tokens
    if options.engine in ("extractive", "titles"):
        from mllm_msr.processing.engine_extractive import ExtractiveEngine, TitlesEngine

        return ExtractiveEngine() if options.engine == "extractive" else TitlesEngine()
    if options.engine == "openai":
        from mllm_msr.processing.engine_openai import OpenAIEngine

        asked = ("revision", "temperature", "top_p", "concurrency", "requests_per_minute", "timeout", "tries")
        return OpenAIEngine(
            options.model,
            {**PROMPTS, **(prompts or {})},
            noun,
            base_url=options.base_url,
            max_new_tokens=limits,
            batch_size=max(options.batch_size, options.concurrency),
            **{each: getattr(options, each) for each in asked},
        )
    from mllm_msr.processing.engine_transformers import TransformersEngine
    from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor

    name = backbone_path(options.model)
    processor = MllmMsrProcessor.from_backbone(
        name, revision=options.revision, prompts=dict(prompts or {}), item_noun=noun, max_length=options.max_length
    )
    passed = ("device_map", "attn_implementation", "quantization_config")
    return TransformersEngine(
        name,
        processor,
        label=Path(name).name if Path(options.model).is_dir() else options.model,  # no path of this machine
        max_new_tokens=limits,
        **{
            each: getattr(options, each)
            for each in ("revision", "dtype", "batch_size", "token_budget", "temperature", "top_p")
        },
        **{each: getattr(options, each) for each in passed if getattr(options, each) is not None},
    )
