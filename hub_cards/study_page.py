"""A study's results, and its table and chart."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mllm_msr.evaluation.metrics import metric_label
from mllm_msr.hub_cards.charts import Interval, interval_chart, standalone
from mllm_msr.hub_cards.view import Cell, Row, TableView, difference_cells, estimate_cell, variant_of
from mllm_msr.records.public import public_text
from mllm_msr.records.results import Difference, Estimate
from mllm_msr.records.sections import OURS
from mllm_msr.records.storage import write_text

METRICS_SHOWN = ("auc", "hr@5", "ndcg@5")


@dataclass(frozen=True)
class StudyFigure:
    """A metric of an entry.

    Args:
        estimate: over the users of all folds, averaged over seeds.
        seed_deviation: standard deviation of the metric over seeds; None for one seed.
        difference: from the first entry, paired by user; None for that itself, and where the users are others.
    """

    estimate: Estimate
    seed_deviation: float | None = None
    difference: Difference | None = None


@dataclass(frozen=True)
class StudyEntry:
    """One variant of one cell of a study.

    Args:
        cell, variant: their names.
        runs, users: how many it rests on.
        same_candidates: whether the first entry ranked the same; if not, a difference is as fair but less exact.
        metrics: by metric.
        train_seconds: what training took in each run where that is known.
    """

    cell: str
    variant: str
    runs: int
    users: int
    same_candidates: bool
    metrics: Mapping[str, StudyFigure]
    train_seconds: tuple[float, ...] = ()

    @property
    def label(self) -> str:
        """The cell's name; with the variant's, where that is not ours."""
        cell = public_text(self.cell)
        return cell if self.variant == OURS else f"{cell}: {variant_of(self.variant).label}"


@dataclass(frozen=True)
class StudyResults:
    """All entries of a study, the first being what the others are compared with, and what failed."""

    study: str
    entries: tuple[StudyEntry, ...]
    failures: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The content of ``study.json``; what is None is left out."""

        def figure(one: StudyFigure) -> dict[str, Any]:
            content: dict[str, Any] = {**one.estimate.to_json(), "seed_std": one.seed_deviation}
            return content | ({"against_first": one.difference.to_json()} if one.difference else {})

        entries = [
            {**vars(entry), "metrics": {name: figure(one) for name, one in entry.metrics.items()}}
            for entry in self.entries
        ]
        return {"study": self.study, "entries": entries, "failures": list(self.failures)}


def write_study(folder: Path, study: StudyResults) -> str:
    """Write ``study.json``, ``study.md`` and ``study.svg``; returns the Markdown."""
    page = study_page(study)
    write_text(folder / "study.json", json.dumps(study.to_json(), indent=2))
    write_text(folder / "study.md", page + "\n")
    write_text(folder / "study.svg", standalone(study_chart(study)))
    return page


def study_page(study: StudyResults) -> str:
    """Every entry's figures and its difference from the first, in percent and points."""
    rows = []
    for entry in study.entries:
        cells = []
        for name in METRICS_SHOWN:
            figure = entry.metrics[name]
            deviation = f" ±{100 * figure.seed_deviation:.1f}" if figure.seed_deviation is not None else ""
            value = estimate_cell(figure.estimate)
            cells += [Cell(value.text + deviation, value.interval), *difference_cells(figure.difference)]
        seconds = entry.train_seconds
        cells.append(Cell(f"{sum(seconds) / len(seconds):.0f} s" if seconds else ""))
        rows.append(Row(entry.label + ("" if entry.same_candidates else " (other candidates)"), tuple(cells)))
    head = [head for name in METRICS_SHOWN for head in (metric_label(name), "against the first", "p")]
    parts = [
        f"# {study.study}",
        f"Percent and points, {study.entries[0].users:,} users; ± is the standard deviation over seeds; 95% intervals "
        "by bootstrap over users; differences paired by user (none where the users differ); p is two-sided and not "
        "corrected.",
        TableView(("", *head, "trained for"), tuple(rows)).to_markdown(),
    ]
    if verdicts := [verdict for entry in study.entries[1:] if (verdict := _verdict(entry))]:
        parts.append("Beside the first:\n\n" + "\n".join(verdicts))
    if study.failures:
        parts.append("Failed: " + "; ".join(study.failures) + ".")
    return "\n\n".join(parts)


def _verdict(entry: StudyEntry) -> str | None:
    """Whether the entry differs from the first, by the interval of the AUC's difference."""
    difference = entry.metrics["auc"].difference
    if difference is None:
        return None
    gap = f"{abs(100 * difference.value):.1f} points of AUC"
    if not difference.significant:
        return f"- {entry.label}: these users cannot tell it from the first ({gap})"
    return f"- {entry.label}: {gap} {'below' if difference.high < 0 else 'above'}"


def study_chart(study: StudyResults) -> Markup:
    """The AUC of every entry with its interval."""
    rows = [
        Interval.in_percent(entry.label, "kind-other" if place else "kind-chosen", entry.metrics["auc"].estimate)
        for place, entry in enumerate(study.entries)
    ]
    return interval_chart(
        rows, title=study.study, description="; ".join(map(str, rows)), x_label="AUC, percent", chance=50.0
    )
