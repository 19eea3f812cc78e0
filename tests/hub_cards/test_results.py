"""What metrics.json says in words: the tables' shape, who is best, and sentences that do not flatter."""

from mllm_msr.hub_cards.results import findings, headline, ordered_rows, results_markdown, results_table


def row(value: float, low: float | None = None, high: float | None = None) -> dict:
    result = {"value": value, "ci95": [value - 0.01 if low is None else low, value + 0.01 if high is None else high]}
    return {"auc": result, "hr@5": result}


METRICS = {
    "n_candidates": 21,
    "rows": {
        "oracle": row(0.95),
        "my_knn": row(0.7),
        "random": row(0.5),
        "popularity": row(0.72),
        "mllm_msr": row(0.82),
        "blank_images": row(0.815),
    },
}


def test_rows_come_in_reading_order_with_the_oracle_last():
    assert ordered_rows(METRICS) == ["mllm_msr", "blank_images", "popularity", "random", "my_knn", "oracle"]


def test_markdown_has_a_cell_for_every_row_and_metric_and_the_oracle_is_never_best():
    lines = results_markdown(METRICS).splitlines()
    assert {line.count("|") for line in lines} == {4}
    assert lines[2] == "| MLLM-MSR | **82.0** (81.0-83.0) | **82.0** (81.0-83.0) |"
    assert lines[-1] == "| oracle | 95.0 (94.0-96.0) | 95.0 (94.0-96.0) |"
    assert results_markdown(METRICS).count("**") == 4


def test_terminal_table_is_aligned():
    lines = results_table(METRICS).splitlines()
    assert len(lines) == 1 + 2 * 6
    assert {len(line) for line in lines} == {len(lines[0])}
    assert lines[1].count("82.0*") == 2
    assert "my knn" in results_table(METRICS)


def test_headline_names_the_baselines_that_are_there():
    said = "82.0% of users find their next choice in the top five of 21 candidates"
    assert headline(METRICS) == f"{said}; popularity manages 72.0%, chance 50.0%."
    assert headline({"rows": {"mllm_msr": row(0.8)}}) == "80.0% of users find their next choice in the top five."
    assert headline({"rows": {"popularity": row(0.8)}}) is None


def test_a_stronger_baseline_is_in_the_headline_and_among_the_findings():
    metrics = {"rows": {**METRICS["rows"], "sasrec": row(0.9), "knn": row(0.85)}}
    assert headline(metrics).endswith("in the top five; SASRec manages 90.0%, popularity 72.0%, chance 50.0%.")
    said = {one["words"]: one["figure"] for one in findings(metrics)}
    assert said["AUC against SASRec, the strongest baseline"] == "-8.0"
    metrics["against"] = {"sasrec": {"auc": {"difference": -0.08, "ci95": [-0.2, 0.01], "p": 0.1}}}
    words = [one["words"] for one in findings(metrics)]
    assert "AUC against SASRec, the strongest baseline (the 95% interval of the difference spans 0)" in words


def test_findings_call_overlap_and_defeat_by_their_names():
    said = {one["words"]: one["figure"] for one in findings(METRICS)}
    assert said["AUC against popularity"] == "+10.0"
    assert said["AUC from the pictures, against blank ones (the 95% intervals overlap)"] == "+0.5"
    assert said["of the way from chance to the oracle's 95.0"] == "71%"
    worse = findings({"rows": {"mllm_msr": row(0.45), "popularity": row(0.7), "oracle": row(0.9)}})
    assert worse[1:] == [{"figure": "-25.0", "words": "AUC against popularity"}]
    assert findings({"rows": {"random": row(0.5)}}) == []
