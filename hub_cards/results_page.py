"""``results.md``: a run's results as Markdown to paste; the same for the console; and several runs side by side."""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from mllm_msr.evaluation.diagnostics import agreement
from mllm_msr.evaluation.metrics import metric_label, paired_differences
from mllm_msr.hub_cards.cards import plain
from mllm_msr.hub_cards.findings import conditions, headline
from mllm_msr.hub_cards.stories import ItemCard, UserStory, user_stories
from mllm_msr.hub_cards.view import (
    AGREEMENT_HEAD,
    COMPARED,
    COMPARED_AMONG_ALL,
    DIVISIONS,
    FREQUENCY,
    SLICED,
    Cell,
    Row,
    TableView,
    agreement_cells,
    catalogue_table,
    catalogue_words,
    difference_cells,
    differences_table,
    estimate_cell,
    in_order,
    percent,
    results_table,
    sasrec_table,
    sections,
    slice_table,
    variant_of,
)
from mllm_msr.records.results import Difference, Results
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import PREFERENCES, SCORES
from mllm_msr.records.sections import OURS
from mllm_msr.records.storage import write_text

SIDE_BY_SIDE = ("auc", "hr@5", "mrr@5", "ndcg@5")


def write_results(run: RunFolder) -> Path:
    """Write ``results.md`` of a run that was evaluated, and return its path."""
    results, scores = run.results(), run.read(SCORES) if run.has(SCORES) else None
    write_text(run.results_page, results_page(results, user_stories(run, scores, results.split)))
    return run.results_page


def results_page(results: Results, users: Sequence[UserStory] = ()) -> str:
    """All of a run's results as Markdown, in the order of the report: people, the table, its parts, further evidence.

    Args:
        users: shown in words.
    """
    further = sections(results)
    titles = [f"{len(users)} users"] * bool(users) + ["Results", *(section.title for section in further)]
    parts = [f"# {' '.join(results.dataset.split())}", headline(results), _conditions(results)]
    parts += ["\n".join(f"- [{title}](#{github_anchor(title)})" for title in titles)]
    if users:
        parts += [
            f"## {titles[0]}",
            "Evenly spaced from the best-ranked to the worst-ranked choice.",
            *map(_told, users),
        ]
    parts += [
        "## Results",
        "Percent, 95% interval by bootstrap over users; equal scores count by their expected place.",
    ]
    parts += [results_table(results).to_markdown(), *results.notes]
    for section in further:
        parts += [f"## {section.title}", section.words, section.table.to_markdown() if section.table else None]
    return "\n\n".join(part for part in parts if part) + "\n"


def _told(user: UserStory) -> str:
    """A user's history, preferences and ranking as Markdown."""
    blocks = [f"{_titles(block.items)}: *{plain(block.preference)}*" for block in user.blocks]
    recent = [f"{_titles(user.recent)}; not yet part of the preference"] if user.recent else []
    ranked = [
        f"{entry.place}. {plain(entry.item.title)} {entry.score:.3f}".join(("**",) * 2 if entry.chosen else ("",) * 2)
        for entry in user.ranking
    ]
    head = f"**User {plain(user.user_id)}**, next choice {user.rank} of {user.candidates}"
    steps = "\n".join(f"{step}. {text}" for step, text in enumerate([*blocks, *recent], start=1))
    return f"{head}\n\n{steps}\n\nRanked: {'; '.join(ranked)}"


def _titles(items: Sequence[ItemCard]) -> str:
    return ", ".join(plain(item.title) for item in items)


def github_anchor(title: str) -> str:
    """The anchor that GitHub and the Hub give a heading.

    >>> github_anchor("NDCG@5 by items in the history")
    'ndcg5-by-items-in-the-history'
    """
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _conditions(results: Results) -> str:
    return f"{', '.join(conditions(results))}, candidates `{results.candidate_hash}`."


def console_page(results: Results) -> str:
    """What ``mllm-msr evaluate`` prints: the table, our differences, and the whole catalogue if it was ranked."""
    parts = [results_table(results).to_text()]
    if table := slice_table(results, FREQUENCY):
        parts += [f"{metric_label(SLICED)} by {DIVISIONS[FREQUENCY]}:", table.to_text()]
    if differences := sasrec_table(results.against_sasrec, ("auc", SLICED)):
        parts += ["In points, paired by user:", differences.to_text()]
    if differences := differences_table(results, ("auc", SLICED)):
        parts += ["In points, paired by user:", differences.to_text()]
    if catalogue := results.full_catalogue:
        items = f"{catalogue.n_users:,} users, sampled candidates and all {catalogue.n_candidates:,.0f} items:"
        parts += [items, catalogue_table(catalogue, COMPARED_AMONG_ALL).to_text(), catalogue_words(results, catalogue)]
        if differences := sasrec_table(catalogue.against_sasrec, COMPARED_AMONG_ALL):
            parts += ["Among all items, in points, paired by user:", differences.to_text()]
    parts += results.notes
    return "\n".join(parts)


def compare(runs: Sequence[RunFolder]) -> str:
    """The variants of several runs side by side, as Markdown; says where the runs ranked other candidates.

    A run that is named twice, by whatever path, counts once.

    Raises:
        FileNotFoundError: a run that has not been evaluated.
        ValueError: fewer than two runs.
    """
    different: dict[Path, RunFolder] = {}
    repeated = []
    for run in runs:
        if run.path.resolve() in different:
            repeated.append(str(run.path))
        different.setdefault(run.path.resolve(), run)
    if repeated:
        print(f"the same run is named twice and counts once: {', '.join(repeated)}", file=sys.stderr)
    if len(different) < 2:
        again = ": this one run is named twice" if repeated else ""
        raise ValueError(f"compare needs two different runs or more{again}")
    labels = _labels(list(different.values()))
    results = {label: run.results() for label, run in labels.items()}
    rows = []
    for variant in in_order({name for run_results in results.values() for name in run_results.variants}):
        for label, run_results in results.items():
            if metrics := run_results.variants.get(variant.name):
                rows.append(
                    Row.of(variant, [Cell(label), *(estimate_cell(metrics.get(name)) for name in SIDE_BY_SIDE)])
                )
    parts = [TableView(("", "run", *(metric_label(name) for name in SIDE_BY_SIDE)), tuple(rows)).to_markdown()]
    if len({run_results.candidate_hash for run_results in results.values()}) > 1:
        parts.append("Not the same candidates: compare the differences between variants, not the figures.")
    if among_all := catalogues_side_by_side(results):
        parts += [
            "Among all items, and less SASRec in the same run, in points, paired by user:",
            among_all.to_markdown(),
        ]
    if paired := beside_the_first(labels):
        parts.append(
            f"{variant_of(OURS).label} less that of {next(iter(labels))}, in points, paired by user; and how far the "
            "scores and the preferences agree:"
        )
        parts.append(paired.to_markdown())
    parts.append("\n".join(f"- {label}: {facts.dataset}, {_conditions(facts)}" for label, facts in results.items()))
    return "\n\n".join(parts)


def catalogues_side_by_side(results: Mapping[str, Results]) -> TableView | None:
    """Each run's variants among all items, with their differences from SASRec; None if no run was ranked so."""
    catalogues = {label: each.full_catalogue for label, each in results.items() if each.full_catalogue}
    rows = []
    for variant in in_order({name for catalogue in catalogues.values() for name in catalogue.variants}):
        for label, catalogue in catalogues.items():
            if figures := catalogue.variants.get(variant.name):
                less = catalogue.against_sasrec.get(variant.name, {})
                cells = [
                    (estimate_cell(figures.full.get(name)), *difference_cells(less.get(name)))
                    for name in COMPARED_AMONG_ALL
                ]
                rows.append(Row.of(variant, [Cell(label), *(cell for group in cells for cell in group)]))
    head = [text for name in COMPARED_AMONG_ALL for text in (metric_label(name), "less SASRec", "p")]
    return TableView(("", "run", *head), tuple(rows)) if rows else None


def _labels(runs: Sequence[RunFolder]) -> dict[str, RunFolder]:
    """Each run under its folder's name; under its path if another is called the same."""
    names = [run.path.resolve().name for run in runs]
    return {
        name if names.count(name) == 1 else str(run.path): run for name, run in zip(names, runs, strict=True)
    }  # fmt: skip


def beside_the_first(runs: Mapping[str, RunFolder]) -> TableView | None:
    """Our scores in each run against those in the first, where both ranked the same candidates for the same users:
    differences in points, how far the scores agree, and what share of all words in two runs' preferences both have."""
    (_, first), *others = runs.items()
    keys = ["user_id", "item_id", "label"]
    rows = []
    for label, run in others:
        if not (first.has(SCORES) and run.has(SCORES)):
            continue
        ours, theirs = (
            folder.scan(SCORES).filter(variant=OURS).select(*keys, "logit").sort(keys).collect()
            for folder in (first, run)
        )
        if ours.is_empty() or not ours.select(keys).equals(theirs.select(keys)):
            continue
        differences = paired_differences(ours["user_id"], ours["label"], theirs["logit"], ours["logit"])
        cells = [cell for name in COMPARED for cell in difference_cells(Difference.from_json(differences[name]))]
        agreed = agreement_cells(agreement(ours["user_id"], ours["logit"], theirs["logit"]))
        rows.append(Row(label, (*cells, *agreed, Cell(_shared_words(first, run)))))
    gaps = [head for name in COMPARED for head in (metric_label(name), "p")]
    head = ("", *gaps, *AGREEMENT_HEAD, "words that the preferences share, percent")
    return TableView(head, tuple(rows)) if rows else None


def _shared_words(first: RunFolder, second: RunFolder) -> str:
    """Of the words in a user's preference after a step in either run, the share in both, in percent; mean over all."""
    if not (first.has(PREFERENCES) and second.has(PREFERENCES)):
        return ""
    words = pl.col("preference").str.to_lowercase().str.extract_all(r"\w+")
    ours, theirs = (run.read(PREFERENCES).select("user_id", "step", words) for run in (first, second))
    both = ours.join(theirs, on=["user_id", "step"])
    union = both["preference"].list.set_union(both["preference_right"]).list.len().to_numpy()
    common = both["preference"].list.set_intersection(both["preference_right"]).list.len().to_numpy()
    return percent((common[union > 0] / union[union > 0]).mean()) if (union > 0).any() else ""
