"""What ``metrics.json`` holds beyond the table: paired differences, slices, calibration, checks; as rows and charts."""

from collections import defaultdict
from typing import Any

from markupsafe import Markup

from mllm_msr.hub_cards.charts import Line, line_chart
from mllm_msr.hub_cards.results import METRIC_NAMES, OURS, ROW_MEANINGS, ordered_rows, percent, row_name

COMPARED = ("auc", "hr@5", "ndcg@5")
AMONG_ALL = ("hr@5", "hr@10", "ndcg@5")
WHY_THEY_DIFFER = (
    "Among sampled candidates most of the items that could stand above a choice are absent. So figures are higher than "
    "among all items, by more for some rows than for others, and even the order of rows may change (Krichene and "
    "Rendle, KDD 2020). Where it does, believe the whole catalogue."
)
SLICED = "ndcg@5"
CURVES = (OURS, "blank_images", "no_sft", "sasrec", "knn", "popularity", "random", "oracle")  # where all are too many
DIVISIONS = {
    "history_length": "items in the history",
    "target_train_count": "training interactions of the choice",
    "popularity_decile": "popularity of the choice, tenths of the catalogue",
}


def style(row: str) -> str:
    """The CSS class of a row's colour and dash."""
    return f"row-{row}" if row in ROW_MEANINGS else "row-other"


def against(metrics: dict) -> list[dict[str, Any]]:
    """Ours against each other row, in reading order: ``{"row", "cells": [{"difference", "interval", "p"}]}``."""
    pairs = metrics.get("against", {})
    return [
        {"row": row, "cells": [difference(pairs[row][key]) for key in COMPARED]}
        for row in ordered_rows(metrics)
        if row in pairs
    ]


def difference(result: dict) -> dict[str, str]:
    low, high = result["ci95"]
    p = "< 0.001" if result["p"] < 0.001 else f"{result['p']:.3f}"
    return {
        "difference": f"{100 * result['difference']:+.1f}",
        "interval": f"{100 * low:+.1f} to {100 * high:+.1f}",
        "p": p,
    }


def against_lines(metrics: dict) -> str:
    """The same for the terminal: a line for each other row, its AUC and NDCG@5."""
    lines = [
        f"  {row_name(row['row']):<16}"
        + "".join(
            f"  {METRIC_NAMES[key]} {cell['difference']} ({cell['interval']}) p {cell['p']}"
            for key, cell in zip(COMPARED, row["cells"], strict=True)
            if key != "hr@5"
        )
        for row in against(metrics)
    ]
    return "\n".join([f"{row_name(OURS)} less each row, points, paired by user:", *lines]) if lines else ""


def checks(metrics: dict) -> list[tuple[str, float, str]]:
    """(row, share of users with a tied choice, correlation with popularity), in reading order."""
    found = metrics.get("checks", {})
    return [
        (row, found[row]["tied_users"], f"{found[row]['popularity_correlation']:.2f}".replace("-0.00", "0.00"))
        if "popularity_correlation" in found[row]
        else (row, found[row]["tied_users"], "")
        for row in ordered_rows(metrics)
        if row in found
    ]


def catalogue(metrics: dict) -> dict[str, Any] | None:
    """Rows among sampled candidates and among all items: ``{"users", "items", "order", "rows": [{"row", "cells":
    [result]}]}``, ``order`` a sentence on whether both agree, cells being sampled and full of each of ``AMONG_ALL`` in
    turn; None if that was not evaluated."""
    found = metrics.get("full_catalogue")
    if not found:
        return None
    rows = [row for row in ordered_rows(metrics) if row in found["rows"]]
    cells = {row: [found["rows"][row][kind][key] for key in AMONG_ALL for kind in ("sampled", "full")] for row in rows}
    value = {row: [found["rows"][row][kind][SLICED]["value"] for kind in ("sampled", "full")] for row in rows}
    turned = [
        f"{row_name(ahead)} is ahead of {row_name(behind)} among sampled candidates and behind among all items"
        for ahead in rows
        for behind in rows
        if value[ahead][0] > value[behind][0] and value[ahead][1] < value[behind][1]
    ]
    order = "; ".join(turned[:3]) + (f"; and {len(turned) - 3} pairs more" if turned[3:] else "")
    said = f"By {METRIC_NAMES[SLICED]} of these users " + (order or "both put the rows into one order") + "."
    if OURS in metrics["rows"] and OURS not in rows:
        said += f" {row_name(OURS)} is not among them: so many pairs were too costly; fewer users may not be."
    return {
        "users": found["n_users"],
        "items": found["n_candidates"],
        "order": said,
        "rows": [{"row": row, "cells": cells[row]} for row in rows],
    }


def catalogue_lines(metrics: dict) -> str:
    """The same for the terminal: a line for each row, its NDCG@5."""
    found = catalogue(metrics)
    if not found:
        return ""
    lines = [
        f"  {row_name(row['row']):<16}" + "".join(f"{percent(cell['value']):>7}" for cell in row["cells"][-2:])
        for row in found["rows"]
    ]
    head = f"{METRIC_NAMES[SLICED]} of {found['users']} users, sampled candidates | all items ({found['items']:,.0f}):"
    return "\n".join([head, *lines, found["order"]])


def agreement(metrics: dict) -> dict[str, Any] | None:
    """Ways of computing our scores against the one evaluated: ``{"users", "way", "others": [(name, largest difference
    of a score, rank correlation, share of users with another first)]}``; None if that was not evaluated."""
    found = metrics.get("agreement")
    if not found:
        return None
    others = [(name, *agreement_cells(result)) for name, result in found["others"].items()]
    return {"users": found["n_users"], "way": found["way"], "others": others}


def agreement_cells(result: dict) -> tuple[str, str, str]:
    correlation = f"{result['rank_correlation']:.4f}" if result.get("rank_correlation") is not None else ""
    return f"{result['max_difference']:.2g}", correlation, percent(result["first_changed"])


def slice_tables(metrics: dict) -> list[dict[str, Any]]:
    """A table for each division of the users: ``{"by", "title", "parts": [{"name", "users"}], "rows": [{"name", "row",
    "cells"}]}``, cells being results of ``SLICED`` or None."""
    parts = defaultdict(list)
    for one in metrics.get("slices", []):
        parts[one["by"]].append(one)
    tables = []
    for by, title in DIVISIONS.items():
        if by in parts:
            rows = [
                {
                    "name": row_name(row),
                    "row": row,
                    "cells": [one["rows"].get(row, {}).get(SLICED) for one in parts[by]],
                }
                for row in ordered_rows(metrics)
            ]
            names = [{"name": one["part"], "users": one["users"]} for one in parts[by]]
            tables.append({"by": by, "title": title, "parts": names, "rows": rows})
    return tables


def charts(metrics: dict) -> list[Markup]:
    """Slices of a few rows, and the reliability curve, as far as they are known."""
    return [*filter(None, [_slice_chart(table) for table in slice_tables(metrics)]), *_reliability(metrics)]


def _slice_chart(table: dict) -> Markup | None:
    shown = [row for row in table["rows"] if row["row"] in (OURS, "sasrec", "knn", "blank_images", "popularity")]
    if len(table["parts"]) < 2 or not shown:
        return None
    lines = []
    for row in shown:
        known = [(place, 100 * cell["value"]) for place, cell in enumerate(row["cells"], 1) if cell]
        lines.append(Line(row["name"], [x for x, _ in known], [y for _, y in known], style(row["row"]), dots=True))
    ours = "; ".join(f"{part['name']} {y:.0f}" for part, y in zip(table["parts"], lines[0].y, strict=False))
    top = max(max(line.y) for line in lines if len(line.y))
    return line_chart(
        lines,
        title=f"NDCG@5 by {table['title']}",
        description=f"{lines[0].name}, percent: {ours}.",
        x_label=table["title"],
        y_label="NDCG@5, percent",
        x_range=(0.8, len(table["parts"]) + 0.2),
        y_range=(0, 1.05 * top or 1),
        x_names=[part["name"] for part in table["parts"]],
    )


def _reliability(metrics: dict) -> list[Markup]:
    found = metrics.get("calibration")
    if not found:
        return []
    curves = (("as trained", "as_trained", "kind-other"), ("share corrected", "prior_corrected", "kind-chosen"))
    lines = [
        Line(name, [b["mean"] for b in found[key]["bins"]], [b["chosen"] for b in found[key]["bins"]], kind, dots=True)
        for name, key, kind in reversed(curves)
    ]
    top = max(max(max(line.x), max(line.y)) for line in lines)
    errors = "; ".join(f"{name} {percent(found[key]['error'])}" for name, key, _ in curves)
    return [
        line_chart(
            lines,
            title="Is a probability of Yes what it says?",
            description=f"Share of choices by predicted probability in tenths of the pairs; the diagonal is perfect. "
            f"Mean distance from it, points: {errors}. The correction makes up for training on another share of "
            "choices than is ranked here.",
            x_label="predicted probability",
            y_label="share of choices",
            x_range=(0, top),
            y_range=(0, top),
            diagonal=True,
        )
    ]
