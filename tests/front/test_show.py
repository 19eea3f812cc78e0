import polars as pl
import pytest

from mllm_msr.show import changes, show_user


@pytest.fixture
def run(tmp_path):
    for folder in ("data", "summaries"):
        (tmp_path / folder).mkdir()
    items = list("abcde")
    log = pl.DataFrame({"user_id": ["u"] * 5, "item_id": items, "timestamp": range(5)})
    log.write_parquet(tmp_path / "data/interactions.parquet")
    pl.DataFrame({"item_id": items, "title": [c.upper() for c in items]}).write_parquet(tmp_path / "data/items.parquet")
    texts = pl.DataFrame({"item_id": items, "summary": [f"a {c}" for c in items]})
    texts.write_parquet(tmp_path / "summaries/items.parquet")
    pl.DataFrame(
        {
            "user_id": ["u", "u"],
            "step": [1, 2],
            "preference": ["likes red mugs", "likes blue mugs"],
            "read_item_ids": [items[:2], items[:4]],
            "status": ["ok", "suspect:unfinished"],
        }
    ).write_parquet(tmp_path / "summaries/preferences.parquet")
    return tmp_path


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


def test_who_is_not_there_is_said(run):
    with pytest.raises(ValueError, match=r"user 'x' has no interactions in .* ids look like 'u'"):
        show_user(run, "x")
    (run / "summaries/preferences.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="mllm-msr summarize users"):
        show_user(run, "u")


def test_changes_are_marked_word_by_word():
    assert changes("", "a b") == "[+a b+]"
    assert changes("red; dotted; mug", "red; mug") == "red; [-dotted;-] mug"
    assert changes("a b", "a b") == "nothing"
    assert changes("a b", "b", colours=True) == "\033[31;9ma\033[0m b"
