"""results.md, the console, the comparison of runs, and studies, from results as a run would leave them."""

import json
import re
from dataclasses import replace

import polars as pl
import pytest
from hub_run import fabricate

from mllm_msr.hub_cards.figures import reliability_chart, slice_charts
from mllm_msr.hub_cards.report import write_report
from mllm_msr.hub_cards.results_page import compare, console_page, results_page, write_results
from mllm_msr.hub_cards.study_page import StudyEntry, StudyFigure, StudyResults, write_study
from mllm_msr.records.results import (
    Agreement,
    AgreementFigures,
    Calibration,
    CatalogueFigures,
    Check,
    Difference,
    Estimate,
    FullCatalogue,
    Metrics,
    Reliability,
    ReliabilityBin,
    Results,
    Slice,
)
from mllm_msr.records.schema import PREFERENCES, SCORES


def metrics(value: float, *names: str) -> Metrics:
    return dict.fromkeys(names or ("auc", "hr@5", "mrr@5", "ndcg@5"), Estimate(value, value - 0.01, value + 0.01))


def gap(value: float, p: float) -> dict[str, Difference]:
    return dict.fromkeys(("auc", "hr@5", "ndcg@5"), Difference(value, value - 0.02, value + 0.02, p))


VARIANTS = {"mllm_msr": metrics(0.8), "sasrec": metrics(0.85), "popularity": metrics(0.6)}
BINS = [ReliabilityBin(0.1, 0.05, 10), ReliabilityBin(0.4, 0.3, 10)]
BARE = Results("films", "strict", "test", 10, 21, 0, "abc", VARIANTS)
RESULTS = replace(
    BARE,
    against={"sasrec": gap(-0.05, 0.0004), "popularity": gap(0.2, 0.0123)},
    slices=[
        Slice("target_train_count", "0", 4, {"mllm_msr": metrics(0.7), "sasrec": metrics(0.5)}),
        Slice("target_train_count", "1+", 6, VARIANTS),
    ],
    checks={"mllm_msr": Check(0.0, 0.07), "popularity": Check(0.43, 1.0), "sasrec": Check(0.0)},
    calibration=Calibration(Reliability(BINS, 0.075), Reliability(BINS, 0.02), -3.0),
    agreement=Agreement(10, "float32", {"bfloat16": AgreementFigures(0.0123, 0.1, 0.98765)}),
)


def catalogue(**values: tuple[float, float]) -> FullCatalogue:
    """Of each variant: a value among sampled candidates, and one among all items."""
    names = ("hr@5", "hr@10", "ndcg@5")
    variants = {
        name: CatalogueFigures(metrics(sampled, *names), metrics(full, *names))
        for name, (sampled, full) in values.items()
    }
    return FullCatalogue(10, 1400.5, variants)


@pytest.fixture
def pair(tmp_path):
    """Two finished runs of the same candidates, in folders "one" and "two"."""
    return [fabricate(tmp_path / name) for name in ("one", "two")]


def tables(page: str) -> list[list[str]]:
    """The lines of every Markdown table."""
    found: list[list[str]] = [[]]
    for line in page.splitlines():
        if line.startswith("|"):
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [one for one in found if one]


def test_the_page_holds_every_table_and_defeat_is_plain():
    page = results_page(RESULTS)
    for one in tables(page):
        assert len({line.count("|") for line in one}) == 1, one[0]
    assert len(tables(page)) == 5
    assert "| SASRec | -5.0 (-7.0 to -3.0) | < 0.001 |" in page
    assert "| popularity | +20.0 (+18.0 to +22.0) | 0.012 |" in page
    assert "| training interactions of the chosen item | 0 (4 users) | 1+ (6 users) |" in page
    assert "| popularity |  | 60.0 (59.0-61.0) |" in page  # not scored in the first part
    assert "7.5 as trained, 2.0 when" in page
    assert "10 users, 21 candidates each, strict protocol, test split, seed 0, candidates `abc`." in page
    assert "| bfloat16 | 0.012 | 0.9877 | 10.0 |" in page


def test_a_run_with_nothing_but_its_table_has_a_page_too():
    assert len(tables(results_page(BARE))) == 1


def test_the_console_shows_differences_and_the_whole_catalogue():
    shown = console_page(replace(RESULTS, full_catalogue=catalogue(mllm_msr=(0.8, 0.3), sasrec=(0.7, 0.4))))
    lines = {line.split("  ")[0]: line.split() for line in shown.splitlines() if not line.startswith(" ")}
    assert lines["popularity"][1:] == ["+20.0", "0.012", "+20.0", "0.012"] and "SASRec" in lines
    assert "MLLM-MSR is ahead of SASRec among sampled candidates and behind among all items" in shown
    assert console_page(BARE).count("SASRec") == 1


def among_all() -> FullCatalogue:
    """Two variants, one of them SASRec, among all items."""
    names = ("hr@10", "ndcg@10")
    variants = {name: CatalogueFigures(metrics(0.8, *names), metrics(0.2, *names)) for name in ("fused", "sasrec")}
    less = {"fused": dict.fromkeys(names, Difference(0.031, 0.011, 0.051, 0.002))}
    return FullCatalogue(10, 1400.5, variants, against_sasrec=less)


def test_differences_from_sasrec_are_shown_among_all_items_too(pair):
    whole = replace(RESULTS, full_catalogue=among_all(), notes=["The catalogue is cut."])
    page, shown = results_page(whole), console_page(whole)
    assert "## Differences from SASRec among all items" in page and "The catalogue is cut." in page
    assert "| less SASRec | HR@10 | p | NDCG@10 | p |" in page
    assert "| fused | +3.1 (+1.1 to +5.1) | 0.002 | +3.1 (+1.1 to +5.1) | 0.002 |" in page
    assert "HR@10 all items" in shown and "NDCG@10 all items" in shown
    assert "Among all items, in points, paired by user:" in shown and shown.endswith("The catalogue is cut.")
    replace(pair[1].results(), full_catalogue=among_all()).write(pair[1].metrics)
    table = tables(compare(pair))[1]
    assert table[0] == "| | run | HR@10 | less SASRec | p | NDCG@10 | less SASRec | p |"
    assert [line.split("|")[1:3] for line in table[2:]] == [[" fused ", " two "], [" SASRec ", " two "]]
    assert "+3.1 (+1.1 to +5.1) | 0.002" in table[2]


def test_runs_side_by_side_say_when_their_candidates_differ(pair, tmp_path):
    both = compare(pair)
    assert "Not the same candidates" not in both
    first, _ = tables(both)
    assert [line.split("|")[1:3] for line in first[2:4]] == [[" MLLM-MSR ", " one "], [" MLLM-MSR ", " two "]]
    assert len(first) == 2 + 2 * 7
    replace(pair[1].results(), candidate_hash="xyz").write(pair[1].metrics)
    assert "Not the same candidates" in compare(pair)
    with pytest.raises(ValueError, match=r"needs two different runs or more$"):
        compare(pair[:1])
    pair[1].metrics.unlink()
    with pytest.raises(FileNotFoundError, match=r"metrics\.json is missing: run `mllm-msr evaluate"):
        compare(pair)


def test_a_run_that_is_named_twice_counts_once(pair, tmp_path, capsys):
    one, two = pair
    (tmp_path / "link").symlink_to(one.path)
    again = [one] + [replace(one, path=path) for path in (one.path, tmp_path / "two/../one", tmp_path / "link")]
    for second in again:
        with pytest.raises(ValueError, match="needs two different runs or more: this one run is named twice"):
            compare([one, second])
    capsys.readouterr()
    assert compare([one, *again, two]) == compare([one, two])
    assert capsys.readouterr().err.startswith("the same run is named twice and counts once: ")


def test_runs_of_the_same_candidates_are_compared_user_by_user(pair):
    _, two = pair
    scores, preferences = two.read(SCORES), two.read(PREFERENCES)
    worse = pl.when(variant="mllm_msr").then(-pl.col("logit")).otherwise("logit")
    two.write(SCORES, scores.with_columns(worse.alias("logit")))
    twice = pl.col("preference") + " and " + pl.col("preference")
    two.write(PREFERENCES, preferences.with_columns(twice.alias("preference")))
    page = compare(pair)
    line = tables(page)[1][-1]
    assert len({row.count("|") for row in tables(page)[1]}) == 1
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[1] == "two" and cells[2].startswith("-") and float(cells[3].removeprefix("<")) < 0.05
    assert cells[9] == "-1.0000" and float(cells[10]) > 50
    assert 80 < float(cells[11]) < 100  # only the word "and" is new
    two.write(SCORES, scores.filter(pl.col("user_id") != "u0"))
    assert len(tables(compare(pair))) == 1  # not the same users


def test_the_whole_catalogue_is_shown_beside_the_sample_and_a_turned_order_is_named():
    values = {"mllm_msr": (0.8, 0.3), "sasrec": (0.7, 0.4), "popularity": (0.5, 0.1)}
    page = results_page(replace(RESULTS, full_catalogue=catalogue(**values)))
    assert "| SASRec | 70.0 (69.0-71.0) | 40.0 (39.0-41.0) |" in page
    turned = "MLLM-MSR is ahead of SASRec among sampled candidates and behind among all items"
    assert f"By NDCG@5 of these users {turned}." in page
    for one in tables(page):
        assert len({line.count("|") for line in one}) == 1, one[0]
    del values["mllm_msr"]
    assert "MLLM-MSR is not among them" in results_page(replace(RESULTS, full_catalogue=catalogue(**values)))
    page = results_page(replace(RESULTS, full_catalogue=catalogue(sasrec=(0.7, 0.2), popularity=(0.5, 0.1))))
    assert "both put the variants into one order." in page


def test_the_report_shows_the_evidence(make_run):
    run = make_run()
    RESULTS.write(run.metrics)
    write_results(run)
    page = write_report(run).read_text()
    for title in ("Differences from each variant", "&lt; 0.001", "NDCG@5 by training interactions", "Is a probability"):
        assert title in page
    assert "Ties and popularity" in page and "SASRec" in page and "bfloat16" in page
    shown = run.results_page.read_text()
    assert shown.endswith(results_page(RESULTS).partition("## Results")[2])
    assert shown.count("**User u") == 6 and shown.index("**User u") < shown.index("## Results")
    assert "<script>" not in shown
    for title in re.findall(r"^- \[(.*)\]\(#", shown, re.MULTILINE):
        assert f"\n## {title}\n" in shown


def test_charts_are_drawn_only_from_what_is_there():
    assert len(slice_charts(RESULTS)) == 1 and reliability_chart(RESULTS)
    assert slice_charts(BARE) == [] and reliability_chart(BARE) is None
    assert slice_charts(replace(RESULTS, slices=RESULTS.slices[:1])) == []  # one part is no curve


def test_a_study_says_what_matters_and_what_cannot_be_told(tmp_path):
    def entry(cell: str, variant: str, value: float, difference: float | None) -> StudyEntry:
        gap = None if difference is None else Difference(difference, difference - 0.02, difference + 0.02, 0.01)
        figure = StudyFigure(Estimate(value, value - 0.02, value + 0.02), 0.003, gap)
        figures = dict.fromkeys(("auc", "hr@5", "ndcg@5"), figure)
        return StudyEntry(cell, variant, 2, 50, difference is not None or cell == "full", figures, (3.0, 5.0))

    entries = (
        entry("full", "mllm_msr", 0.8, None),
        entry("full", "blank_images", 0.7, -0.1),
        entry("blocks of <6>", "mllm_msr", 0.79, -0.01),
        entry("other data", "mllm_msr", 0.6, None),
    )
    page = write_study(tmp_path, StudyResults("s", entries, ("x: broke",)))
    assert "- full: blank images: 10.0 points of AUC below" in page
    assert "- blocks of <6>: these users cannot tell it from the first (1.0 points of AUC)" in page
    assert "| other data (other candidates) |" in page and "- other data" not in page
    assert "80.0 ±0.3 (78.0-82.0)" in page and "4 s |" in page
    assert "Failed: x: broke." in page
    (table,) = tables(page)
    assert len({line.count("|") for line in table}) == 1
    content = json.loads((tmp_path / "study.json").read_text())
    assert content["entries"][1]["metrics"]["auc"]["against_first"]["p"] == 0.01
    chart = (tmp_path / "study.svg").read_text()
    assert chart.startswith("<svg xmlns=") and "blocks of &lt;6&gt;" in chart and chart.count("<circle") == 4
