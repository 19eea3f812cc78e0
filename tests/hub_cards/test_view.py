"""Results as tables and in words: the order of variants, who is best, and sentences that do not flatter."""

from dataclasses import replace

import pytest

from mllm_msr.hub_cards.findings import Finding, findings, headline
from mllm_msr.hub_cards.results_page import console_page, results_page
from mllm_msr.hub_cards.view import TableView, in_order, results_table, variant_of
from mllm_msr.records.results import CatalogueFigures, Difference, Estimate, FullCatalogue, Metrics, Results


def metrics(value: float) -> Metrics:
    return dict.fromkeys(("auc", "hr@5"), Estimate(value, value - 0.01, value + 0.01))


def results(**values: float) -> Results:
    variants = {name: metrics(value) for name, value in values.items()}
    return Results("films", "strict", "test", 10, 21, 0, "abc", variants)


RESULTS = results(oracle=0.95, my_knn=0.7, random=0.5, popularity=0.72, mllm_msr=0.82, blank_images=0.815)


def words_of(found: list[Finding]) -> dict[str, str]:
    return {finding.words: finding.figure for finding in found}


def test_headline_names_the_baselines_that_are_there():
    sentence = "82.0% of users find their next choice in the top five of 21 candidates"
    assert headline(RESULTS) == f"{sentence}; popularity manages 72.0%, chance 50.0%."
    assert headline(results(mllm_msr=0.8)) == sentence.replace("82.0", "80.0") + "."
    assert headline(results(popularity=0.8)) is None


def test_a_stronger_baseline_is_in_the_headline_and_among_the_findings():
    stronger = Results(
        **{**vars(RESULTS), "variants": {**RESULTS.variants, "sasrec": metrics(0.9), "knn": metrics(0.85)}}
    )
    assert headline(stronger).endswith("candidates; SASRec manages 90.0%, popularity 72.0%, chance 50.0%.")
    assert words_of(findings(stronger))["AUC against SASRec, the strongest baseline"] == "-8.0"
    against = {"sasrec": {"auc": Difference(-0.08, -0.2, 0.01, p=0.1)}}
    doubtful = findings(Results(**{**vars(stronger), "against": against}))
    assert "AUC against SASRec, the strongest baseline (the 95% interval of the difference spans 0)" in words_of(
        doubtful
    )


def test_findings_call_overlap_and_defeat_by_their_names():
    found = words_of(findings(RESULTS))
    assert found["AUC against popularity"] == "+10.0"
    assert found["AUC from the images, against blank ones (the 95% intervals overlap)"] == "+0.5"
    assert found["of the way from chance to the oracle's 95.0"] == "71%"
    worse = findings(results(mllm_msr=0.45, popularity=0.7, oracle=0.9))
    assert worse[1:] == [Finding("-25.0", "AUC against popularity")]
    assert findings(results(random=0.5)) == []


def test_variants_come_in_reading_order_with_the_oracle_last():
    names = [variant.name for variant in in_order(RESULTS.variants)]
    assert names == ["mllm_msr", "blank_images", "popularity", "random", "my_knn", "oracle"]
    assert variant_of("my_knn").label == "my knn"


def test_metrics_of_any_cut_off_are_shown_in_the_order_asked_for():
    metrics = {"hr@3": Estimate(0.5, 0.4, 0.6), "auc_user": Estimate(0.7, 0.6, 0.8)}
    difference = {name: Difference(0.1, 0.0, 0.2, 0.04) for name in metrics}
    catalogue = FullCatalogue(4, 90.0, {"popularity": CatalogueFigures(metrics, metrics)})
    asked = replace(
        RESULTS,
        variants={"mllm_msr": metrics, "popularity": metrics},
        against={"popularity": difference},
        full_catalogue=catalogue,
    )
    assert results_table(asked).head == ("", "HR@3", "AUC per user")
    page, console = results_page(asked), console_page(asked)
    assert "| popularity | +10.0 (+0.0 to +20.0) | 0.040 |" in page
    assert "By HR@3 of these users both put the variants into one order" in page and "HR@3 all items" in console


def test_markdown_has_a_cell_for_every_variant_and_metric_and_the_oracle_is_never_best():
    lines = results_table(RESULTS).to_markdown().splitlines()
    assert {line.count("|") for line in lines} == {4}
    assert lines[2] == "| MLLM-MSR | **82.0** (81.0-83.0) | **82.0** (81.0-83.0) |"
    assert lines[-1] == "| oracle | 95.0 (94.0-96.0) | 95.0 (94.0-96.0) |"
    assert "\n".join(lines).count("**") == 4


def test_the_console_has_aligned_columns():
    lines = results_table(RESULTS).to_text().splitlines()
    assert len(lines) == 1 + 2 * 6
    assert lines[1].count("82.0*") == 2
    assert {len(line.replace("*", " ").rstrip()) for line in lines[2::2]} == {len(lines[2])}
    assert lines[0].endswith("HR@5") and "my knn" in "\n".join(lines)


@pytest.mark.parametrize("text", ["left|right", "line\nline", "<script>", "`code`"])
def test_no_text_breaks_a_table(text):
    lines = TableView.of_texts(("", text), [(text, text), ("figure", 1)]).to_markdown().splitlines()
    assert len(lines) == 4 and lines[1] == "|:--|:--|"
    assert {line.replace("\\|", "").count("|") for line in lines} == {3}
    assert "<script>" not in "\n".join(lines)


def test_columns_of_words_stand_left_and_figures_right():
    table = TableView.of_texts(("", "run", "p", "seconds"), [("x", "first run", "< 0.001", "3 s"), ("y", None, 1, "")])
    assert table.to_markdown().splitlines()[1] == "|:--|:--|--:|--:|"
