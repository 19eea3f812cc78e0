"""One self-contained HTML page about a finished run, for a person: no network, no script, light and dark, any width.

Everything that came from data passes through Jinja's autoescaping or markupsafe; artefacts a run does not have leave
no gap in the page.
"""

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mllm_msr.hub_cards import evidence
from mllm_msr.hub_cards.charts import Line, interval_chart, line_chart
from mllm_msr.hub_cards.results import (
    METRIC_NAMES,
    OURS,
    ROW_MEANINGS,
    best_rows,
    findings,
    headline,
    interval,
    metric_keys,
    ordered_rows,
    percent,
    results_markdown,
    results_table,
    row_name,
    write_page,
)
from mllm_msr.hub_cards.stories import best_groups, summary_examples, user_stories

__all__ = ["results_markdown", "results_table", "write_report"]


def write_report(run: Path) -> Path:
    """Write ``run/report.html`` from the artefacts in ``run`` and return its path.

    Needs ``metrics.json``; draws whatever else is there (see the README's list of artefacts). Raises
    ``FileNotFoundError`` naming the file and the command that makes it.
    """
    run = Path(run)
    if not (run / "metrics.json").exists():
        raise FileNotFoundError(f"{run / 'metrics.json'} is missing: run `mllm-msr evaluate` on this run first")
    metrics = read_json(run / "metrics.json")
    scores = pl.read_parquet(run / "scores.parquet") if (run / "scores.parquet").exists() else None
    provenance = {"versions": {}, "inputs": {}, "stages": {}} | read_json(run / "provenance.json")
    data = {"source": "", "cleaning": [], "skipped": [], "statistics": {}, "protocol": {}}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "interval": interval,
        "row_name": row_name,
        "duration": duration,
        "flat": _flat,
        "number": number,
    }
    page = environment.get_template("report.html.j2").render(
        metrics=metrics,
        candidate_hash=metrics.get("candidate_hash"),
        page_title=f"MLLM-MSR on {metrics.get('dataset', 'a data set')}",
        keys=metric_keys(metrics),
        metric_names=METRIC_NAMES,
        rows=ordered_rows(metrics),
        meanings=ROW_MEANINGS,
        best={key: best_rows(metrics, key) for key in metric_keys(metrics)},
        ours=OURS,
        style=evidence.style,
        subtitle=_subtitle(metrics),
        headline=headline(metrics),
        findings=findings(metrics),
        sampled=(metrics.get("n_candidates") or 0) < (catalogue_size(run) or 0),
        against=evidence.against(metrics),
        catalogue=evidence.catalogue(metrics),
        among_all=[METRIC_NAMES[key] for key in evidence.AMONG_ALL],
        why_they_differ=evidence.WHY_THEY_DIFFER,
        agreement=evidence.agreement(metrics),
        backbone=_backbone(run),
        compared=[METRIC_NAMES[key] for key in evidence.COMPARED],
        checks=evidence.checks(metrics),
        slices=evidence.slice_tables(metrics),
        evidence_charts=evidence.charts(metrics),
        charts=[chart for chart in (_values_chart(metrics), *_score_charts(scores)) if chart],
        loss_chart=_loss_chart(run / "model/log_history.json"),
        summaries=summary_examples(run),
        users=user_stories(run, scores, metrics.get("split", "test")),
        data=data | read_json(run / "data/report.json"),
        stages=_stages(provenance),
        provenance=provenance,
        config=_public_recipe(run / "config.yaml"),
        markdown=results_markdown(metrics),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    return write_page(page, run / "report.html")


def _public_recipe(path: Path) -> str:
    """The recipe without the folder of the raw data and that of a local model, which are paths of this machine."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    recipe.get("source", {}).pop("folder", None)
    if Path(recipe.get("training", {}).get("model_name_or_path") or "").is_absolute():
        recipe["training"]["model_name_or_path"] = Path(recipe["training"]["model_name_or_path"]).name
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if recipe else ""


def read_json(path: Path) -> dict:
    """The object in ``path``, or an empty one if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else {}


def _backbone(run: Path) -> str | None:
    """The name of the pretrained model that was fine-tuned; None for the demo's own, which has read nothing."""
    recipe = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) if (run / "config.yaml").exists() else {}
    name = recipe.get("training", {}).get("model_name_or_path", "demo")
    return None if name == "demo" else "The model before training" if Path(name).is_dir() else name


def catalogue_size(run: Path) -> int | None:
    """How many items the run's catalogue has, if that is known."""
    return read_json(run / "data/report.json").get("statistics", {}).get("items")


def duration(seconds: float) -> str:
    """
    >>> duration(3.21), duration(250), duration(7300)
    ('3.2 s', '4 min 10 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _subtitle(metrics: dict) -> str:
    parts = [f"MLLM-MSR on {metrics.get('dataset', 'a data set')}"]
    for key, words in (("n_users", "{:,} users"), ("n_candidates", "{:,} candidates each")):
        parts += [words.format(metrics[key])] if metrics.get(key) else []
    parts += [f"{metrics[key]} {key}" for key in ("protocol", "split") if metrics.get(key)]
    parts += [f"model {metrics['model_of']}"] if metrics.get("model_of") else []
    return ", ".join(parts)


def _flat(values: dict, prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as (name, text) pairs in reading order; what is None is left out."""
    pairs = []
    for key, value in values.items():
        name = prefix + str(key).replace("_", " ")
        if isinstance(value, dict):
            pairs += _flat(value, f"{name}, ")
        elif "timestamp" in key and isinstance(value, int):
            pairs.append((name.replace("timestamp", "interaction"), f"{datetime.fromtimestamp(value, UTC):%Y-%m-%d}"))
        elif value is not None:
            pairs.append((name, number(value)))
    return pairs


def number(value: object) -> str:
    """
    >>> number(12345), number(0.123456), number("as it is")
    ('12,345', '0.1235', 'as it is')
    """
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _stages(provenance: dict) -> list[tuple[str, float, float]]:
    """(name, seconds, share of the longest) of every stage."""
    stages = {name: stage["seconds"] for name, stage in provenance["stages"].items() if "seconds" in stage}
    longest = max(stages.values(), default=0) or 1
    return [(name.replace("_", " "), seconds, seconds / longest) for name, seconds in stages.items()]


def _values_chart(metrics: dict):
    rows = [row for row in ordered_rows(metrics) if "auc" in metrics["rows"][row]]
    if not rows:
        return None
    values = []
    for row in rows:
        result = metrics["rows"][row]["auc"]
        values.append((row_name(row), evidence.style(row), *(100 * v for v in (result["value"], *result["ci95"]))))
    said = "; ".join(f"{name} {value:.1f} ({low:.1f} to {high:.1f})" for name, _, value, low, high in values)
    return interval_chart(
        values,
        title="AUC of every row, with 95% intervals",
        description=f"AUC in percent, chance is 50: {said}.",
        x_label="AUC over all user-candidate pairs, percent",
        chance=50.0,
    )


def _score_charts(scores: pl.DataFrame | None) -> list:
    """HR@k and ROC of every row, and how our scores of chosen and other candidates are distributed."""
    if scores is None or scores.is_empty():
        return []
    names = ordered_rows({"rows": dict.fromkeys(scores["variant"].unique().sort())})
    if len(names) > len(evidence.CURVES):
        names = [row for row in names if row in evidence.CURVES] or names
    curves, rocs = [], []
    for row in names:
        own = scores.filter(pl.col("variant") == row)
        hits = _hit_curve(own)
        curves.append(Line(row_name(row), np.arange(1, len(hits) + 1), 100 * hits, evidence.style(row)))
        x, y = _roc(own["label"].to_numpy(), own["logit"].to_numpy())
        rocs.append(Line(row_name(row), x, y, evidence.style(row)))
    longest = max(len(line.x) for line in curves)
    at_five = "; ".join(f"{line.name} {line.y[min(4, len(line.y) - 1)]:.0f}" for line in curves)
    charts = [
        line_chart(
            curves,
            title="Is the choice among the first k?",
            description=f"Share of users by k. At k = 5, in percent: {at_five}.",
            x_label="k",
            y_label="HR@k, percent of users",
            x_range=(1, max(longest, 2)),
            y_range=(0, 100),
        ),
        line_chart(
            rocs,
            title="ROC over all pairs",
            description="True positive rate against false positive rate; the diagonal is chance.",
            x_label="share of other candidates accepted",
            y_label="share of choices accepted",
            x_range=(0, 1),
            y_range=(0, 1),
            diagonal=True,
        ),
    ]
    shown = OURS if OURS in names else names[0]
    return [*charts, _histogram(scores.filter(pl.col("variant") == shown), row_name(shown))]


def _hit_curve(scores: pl.DataFrame, longest: int = 50) -> np.ndarray:
    """HR@k for k = 1 .. list length (at most ``longest``): mean over users, ties by expectation."""
    n, p, above = (group.to_numpy()[:, None] for group in best_groups(scores)[["n", "p", "above"]])
    k = np.arange(min(longest, int(scores.group_by("user_id").len()["len"].to_numpy().max())))
    missed = np.where(k < above, 1.0, np.maximum(n - p - (k - above), 0) / np.maximum(n - (k - above), 1))
    return 1.0 - np.cumprod(missed, axis=1).mean(axis=0)


def _roc(labels: np.ndarray, logits: np.ndarray, points: int = 160) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-logits, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(logits[order])), len(order) - 1)  # equal scores are passed in one step
    positives = np.cumsum(labels[order])[ends]
    negatives = ends + 1 - positives
    x = np.append(0.0, negatives / max(negatives[-1], 1))
    y = np.append(0.0, positives / max(positives[-1], 1))
    kept = np.unique(np.linspace(0, len(x) - 1, points).astype(int))
    return x[kept], y[kept]


def _histogram(scores: pl.DataFrame, name: str):
    values = scores["score"].to_numpy()
    low, high = float(values.min()), float(values.max())
    edges = np.linspace(low, high if high > low else low + 1, 25)
    lines, means = [], []
    for label, kind, style in ((1, "choices", "kind-chosen"), (0, "other candidates", "kind-other")):
        chosen = values[scores["label"].to_numpy() == label]
        if not len(chosen):
            continue
        share = 100 * np.histogram(chosen, edges)[0] / len(chosen)
        lines.append(Line(kind, np.repeat(edges, 2)[1:-1], np.repeat(share, 2), style, fill=True))
        means.append(f"{kind} {chosen.mean():.2f}")
    return line_chart(
        lines,
        title=f"Scores of {name}",
        description=f"Share of choices and of other candidates by score. Mean score: {', '.join(means)}.",
        x_label="score: probability of Yes",
        y_label="percent of each",
        x_range=(edges[0], edges[-1]),
        y_range=(0, 1.05 * max(float(np.max(line.y)) for line in lines)),
    )


def _loss_chart(path: Path):
    log = json.loads(path.read_text()) if path.exists() else []
    train = np.array([(entry["step"], entry["loss"]) for entry in log if "loss" in entry], dtype=float)
    held_out = np.array([(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry], dtype=float)
    if len(train) < 2:
        return None
    window = max(1, len(train) // 15)
    padded = np.pad(train[:, 1], (window - 1, 0), mode="edge")
    smooth = np.convolve(padded, np.ones(window) / window, mode="valid")
    lines = [
        Line("training (running mean)" if window > 1 else "training", train[:, 0], smooth, "kind-chosen"),
        Line("each report", train[:, 0], train[:, 1], "kind-chosen", faint=True),
    ]
    if len(held_out):
        lines.append(Line("validation", held_out[:, 0], held_out[:, 1], "kind-other", dots=True))
    end = f"Training loss from {smooth[0]:.3f} to {smooth[-1]:.3f}"
    end += f"; last validation loss {held_out[-1, 1]:.3f}" if len(held_out) else ""
    top = 1.05 * max(float(np.max(line.y)) for line in lines)
    return line_chart(
        lines,
        title="Loss while fine-tuning",
        description=f"{end}.",
        x_label="optimiser step",
        y_label="loss on the answer",
        x_range=(0, float(train[-1, 0])),
        y_range=(0, top),
    )
