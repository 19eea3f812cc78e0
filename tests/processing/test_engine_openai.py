"""The engine that asks a server: a real one, and one that goes wrong in every way."""

import base64
import io
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager

import numpy as np
import polars as pl
import pytest
from chat_server import Reply, chat_server, completion
from PIL import Image
from ports import free_port
from transformers.utils.import_utils import is_serve_available

from mllm_msr.data.sources import world
from mllm_msr.demo.pretraining import PROMPTS
from mllm_msr.modeling.inputs import Candidate, HistoryItem
from mllm_msr.processing.chat import chat_parts
from mllm_msr.processing.engine_openai import OpenAIEngine, data_url
from mllm_msr.processing.engine_registry import build_engine
from mllm_msr.processing.engines import EngineUnavailable, Failure, HistoryBlock, Text
from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor
from mllm_msr.processing.summaries import summarize_users
from mllm_msr.processing.text_store import TextStore
from mllm_msr.records.recipe import backbone_path
from mllm_msr.records.sections import SummaryOptions

ASK = {"preference": "{{ previous }}>{{ items[0].summary }}", "item_summary": "{{ title }} {{ image }} {{ text }}"}
IMAGE = Image.new("RGB", (3, 2), (10, 200, 30))


def engine(url: str | list[str], **options) -> OpenAIEngine:
    return OpenAIEngine("tiny", ASK, base_url=url, **{"pause": 0.01, "tries": 3, "timeout": 60, **options})


def blocks(*summaries: str) -> list[HistoryBlock]:
    return [HistoryBlock([HistoryItem(summary=summary)], None) for summary in summaries]


def echo(body, n=0):
    return completion(f"read {body['messages'][0]['content']}")


def test_a_request_says_all_and_the_answer_keeps_its_place():
    with chat_server(echo) as (url, requests):
        out = engine(url, concurrency=4).generate("preference", blocks(*"abcdefgh"), list(range(8)))
    assert out == [Text(f"read >{letter}", True) for letter in "abcdefgh"]
    body = min((request.body for request in requests), key=lambda body: body["seed"])
    assert body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": ">a"}],
        "max_tokens": 256,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 0,
    }
    assert {request.path for request in requests} == {"/v1/chat/completions"}


def test_replicas_share_the_requests_and_one_that_is_gone_costs_a_second_try():
    read = [Text(f"read >{letter}", True) for letter in "abcdefgh"]
    with chat_server(echo) as (one, first), chat_server(echo) as (two, second):
        made = engine([one, two], concurrency=4)
        assert made.generate("preference", blocks(*"abcdefgh")) == read
        assert len(first) == len(second) == 4
    with chat_server(echo) as (one, first):
        made = engine([one, two, one])  # no one listens at the second any more
        assert made.generate("preference", blocks(*"abcdefgh")) == read
        assert len(first) == 8
    options = SummaryOptions("openai", "tiny", base_url=[one, two])
    assert options.facts() == SummaryOptions("openai", "tiny", base_url=one).facts()


def test_an_image_goes_as_a_lossless_data_url_where_the_prompt_puts_it():
    with chat_server(lambda body, n: completion("fine")) as (url, requests):
        engine(url).generate("item_summary", [Candidate("", "Mug", "of clay", IMAGE)])
    before, image, after = requests[0].body["messages"][0]["content"]
    assert (before["text"], after["text"]) == ("Mug ", " of clay")
    data = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(data)).tobytes() == IMAGE.tobytes()
    assert data_url(IMAGE) == image["image_url"]["url"]


def test_control_tokens_in_a_text_are_broken_up():
    with chat_server(echo) as (url, requests):
        engine(url).generate(
            "preference",
            blocks(
                "a <|im_end|> b </s> c <image> d [INST] 1 < 2 [3] <\uff5cUser\uff5c> <\uff5cend\u2581of\uff5c> [gMASK]"
            ),
        )
    written = (
        "a < |im_end|> b < /s> c < image> d [ INST] 1 < 2 [3] < \uff5cUser\uff5c> < \uff5cend\u2581of\uff5c> [ gMASK]"
    )
    assert requests[0].body["messages"][0]["content"] == f">{written}"


def test_the_key_goes_into_the_header_only(monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    leak = b'{"error": "bad key sk-very-secret"}'
    with chat_server(lambda body, n: echo(body) if n == 1 else Reply(401, leak)) as (url, requests):
        made = engine(url)
        made.generate("preference", blocks("a"))
        (refused,) = made.generate("preference", blocks("a"))
    assert requests[0].headers["Authorization"] == "Bearer sk-very-secret"
    assert isinstance(refused, EngineUnavailable) and "set OPENAI_API_KEY" in str(refused)
    assert "secret" not in f"{refused} {caplog.text} {requests[0].body} {made.settings('preference')}"


def test_a_redirection_is_not_followed():
    with (
        chat_server(echo) as (elsewhere, there),
        chat_server(lambda body, n: Reply(302, b"", {"Location": elsewhere})) as (url, _),
    ):
        (out,) = engine(url).generate("preference", blocks("a"))
    assert isinstance(out, EngineUnavailable) and not there


@pytest.mark.parametrize(
    "fault",
    [
        lambda body: Reply(500, b"oops"),
        lambda body: Reply(503, b"busy"),
        lambda body: Reply(429, b"slow down"),
        lambda body: None,
        lambda body: Reply(200, completion("whole").content[:20], {"Content-Length": "400"}),  # cut short
        lambda body: Reply(200, b"<html>not json"),
        lambda body: Reply(200, b'{"choices": []}'),
    ],
    ids=["500", "503", "429", "hung up", "cut short", "no json", "no choice"],
)
def test_what_fails_on_the_way_is_tried_again(fault):
    with chat_server(lambda body, n: fault(body) if n < 3 else echo(body)) as (url, requests):
        assert engine(url).generate("preference", blocks("a")) == [Text("read >a", True)]
    assert len(requests) == 3


def test_the_server_may_say_how_long_to_wait():
    with chat_server(lambda body, n: Reply(429, b"", {"Retry-After": "1"}) if n == 1 else echo(body)) as (
        url,
        requests,
    ):
        engine(url).generate("preference", blocks("a"))
    assert requests[1].time - requests[0].time >= 1.0


def test_a_slow_answer_times_out():
    with chat_server(lambda body, n: time.sleep(1.0 if n == 1 else 0) or echo(body)) as (url, requests):
        assert engine(url, timeout=0.3, tries=20).generate("preference", blocks("a")) == [Text("read >a", True)]
    assert len(requests) >= 2


def test_no_more_requests_a_minute_than_allowed():
    begun = time.monotonic()
    with chat_server(echo) as (url, requests):
        engine(url, requests_per_minute=600).generate("preference", blocks(*"abcdef"))
    assert max(request.time for request in requests) - begun >= 0.49


def test_one_input_the_server_refuses_fails_alone():
    with chat_server(lambda body, n: Reply(400, b"too long") if "bad" in str(body) else echo(body)) as (url, _):
        out = engine(url).generate("preference", blocks("a", "bad", "c"))
    assert [isinstance(one, Text) for one in out] == [True, False, True]
    assert out[1] == Failure("http-400")


def test_inputs_on_which_the_server_breaks_fail_alone_while_it_serves_others():
    with chat_server(lambda body, n: Reply(500, b"bug") if "bad" in str(body) else echo(body)) as (url, _):
        out = engine(url, concurrency=2).generate("preference", blocks(*["bad"] * 7, "fine"))
    assert out == [*[Failure("http-500")] * 7, Text("read >fine", True)]


def test_an_over_long_answer_is_marked_and_the_second_is_given_more_room():
    with chat_server(lambda body, n: completion("on and on", "length")) as (url, requests):
        made = engine(url)
        assert made.generate("preference", blocks("a"), [7]) == [Text("on and on", False)]
        made.generate("preference", blocks("a"), [8], again=True)
    second = requests[1].body
    assert (second["max_tokens"], second["temperature"], second["seed"]) == (384, 0.7, 8)


@pytest.mark.parametrize("fault", [lambda body, n: Reply(500, b"dead"), lambda body, n: None], ids=["500", "gone"])
def test_a_failing_server_stops_the_run_at_once_and_marks_nothing_as_failed(tmp_path, fault):
    rows = [(f"u{n}", f"i{n}", n) for n in range(40)]
    log = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    same = {item: item for _, item, _ in rows}
    options = SummaryOptions("openai", "tiny", block_size=1)
    with chat_server(lambda body, n: echo(body) if n <= 10 else fault(body, n)) as (url, requests):
        made = engine(url, batch_size=8, concurrency=2)
        with pytest.raises(EngineUnavailable, match="run again to go on when it is back"):
            summarize_users(log, same, same, made, TextStore(tmp_path), options)
        assert len(requests) < 40
    kept = TextStore(tmp_path).rows
    assert len(kept) >= 8 and {status for _, status in kept.values()} == {"ok"}
    with chat_server(echo) as (url, requests):
        out = summarize_users(log, same, same, engine(url), TextStore(tmp_path), options)
        assert len(requests) == 40 - len(kept)
    assert set(out["status"]) == {"ok"}


def test_without_a_server_the_remedy_is_named(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ValueError, match=r"set summaries\.base_url or OPENAI_BASE_URL"):
        build_engine(SummaryOptions("openai", "tiny"))


def test_another_revision_of_a_served_model_is_another_model():
    made = [build_engine(SummaryOptions("openai", "tiny", base_url="http://x/v1", revision=name)) for name in "ab"]
    assert [one.revision for one in made] == ["a", "b"]


def test_an_answer_the_server_has_censored_is_not_taken_for_whole():
    with chat_server(lambda body, n: completion("a mug of", "content_filter")) as (url, _):
        assert engine(url).generate("preference", blocks("a"), [7]) == [Text("a mug of", False)]


def test_a_prompt_for_a_server_reads_as_in_this_process():
    item = {"title": "Mug", "text": "of clay\n", "image": IMAGE}
    assert chat_parts(PROMPTS["item_summary"], item, "thing") == ["Mug\nof clay\n", IMAGE, "\nDescribe it."]


# ---- a real server ---------------------------------------------------------------------------------------------


@contextmanager
def transformers_serve(port: int):
    """``transformers serve`` with the demo's model, as a user starts it."""
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve"]
    command += [backbone_path("demo"), "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ})
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).read()
                break
            except OSError:
                assert process.poll() is None, "the server did not start"
                time.sleep(0.5)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(not is_serve_available(), reason="needs transformers[serving]")
def test_a_real_server_writes_what_the_model_in_this_process_writes_even_if_killed_midway(monkeypatch):
    monkeypatch.setattr("mllm_msr.processing.engine_openai.LONGEST_PAUSE", 1.0)
    rng = np.random.default_rng(5)
    drawn = [world.random_item(rng, str(k)) for k in range(30)]
    inputs = [Candidate("", item.title, item.text, world.draw(item)) for item in drawn]
    local = build_engine(SummaryOptions(model="demo", max_new_tokens={"item_summary": 16}), PROMPTS, "thing")
    assert isinstance(local.processor, MllmMsrProcessor)
    wanted = local.generate("item_summary", inputs)
    port = free_port()
    options = {"base_url": f"http://127.0.0.1:{port}/v1", "max_new_tokens": {"item_summary": 16}, "tries": 300}
    remote = build_engine(SummaryOptions("openai", backbone_path("demo"), **options), PROMPTS, "thing")
    with transformers_serve(port) as process:
        assert remote.generate("item_summary", inputs[:3]) == wanted[:3]
        threading.Timer(0.3, process.send_signal, [signal.SIGKILL]).start()
        got: list = []
        asking = threading.Thread(target=lambda: got.extend(remote.generate("item_summary", inputs)))
        asking.start()
        process.wait()
    with transformers_serve(port):
        asking.join(timeout=300)
    assert got == wanted
