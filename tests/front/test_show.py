"""One user's history in words."""

import re
from dataclasses import replace

import pytest
from tiny_runs import tiny_recipe

from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import INTERACTIONS, ITEM_SUMMARIES, ITEMS, PREFERENCES
from mllm_msr.run_users import unknown_users
from mllm_msr.show import changes, show_user

ENDS = ("ok", "tiny", "1", "abc")  # status, generator, revision, prompt_hash


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """Five items and two preferences of one user."""
    run = RunFolder.create(tmp_path / "run", tiny_recipe())
    items = list("abcde")
    run.write(INTERACTIONS, INTERACTIONS.frame([("u", item, time) for time, item in enumerate(items)]))
    run.write(ITEMS, ITEMS.frame([(item, item.upper(), "", None) for item in items]))
    run.write(ITEM_SUMMARIES, ITEM_SUMMARIES.frame([(item, f"a {item}", *ENDS) for item in items]))
    steps = [
        ("u", 1, "likes red mugs", items[:2], 1, *ENDS),
        ("u", 2, "likes blue mugs", items[:4], 3, "suspect:unfinished", *ENDS[1:]),
    ]
    run.write(PREFERENCES, PREFERENCES.frame(steps))
    for stage in ("prepare", "summarize items", "summarize users"):
        run.take_over(stage, stage, [])
    return run


def test_a_user_is_shown_step_by_step(run, capsys):
    show_user(run, "u")
    assert capsys.readouterr().out.splitlines() == [
        "user u: 5 items, 2 preferences",
        "",
        "step 1",
        "  A: a a",
        "  B: a b",
        "  => likes red mugs",
        "",
        "step 2",
        "  C: a c",
        "  D: a d",
        "  => likes blue mugs  (suspect:unfinished)",
        "  change: likes [-red-] [+blue+] mugs",
        "",
        "since then",
        "  E: a e",
    ]


def test_who_is_not_there_is_said_and_whom_the_run_keeps(run):
    with pytest.raises(ValueError, match=r"'x' is no user of .*; ids look like 'u'"):
        show_user(run, "x")
    cut = replace(run, recipe=replace(run.recipe, data=replace(run.recipe.data, k_core_users=5, limit_users=20)))
    kept = r"'x' is no user of .*, which keeps users of 5 interactions or more and 20 users of the log"
    assert re.match(kept, str(unknown_users(cut, ["x"])))


def test_before_preferences_are_written_the_command_that_writes_them_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="mllm-msr summarize users"):
        show_user(RunFolder.create(tmp_path / "new", tiny_recipe()), "u")


def test_changes_are_marked_word_by_word():
    assert changes("", "a b") == "[+a b+]"
    assert changes("red; dotted; mug", "red; mug") == "red; [-dotted;-] mug"
    assert changes("a b", "a b") == "nothing"
    assert changes("a b", "b", colours=True) == "\033[31;9ma\033[0m b"
