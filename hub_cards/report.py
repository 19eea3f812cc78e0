"""One self-contained HTML page about a finished run, for a person: no network, no script, light and dark, any width.

Everything that came from data passes through Jinja's autoescaping or markupsafe; artefacts a run does not have leave
no gap in the page.
"""

import base64
import io
import json
import os
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image, UnidentifiedImageError

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
)

__all__ = ["results_markdown", "results_table", "write_report"]

N_USERS = 6  # shown in full
N_CANDIDATES = 8  # shown of each ranking, and the chosen item wherever it stands
N_BLOCKS = 4  # shown with pictures; earlier ones are folded
THUMBNAIL = 80  # pixels, longer edge


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
    provenance = read_json(run / "provenance.json")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "interval": interval, "row_name": row_name, "duration": duration}
    page = environment.get_template("report.html.j2").render(
        metrics=metrics,
        keys=metric_keys(metrics),
        metric_names=METRIC_NAMES,
        rows=ordered_rows(metrics),
        meanings=ROW_MEANINGS,
        best={key: best_rows(metrics, key) for key in metric_keys(metrics)},
        ours=OURS,
        style=_style,
        subtitle=_subtitle(metrics),
        headline=headline(metrics),
        findings=findings(metrics),
        charts=[chart for chart in (_values_chart(metrics), *_score_charts(scores)) if chart],
        loss_chart=_loss_chart(run / "model/log_history.json"),
        summaries=_summaries(run),
        users=_users(run, scores),
        data=read_json(run / "data/report.json"),
        stages=_stages(provenance),
        provenance=provenance,
        config=(run / "config.yaml").read_text() if (run / "config.yaml").exists() else "",
        markdown=results_markdown(metrics),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    temporary = run / ".report.html.tmp"
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, run / "report.html")
    return run / "report.html"


def read_json(path: Path) -> dict:
    """The object in ``path``, or an empty one if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else {}


def duration(seconds: float) -> str:
    """
    >>> duration(3.21), duration(250), duration(7300)
    ('3.2 s', '4 min 10 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _style(row: str) -> str:
    return f"row-{row}" if row in ROW_MEANINGS else "row-other"


def _subtitle(metrics: dict) -> str:
    parts = [f"MLLM-MSR on {metrics.get('dataset', 'a data set')}"]
    for key, words in (("n_users", "{:,} users"), ("n_candidates", "{:,} candidates each")):
        parts += [words.format(metrics[key])] if metrics.get(key) else []
    parts += [f"{metrics[key]} {key}" for key in ("protocol", "split") if metrics.get(key)]
    return ", ".join(parts)


def _stages(provenance: dict) -> list[tuple[str, float, float]]:
    """(name, seconds, share of the longest) of every stage."""
    stages = {name: stage["seconds"] for name, stage in provenance.get("stages", {}).items() if "seconds" in stage}
    longest = max(stages.values(), default=0) or 1
    return [(name.replace("_", " "), seconds, seconds / longest) for name, seconds in stages.items()]


def _values_chart(metrics: dict):
    rows = [row for row in ordered_rows(metrics) if "auc" in metrics["rows"][row]]
    if not rows:
        return None
    values = []
    for row in rows:
        result = metrics["rows"][row]["auc"]
        values.append((row_name(row), _style(row), *(100 * v for v in (result["value"], *result["ci95"]))))
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
    names = ordered_rows({"rows": dict.fromkeys(scores["row"].unique().sort())})
    curves, rocs = [], []
    for row in names:
        own = scores.filter(pl.col("row") == row)
        hits = _hit_curve(own)
        curves.append(Line(row_name(row), np.arange(1, len(hits) + 1), 100 * hits, _style(row)))
        x, y = _roc(own["label"].to_numpy(), own["logit"].to_numpy())
        rocs.append(Line(row_name(row), x, y, _style(row)))
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
    return [*charts, _histogram(scores.filter(pl.col("row") == shown), row_name(shown))]


def _hit_curve(scores: pl.DataFrame, longest: int = 50) -> np.ndarray:
    """HR@k for k = 1 .. list length (at most ``longest``): mean over users, ties by expectation."""
    n, p, above = (group.to_numpy()[:, None] for group in _best_groups(scores)[["n", "p", "above"]])
    k = np.arange(min(longest, scores.group_by("user_id").len()["len"].max()))
    missed = np.where(k < above, 1.0, np.maximum(n - p - (k - above), 0) / np.maximum(n - (k - above), 1))
    return 1.0 - np.cumprod(missed, axis=1).mean(axis=0)


def _best_groups(scores: pl.DataFrame) -> pl.DataFrame:
    """Per user: the best group of equal scores with a positive; its size n, its positives p, how many stand above."""
    groups = scores.group_by("user_id", "logit").agg(pl.len().alias("n"), pl.col("label").sum().alias("p"))
    groups = groups.sort("user_id", "logit", descending=[False, True])
    groups = groups.with_columns(above=pl.col("n").cast(pl.Int64).cum_sum().over("user_id") - pl.col("n"))
    return groups.filter(pl.col("p") > 0).unique("user_id", keep="first", maintain_order=True).cast({"n": pl.Int64})


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
        y_range=(0, 1.05 * max(float(line.y.max()) for line in lines)),
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


def _users(run: Path, scores: pl.DataFrame | None) -> list[dict]:
    """The users shown: evenly spaced from the best-ranked to the worst-ranked choice, so nothing is flattered."""
    needed = ("data/items.parquet", "data/tasks.parquet")
    if scores is None or scores.is_empty() or not all((run / path).exists() for path in needed):
        return []
    shown = OURS if OURS in scores["row"].unique() else ordered_rows({"rows": dict.fromkeys(scores["row"].unique())})[0]
    scores = scores.filter(pl.col("row") == shown)
    tasks = pl.read_parquet(run / "data/tasks.parquet").filter(pl.col("split") == "test").unique("user_id", keep="first")
    groups = _best_groups(scores).join(tasks, on="user_id").with_columns(rank=pl.col("above") + (pl.col("n") + 1) / 2)
    groups = groups.sort("rank", "user_id")
    places = np.unique(np.linspace(0, len(groups) - 1, min(N_USERS, len(groups))).round().astype(int)) if len(groups) else []
    preferences = None
    if (run / "summaries/preferences.parquet").exists():
        preferences = pl.read_parquet(run / "summaries/preferences.parquet")
    users = [_user(row, scores, preferences) for row in groups[places].iter_rows(named=True)]
    wanted = {entry["item_id"] for user in users for entry in user["ranking"]}
    wanted |= {item for user in users for block in user["blocks"] for item in block["items"]}
    wanted |= {item for user in users for item in user["recent"]}
    cards = _cards(run, wanted)
    for user in users:
        for block in user["blocks"]:
            block["cards"] = [cards[item] for item in block["items"]]
            block["titles"] = [card["title"] for card in block["cards"]]
        user["recent"] = [cards[item] for item in user["recent"]]
        for entry in user["ranking"]:
            entry |= cards[entry["item_id"]]
    return users


def _summaries(run: Path) -> dict:
    """How many item summaries have which status, and a few of them beside their pictures."""
    if not all((run / path).exists() for path in ("data/items.parquet", "summaries/items.parquet")):
        return {}
    summaries = pl.read_parquet(run / "summaries/items.parquet").sort("item_id")
    counts = summaries.group_by(pl.col("status").str.split(":").list.first()).len("count").sort("count", descending=True)
    places = np.unique(np.linspace(0, len(summaries) - 1, N_USERS).round().astype(int)) if len(summaries) else []
    cards = _cards(run, set(summaries["item_id"][places]))
    shown = [cards[row["item_id"]] | {"summary": row["summary"]} for row in summaries[places].iter_rows(named=True)]
    return {"counts": dict(counts.iter_rows()), "shown": shown}


def _cards(run: Path, item_ids: set[str]) -> dict[str, dict]:
    """Title and thumbnail of every item of ``item_ids``; only their rows are read."""
    items = pl.scan_parquet(run / "data/items.parquet").filter(pl.col("item_id").is_in(list(item_ids))).collect()
    rows = {row["item_id"]: row for row in items.iter_rows(named=True)}
    return {item: _card(item, rows.get(item, {})) for item in item_ids}


def _card(item_id: str, row: dict) -> dict:
    return {"title": row.get("title") or f"item {item_id}", "picture": thumbnail(row.get("image"))}


def _user(task: dict, scores: pl.DataFrame, preferences: pl.DataFrame | None) -> dict:
    """A user's story by item ids: blocks with the preference after each, items not yet summarised, the ranking."""
    blocks, read = [], []
    if preferences is not None:
        steps = preferences.filter((pl.col("user_id") == task["user_id"]) & (pl.col("last_timestamp") <= task["cutoff"]))
        for step in steps.sort("step").iter_rows(named=True):
            if not set(step["read_item_ids"]) <= set(task["history"]):
                continue
            fresh = step["read_item_ids"][len(read) :]
            blocks.append({"step": step["step"], "preference": step["preference"], "items": fresh})
            read = step["read_item_ids"]
    own = scores.filter(pl.col("user_id") == task["user_id"]).sort("logit", "label", descending=[True, False])
    ranking = [
        {"place": place, "item_id": row["item_id"], "chosen": row["label"] == 1, "score": row["score"]}
        for place, row in enumerate(own.iter_rows(named=True), start=1)
    ]
    shown = [entry for entry in ranking if entry["place"] <= N_CANDIDATES or entry["chosen"]]
    highest = max(entry["score"] for entry in ranking) or 1.0
    for before, entry in zip([None, *shown], shown, strict=False):
        entry["bar"] = entry["score"] / highest
        entry["gap"] = before is not None and entry["place"] > before["place"] + 1
    first, final = task["above"] + 1, task["above"] + task["n"]
    return {
        "user_id": task["user_id"],
        "rank": f"ranked {first}" if first == final else f"tied for places {first}-{final}",
        "candidates": len(ranking),
        "blocks": blocks,
        "shown_from": max(0, len(blocks) - N_BLOCKS),
        "recent": task["history"][len(read) :],
        "ranking": shown,
    }


def thumbnail(image: dict | None) -> str | None:
    """A small JPEG as a data URI from ``{"bytes", "path"}``; None if there is no picture or it cannot be read."""
    if not image or not image.get("bytes"):
        return None
    try:
        with Image.open(io.BytesIO(image["bytes"])) as opened:
            opened.draft("RGB", (2 * THUMBNAIL, 2 * THUMBNAIL))
            small = opened.convert("RGBA")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
        return None
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    white = Image.new("RGB", small.size, "white")
    white.paste(small, mask=small.getchannel("A"))
    buffer = io.BytesIO()
    white.save(buffer, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
