"""A study's table and chart, from its ``study.json``."""

import json
import re
from pathlib import Path

from mllm_msr.hub_cards.charts import interval_chart
from mllm_msr.hub_cards.results import METRIC_NAMES, OURS, interval, percent, row_name
from mllm_msr.hub_cards.results_page import table

SHOWN = ("auc", "hr@5", "ndcg@5")
STYLE = """text{font:12.5px system-ui,sans-serif;fill:#1d2226}.end{text-anchor:end}.middle{text-anchor:middle}
.grid{stroke:#e2dfd8;fill:none}.diagonal{stroke:#5d666d;stroke-dasharray:2 4;fill:none}.dot{fill:currentColor}
.whisker{stroke:currentColor;stroke-width:3;stroke-linecap:round;opacity:.55}
.kind-chosen{color:#0072b2}.kind-other{color:#d55e00}svg{background:#fff}"""


def write_study(folder: Path) -> str:
    """Write ``study.md`` and ``study.svg`` from ``folder/study.json``; returns the Markdown."""
    study = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    page = study_markdown(study)
    (folder / "study.md").write_text(page + "\n", encoding="utf-8")
    (folder / "study.svg").write_text(study_chart(study), encoding="utf-8")
    return page


def study_markdown(study: dict) -> str:
    """Every cell's figures and its difference from the first, in percent and points."""
    rows = []
    for entry in study["cells"]:
        cells = [entry_name(entry) + ("" if entry["same_candidates"] else " (other candidates)")]
        for key in SHOWN:
            result = entry["metrics"][key]
            spread = f", seeds ±{percent(result['seed_std'])}" if result["seed_std"] is not None else ""
            cells.append(f"{percent(result['value'])} ({interval(result)}{spread})")
            if "difference" in result:
                low, high = result["difference_ci95"]
                gap = f"{100 * result['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
                cells.append(f"{gap} p {'< 0.001' if result['p'] < 0.001 else format(result['p'], '.3f')}")
            else:
                cells.append("")
        took = [seconds for seconds in entry.get("train_seconds", []) if seconds is not None]
        rows.append([*cells, f"{sum(took) / len(took):.0f} s" if took else ""])
    head = ["", *(f"{METRIC_NAMES[key]} | against the first" for key in SHOWN), "trained for"]
    first = study["cells"][0]
    parts = [
        f"# {study['study']}",
        f"Percent and points, {first['users']} users; 95 % intervals by bootstrap over users; differences paired by "
        "user (none where the users differ); p two-sided, not corrected.",
        table(head, rows),
        "Beside the first:\n\n" + verdicts(study) if verdicts(study) else "",
    ]
    if study["failures"]:
        parts.append("Failed: " + "; ".join(study["failures"]) + ".")
    return "\n\n".join(part for part in parts if part)


def verdicts(study: dict) -> str:
    """For every row but the first, one line that says whether it differs, by the interval of the AUC's difference."""
    lines = []
    for entry in study["cells"][1:]:
        result = entry["metrics"]["auc"]
        if "difference" not in result:
            continue
        low, high = result["difference_ci95"]
        gap = f"{abs(100 * result['difference']):.1f} points of AUC"
        said = (
            f"{gap} below"
            if high < 0
            else f"{gap} above"
            if low > 0
            else f"not to be told apart by these users ({gap})"
        )
        lines.append(f"- {entry_name(entry)}: {said}")
    return "\n".join(lines)


def study_chart(study: dict) -> str:
    """The AUC of every entry with its interval, as one SVG file."""
    rows = []
    for index, entry in enumerate(study["cells"]):
        result = entry["metrics"]["auc"]
        values = (100 * value for value in (result["value"], *result["ci95"]))
        rows.append((entry_name(entry), "kind-chosen" if not index else "kind-other", *values))
    figure = str(
        interval_chart(
            rows,
            title=study["study"],
            description="; ".join(
                f"{name} {value:.1f} ({low:.1f} to {high:.1f})" for name, _, value, low, high in rows
            ),
            x_label="AUC, percent",
            chance=50.0,
        )
    )
    found = re.search("<svg.*?</svg>", figure, re.DOTALL)
    assert found
    return (
        found.group()
        .replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
        .replace("</title>", f"</title><style>{STYLE}</style>", 1)
    )


def entry_name(entry: dict) -> str:
    """The cell's name; with the row's, where that is not ours."""
    return entry["cell"] if entry["row"] == OURS else f"{entry['cell']}: {row_name(entry['row'])}"
