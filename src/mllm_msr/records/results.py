"""What an evaluation returns, and what ``metrics.json`` holds: figures with their intervals, by variant and metric."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
        return cls(content["difference"], *content["ci95"], content["p"])


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
    """Users and mean candidates of the ranking over the full catalogue, and each variant's figures."""

    n_users: int
    n_candidates: float
    variants: dict[str, CatalogueFigures]


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
class Results:
    """All of a run's results.

    Args:
        dataset, protocol, split, n_users, n_candidates, seed, candidate_hash: what was ranked.
        variants: metrics of every variant of the results table, in the order evaluated.
        against: our answer's differences from every other variant.
        slices, checks, calibration, full_catalogue, agreement: further evidence, where it was computed.
        model_of: what the model was trained on, if on other data.
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
    slices: list[Slice] = field(default_factory=list)
    checks: dict[str, Check] = field(default_factory=dict)
    calibration: Calibration | None = None
    full_catalogue: FullCatalogue | None = None
    agreement: Agreement | None = None
    model_of: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The content of ``metrics.json``; what was not computed is left out."""
        content = {name: _plain(value) for name, value in vars(self).items() if value is not None}
        return {"rows" if name == "variants" else name: value for name, value in content.items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Results":
        """Read what :meth:`to_json` made; KeyError names a missing entry."""
        known = {name: content[name] for name in _FACTS} | {"model_of": content.get("model_of")}
        calibration, catalogue, agreement = (
            content.get(name) for name in ("calibration", "full_catalogue", "agreement")
        )
        return cls(
            **known,
            variants=_by_variant(content["rows"]),
            against={
                variant: {name: Difference.from_json(one) for name, one in metrics.items()}
                for variant, metrics in content.get("against", {}).items()
            },
            slices=[
                Slice(one["by"], one["part"], one["users"], _by_variant(one["rows"]))
                for one in content.get("slices", [])
            ],
            checks={variant: Check(**one) for variant, one in content.get("checks", {}).items()},
            calibration=calibration
            and Calibration(
                _reliability(calibration["as_trained"]),
                _reliability(calibration["prior_corrected"]),
                calibration["shift"],
            ),
            full_catalogue=catalogue
            and FullCatalogue(
                catalogue["n_users"],
                catalogue["n_candidates"],
                {
                    variant: CatalogueFigures(_metrics(one["sampled"]), _metrics(one["full"]))
                    for variant, one in catalogue["rows"].items()
                },
            ),
            agreement=agreement
            and Agreement(
                agreement["n_users"],
                agreement["way"],
                {way: AgreementFigures(**one) for way, one in agreement["others"].items()},
            ),
        )

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


_FACTS = ("dataset", "protocol", "split", "n_users", "n_candidates", "seed", "candidate_hash")


def _metrics(content: Mapping[str, Any]) -> Metrics:
    return {name: Estimate.from_json(one) for name, one in content.items()}


def _by_variant(content: Mapping[str, Any]) -> ByVariant:
    return {variant: _metrics(metrics) for variant, metrics in content.items()}


def _reliability(content: Mapping[str, Any]) -> Reliability:
    return Reliability([ReliabilityBin(**one) for one in content["bins"]], content["error"])


def _plain(value: Any) -> Any:
    """Dataclasses as JSON: a table's variants are its rows, and what is None is left out."""
    if isinstance(value, Estimate | Difference):
        return value.to_json()
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if hasattr(value, "__dataclass_fields__"):
        plain = {name: _plain(one) for name, one in vars(value).items() if one is not None}
        return {"rows" if name == "variants" else name: one for name, one in plain.items()}
    return value
