from typing import Any

import pytest

from mllm_msr.records.sections import EvaluationOptions, HeadOptions, PrepareOptions, SummaryOptions, VectorOptions


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"protocol": "loose"}, "protocol='loose': must be one of .strict., .paper., .global-cutoff."),
        ({"repeats": None}, "repeats=None: must be one of .first., .last., .all."),
        ({"n_negatives": 0}, "n_negatives=0: must be at least 1"),
        ({"n_negatives": 2.5}, "n_negatives=2.5: must be a whole number"),
        ({"limit_users": "5"}, "limit_users='5': must be a whole number"),
        ({"folds": 5, "fold": 5}, "fold=5: there are 5 folds"),
        ({"folds": 5}, "folds=5, fold=0: only protocol='paper' splits by user"),
    ],
)
def test_bad_options_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrepareOptions(**fields)


def test_no_limit_is_none_and_no_core_is_zero() -> None:
    assert PrepareOptions(limit_users=None, max_history=None, k_core_users=0).k_core_users == 0


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (HeadOptions, {"learning_rate": -1.0}, "learning_rate=-1.0: must be at least 0"),
        (HeadOptions, {"learning_rate": float("nan")}, "learning_rate=nan: must be at least 0"),
        (HeadOptions, {"weight_decay": -1.0}, "weight_decay=-1.0: must be at least 0"),
        (HeadOptions, {"heads": 3}, "hidden=64 is no multiple of heads=3"),
        (
            SummaryOptions,
            {"model": "m", "base_url": "notaurl"},
            "^base_url: is no address of a server; write it as http",
        ),
        (SummaryOptions, {"model": "m", "base_url": ["http://h/v1", "h:80"]}, "^base_url: is no address of a server"),
        (
            SummaryOptions,
            {"model": "m", "base_url": "http://me:secret@h:port"},
            "^base_url: is no address of a server;",
        ),
        (EvaluationOptions, {"served": "localhost:8000"}, "^served: is no address of a server; write it as http"),
        (VectorOptions, {"dtype": "foo"}, "dtype='foo': must be 'auto', 'float32'"),
    ],
)
def test_bad_options_of_vectors_and_head_are_named(kind: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**fields)
