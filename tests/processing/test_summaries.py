"""Summaries: resumable, incremental, and honest about what failed."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
import pytest
from PIL import Image

from mllm_msr.processing.summaries import TextStore, summarize_items, summarize_users


class Scribe:
    """An engine that writes down what it was given, and can be told to die or to choke on a title."""

    batch_size = 4

    def __init__(self, dies_after: int | None = None, chokes_on: str | None = None, prompt: str = "p1") -> None:
        self.asked: list[Any] = []
        self.dies_after, self.chokes_on, self.prompt = dies_after, chokes_on, prompt

    @property
    def identity(self) -> dict[str, str]:
        return {"generator": "scribe", "revision": "1"}

    def prompt_hash(self, task: str) -> str:
        return f"{task} {self.prompt}"

    def generate(self, task: str, inputs: Sequence[Mapping[str, Any]]) -> list[tuple[str, bool]]:
        if self.dies_after is not None and len(self.asked) >= self.dies_after:
            raise KeyboardInterrupt
        if any(self.chokes_on and one.get("title") == self.chokes_on for one in inputs):
            raise RuntimeError("cannot digest this")
        self.asked += inputs
        if task == "item_summary":
            return [(f"{one['title']} {one['image'].size if one['image'] else 'unseen'}", True) for one in inputs]
        return [(f"[{one['previous'] or ''}{'+'.join(i['summary'] for i in one['items'])}]", True) for one in inputs]


def png(edge: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (edge, edge), "red").save(buffer, "PNG")
    return buffer.getvalue()


def catalogue(n: int = 10) -> pl.DataFrame:
    rows = [(f"i{k}", f"title {k}", "", {"bytes": png(40 + k), "path": None} if k % 3 else None) for k in range(n)]
    image = pl.Struct({"bytes": pl.Binary, "path": pl.String})
    schema = {"item_id": pl.String, "title": pl.String, "text": pl.String, "image": image}
    return pl.DataFrame(rows, schema=schema, orient="row")


def log(lengths: dict[str, int]) -> pl.DataFrame:
    rows = [(user, f"i{k}", 100 + k) for user, n in lengths.items() for k in range(n)]
    return pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")


SUMMARIES = {f"i{k}": str(k) for k in range(20)}


def test_one_summary_an_item_in_the_order_of_the_items(tmp_path):
    out = summarize_items(catalogue(), Scribe(), TextStore(tmp_path))
    assert out["item_id"].to_list() == [f"i{k}" for k in range(10)]
    assert out["summary"][4] == "title 4 (44, 44)"
    assert out["summary"][3] == "title 3 unseen"
    assert set(out["status"]) == {"ok"}


def test_equal_items_are_written_once(tmp_path):
    twice = pl.concat([catalogue(), catalogue().with_columns(pl.col("item_id") + "b")])
    scribe = Scribe()
    out = summarize_items(twice, scribe, TextStore(tmp_path))
    assert len(scribe.asked) == 10
    assert out["summary"][:10].to_list() == out["summary"][10:].to_list()


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    whole = summarize_items(catalogue(), Scribe(), TextStore(tmp_path / "a"))
    with pytest.raises(KeyboardInterrupt):
        summarize_items(catalogue(), Scribe(dies_after=4), TextStore(tmp_path / "b"))
    scribe = Scribe()
    assert summarize_items(catalogue(), scribe, TextStore(tmp_path / "b")).equals(whole)
    assert len(scribe.asked) == 6  # the first batch of four was kept


def test_one_bad_item_is_marked_and_tried_again(tmp_path):
    out = summarize_items(catalogue(), Scribe(chokes_on="title 5"), TextStore(tmp_path))
    assert out.filter(pl.col("status") != "ok")["item_id"].to_list() == ["i5"]
    assert "cannot digest this" in out["status"][5]
    scribe = Scribe()
    again = summarize_items(catalogue(), scribe, TextStore(tmp_path))
    assert set(again["status"]) == {"ok"}
    assert [one["title"] for one in scribe.asked] == ["title 5"]


def test_a_changed_prompt_regenerates(tmp_path):
    summarize_items(catalogue(), Scribe(), TextStore(tmp_path))
    scribe = Scribe(prompt="p2")
    summarize_items(catalogue(), scribe, TextStore(tmp_path))
    assert len(scribe.asked) == 10


def test_preferences_are_recurrent_and_say_what_they_read(tmp_path):
    out = summarize_users(log({"u": 8, "v": 3, "w": 2}), SUMMARIES, SUMMARIES, Scribe(), TextStore(tmp_path))
    rows = out.select("user_id", "step", "preference", "read_item_ids", "last_timestamp").rows()
    assert rows == [
        ("u", 1, "[0+1+2]", ["i0", "i1", "i2"], 102),
        ("u", 2, "[[0+1+2]3+4+5]", [f"i{k}" for k in range(6)], 105),
        ("v", 1, "[0+1+2]", ["i0", "i1", "i2"], 102),
    ]


def test_new_interactions_cost_only_their_own_blocks(tmp_path):
    store = TextStore(tmp_path)
    summarize_users(log({"u": 6, "v": 12}), SUMMARIES, SUMMARIES, Scribe(), store)
    scribe = Scribe()
    out = summarize_users(log({"u": 9, "v": 12}), SUMMARIES, SUMMARIES, scribe, TextStore(tmp_path))
    assert out.height == 7
    assert scribe.asked == []  # u's third block is, word for word, what v's was
    other = {**SUMMARIES, "i8": "eight"}
    out = summarize_users(log({"u": 9, "v": 6}), SUMMARIES, other, scribe, TextStore(tmp_path))
    assert len(scribe.asked) == 1
    assert out.filter(user_id="u")["preference"][-1].endswith("6+7+eight]")
