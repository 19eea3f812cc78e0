"""``results.md``: a run's results as Markdown to paste; and several runs side by side."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from mllm_msr.evaluation.diagnostics import agreement
from mllm_msr.evaluation.metrics import paired_differences
from mllm_msr.hub_cards import evidence
from mllm_msr.hub_cards.results import (
    METRIC_NAMES,
    OURS,
    headline,
    interval,
    ordered_rows,
    percent,
    results_markdown,
    row_name,
    write_page,
)

SIDE_BY_SIDE = ("auc", "hr@5", "mrr@5", "ndcg@5")
AGREEMENT = ("largest difference of a logit", "rank correlation", "users with another first, percent")


def write_results(run: Path) -> Path:
    """Write ``run/results.md`` from ``run/metrics.json`` and return its path."""
    return write_page(results_page(read_metrics(run)), run / "results.md")


def read_metrics(run: Path) -> dict:
    path = Path(run) / "metrics.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `mllm-msr evaluate {run}` first")
    return json.loads(path.read_text(encoding="utf-8"))


def results_page(metrics: dict) -> str:
    """All of a run's results: the table, ours against each row, slices, calibration, checks."""
    said = headline(metrics)
    parts = [f"# {metrics.get('dataset', 'Results')}", *([said] if said else []), _conditions(metrics)]
    parts += ["Percent, 95 % interval by bootstrap over users; ties by expectation.", results_markdown(metrics)]
    if differences := evidence.against(metrics):
        names = [f"{METRIC_NAMES[key]} | p" for key in evidence.COMPARED]
        rows = [
            [row_name(row["row"]), *(f"{c['difference']} ({c['interval']}) | {c['p']}" for c in row["cells"])]
            for row in differences
        ]
        parts += [
            "## Ours less each row\n\nPoints; paired bootstrap over users; p two-sided, not corrected.",
            table(["", *names], rows),
        ]
    if among := evidence.catalogue(metrics):
        head = [f"{METRIC_NAMES[key]} sampled | all items" for key in evidence.AMONG_ALL]
        rows = [
            [row_name(row["row"]), *(f"{percent(c['value'])} ({interval(c)})" for c in row["cells"])]
            for row in among["rows"]
        ]
        parts += [
            f"## Among all items\n\n{among['users']} users, their choices among sampled candidates and among all "
            f"{among['items']:,.0f} items they never chose. {among['order']} {evidence.WHY_THEY_DIFFER}",
            table(["", *head], rows),
        ]
    for one in evidence.slice_tables(metrics):
        head = [one["title"], *(f"{part['name']} ({part['users']} users)" for part in one["parts"])]
        rows = [
            [row["name"], *(f"{percent(c['value'])} ({interval(c)})" if c else "" for c in row["cells"])]
            for row in one["rows"]
        ]
        parts += [f"## {METRIC_NAMES[evidence.SLICED]} by {one['title']}", table(head, rows)]
    if found := metrics.get("calibration"):
        parts += [
            "## Calibration\n\nExpected calibration error of p(yes), points: "
            f"{percent(found['as_trained']['error'])} as trained, {percent(found['prior_corrected']['error'])} when "
            "the share of choices among the candidates is made up for."
        ]
    if rows := [[row_name(row), percent(tied), correlation] for row, tied, correlation in evidence.checks(metrics)]:
        head = ["", "users whose choice is tied, percent", "rank correlation with popularity"]
        parts += ["## Ties and popularity", table(head, rows)]
    if ways := evidence.agreement(metrics):
        parts += [
            f"## Do other ways of computing agree?\n\nOurs on {ways['users']} users, against the scores evaluated "
            f"({ways['way']}).",
            table(["", *AGREEMENT], ways["others"]),
        ]
    return "\n\n".join(parts) + "\n"


def _conditions(metrics: dict) -> str:
    facts = [
        f"{key.replace('n_', '')} {metrics[key]}"
        for key in ("n_users", "n_candidates", "protocol", "split", "seed")
        if metrics.get(key) is not None
    ]
    if metrics.get("model_of"):
        facts.append(f"model {metrics['model_of']}")
    if metrics.get("candidate_hash"):
        facts.append(f"candidates `{metrics['candidate_hash']}`")
    return ", ".join(facts) + "."


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a head or cell may hold several columns, parted by `` | ``.

    >>> print(table(["", "AUC"], [["ours", "81.2"]]))
    | | AUC |
    |:--|--:|
    | ours | 81.2 |
    """
    columns = " | ".join(head).count("|") + 1
    lines = [f"| {' | '.join(head)} |".replace("|  |", "| |"), f"|:--|{'--:|' * (columns - 1)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def compare(runs: Sequence[Path]) -> str:
    """The rows of several runs side by side, as Markdown; says where the runs did not rank the same candidates.

    Raises ``FileNotFoundError`` for a run without metrics, ``ValueError`` for fewer than two runs.
    """
    if len(runs) < 2:
        raise ValueError("compare needs two runs or more")
    found = {_label(run, runs): read_metrics(run) for run in runs}
    rows = ordered_rows({"rows": {row: None for metrics in found.values() for row in metrics["rows"]}})
    lines = []
    for row in [OURS, *(row for row in rows if row != OURS)]:
        for label, metrics in found.items():
            if row in metrics["rows"]:
                results = [metrics["rows"][row].get(key) for key in SIDE_BY_SIDE]
                cells = [f"{percent(one['value'])} ({interval(one)})" if one else "" for one in results]
                lines.append([row_name(row), label, *cells])
    said = table(["", "run", *(METRIC_NAMES[key] for key in SIDE_BY_SIDE)], lines)
    hashes = {metrics.get("candidate_hash") for metrics in found.values()}
    if len(hashes) > 1:
        said += "\n\nNot the same candidates: compare the differences between rows, not the figures."
    if paired := beside_the_first(dict(zip(found, runs, strict=True))):
        gaps = (f"{METRIC_NAMES[key]} | p" for key in evidence.COMPARED)
        head = ["", *gaps, *AGREEMENT, "words that preferences share, percent"]
        said += (
            f"\n\n{row_name(OURS)} less that of {next(iter(found))}, points, paired by user; and how far they agree:"
        )
        said += "\n\n" + table(head, paired)
    facts = [f"- {label}: {metrics.get('dataset')}, {_conditions(metrics)}" for label, metrics in found.items()]
    return said + "\n\n" + "\n".join(facts)


def beside_the_first(runs: Mapping[str, Path]) -> list[list[str]]:
    """Our scores in each run against those in the first, where both ranked the same candidates for the same users:
    differences in points, how far the scores agree, and what share of all words in two runs' preferences both have."""
    (_, first), *others = runs.items()
    lines = []
    for label, run in others:
        files = [Path(one) / "scores.parquet" for one in (first, run)]
        if not all(file.is_file() for file in files):
            continue
        keys = ["user_id", "item_id", "label"]
        one, two = (pl.read_parquet(file).filter(variant=OURS).select(*keys, "logit").sort(keys) for file in files)
        if one.is_empty() or not one.select(keys).equals(two.select(keys)):
            continue
        found = paired_differences(one["user_id"], one["label"], two["logit"], one["logit"])
        cells = (evidence.difference(found[key]) for key in evidence.COMPARED)
        gaps = [f"{cell['difference']} ({cell['interval']}) | {cell['p']}" for cell in cells]
        agreed = evidence.agreement_cells(vars(agreement(one["user_id"], one["logit"], two["logit"])))
        lines.append([label, *gaps, *agreed, _words_shared(Path(first), Path(run))])
    return lines


def _words_shared(first: Path, second: Path) -> str:
    """Of the words in a user's preference after a step in either run, the share in both, in percent; mean over all."""
    files = [run / "summaries/preferences.parquet" for run in (first, second)]
    if not all(file.is_file() for file in files):
        return ""
    words = pl.col("preference").str.to_lowercase().str.extract_all(r"\w+")
    one, two = (pl.read_parquet(file).select("user_id", "step", words) for file in files)
    both = one.join(two, on=["user_id", "step"])
    union = both["preference"].list.set_union(both["preference_right"]).list.len().to_numpy()
    common = both["preference"].list.set_intersection(both["preference_right"]).list.len().to_numpy()
    return percent((common[union > 0] / union[union > 0]).mean()) if (union > 0).any() else ""


def _label(run: Path, runs: Sequence[Path]) -> str:
    """The run's folder name; its path if another run is called the same."""
    names = [Path(one).resolve().name for one in runs]
    name = Path(run).resolve().name
    return name if names.count(name) == 1 else str(run)
