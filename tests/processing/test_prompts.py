"""The default prompts read well with and without each of their variables."""

import pytest
from jinja2 import Environment, StrictUndefined

from mllm_msr.processing.prompts import PROMPTS

FULL = {
    "title": "TITLE",
    "text": "TEXT",
    "image": "IMAGE",
    "text_summary": "WORDS",
    "image_summary": "LOOKS",
    "items": [{"title": "T1", "summary": "S1"}, {"title": "T2", "summary": "S2"}],
    "previous": "BEFORE",
    "preference": "PREFERENCE",
    "recent": [{"title": "R1", "summary": "S3"}],
    "noun": "film",
}
EMPTY = {name: [] if isinstance(value, list) else "" for name, value in FULL.items()} | {
    "title": "TITLE",
    "noun": "film",
}


def render(name: str, **variables: object) -> str:
    return Environment(undefined=StrictUndefined, autoescape=False).from_string(PROMPTS[name]).render(**variables)


@pytest.mark.parametrize("name", PROMPTS)
def test_what_is_there_is_shown_and_what_is_not_leaves_no_trace(name: str) -> None:
    full, empty = render(name, **FULL), render(name, **EMPTY)
    for text in (full.strip(), empty.strip()):
        assert "\n\n" not in text and "  " not in text and "{" not in text
    assert name == "late_answer" or ("film" in full and len(empty) < len(full))
    unused = {"TEXT", "WORDS", "LOOKS", "BEFORE", "PREFERENCE", "S1", "R1", "S3"}
    assert not any(word in empty for word in unused)


def test_every_variable_is_used_where_it_is_documented() -> None:
    assert all(word in render("item_summary", **FULL) for word in ("TITLE", "TEXT", "IMAGE"))
    assert all(word in render("fusion", **FULL) for word in ("TITLE", "WORDS", "LOOKS"))
    assert all(word in render("preference", **FULL) for word in ("1. T1: S1", "2. T2: S2", "BEFORE"))
    assert all(word in render("recommendation", **FULL) for word in ("PREFERENCE", "R1: S3", "TITLE", "TEXT", "IMAGE"))


def test_what_is_about_the_user_comes_before_the_candidate() -> None:
    text = render("recommendation", **FULL)
    assert max(text.index(word) for word in ("PREFERENCE", "R1", "S3")) < text.index("TITLE") < text.index("IMAGE")


def test_the_two_sides_of_late_prompts_keep_to_themselves() -> None:
    user, item = render("late_user", **FULL), render("late_item", **FULL)
    assert all((word in user) and (word not in item) for word in ("PREFERENCE", "R1: S3"))
    assert all((word in item) and (word not in user) for word in ("TITLE", "TEXT", "IMAGE"))
    assert render("late_answer", **FULL) == ""


def test_the_first_step_does_not_speak_of_an_earlier_preference() -> None:
    assert "so far" in render("preference", **FULL)
    assert "so far" not in render("preference", **{**FULL, "previous": ""})
