"""One user's history in words: what was chosen, what each block added to the preference, and what changed."""

import difflib
import re
import sys

import polars as pl

from mllm_msr.data.raw import one_line
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import INTERACTIONS, ITEM_SUMMARIES, ITEMS, PREFERENCES
from mllm_msr.run_users import known_id, unknown_users


def show_user(run: RunFolder, user_id: str) -> None:
    """Print a user's blocks with the preference after each, the change from step to step marked.

    On a terminal what is new is green and what is gone is red and struck through; elsewhere they read ``[+new+]`` and
    ``[-gone-]``. Raises ``ValueError`` if the run has no such user, ``FileNotFoundError`` if it has no preferences yet.
    """
    run.require("summarize users")
    user_id = known_id(run, user_id)
    log = run.scan(INTERACTIONS).filter(pl.col("user_id") == user_id).collect()
    if log.is_empty():
        raise unknown_users(run, [user_id])
    steps = run.scan(PREFERENCES).filter(pl.col("user_id") == user_id).sort("step").collect()
    history = log["item_id"].to_list()
    of_history = pl.col("item_id").is_in(set(history))
    titles, summaries = (
        {
            item: one_line(text or "")
            for item, text in run.scan(table).filter(of_history).select("item_id", column).collect().iter_rows()
        }
        for table, column in ((ITEMS, "title"), (ITEM_SUMMARIES, "summary"))
    )
    colours = sys.stdout.isatty()
    print(f"user {user_id}: {len(history)} items, {steps.height} preferences")
    read, before = 0, ""
    for step in steps.iter_rows(named=True):
        print(f"\nstep {step['step']}")
        for item in step["read_item_ids"][read:]:
            print(f"  {titles.get(item, item)}: {summaries.get(item, '')}")
        read = len(step["read_item_ids"])
        after = one_line(step["preference"])
        print(f"  => {after}" + (f"  ({step['status']})" if step["status"] != "ok" else ""))
        if before:
            print(f"  change: {changes(before, after, colours)}")
        before = after
    if history[read:]:
        print("\nsince then")
        for item in history[read:]:
            print(f"  {titles.get(item, item)}: {summaries.get(item, '')}")


def changes(before: str, after: str, colours: bool = False) -> str:
    """``after`` with what is new in it and what is gone marked, word by word.

    >>> changes("likes red mugs", "likes blue mugs, lamps")
    'likes [-red-] [+blue+] mugs[+, lamps+]'
    >>> changes("likes red mugs", "likes red mugs")
    'nothing'
    """
    if before == after:
        return "nothing"
    gone, new = ("\033[31;9m{}\033[0m", "\033[32m{}\033[0m") if colours else ("[-{}-]", "[+{}+]")
    old, fresh = (re.findall(r"\s*(?:[\w'-]+|[^\w\s])", f" {text}") for text in (before, after))
    plain_old, plain_fresh = [word.strip() for word in old], [word.strip() for word in fresh]
    out: list[str] = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, plain_old, plain_fresh, autojunk=False).get_opcodes():
        for mark, side in ((gone, old[a:b] if kind != "equal" else []), (new, fresh[c:d])):
            if text := "".join(side).lstrip():
                space = side[0][: len(side[0]) - len(side[0].lstrip())]
                out.append(space + (text if kind == "equal" else mark.format(text)))
    return "".join(out).strip()
