"""What an evaluation found, to ``metrics.json`` and back."""

import json
from pathlib import Path

import pytest

from mllm_msr.records.results import (
    Agreement,
    AgreementFigures,
    Calibration,
    CatalogueFigures,
    Check,
    Difference,
    Estimate,
    FullCatalogue,
    Reliability,
    ReliabilityBin,
    Results,
    Slice,
)

AUC = {"auc": Estimate(0.8, 0.7, 0.9)}
CURVE = Reliability([ReliabilityBin(0.25, 0.3, 12)], 0.05)
LITTLE = Results("shop", "strict", "test", 12, 6, 0, "abc", {"mllm_msr": AUC, "popularity": AUC})
WHOLE = Results(
    **vars(LITTLE)
    | {
        "against": {"popularity": {"auc": Difference(0.0, -0.1, 0.1, 1.0)}},
        "slices": [Slice("history_length", "5-19", 4, {"mllm_msr": AUC})],
        "checks": {"mllm_msr": Check(0.1, None), "popularity": Check(0.2, 1.0)},
        "calibration": Calibration(CURVE, CURVE, -1.5),
        "full_catalogue": FullCatalogue(
            5,
            39.5,
            {"mllm_msr": CatalogueFigures(AUC, AUC)},
            against_sasrec={"mllm_msr": {"hr@10": Difference(0.1, 0.05, 0.15, 0.01)}},
        ),
        "agreement": Agreement(4, "float32", {"bfloat16": AgreementFigures(0.01, 0.0, 0.99)}),
        "model_of": "trained on films",
        "notes": ["The data is a sample."],
    }
)


@pytest.mark.parametrize("results", [LITTLE, WHOLE], ids=["little", "whole"])
def test_a_file_brings_back_what_was_written(results: Results, tmp_path: Path) -> None:
    results.write(tmp_path / "metrics.json")
    assert Results.read(tmp_path / "metrics.json") == results


def test_the_file_has_a_table_s_variants_as_its_rows_and_leaves_out_what_was_not_computed() -> None:
    content = WHOLE.to_json()
    assert content["rows"]["mllm_msr"]["auc"] == {"value": 0.8, "ci95": [0.7, 0.9]}
    assert content["against"]["popularity"]["auc"] == {"difference": 0.0, "ci95": [-0.1, 0.1], "p": 1.0}
    assert content["slices"][0]["rows"].keys() == content["full_catalogue"]["rows"].keys() == {"mllm_msr"}
    assert content["checks"]["mllm_msr"] == {"tied_users": 0.1}
    assert not {"calibration", "full_catalogue", "agreement", "model_of"} & LITTLE.to_json().keys()


def test_a_file_of_another_version_says_what_it_lacks(tmp_path: Path) -> None:
    content = LITTLE.to_json()
    del content["candidate_hash"]
    for text in (json.dumps(content), "[]", "{"):
        (tmp_path / "metrics.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"metrics\.json is not a results file .* evaluate the run again"):
            Results.read(tmp_path / "metrics.json")


@pytest.mark.parametrize(("low", "high", "significant"), [(0.01, 0.2, True), (-0.2, -0.01, True), (0.0, 0.1, False)])
def test_a_difference_is_significant_if_its_interval_excludes_zero(low: float, high: float, significant: bool) -> None:
    assert Difference(0.1, low, high, 0.04).significant is significant
