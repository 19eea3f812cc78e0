"""The sections of a recipe, as types. Every value of a run is a field here, with its default and its meaning.

The section ``training`` alone is not one of them: its fields are the flags of ``training/sft.py``, which are TRL's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from math import inf
from typing import Any, Literal
from urllib.parse import urlsplit

from mllm_msr.records.typed import check_types

OnBadRows = Literal["error", "skip"]
DEFAULT_METRICS = ("auc", "auc_user", "hr@1", "hr@5", "hr@10", "mrr@5", "ndcg@5", "ndcg@10", "map")
OURS = "mllm_msr"  # the variant that is our model, trained
FusionMember = Literal[
    "sequence_head", "neighbour_identity", "identity_only", "content_only", "gru4rec", "sasrecf", "gru4recf", "likeness"
]
FUSED: list[FusionMember] = ["sequence_head", "identity_only", "content_only", "sasrecf", "gru4recf", "likeness"]
# which rank by item vectors
HEAD_VARIANTS = ("sequence_head", "fused", "neighbour_identity", "content_only", "identity_only", "likeness")
DEFAULT_VARIANTS = (
    *(OURS, "sequence_head", "fused", "sasrec"),
    *("popularity", "random", "text_only", "blank_images", "no_sft"),
)
MAX_PIXELS = 50_000_000  # about what a full-frame camera makes; more is a mistake or an attack
MAX_EDGE = 672  # LLaVA-NeXT's largest; finer detail never reaches a backbone of this kind


LARGEST_SEED = 2**32 - 1  # that NumPy takes


def at_least(section: Any, **least: float) -> None:
    """Raise ValueError for a number below its least, one that is none or infinite, or too large a seed; what is no
    number (None, "all") passes."""
    for name, smallest in least.items():
        value = getattr(section, name)
        if isinstance(value, int | float) and not smallest <= value < inf:
            raise ValueError(f"{name}={value}: must be at least {smallest}{', and finite' if value == inf else ''}")
        if name == "seed" and value > LARGEST_SEED:
            raise ValueError(f"seed={value}: must be at most {LARGEST_SEED}")


def need_server(name: str, url: str) -> None:
    """Raise ValueError for what is no address of a server, without showing it: it may have a password."""
    try:
        parts = urlsplit(url.strip())
        sound = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:  # a port that is none, brackets that do not close
        sound = False
    if not sound:
        raise ValueError(f"{name}: is no address of a server; write it as http(s)://HOST:PORT/v1")


@dataclass(frozen=True)
class Source:
    """Section ``source``: the name of a reader in ``data/sources``, and options that it knows and checks itself."""

    type: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PrepareOptions:
    """Section ``data``: cleaning, splitting and sampling. None means no limit."""

    on_bad_rows: OnBadRows = "error"
    # cleaning
    repeats: Literal["first", "last", "all"] = "first"  # which of a user's interactions with one item counts
    k_core_users: int = 5  # every user has at least so many interactions ...
    k_core_items: int = 5  # ... and every item
    missing_images: Literal["keep", "drop"] = "keep"  # items without title or image
    limit_users: int | None = None  # a seeded sample of users
    max_history: int | None = None  # a user's most recent interactions that count
    # protocol
    protocol: Literal["strict", "paper", "global-cutoff"] = "strict"
    negatives: Literal["uniform", "popularity", "all"] = "uniform"  # all: rank among all items; tasks have a sample
    n_negatives: int = 20  # a validation or test target
    n_train_negatives: int = 1  # a training target
    max_train_targets: int | None = 5  # a user's most recent; "paper" has one a user
    min_history: int = 1  # items before a target; 0 asks users of whom nothing is known as well
    folds: int = 10  # protocol "paper": 1/folds of the users are tested
    fold: int = 0  # which of them
    seed: int = 0
    # images
    max_image_pixels: int = MAX_PIXELS
    max_image_edge: int = MAX_EDGE

    def __post_init__(self) -> None:
        check_types(self, "data")
        at_least(self, seed=0, min_history=0, k_core_users=0, k_core_items=0, fold=0, folds=3)
        at_least(self, limit_users=1, max_history=1, n_negatives=1, n_train_negatives=1, max_train_targets=1)
        at_least(self, max_image_pixels=1, max_image_edge=1)
        if self.fold >= self.folds:
            raise ValueError(f"fold={self.fold}: there are {self.folds} folds, counted from 0")
        if (self.folds, self.fold) != (10, 0) and self.protocol != "paper":
            raise ValueError(f"folds={self.folds}, fold={self.fold}: only protocol='paper' splits by user")


# Fields of SummaryOptions by means of which texts are written, and on which none depends.
MEANS = {"batch_size", "token_budget", "device_map", "attn_implementation", "cache", "decoding"}
MEANS |= {"user_model", "user_revision"}  # which are the model and revision of for_users
MEANS |= {"base_url", "concurrency", "requests_per_minute", "timeout", "tries"}


@dataclass(frozen=True)
class SummaryOptions:
    """Section ``summaries``: who writes item summaries and preferences, and how."""

    # None: transformers where a model is named, else extractive
    engine: Literal["transformers", "vllm", "openai", "extractive", "titles"] | None = None
    model: str = ""  # Hub id or folder; for a server, the name it goes by there
    revision: str | None = None  # of a Hub model; for a server, any name: texts of another are made anew
    user_model: str | None = None  # writes preferences, if that is another model
    user_revision: str | None = None
    # the question
    item_prompts: Literal["single", "paper"] = "single"  # one prompt an item, or image, text and their fusion apart
    images: bool = True  # False: the ablation without images
    recurrent: bool = True  # False: the ablation with the whole history in one prompt
    block_size: int = 3  # items of a history block
    max_length: int | None = None  # tokens of a prompt; longer ones lose text, of the history first (transformers)
    # the answer
    max_new_tokens: dict[str, int] = field(default_factory=dict)  # by prompt, over processing.prompts.MAX_NEW_TOKENS
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    seed: int = 0
    dtype: str = "auto"
    quantization_config: dict[str, Any] | None = None
    # the means
    batch_size: int = 16  # inputs at a time, and texts saved at a time
    token_budget: int | None = None  # tokens of a batch, padding and answers included: larger ones are divided
    device_map: Any = None
    attn_implementation: str | None = None
    decoding: Literal["dropping", "static", "continuous"] = "dropping"  # of greedy texts (transformers; summaries.md)
    base_url: str | list[str] | None = None  # OpenAI-compatible servers of one model; the key: OPENAI_API_KEY
    concurrency: int = 8  # requests in flight
    requests_per_minute: float | None = None
    timeout: float = 120.0  # seconds
    tries: int = 5
    cache: str | None = None  # folder of all texts by content, to be shared by runs (default: the run's own)

    def __post_init__(self) -> None:
        check_types(self, "summaries")
        if self.engine is None:
            object.__setattr__(self, "engine", "transformers" if self.model else "extractive")
        if not self.model and self.engine not in ("extractive", "titles"):
            raise ValueError(f"model: name the model of the {self.engine} engine")
        at_least(self, block_size=1, batch_size=1, concurrency=1, tries=1, max_length=1, token_budget=1)
        at_least(self, seed=0, temperature=0, timeout=0.001, requests_per_minute=0.001)
        for url in [self.base_url] if isinstance(self.base_url, str) and self.base_url else self.base_url or ():
            need_server("base_url", url)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0 and at most 1")
        for name, tokens in self.max_new_tokens.items():
            if tokens < 1:
                raise ValueError(f"max_new_tokens: {name}={tokens} must be at least 1")

    def for_users(self) -> "SummaryOptions":
        """The same for preferences, whose model may be another."""
        if not self.user_model:
            return self
        return replace(self, model=self.user_model, revision=self.user_revision, user_model=None, user_revision=None)

    def facts(self) -> dict[str, Any]:
        """All that a text depends on."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in MEANS}


VECTOR_ORIGINS = ("file", "column", "model")  # where the vectors of items come from: one of these, or the backbone


@dataclass(frozen=True)
class VectorOptions:
    """Section ``vectors``: what the vectors of items are made of, and by which model; or where one's own are."""

    file: str | None = None  # Parquet, CSV or npz with item_id and vector, in place of a model
    column: str | None = None  # of the items table (own tables), in place of a model: lists, or texts as "[0.1, 0.2]"
    model: str | None = None  # Hub id or folder; None: the backbone that is trained
    revision: str | None = None
    engine: Literal["transformers", "sentence-transformers"] = "transformers"  # what reads the model
    summaries: bool = True  # read the item summaries of a model, after the item's own text
    images: bool = True
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None  # of the model; None: as training has it
    # the means
    token_budget: int | None = None  # tokens of one forward; None: 1,024 on a CPU, 8,192 elsewhere
    batch_size: int = 512  # items that are decoded, and saved, at a time

    def __post_init__(self) -> None:
        check_types(self, "vectors")
        at_least(self, token_budget=1, batch_size=1)
        if len(given := [name for name in VECTOR_ORIGINS if getattr(self, name)]) > 1:
            raise ValueError(f"vectors: {' and '.join(given)} are given; name one of {', '.join(VECTOR_ORIGINS)}")

    @property
    def own(self) -> bool:
        """Whether vectors are read, and not computed."""
        return bool(self.file or self.column)

    def facts(self) -> dict[str, Any]:
        """All that a vector depends on."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in MEANS}


@dataclass(frozen=True)
class HeadOptions:
    """Section ``head``: the sequence head over item vectors, as ``modeling/sequence_head_options.py`` describes it."""

    enabled: bool = True
    encoder: Literal["transformer", "gru", "both"] = "transformer"
    hidden: int = 64
    layers: int = 2
    heads: int = 2
    dropout: float = 0.3
    identity_dropout: float = 0.3
    gate: bool = False
    unit_items: bool = False
    max_length: int = 100
    # training
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    average: float = 0.99
    most_classes: int = 2048
    max_epochs: int = 100
    patience: int = 5
    stop_by: Literal["candidates", "catalogue"] = "candidates"
    seed: int = 0
    # fusion
    members: list[FusionMember] = field(default_factory=lambda: list(FUSED))  # of the fused score
    fusion_tasks: int = 4000  # validation tasks on which weights are fitted, at most
    hidden_share: float = 0.1  # of trained items, taken as never chosen while weights are fitted
    answer: bool = True  # the trained model's answer is a member of the fused score, if the recipe trains one
    answer_tasks: int = 400  # validation tasks on which its weight is fitted, at most; of 41 pairs each

    def __post_init__(self) -> None:
        check_types(self, "head")
        at_least(self, hidden=1, layers=1, heads=1, max_length=1, batch_size=1, most_classes=1)
        at_least(self, max_epochs=0, patience=1, seed=0, fusion_tasks=1, answer_tasks=1)
        at_least(self, learning_rate=0, weight_decay=0)
        if not self.members or len(set(self.members)) < len(self.members):
            raise ValueError(f"members={self.members}: name at least one, and each once")
        for name in ("dropout", "identity_dropout", "average", "hidden_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 0 and below 1")
        if self.hidden % self.heads:
            raise ValueError(f"hidden={self.hidden} is no multiple of heads={self.heads}")


@dataclass(frozen=True)
class EvaluationOptions:
    """Section ``evaluation``: which variants are scored on which tasks."""

    split: Literal["validation", "test"] = "test"
    rows: list[str] = field(default_factory=lambda: list(DEFAULT_VARIANTS))  # names in evaluation.variants
    seed: int = 0
    token_budget: int = 8192  # tokens of one forward
    cache_dtype: Literal["int8"] | None = None  # of what a late model keeps of items; None: as it is computed
    served: str | None = None  # address of a vLLM or SGLang server that has the trained model's backbone; text only
    # these decide what is measured and leave scores as they are
    metrics: list[str] = field(default_factory=lambda: list(DEFAULT_METRICS))  # names in evaluation.metrics
    full_catalogue: int | Literal["all"] | None = None  # users ranked among all items as well
    full_catalogue_pairs: int = 500_000  # that our model scores for it at most; baselines score any number
    rerank: int = 100  # best items of each user among all for which `fused` asks the answer, within these pairs
    agreement: int | None = None  # tasks on which ways of computing are compared
    model_of: str | None = None  # what the report says of a model that was trained on other data

    def __post_init__(self) -> None:
        check_types(self, "evaluation")
        at_least(self, seed=0, token_budget=1, full_catalogue=1, full_catalogue_pairs=1, agreement=1, rerank=0)
        if self.full_catalogue != "all":
            at_least(self, full_catalogue=1)
        if self.served is not None:
            need_server("served", self.served)
        if not self.metrics or not self.rows:
            raise ValueError("metrics and rows: name at least one of each")

    def facts(self) -> dict[str, Any]:
        """All that a score depends on."""
        further: dict[str, Any] = {"served": True} if self.served else {}
        if self.cache_dtype:
            further["cache_dtype"] = self.cache_dtype
        return {name: getattr(self, name) for name in ("split", "seed", "token_budget")} | further
