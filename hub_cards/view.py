"""Results as tables: one view for the console, ``results.md``, the report, comparisons, studies and cards."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from mllm_msr.evaluation.metrics import metric_label
from mllm_msr.evaluation.variants import VARIANTS, Variant, variant_of
from mllm_msr.records.results import (
    Agreement,
    AgreementFigures,
    ColdItems,
    Difference,
    Estimate,
    FullCatalogue,
    FusionWeights,
    Results,
)
from mllm_msr.records.sections import OURS

COMPARED = ("auc", "hr@5", "ndcg@5")
COMPARED_AMONG_ALL = ("hr@10", "ndcg@10")
AMONG_ALL = ("hr@5", "hr@10", "ndcg@5", "ndcg@10")
ORDERED_BY = ("ndcg@5", "ndcg@10", "hr@10")  # the first that was measured
SLICED = "ndcg@5"
DIVISIONS = {
    "history_length": "items in the history",
    "target_train_count": "training interactions of the chosen item",
    "popularity_decile": "popularity of the chosen item, tenths of the catalogue",
}
COLD_OR_TRAINED = {
    "cold_cold": "cold target, cold negatives",
    "cold_trained": "cold target, trained negatives",
    "trained_cold": "trained target, cold negatives",
    "trained_trained": "trained target, trained negatives",
}
FREQUENCY = "target_train_count"  # the division of the report's first page
SAMPLED_OR_ALL = (
    "Most of the items that could be ranked above the chosen one are missing among sampled candidates. Figures are "
    "therefore higher than among all items, for some variants more than for others, and even their order may change "
    "(Krichene and Rendle, KDD 2020). Where it does, believe the whole catalogue."
)


@dataclass(frozen=True)
class Cell:
    """A text; ``interval`` follows it in brackets or stands below it in small print; ``best``: of its column."""

    text: str = ""
    interval: str = ""
    best: bool = False


@dataclass(frozen=True)
class Row:
    """One row; where it is about a variant, that variant's colour and meaning go with its label."""

    label: str
    cells: tuple[Cell, ...]
    variant: Variant | None = None

    @classmethod
    def of(cls, variant: Variant, cells: Iterable[Cell]) -> "Row":
        return cls(variant.label, tuple(cells), variant)


@dataclass(frozen=True)
class TableView:
    """A table of texts: the head of every column, that of the labels first, and the rows."""

    head: tuple[str, ...]
    rows: tuple[Row, ...]

    @classmethod
    def of_texts(cls, head: Sequence[str], rows: Iterable[Sequence[object]]) -> "TableView":
        """A table without intervals; None is an empty cell."""
        texts = [["" if value is None else str(value) for value in row] for row in rows]
        return cls(tuple(head), tuple(Row(label, tuple(map(Cell, cells))) for label, *cells in texts))

    @property
    def texts(self) -> list[bool]:
        """For every column after the labels, whether it holds words and not figures."""
        columns = zip(*(row.cells for row in self.rows), strict=True)
        return [any(re.search(r"[^\W\d_]{2}", cell.text) for cell in column) for column in columns]

    def to_markdown(self) -> str:
        """
        >>> print(TableView(("", "AUC"), (Row("ours", (Cell("81.2", "79.1-83.3", best=True),)),)).to_markdown())
        | | AUC |
        |:--|--:|
        | ours | **81.2** (79.1-83.3) |
        """

        def line(texts: Iterable[str]) -> str:
            return "| " + " | ".join(map(markdown_cell, texts)) + " |"

        def text(cell: Cell) -> str:
            value = f"**{cell.text}**" if cell.best else cell.text
            return f"{value} ({cell.interval})" if cell.interval else value

        rule = "|:--|" + "".join(":--|" if is_text else "--:|" for is_text in self.texts)
        lines = [line(self.head).replace("|  |", "| |", 1), rule]
        return "\n".join(lines + [line([row.label, *map(text, row.cells)]) for row in self.rows])

    def to_text(self) -> str:
        """Aligned columns for a terminal, the interval below each value, ``*`` on the best.

        >>> print(TableView(("", "AUC"), (Row("ours", (Cell("81.2", "79.1-83.3", best=True),)),)).to_text())
                    AUC
        ours      81.2*
              79.1-83.3
        """
        first = max(len(label) for label in (self.head[0], *(row.label for row in self.rows))) + 2
        texts = [text for row in self.rows for cell in row.cells for text in (cell.text + "*", cell.interval)]
        width = max(len(text) for text in (*texts, *self.head[1:]))

        def line(label: str, values: Iterable[str]) -> str:
            return (f"{label:<{first}}" + "  ".join(f"{value:>{width}}" for value in values)).rstrip()

        lines = [line(self.head[0], self.head[1:])]
        for row in self.rows:
            lines.append(line(row.label, [cell.text + "*" * cell.best for cell in row.cells]))
            if any(cell.interval for cell in row.cells):
                lines.append(line("", [cell.interval for cell in row.cells]))
        return "\n".join(lines)


@dataclass(frozen=True)
class Section:
    """A table under a title, with what a reader needs to know of it; ``detail`` is folded away in the report."""

    title: str
    words: str
    table: TableView | None = None
    detail: bool = True


def markdown_cell(text: str) -> str:
    """Text of a table's cell: of one line, without what would end the cell or begin a tag.

    >>> markdown_cell("a|b <i> < 0.001")
    'a\\\\|b &lt;i> < 0.001'
    """
    return re.sub(r"<(?=[A-Za-z/!])", "&lt;", " ".join(text.split()).replace("|", "\\|"))


def in_order(names: Iterable[str]) -> list[Variant]:
    """Variants in reading order: ours, its ablations, baselines, those we do not know, the oracle last."""
    places = {name: (variant.kind == "oracle", place) for place, (name, variant) in enumerate(VARIANTS.items())}
    return [variant_of(name) for name in sorted(names, key=lambda name: places.get(name, (False, len(places))))]


def metrics_of(results: Results) -> list[str]:
    """The metrics that at least one variant has, in the order in which they were asked for."""
    return list(dict.fromkeys(name for metrics in results.variants.values() for name in metrics))


def measured(names: Iterable[str], wanted: Sequence[str]) -> list[str]:
    """Those of the ``wanted`` metrics that are among ``names``; if none is, the first of ``names``.

    >>> measured(["hr@3", "auc"], ("auc", "hr@5")), measured(["hr@3"], ("auc",))
    (['auc'], ['hr@3'])
    """
    names = list(names)
    return [name for name in wanted if name in names] or names[:1]


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def interval(estimate: Estimate) -> str:
    """In percent; empty if it is a point, as that of chance is."""
    return f"{percent(estimate.low)}-{percent(estimate.high)}" if estimate.high - estimate.low > 1e-9 else ""


def estimate_cell(estimate: Estimate | None, best: bool = False) -> Cell:
    """In percent; empty if the metric was not computed."""
    return Cell(percent(estimate.value), interval(estimate), best) if estimate else Cell()


def difference_cells(difference: Difference | None) -> tuple[Cell, Cell]:
    """The difference in points, and its p."""
    if difference is None:
        return Cell(), Cell()
    p = "< 0.001" if difference.p < 0.001 else f"{difference.p:.3f}"
    low, high = 100 * difference.low, 100 * difference.high
    return Cell(f"{100 * difference.value:+.1f}", f"{low:+.1f} to {high:+.1f}"), Cell(p)


def agreement_cells(figures: AgreementFigures) -> tuple[Cell, Cell, Cell]:
    """See :data:`AGREEMENT_HEAD`."""
    correlation = "" if figures.rank_correlation is None else f"{figures.rank_correlation:.4f}"
    return Cell(f"{figures.max_difference:.2g}"), Cell(correlation), Cell(percent(figures.first_changed))


AGREEMENT_HEAD = ("largest difference of a logit", "rank correlation", "users with another item first, percent")


def results_table(results: Results) -> TableView:
    """Every variant and metric, in percent; the best of each column is marked, the oracle does not compete."""
    names = metrics_of(results)
    competing = [metrics for name, metrics in results.variants.items() if variant_of(name).kind != "oracle"]
    highest = {name: max((m[name].value for m in competing if name in m), default=None) for name in names}

    def cell(variant: Variant, name: str) -> Cell:
        estimate = results.variants[variant.name].get(name)
        best = estimate is not None and variant.kind != "oracle" and estimate.value == highest[name]
        return estimate_cell(estimate, best)

    rows = [Row.of(variant, [cell(variant, name) for name in names]) for variant in in_order(results.variants)]
    return TableView(("", *(metric_label(name) for name in names)), tuple(rows))


def differences_table(results: Results, wanted: Sequence[str] = COMPARED) -> TableView | None:
    """Our variant less each other one, in points, with p; None if that was not computed."""
    metrics = measured(metrics_of(results), wanted)
    rows = [
        Row.of(
            variant, [cell for name in metrics for cell in difference_cells(results.against[variant.name].get(name))]
        )
        for variant in in_order(results.against)
    ]
    head = [label for name in metrics for label in (metric_label(name), "p")]
    return TableView((f"{variant_of(OURS).label} less", *head), tuple(rows)) if rows else None


def sasrec_table(
    differences: Mapping[str, Mapping[str, Difference]], wanted: Sequence[str] = COMPARED
) -> TableView | None:
    """Each variant less SASRec, in points, with p; None if SASRec was not evaluated."""
    metrics = measured(dict.fromkeys(name for each in differences.values() for name in each), wanted)
    rows = [
        Row.of(variant, [cell for name in metrics for cell in difference_cells(differences[variant.name].get(name))])
        for variant in in_order(differences)
        if variant.kind != "oracle"
    ]
    head = [label for name in metrics for label in (metric_label(name), "p")]
    return TableView((f"less {variant_of('sasrec').label}", *head), tuple(rows)) if rows else None


def fusion_table(fusion: FusionWeights) -> TableView:
    """What the fused score gives each member, by how often an item was chosen in training."""
    rows = [
        (bucket, *(f"{weight:+.2f}" for weight in weights), f"{fusion.bias[bucket]:+.2f}")
        for bucket, weights in fusion.weights.items()
    ]
    labels = [variant_of(name).label for name in fusion.members]
    return TableView.of_texts(("training interactions", *labels, "added"), rows)


def catalogue_table(catalogue: FullCatalogue, wanted: Sequence[str] = AMONG_ALL) -> TableView:
    """The same users' metrics among sampled candidates and among all items."""
    metrics = measured(next(iter(catalogue.variants.values())).full, wanted)
    rows = []
    for variant in in_order(catalogue.variants):
        figures = catalogue.variants[variant.name]
        cells = [estimate_cell(part.get(name)) for name in metrics for part in (figures.sampled, figures.full)]
        rows.append(Row.of(variant, cells))
    head = [f"{metric_label(name)} {among}" for name in metrics for among in ("sampled", "all items")]
    return TableView(("", *head), tuple(rows))


def catalogue_words(results: Results, catalogue: FullCatalogue) -> str:
    """Whether variants keep their order when all items are ranked."""
    metric = measured(next(iter(catalogue.variants.values())).full, ORDERED_BY)[0]
    figures = {
        variant: (figures.sampled[metric].value, figures.full[metric].value)
        for variant in in_order(catalogue.variants)
        for figures in [catalogue.variants[variant.name]]
    }
    turned = []
    for pair in combinations(figures, 2):
        behind, ahead = sorted(pair, key=lambda variant: figures[variant][0])
        if figures[behind][0] < figures[ahead][0] and figures[behind][1] > figures[ahead][1]:
            turned.append(
                f"{ahead.label} is ahead of {behind.label} among sampled candidates and behind among all items"
            )
    order = "; ".join(turned[:3]) + (f"; and {len(turned) - 3} pairs more" if turned[3:] else "")
    words = f"By {metric_label(metric)} of these users {order or 'both put the variants into one order'}."
    if "fused" in catalogue.variants and results.fusion_without_answer:
        words += f" The fused score has asked the answer of the best {catalogue.reranked} items of each user."
    if OURS in results.variants and OURS not in catalogue.variants:
        words += f" {variant_of(OURS).label} is not among them: so many pairs were too costly; fewer users may not be."
    return words


def slice_table(results: Results, by: str) -> TableView | None:
    """One metric of every variant in each part of the users; None if they were not divided so."""
    parts = [part for part in results.slices if part.by == by]
    rows = [
        Row.of(variant, [estimate_cell(part.variants.get(variant.name, {}).get(SLICED)) for part in parts])
        for variant in in_order(results.variants)
    ]
    head = [f"{part.part} ({part.users:,} users)" for part in parts]
    return TableView((DIVISIONS[by], *head), tuple(rows)) if parts else None


def cold_table(cold: ColdItems) -> TableView:
    """How often targets of each kind stand above negatives of each kind."""
    rows = []
    for variant in in_order(cold.variants):
        figures = cold.variants[variant.name]
        rows.append(Row.of(variant, [estimate_cell(figures.get(name)) for name in COLD_OR_TRAINED]))
    return TableView(("AUC", *COLD_OR_TRAINED.values()), tuple(rows))


def checks_table(results: Results) -> TableView | None:
    rows = []
    for variant in in_order(results.checks):
        check = results.checks[variant.name]
        correlation = check.popularity_correlation
        text = "" if correlation is None else f"{correlation:.2f}".replace("-0.00", "0.00")
        rows.append(Row.of(variant, (Cell(percent(check.tied_users)), Cell(text))))
    head = ("", "users whose chosen item is tied, percent", "rank correlation with popularity")
    return TableView(head, tuple(rows)) if rows else None


def agreement_table(agreement: Agreement) -> TableView:
    rows = [Row(way, agreement_cells(figures)) for way, figures in agreement.others.items()]
    return TableView(("computed in", *AGREEMENT_HEAD), tuple(rows))


def sections(results: Results) -> list[Section]:
    """All evidence beyond the table of results, as far as it was computed."""
    ours, parts = variant_of(OURS).label, []
    if table := slice_table(results, FREQUENCY):
        words = (
            "Percent. By how often the chosen item occurs in training: 0 are items that nobody had chosen, of which a "
            "model of identities knows nothing."
        )
        parts.append(Section(f"{metric_label(SLICED)} by {DIVISIONS[FREQUENCY]}", words, table, detail=False))
    if differences := sasrec_table(results.against_sasrec):
        words = "Each variant less SASRec, in points, on the same users and candidates, paired by user; p is two-sided."
        parts.append(Section("Differences from SASRec", words, differences, detail=False))
    if differences := differences_table(results):
        words = (
            f"{ours} less each other variant, in points, on the same users and candidates, by a bootstrap over users "
            "paired by user. p is two-sided and not corrected for the number of variants."
        )
        parts.append(Section("Differences from each variant", words, differences, detail=False))
    if catalogue := results.full_catalogue:
        words = (
            f"The chosen items of {catalogue.n_users:,} users, ranked among the sampled candidates and among all "
            f"{catalogue.n_candidates:,.0f} items that the user never chose; percent. "
            f"{catalogue_words(results, catalogue)} {SAMPLED_OR_ALL}"
        )
        parts.append(Section("Among all items", words, catalogue_table(catalogue), detail=False))
        if differences := sasrec_table(catalogue.against_sasrec, COMPARED_AMONG_ALL):
            words = "Each variant less SASRec among all items, in points, paired by user; p is two-sided."
            parts.append(Section("Differences from SASRec among all items", words, differences, detail=False))
    if results.fusion:
        words = (
            "The fused score of an item is a weighted sum of its standardised scores by each member, fitted on "
            "validation tasks, by how often the item occurs in training; weights are drawn towards shared ones."
        )
        parts.append(Section("What the fused score weighs", words, fusion_table(results.fusion), detail=False))
    if weights := results.fusion_without_answer:
        words = (
            f"These rank the whole catalogue; the answer of {ours}, which takes a forward of the model, is asked of "
            "its best items alone."
        )
        parts.append(Section("What it weighs where the answer is not asked", words, fusion_table(weights)))
    if cold := results.cold_items:
        among = "all items" if cold.among_all else "the sampled candidates"
        words = (
            f"How often the chosen item stands above another one of the same user, of {among}; percent. Cold: nobody "
            f"chose it in training ({cold.cold_targets:,} targets). Trained: somebody did, a target at least 5 times "
            f"({cold.trained_targets:,} targets). No softmax over trained items pushes cold ones down; if that alone "
            "brought cold targets up, trained targets would lose to cold negatives."
        )
        parts.append(Section("Cold and trained items against each other", words, cold_table(cold)))
    for by, title in DIVISIONS.items():
        if by != FREQUENCY and (table := slice_table(results, by)):
            parts.append(Section(f"{metric_label(SLICED)} by {title}", "Percent.", table))
    if calibration := results.calibration:
        trained, corrected = calibration.as_trained.error, calibration.prior_corrected.error
        words = (
            f"Expected calibration error of the probability of Yes, in points: {percent(trained)} as trained, "
            f"{percent(corrected)} when it is corrected for the share of chosen items among these candidates."
        )
        parts.append(Section("Calibration", words))
    if checks := checks_table(results):
        words = (
            "Tied: another candidate has the same score as the chosen item. The rank correlation is that of scores and "
            "training counts within a user, its mean over users; 1 would be a ranking by popularity."
        )
        parts.append(Section("Ties and popularity", words, checks))
    if agreement := results.agreement:
        words = (
            f"Scores of {ours} for {agreement.n_users:,} users, against those evaluated ({agreement.way}). The rank "
            "correlation is within a user, its mean over users."
        )
        parts.append(Section("Do other ways of computing agree?", words, agreement_table(agreement)))
    return parts
