"""Summaries: resumable, incremental, and honest about what failed."""

import io
from collections.abc import Sequence
from typing import Any

import polars as pl
import pytest
from PIL import Image

from mllm_msr.modeling.inputs import HistoryItem
from mllm_msr.processing.engines import EngineUnavailable, Failure, PromptInput, Text
from mllm_msr.processing.summaries import summarize_items, summarize_users
from mllm_msr.processing.text_status import assess
from mllm_msr.processing.text_store import TextStore
from mllm_msr.records.schema import ITEMS
from mllm_msr.records.sections import SummaryOptions


class Scribe:
    """An engine that writes down what it was given, and can be told to die, to choke on a title, or to be gone."""

    batch_size, generator, revision = 4, "scribe", "1"

    def __init__(
        self, dies_after: int | None = None, chokes_on: str = "", gone_at: str = "", prompt: str = "p1"
    ) -> None:
        self.asked: list[Any] = []
        self.dies_after, self.chokes_on, self.gone_at, self.prompt = dies_after, chokes_on, gone_at, prompt
        self.says: dict[tuple[str, bool], Text] = {}  # (title, again) -> another answer than usual

    def prompt_hash(self, task: str) -> str:
        return f"{task} {self.prompt}"

    def settings(self, task: str) -> str:
        return ""

    def generate(self, task: str, inputs: Sequence[PromptInput], seeds=None, again=False) -> list[Any]:
        if self.dies_after is not None and len(self.asked) >= self.dies_after:
            raise KeyboardInterrupt
        if self.chokes_on and any(given.title == self.chokes_on for given in inputs):
            raise RuntimeError("cannot digest this")
        self.asked += inputs
        return [self.answer(task, given, again) for given in inputs]

    def answer(self, task: str, given: Any, again: bool) -> Any:
        title = getattr(given, "title", None)
        if self.gone_at and title == self.gone_at:
            return EngineUnavailable("the server is gone")
        usual = {
            "item_summary": lambda: f"{title} {given.image.size if given.image else 'unseen'}",
            "image_summary": lambda: f"looks {given.image.size[0]}",
            "text_summary": lambda: f"is {title}",
            "fusion": lambda: f"{given.text_summary} and {given.image_summary}",
            "preference": lambda: f"[{given.previous or ''}{'+'.join(item.summary for item in given.items)}]",
        }
        return self.says.get((title, again)) or Text(usual[task](), True)


def png(edge: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (edge, edge), "red").save(buffer, "PNG")
    return buffer.getvalue()


def catalogue(n: int = 10) -> pl.DataFrame:
    rows = [(f"i{k}", f"title {k}", "", {"bytes": png(40 + k), "path": None} if k % 3 else None) for k in range(n)]
    return ITEMS.frame(rows)


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
    assert out["status"][5] == "failed:RuntimeError"  # and not what the exception says
    scribe = Scribe()
    again = summarize_items(catalogue(), scribe, TextStore(tmp_path))
    assert set(again["status"]) == {"ok"}
    assert [item.title for item in scribe.asked] == ["title 5"]


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


def test_only_users_with_a_new_block_cost_anything(tmp_path):
    own = {f"{user}{k}": f"{user} {k}" for user in "uvw" for k in range(9)}
    rows = [(user, f"{user}{k}", k) for user in "uvw" for k in range(8)]
    before = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    after = pl.concat([before, pl.DataFrame([("v", "v8", 8)], schema=before.schema, orient="row")])
    first = summarize_users(before, own, own, Scribe(), TextStore(tmp_path))
    scribe = Scribe()
    second = summarize_users(after, own, own, scribe, TextStore(tmp_path))
    assert [block.items for block in scribe.asked] == [[HistoryItem(f"v {k}", f"v {k}") for k in (6, 7, 8)]]
    assert second.filter((pl.col("user_id") != "v") | (pl.col("step") < 3)).equals(first)


@pytest.mark.parametrize(
    ("options", "new"),
    [
        ({"block_size": 3}, 0),
        ({"block_size": 2}, 4),
        ({"recurrent": False}, 1),
        ({"seed": 1}, 2),
        ({"batch_size": 9}, 0),
    ],
)
def test_a_changed_parameter_regenerates_what_depends_on_it(tmp_path, options, new):
    history = log({"u": 8, "v": 3})
    own = {f"i{k}": f"thing {k}" for k in range(9)}
    summarize_users(history, own, own, Scribe(), TextStore(tmp_path), SummaryOptions("extractive"))
    scribe = Scribe()
    summarize_users(history, own, own, scribe, TextStore(tmp_path), SummaryOptions("extractive", **options))
    # u and v share their first block; in the direct variant it is, word for word, the recurrent one's
    assert len(scribe.asked) == new


def test_without_recurrence_the_whole_history_is_read_at_once(tmp_path):
    direct = SummaryOptions("extractive", recurrent=False)
    out = summarize_users(log({"u": 8}), SUMMARIES, SUMMARIES, Scribe(), TextStore(tmp_path), direct)
    assert out["preference"].to_list() == ["[0+1+2]", "[0+1+2+3+4+5]"]
    assert out["read_item_ids"][1].to_list() == [f"i{k}" for k in range(6)]


def test_without_images_no_engine_sees_one(tmp_path):
    out = summarize_items(catalogue(), Scribe(), TextStore(tmp_path), SummaryOptions("extractive", images=False))
    assert all(text.endswith("unseen") for text in out["summary"])


def test_the_three_prompts_describe_a_image_once_and_fuse_where_there_are_two(tmp_path):
    same = {"bytes": png(40), "path": None}
    items = pl.DataFrame(
        {
            "item_id": list("abcd"),
            "title": ["A", "B", "C", ""],
            "text": ["", "", "", ""],
            "image": [same, same, None, same],
        }
    )
    scribe = Scribe()
    out = summarize_items(items, scribe, TextStore(tmp_path), SummaryOptions("extractive", item_prompts="paper"))
    assert out["summary"].to_list() == ["is A and looks 40", "is B and looks 40", "is C", "looks 40"]
    assert len([given for given in scribe.asked if getattr(given, "image", None)]) == 1
    assert len([given for given in scribe.asked if hasattr(given, "text_summary")]) == 2
    assert set(out["status"]) == {"ok"}
    assert out["prompt_hash"].n_unique() == 1


def test_an_item_is_as_good_as_the_worst_of_its_parts(tmp_path):
    scribe = Scribe()
    scribe.says = {("title 1", False): Text("", True), ("title 1", True): Text("", True)}
    options = SummaryOptions("extractive", item_prompts="paper")
    out = summarize_items(catalogue(3), scribe, TextStore(tmp_path), options)
    assert out.select("summary", "status").rows()[1] == ("looks 41", "suspect:empty")


@pytest.mark.parametrize(
    ("text", "ended", "status"),
    [
        ("a quiet blue mug", True, "ok"),
        ("Unfortunately sold out, this mug is blue.", True, "ok"),
        ("very very good", True, "ok"),
        (" ", True, "suspect:empty"),
        ("I'm sorry, I cannot see an image.", True, "suspect:refused"),
        (" no. ", True, "suspect:refused"),
        ("No other mug is as blue.", True, "ok"),
        ("I cannot provide a description of this", True, "suspect:refused"),
        ("As an AI language model, I", True, "suspect:refused"),
        ("red, red and blue red and blue red and blue", True, "suspect:looping"),
        ("so so so so so so", True, "suspect:looping"),
        ("a mug of a", False, "suspect:unfinished"),
    ],
)
def test_the_rules_of_a_doubtful_text(text, ended, status):
    assert assess(text, ended) == status


def test_a_doubtful_text_is_asked_for_once_more_and_else_marked(tmp_path):
    scribe = Scribe()
    scribe.says = {
        ("title 1", False): Text("on and on and", False),
        ("title 2", False): Text("", True),
        ("title 2", True): Text("I'm sorry, but no", True),
    }
    out = summarize_items(catalogue(4), scribe, TextStore(tmp_path))
    assert out.select("summary", "status").rows()[:3] == [
        ("title 0 unseen", "ok"),
        ("title 1 (41, 41)", "ok"),
        ("", "suspect:empty"),
    ]
    assert len(scribe.asked) == 6


def test_a_failed_step_leaves_the_preference_as_it_was(tmp_path):
    class Deaf(Scribe):
        def answer(self, task, block, again):
            return Failure("http-400") if block.items[0].summary == "3" else super().answer(task, block, again)

    out = summarize_users(log({"u": 9}), SUMMARIES, SUMMARIES, Deaf(), TextStore(tmp_path))
    assert out.select("preference", "status").rows() == [
        ("[0+1+2]", "ok"),
        ("[0+1+2]", "failed:http-400"),
        ("[[0+1+2]6+7+8]", "ok"),
    ]
    out = summarize_users(log({"u": 9}), SUMMARIES, SUMMARIES, Scribe(), TextStore(tmp_path))
    assert out["preference"][-1] == "[[[0+1+2]3+4+5]6+7+8]"


def test_a_server_that_is_gone_stops_the_run_and_loses_nothing(tmp_path):
    with pytest.raises(EngineUnavailable, match="the server is gone"):
        summarize_items(catalogue(), Scribe(gone_at="title 5"), TextStore(tmp_path))
    kept = TextStore(tmp_path).rows
    assert len(kept) >= 3  # at least those of its own batch that were answered
    assert {status for _, status in kept.values()} == {"ok"}
    scribe = Scribe()
    assert set(summarize_items(catalogue(), scribe, TextStore(tmp_path))["status"]) == {"ok"}
    assert len(scribe.asked) == 10 - len(kept)


def test_an_engine_that_never_succeeds_is_not_asked_a_million_times(tmp_path):
    class Broken(Scribe):
        def generate(self, task, inputs, seeds=None, again=False):
            self.asked += inputs
            raise TypeError("the prompt is wrong")

    scribe = Broken()
    with pytest.raises(EngineUnavailable, match=r"none of 32 texts is of use \(32 failed:TypeError\)"):
        summarize_items(catalogue(60), scribe, TextStore(tmp_path))
    assert summarize_items(catalogue(60), Scribe(), TextStore(tmp_path))["status"].unique().to_list() == ["ok"]


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (Failure("http-400"), "failed:http-400"),
        (Text("No.", True), "suspect:refused"),
        (Text("I'm sorry, I cannot see any image.", True), "suspect:refused"),
        (Text("", False), "suspect:empty"),
    ],
)
@pytest.mark.parametrize("item_prompts", ["single", "paper"])
def test_a_stage_none_of_whose_texts_is_of_use_stops_with_three_samples(tmp_path, answer, status, item_prompts):
    class Useless(Scribe):
        def answer(self, task, given, again):
            return answer

    options = SummaryOptions("extractive", item_prompts=item_prompts)
    with pytest.raises(
        EngineUnavailable, match=rf"none of \d texts is of use \(\d {status}\), such as .*; .*; "
    ) as stop:
        summarize_items(catalogue(6), Useless(), TextStore(tmp_path / "items"), options)
    assert str(stop.value).count("i1: ") == 1
    with pytest.raises(EngineUnavailable, match=rf"preference: none of 2 texts is of use \(2 {status}\)"):
        summarize_users(log({"u": 6}), SUMMARIES, SUMMARIES, Useless(), TextStore(tmp_path / "users"))


def test_items_of_which_nothing_is_known_do_not_stop_a_stage(tmp_path):
    class Mute(Scribe):
        def answer(self, task, item, again):
            return Text(item.title, True)

    blank = catalogue(40).with_columns(title=pl.lit(""), image=pl.lit(None, ITEMS.columns["image"]))
    assert set(summarize_items(blank, Mute(), TextStore(tmp_path))["status"]) == {"suspect:empty"}


def test_one_text_for_most_inputs_is_warned_of_with_three_samples(tmp_path, caplog):
    class Parrot(Scribe):
        def answer(self, task, given, again):
            return Text("A fine mug" + "." * (given.title == "title 1"), True)

    twice = pl.concat([catalogue(6), catalogue(6).with_columns(pl.col("item_id") + "b")])
    summarize_items(twice, Parrot(), TextStore(tmp_path))
    assert "item_summary: 6 of 6 different inputs got one text: i0" in caplog.text
    assert caplog.text.count("A fine mug") == 3
