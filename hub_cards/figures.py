"""Charts of a run: its metrics, its scores, and the loss while it was trained."""

from collections.abc import Sequence

import numpy as np
import polars as pl
from markupsafe import Markup

from mllm_msr.evaluation.metrics import metric_label
from mllm_msr.evaluation.places import hit_curve
from mllm_msr.evaluation.variants import Variant
from mllm_msr.hub_cards.charts import Interval, Line, interval_chart, line_chart
from mllm_msr.hub_cards.facts import LossPoint
from mllm_msr.hub_cards.view import DIVISIONS, SLICED, in_order, percent, variant_of
from mllm_msr.records.results import Results, Slice
from mllm_msr.records.sections import OURS

CURVES = (OURS, "blank_images", "no_sft", "sasrec", "knn", "popularity", "random", "oracle")  # where all are too many
SLICED_CURVES = (OURS, "blank_images", "sasrec", "knn", "popularity")


def style(variant: Variant) -> str:
    """The CSS class of a variant's colour and dash, which the report makes from ``records.variants``."""
    return f"variant-{''.join(letter if letter.isalnum() else '-' for letter in variant.name)}"


def metrics_chart(results: Results) -> Markup | None:
    """The AUC of every variant with its interval."""
    rows = [
        Interval.in_percent(variant.label, style(variant), results.variants[variant.name]["auc"])
        for variant in in_order(results.variants)
        if "auc" in results.variants[variant.name]
    ]
    if not rows:
        return None
    return interval_chart(
        rows,
        title="AUC of every variant, with 95% intervals",
        description=f"AUC in percent, chance is 50: {'; '.join(map(str, rows))}.",
        x_label="AUC over all user-candidate pairs, percent",
        chance=50.0,
    )


def slice_charts(results: Results) -> list[Markup]:
    """How some variants do in each part of the users, for every division of them."""
    divided = {by: [part for part in results.slices if part.by == by] for by in DIVISIONS}
    charts = [_slice_chart(results, title, divided[by]) for by, title in DIVISIONS.items()]
    return [chart for chart in charts if chart]


def _slice_chart(results: Results, title: str, parts: Sequence[Slice]) -> Markup | None:
    lines = []
    for variant in in_order(results.variants.keys() & set(SLICED_CURVES)):
        points = [
            (place, 100 * part.variants[variant.name][SLICED].value)
            for place, part in enumerate(parts, start=1)
            if SLICED in part.variants.get(variant.name, {})
        ]
        if points:
            x, y = zip(*points, strict=True)
            lines.append(Line(variant.label, x, y, style(variant), dots=True))
    if len(parts) < 2 or not lines:
        return None
    names = [part.part for part in parts]
    values = "; ".join(f"{names[int(x) - 1]} {y:.0f}" for x, y in zip(lines[0].x, lines[0].y, strict=True))
    return line_chart(
        lines,
        title=f"{metric_label(SLICED)} by {title}",
        description=f"{lines[0].name}, percent: {values}.",
        x_label=title,
        y_label=f"{metric_label(SLICED)}, percent",
        x_range=(0.8, len(parts) + 0.2),
        y_range=(0, 1.05 * max(max(line.y) for line in lines) or 1),
        x_names=names,
    )


def reliability_chart(results: Results) -> Markup | None:
    """Whether a predicted probability is the share of chosen items."""
    if results.calibration is None:
        return None
    trained, corrected = results.calibration.as_trained, results.calibration.prior_corrected
    curves = {"share corrected": (corrected, "kind-chosen"), "as trained": (trained, "kind-other")}
    lines = [
        Line(name, [part.mean for part in curve.bins], [part.chosen for part in curve.bins], kind, dots=True)
        for name, (curve, kind) in curves.items()
    ]
    top = max(max(*line.x, *line.y) for line in lines)
    return line_chart(
        lines,
        title="Is a probability of Yes what it says?",
        description="Share of chosen items by predicted probability, in tenths of the pairs; the diagonal is perfect. "
        f"Mean distance from it, in points: as trained {percent(trained.error)}; share corrected "
        f"{percent(corrected.error)}. The correction makes up for training on another share of chosen items than is "
        "ranked here.",
        x_label="predicted probability",
        y_label="share of chosen items",
        x_range=(0, top),
        y_range=(0, top),
        diagonal=True,
    )


def score_charts(scores: pl.DataFrame) -> list[Markup]:
    """HR@k and ROC of the variants, and how our scores of chosen and other candidates are distributed."""
    if scores.is_empty():
        return []
    variants = in_order(scores["variant"].unique())
    if len(variants) > len(CURVES):
        variants = [variant for variant in variants if variant.name in CURVES] or variants
    hits, rocs = [], []
    for variant in variants:
        own = scores.filter(variant=variant.name)
        curve = hit_curve(own)
        hits.append(Line(variant.label, np.arange(1, len(curve) + 1), 100 * curve, style(variant)))
        rocs.append(Line(variant.label, *roc(own["label"].to_numpy(), own["logit"].to_numpy()), style(variant)))
    at_five = "; ".join(f"{line.name} {line.y[min(4, len(line.y) - 1)]:.0f}" for line in hits)
    ours = variant_of(OURS) if OURS in [variant.name for variant in variants] else variants[0]
    return [
        line_chart(
            hits,
            title="Is the chosen item among the first k?",
            description=f"Share of users by k. At k = 5, in percent: {at_five}.",
            x_label="k",
            y_label="HR@k, percent of users",
            x_range=(1, max(2, *(len(line.x) for line in hits))),
            y_range=(0, 100),
        ),
        line_chart(
            rocs,
            title="ROC over all pairs",
            description="True positive rate against false positive rate; the diagonal is chance.",
            x_label="share of other candidates accepted",
            y_label="share of chosen items accepted",
            x_range=(0, 1),
            y_range=(0, 1),
            diagonal=True,
        ),
        _histogram(scores.filter(variant=ours.name), ours.label),
    ]


def roc(labels: np.ndarray, logits: np.ndarray, points: int = 160) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates, (at most ``points``,) each; equal scores are passed in one step."""
    order = np.argsort(-logits, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(logits[order])), len(order) - 1)
    positives = np.cumsum(labels[order])[ends]
    negatives = ends + 1 - positives
    x = np.append(0.0, negatives / max(negatives[-1], 1))
    y = np.append(0.0, positives / max(positives[-1], 1))
    kept = np.unique(np.linspace(0, len(x) - 1, points).astype(int))
    return x[kept], y[kept]


def _histogram(scores: pl.DataFrame, name: str) -> Markup:
    values = scores["score"].to_numpy()
    low, high = float(values.min()), float(values.max())
    edges = np.linspace(low, high if high > low else low + 1, 25)
    lines, means = [], []
    for label, kind, css in ((1, "chosen items", "kind-chosen"), (0, "other candidates", "kind-other")):
        part = values[scores["label"].to_numpy() == label]
        if len(part):
            share = 100 * np.histogram(part, edges)[0] / len(part)
            lines.append(Line(kind, np.repeat(edges, 2)[1:-1], np.repeat(share, 2), css, fill=True))
            means.append(f"{kind} {part.mean():.2f}")
    return line_chart(
        lines,
        title=f"Scores of {name}",
        description=f"Share of chosen items and of other candidates by score. Mean score: {', '.join(means)}.",
        x_label="score: probability of Yes",
        y_label="percent of each",
        x_range=(edges[0], edges[-1]),
        y_range=(0, 1.05 * max(float(np.max(line.y)) for line in lines)),
    )


def loss_chart(training: Sequence[LossPoint], validation: Sequence[LossPoint]) -> Markup | None:
    """The loss while the model was trained; None if it was reported less than twice."""
    if len(training) < 2:
        return None
    steps, losses = (np.array(column, dtype=float) for column in zip(*training, strict=True))
    window = max(1, len(training) // 15)
    smooth = np.convolve(np.pad(losses, (window - 1, 0), mode="edge"), np.ones(window) / window, mode="valid")
    lines = [
        Line("training (running mean)" if window > 1 else "training", steps, smooth, "kind-chosen"),
        Line("each report", steps, losses, "kind-chosen", faint=True),
    ]
    words = f"Training loss from {smooth[0]:.3f} to {smooth[-1]:.3f}"
    if validation:
        x, y = zip(*validation, strict=True)
        lines.append(Line("validation", x, y, "kind-other", dots=True))
        words += f"; last validation loss {y[-1]:.3f}"
    return line_chart(
        lines,
        title="Loss while fine-tuning",
        description=f"{words}.",
        x_label="optimiser step",
        y_label="loss on the answer",
        x_range=(0, float(steps[-1])),
        y_range=(0, 1.05 * max(float(np.max(line.y)) for line in lines)),
    )
