"""Users and candidates from what callers give: dataclasses, mappings, and everything else refused with the reason."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

from mllm_msr.modeling.inputs import Candidate, HistoryItem, User, as_candidates, as_users

IMAGE = Image.new("RGB", (4, 4))


def test_mappings_and_objects_become_the_same() -> None:
    user = User("red", (HistoryItem("One", "blue"), HistoryItem(summary="green")))
    recent = [{"title": "One", "summary": "blue"}, HistoryItem(summary="green")]
    assert as_users([user, {"preference": "red", "recent": recent}, SimpleNamespace(**vars(user))]) == [user] * 3
    candidate = Candidate("7", "Two", "text", IMAGE)
    assert as_candidates([candidate, vars(candidate), SimpleNamespace(**vars(candidate))]) == [candidate] * 3
    assert Candidate.of({"title": "Two", "text": None, "image": None}) == Candidate(title="Two")
    assert User.of({"recent": []}) == User() == User.of({"preference": ""})
    assert replace(candidate, image=None).image is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"preference": "x"}, "`users` is a list, not dict"),
        ("likes red", "`users` is a list, not str"),
        (User("x"), "`users` is a list, not User"),
        (None, "`users` is a list, not NoneType"),
        (["likes red"], "a user is a mapping with any of preference, recent, or a User, not str"),
        ([{}], "a user needs at least one of preference, recent"),
        ([{"preference": None}], "a user needs at least one of"),
        ([{"preference": 3}], "`preference` of a user is a text, not int"),
        ([User(None)], "`preference` of a user is a text, not NoneType"),
        ([User("x", [HistoryItem(7)])], "`title` of an item of `recent` is a text, not int"),
        ([{"likes": "red"}], "a user has the unknown key 'likes'; known are preference, recent"),
        ([{"recent": {"title": "One"}}], "`recent` of a user is a list of items"),
        ([{"recent": "One"}], "`recent` of a user is a list of items"),
        ([{"recent": ["One"]}], "an item of `recent` is a mapping"),
        ([{"recent": [{}]}], "an item of `recent` needs at least one of title, summary"),
    ],
)
def test_what_is_no_list_of_users_is_refused(value, message) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        as_users(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"title": "One"}, "`candidates` is a list, not dict"),
        ("One", "`candidates` is a list, not str"),
        (["One"], "a candidate is a mapping"),
        ([[]], "a candidate is a mapping"),
        ([{}], "a candidate needs at least one of title, text, image"),
        ([{"item_id": "7"}], "a candidate needs at least one of title, text, image"),
        ([{"item_id": 7, "title": "One"}], "`item_id` of a candidate is a text, not int"),
        ([{"title": ["One"]}], "`title` of a candidate is a text, not list"),
        ([Candidate(title=7)], "`title` of a candidate is a text, not int"),
        ([{"title": "One", "image": [IMAGE]}], "`image` of a candidate is one opened image"),
        ([{"title": "One", "image": "one.png"}], "`image` of a candidate is one opened image"),
        ([{"title": "One", "image": 3}], "`image` of a candidate is one opened image"),
        ([{"title": "One", "image": b"..."}], "`image` of a candidate is one opened image"),
        ([{"title": "One", "image": {"bytes": b"..."}}], "`image` of a candidate is one opened image"),
        ([{"title": "One", "name": "x"}], "unknown key 'name'"),
    ],
)
def test_what_is_no_list_of_candidates_is_refused(value, message) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        as_candidates(value)
