"""What an evaluation returns, and what ``metrics.json`` holds: figures with their intervals, by variant and metric."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from mllm_msr.records.storage import write_text


@dataclass(frozen=True)
class Estimate:
    """A metric and its 95 % interval, all as fractions (0.81, not 81 %)."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "ci95": [self.low, self.high]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Estimate":
        return cls(content["value"], *content["ci95"])


@dataclass(frozen=True)
class Difference:
    """One variant's metric less another's, paired by user: 95 % interval and two-sided p, not corrected."""

    value: float
    low: float
    high: float
    p: float

    @property
    def significant(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0

    def to_json(self) -> dict[str, Any]:
        return {"difference": self.value, "ci95": [self.low, self.high], "p": self.p}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Difference":
        low, high = content["ci95"]
        return cls(content["difference"], low, high, content["p"])


Metrics = dict[str, Estimate]  # by the names in evaluation.metrics.METRICS
ByVariant = dict[str, Metrics]


@dataclass(frozen=True)
class Slice:
    """The metrics of a part of the users: ``by`` names the division, ``part`` the band, such as "5-19"."""

    by: str
    part: str
    users: int
    variants: ByVariant


@dataclass(frozen=True)
class Check:
    """``tied_users``: share of users whose choice ties with another candidate; ``popularity_correlation``: mean
    Spearman correlation of scores and training counts, None where it is undefined."""

    tied_users: float
    popularity_correlation: float | None = None


@dataclass(frozen=True)
class ReliabilityBin:
    """Mean predicted probability, share of choices, and number of pairs of one bin."""

    mean: float
    chosen: float
    count: int


@dataclass(frozen=True)
class Reliability:
    """A reliability curve and its expected calibration error."""

    bins: list[ReliabilityBin]
    error: float


@dataclass(frozen=True)
class Calibration:
    """Reliability as trained, and with ``shift`` added to the logits for another share of positives."""

    as_trained: Reliability
    prior_corrected: Reliability
    shift: float


@dataclass(frozen=True)
class CatalogueFigures:
    """The same users' metrics among sampled candidates and among the full catalogue."""

    sampled: Metrics
    full: Metrics


@dataclass(frozen=True)
class FullCatalogue:
    """Users and mean candidates of the ranking over the full catalogue, and each variant's figures.

    ``against_sasrec``: every other variant's differences from SASRec among all items.
    ``reranked``: of how many of each user's best items the variant ``fused`` has asked the answer.
    """

    n_users: int
    n_candidates: float
    variants: dict[str, CatalogueFigures]
    against_sasrec: dict[str, dict[str, Difference]] = field(default_factory=dict)
    reranked: int = 0


@dataclass(frozen=True)
class ColdItems:
    """Chosen items against others of the same user, by whether anybody chose them in training.

    Args:
        among_all: whether the others are all items, and not the sampled candidates.
        cold_targets, trained_targets: users whose chosen item has no training interaction, or at least five.
        variants: "cold_trained", for one, is how often a cold target stands above a trained negative; those that no
            user has are left out.
    """

    among_all: bool
    cold_targets: int
    trained_targets: int
    variants: ByVariant


@dataclass(frozen=True)
class AgreementFigures:
    """``max_difference`` of two logits of one pair; ``rank_correlation`` within users, None where undefined;
    ``first_changed``: share of users with another candidate first."""

    max_difference: float
    first_changed: float
    rank_correlation: float | None = None


@dataclass(frozen=True)
class Agreement:
    """Other ways of computing the same scores beside the evaluated one, ``way``."""

    n_users: int
    way: str
    others: dict[str, AgreementFigures]


@dataclass(frozen=True)
class FusionWeights:
    """What the variant ``fused`` gives each member's standardised score, and what it adds, by the bucket of training
    frequency of the ranked item."""

    members: list[str]
    weights: dict[str, list[float]]
    bias: dict[str, float]


@dataclass(frozen=True)
class Results:
    """All of a run's results.

    Args:
        dataset, protocol, split, n_users, n_candidates, seed, candidate_hash: what was ranked.
        variants: metrics of every variant of the results table, in the order evaluated.
        against: our answer's differences from every other variant.
        against_sasrec: every other variant's differences from SASRec.
        slices, checks, calibration, full_catalogue, cold_items, agreement: further evidence, where it was computed.
        fusion: the weights of the variant ``fused``; ``fusion_without_answer``: those where the answer is not asked.
        model_of: what the model was trained on, if on other data.
        notes: what of the data must be known to read the figures right, in sentences.
    """

    dataset: str
    protocol: str
    split: str
    n_users: int
    n_candidates: int
    seed: int
    candidate_hash: str
    variants: ByVariant
    against: dict[str, dict[str, Difference]] = field(default_factory=dict)
    against_sasrec: dict[str, dict[str, Difference]] = field(default_factory=dict)
    slices: list[Slice] = field(default_factory=list)
    checks: dict[str, Check] = field(default_factory=dict)
    calibration: Calibration | None = None
    full_catalogue: FullCatalogue | None = None
    cold_items: ColdItems | None = None
    agreement: Agreement | None = None
    fusion: FusionWeights | None = None
    fusion_without_answer: FusionWeights | None = None
    model_of: str | None = None
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The content of ``metrics.json``; what was not computed is left out."""
        return _plain(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Results":
        """Read what :meth:`to_json` made; KeyError names a missing entry."""
        return _typed(cls, content)

    def write(self, path: Path) -> None:
        """Write ``metrics.json``, whole or not at all."""
        write_text(path, json.dumps(self.to_json(), indent=2))

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read ``metrics.json``; ValueError if it is not one that this version writes."""
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a results file of this version ({error}): evaluate the run again"
            ) from error


def _entry(name: str) -> str:
    """The name of a field in the file, where the variants of a table are its rows."""
    return "rows" if name == "variants" else name


def _plain(value: Any) -> Any:
    """A value of the types above as JSON."""
    if isinstance(value, Estimate | Difference):
        return value.to_json()
    if is_dataclass(value):
        return {_entry(name): _plain(entry) for name, entry in vars(value).items() if entry is not None}
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list) else value


def _typed(hint: Any, content: Any) -> Any:
    """A value of the type ``hint`` from JSON."""
    if hint in (Estimate, Difference):
        return hint.from_json(content)
    if isinstance(hint, type) and is_dataclass(hint):
        hints = get_type_hints(hint)
        needed = {each.name for each in fields(hint) if each.default is each.default_factory is MISSING}
        names = [name for name in hints if name in needed or _entry(name) in content]
        return hint(**{name: _typed(hints[name], content[_entry(name)]) for name in names})
    kinds = get_args(hint)
    if get_origin(hint) is dict:
        return {name: _typed(kinds[1], entry) for name, entry in content.items()}
    if get_origin(hint) is list:
        return [_typed(kinds[0], entry) for entry in content]
    return _typed(kinds[0], content) if type(None) in kinds else content
