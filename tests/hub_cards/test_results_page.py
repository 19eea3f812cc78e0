"""results.md, its tables and the comparison of runs, from metrics as a run would leave them."""

import json

import polars as pl
import pytest

from mllm_msr.hub_cards import evidence
from mllm_msr.hub_cards.report import write_report
from mllm_msr.hub_cards.results_page import compare, results_page, write_results
from mllm_msr.hub_cards.study_page import write_study


def row(value: float) -> dict:
    result = {"value": value, "ci95": [value - 0.01, value + 0.01]}
    return {"auc": result, "hr@5": result, "mrr@5": result, "ndcg@5": result}


def gap(value: float, p: float) -> dict:
    result = {"difference": value, "ci95": [value - 0.02, value + 0.02], "p": p}
    return {"auc": result, "hr@5": result, "ndcg@5": result}


@pytest.fixture
def metrics() -> dict:
    rows = {"mllm_msr": row(0.8), "sasrec": row(0.85), "popularity": row(0.6)}
    bins = [{"mean": 0.1, "chosen": 0.05, "count": 10}, {"mean": 0.4, "chosen": 0.3, "count": 10}]
    return {
        "dataset": "films",
        "n_users": 10,
        "n_candidates": 21,
        "candidate_hash": "abc",
        "rows": rows,
        "against": {"sasrec": gap(-0.05, 0.0004), "popularity": gap(0.2, 0.0123)},
        "slices": [
            {"by": "target_train_count", "part": "0", "users": 4, "rows": {"mllm_msr": row(0.7), "sasrec": row(0.5)}},
            {"by": "target_train_count", "part": "1+", "users": 6, "rows": rows},
        ],
        "calibration": {
            "as_trained": {"bins": bins, "error": 0.075},
            "prior_corrected": {"bins": bins, "error": 0.02, "shift": -3.0},
        },
        "checks": {
            "mllm_msr": {"tied_users": 0.0, "popularity_correlation": 0.07},
            "popularity": {"tied_users": 0.43, "popularity_correlation": 1.0},
            "sasrec": {"tied_users": 0.0},
        },
    }


def tables(page: str) -> list[list[str]]:
    """The lines of every Markdown table."""
    found: list[list[str]] = [[]]
    for line in page.splitlines():
        if line.startswith("|"):
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [one for one in found if one]


def test_the_page_holds_every_table_and_defeat_is_plain(metrics):
    page = results_page(metrics)
    for one in tables(page):
        assert len({line.count("|") for line in one}) == 1, one[0]
    assert len(tables(page)) == 4
    assert "| SASRec | -5.0 (-7.0 to -3.0) | < 0.001 |" in page
    assert "| popularity | +20.0 (+18.0 to +22.0) | 0.012 |" in page
    assert "| training interactions of the choice | 0 (4 users) | 1+ (6 users) |" in page
    assert "| popularity |  | 60.0 (59.0-61.0) |" in page  # not scored in the first part
    assert "7.5 as trained, 2.0 when" in page
    assert "users 10, candidates 21, candidates `abc`" in page


def test_a_run_with_nothing_but_rows_has_a_page_too(metrics):
    assert len(tables(results_page({"rows": metrics["rows"]}))) == 1


def test_runs_side_by_side_say_when_their_candidates_differ(metrics, tmp_path):
    runs = []
    for name, candidates in (("one", "abc"), ("two", "abc"), ("three", "xyz")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps({**metrics, "candidate_hash": candidates}))
        runs.append(tmp_path / name)
    said = compare(runs[:2])
    assert "Not the same candidates" not in said
    (shown,) = tables(said)
    assert [line.split("|")[1:3] for line in shown[2:4]] == [[" MLLM-MSR ", " one "], [" MLLM-MSR ", " two "]]
    assert len(shown) == 2 + 2 * 3
    assert "Not the same candidates" in compare(runs)
    with pytest.raises(ValueError, match="two runs"):
        compare(runs[:1])
    with pytest.raises(FileNotFoundError, match=r"metrics\.json is missing: run `mllm-msr evaluate"):
        compare([runs[0], tmp_path])


def test_runs_of_the_same_candidates_are_compared_user_by_user(make_run, fabricated, tmp_path):
    one, two = make_run(), fabricated(tmp_path / "two")
    scores = pl.read_parquet(two / "scores.parquet")
    worse = pl.when(row="mllm_msr").then(-pl.col("logit")).otherwise("logit")
    scores.with_columns(worse.alias("logit")).write_parquet(two / "scores.parquet")
    preferences = pl.read_parquet(two / "summaries/preferences.parquet")
    preferences.with_columns(pl.col("preference") + " and " + pl.col("preference")).write_parquet(
        two / "summaries/preferences.parquet"
    )
    said = compare([one, two])
    line = tables(said)[1][-1]
    assert len({row.count("|") for row in tables(said)[1]}) == 1
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[1] == "two" and cells[2].startswith("-") and float(cells[3]) < 0.05
    assert cells[9] == "-1.0000" and float(cells[10]) > 50
    assert 80 < float(cells[11]) < 100  # only the word "and" is new
    scores.filter(pl.col("user_id") != "u0").write_parquet(two / "scores.parquet")
    assert len(tables(compare([one, two]))) == 1  # not the same users


def test_the_whole_catalogue_is_shown_beside_the_sample_and_a_turned_order_is_named(metrics):
    def both(sampled: float, full: float) -> dict:
        names = ("hr@5", "hr@10", "ndcg@5")
        return {kind: dict.fromkeys(names, row(value)["auc"]) for kind, value in (("sampled", sampled), ("full", full))}

    rows = {"mllm_msr": both(0.8, 0.3), "sasrec": both(0.7, 0.4), "popularity": both(0.5, 0.1)}
    metrics["full_catalogue"] = {"n_users": 10, "n_candidates": 1400.5, "rows": rows}
    page = results_page(metrics)
    assert "| SASRec | 70.0 (69.0-71.0) | 40.0 (39.0-41.0) |" in page
    turned = "MLLM-MSR is ahead of SASRec among sampled candidates and behind among all items"
    assert f"By NDCG@5 of these users {turned}." in page and turned in evidence.catalogue_lines(metrics)
    for one in tables(page):
        assert len({line.count("|") for line in one}) == 1, one[0]
    del rows["mllm_msr"]
    assert "MLLM-MSR is not among them" in results_page(metrics)
    rows["sasrec"] = both(0.7, 0.2)
    assert "both put the rows into one order." in results_page(metrics)


def test_the_report_shows_the_evidence(make_run, metrics):
    run = make_run()
    (run / "metrics.json").write_text(json.dumps(metrics))
    write_results(run)
    page = write_report(run).read_text()
    for said in ("Ours against each row", "&lt; 0.001", "NDCG@5 by training interactions", "Is a probability of Yes"):
        assert said in page
    assert "Ties and popularity" in page and "SASRec" in page
    assert (run / "results.md").read_text() == results_page(metrics)


def test_charts_are_drawn_only_from_what_is_there(metrics):
    assert len(evidence.charts(metrics)) == 2
    assert evidence.charts({"rows": metrics["rows"]}) == []
    assert len(evidence.charts({**metrics, "slices": metrics["slices"][:1]})) == 1  # one part is no curve


def test_a_study_says_what_matters_and_what_cannot_be_told(tmp_path):
    def entry(cell: str, name: str, value: float, difference: float | None, half: float = 0.02) -> dict:
        result = {"value": value, "ci95": [value - 0.02, value + 0.02], "seed_std": None}
        if difference is not None:
            ends = [difference - half, difference + half]
            result |= {"difference": difference, "difference_ci95": ends, "p": 0.01}
        facts = {"cell": cell, "row": name, "users": 50, "same_candidates": difference is not None or cell == "full"}
        return {**facts, "metrics": dict.fromkeys(("auc", "hr@5", "ndcg@5"), result)}

    cells = [
        entry("full", "mllm_msr", 0.8, None),
        entry("full", "blank_images", 0.7, -0.1),
        entry("blocks of <6>", "mllm_msr", 0.79, -0.01),
        entry("other data", "mllm_msr", 0.6, None),
    ]
    (tmp_path / "study.json").write_text(json.dumps({"study": "s", "cells": cells, "failures": ["x: broke"]}))
    page = write_study(tmp_path)
    assert "- full: blank images: 10.0 points of AUC below" in page
    assert "- blocks of <6>: not to be told apart by these users (1.0 points of AUC)" in page
    assert "| other data (other candidates) |" in page and "- other data" not in page
    assert "Failed: x: broke." in page
    (shown,) = tables(page)
    assert len({line.count("|") for line in shown}) == 1
    chart = (tmp_path / "study.svg").read_text()
    assert chart.startswith("<svg xmlns=") and "blocks of &lt;6&gt;" in chart and chart.count("<circle") == 4
