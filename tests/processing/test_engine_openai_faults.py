"""The engine that asks a server: odd servers, odd keys, and what must not be shown."""

import asyncio
import json
import logging
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from chat_server import Reply, chat_server, completion

from mllm_msr.modeling.inputs import Candidate
from mllm_msr.processing.engine_openai import OpenAIEngine
from mllm_msr.processing.engines import EngineUnavailable, Failure, Text
from mllm_msr.processing.prompts import PROMPTS

MUG = Candidate(title="Mug", text="blue")
BLUE = Text("A blue mug", True)
TOO_LONG = b'{"error": {"message": "max_tokens or max_completion_tokens is too large for 2048 tokens"}}'


def engine(url: str, **options) -> OpenAIEngine:
    return OpenAIEngine("tiny", PROMPTS, base_url=url, **{"pause": 0.01, "tries": 3, "timeout": 60, **options})


def ask(url: str, count: int = 1, **options) -> list:
    return engine(url, **options).generate("text_summary", [MUG] * count)


# ---- secrets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["secret\n", "\r\n secret\t"])
def test_white_space_around_a_key_is_dropped(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with chat_server(lambda body, n: completion("A blue mug")) as (url, requests):
        assert ask(url) == [BLUE]
    assert requests[0].headers["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("key", ["sec\nret", "\u2013secret", "sec ret", "sécret"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_quoted(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="OPENAI_API_KEY has a character") as refused:
        engine("http://127.0.0.1:9/v1")
    assert "ret" not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["ftp://u:secret@host/v1", "secret", "http://", "http://[secret/v1", "http://h:secret/"]
)
def test_an_address_that_is_none_is_not_quoted(url):
    with pytest.raises(ValueError, match=r"summaries\.base_url") as refused:
        engine(url)
    assert "secret" not in str(refused.value) and refused.value.__context__ is None


@pytest.mark.parametrize("status", [301, 302, 400, 401, 402, 403, 404, 418, 422, 429, 500, 503])
def test_neither_address_nor_key_nor_what_the_server_says_is_shown(monkeypatch, caplog, status):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    leak = Reply(
        status, b"refused: secret-key at http://secret-host/secret-path/v1", {"Location": "http://secret-host"}
    )
    with chat_server(lambda body, n: leak) as (url, requests):
        answers = ask(f"{url}/secret-path", 5, tries=1)
    assert requests[0].path == "/v1/secret-path/chat/completions"
    assert not any(isinstance(answer, Text) for answer in answers)
    assert str(status) in str(answers) and "secret" not in f"{answers!r} {[*map(str, answers)]} {caplog.text}"


def test_a_server_that_is_not_there_is_not_named(caplog):
    caplog.set_level(logging.DEBUG)
    answers = ask("http://secret-host.invalid/secret-path/v1", 4, tries=1)
    assert any(isinstance(answer, EngineUnavailable) and "(connection)" in str(answer) for answer in answers)
    assert "secret" not in f"{answers!r} {caplog.text}"


# ---- what a server answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "<think>\nThey want a summary.\n</think>\n\nA blue mug",
        "They want a summary.\n</think>\n\nA blue mug",
        [{"type": "thinking", "thinking": "They want a summary."}, {"type": "text", "text": "A blue mug"}],
        [{"type": "reasoning", "text": "They want a summary."}, {"type": "output_text", "text": "A blue mug"}],
        [{"type": "text", "text": "A blue"}, {"type": "text", "text": " mug"}],
        [{"text": "A blue mug"}],
        {"type": "text", "text": "A blue mug"},
        ["A blue ", "mug"],
    ],
)
def test_a_text_is_what_is_left_of_reasoning_and_parts(content):
    with chat_server(lambda body, n: completion(content)) as (url, _):
        assert ask(url) == [BLUE]


def test_an_answer_that_is_all_reasoning_is_an_empty_text():
    with chat_server(lambda body, n: completion("<think>They want", "length")) as (url, _):
        assert ask(url) == [Text("", False)]
    with chat_server(lambda body, n: completion(None)) as (url, _):
        assert ask(url) == [Text("", True)]


def test_half_characters_become_replacement_characters():
    with chat_server(lambda body, n: completion("A blue mug \ud83d")) as (url, _):
        assert ask(url) == [Text("A blue mug \ufffd", True)]
    cut = Reply(content=completion("A blue mug ☕").content.replace(b"\\u2615", "☕".encode()[:2]))
    with chat_server(lambda body, n: cut) as (url, _):
        assert ask(url)[0].text.startswith("A blue mug \ufffd")


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b'{"choices": null}', b'{"choices": [{"message": 1}]}', b'{"choices": [{}]}', b"[" * 100_000]
    + [json.dumps({"choices": [{"message": {"content": odd}}]}).encode() for odd in (1, [1], [{"text": 1}], [[]])],
)
def test_an_answer_that_is_no_completion_is_a_failure_of_its_own_kind(content):
    with chat_server(lambda body, n: Reply(content=content)) as (url, _):
        assert ask(url, tries=1) == [Failure("malformed-answer")]


@pytest.mark.parametrize("finish", ["MAX_TOKENS", "max_output_tokens", "SAFETY", {"type": "length", "length": 96}])
def test_an_answer_is_not_taken_for_whole_whatever_the_server_calls_its_end(finish):
    with chat_server(lambda body, n: completion("A blue", finish)) as (url, _):
        assert ask(url) == [Text("A blue", False)]


@pytest.mark.parametrize("finish", ["abort", "error", {"type": "abort", "message": "stopped"}])
def test_what_a_server_breaks_off_is_asked_for_again(finish):
    with chat_server(lambda body, n: completion("A bl", finish) if n == 1 else completion("A blue mug")) as (url, _):
        assert ask(url) == [Text("A blue mug", True)]
    with chat_server(lambda body, n: completion("A bl", finish)) as (url, _):
        assert ask(url, tries=1) == [Failure("broken-off")]


@pytest.mark.parametrize("finish", ["stop", "eos_token", "STOP", "end_turn", None])
def test_an_answer_is_whole_by_any_name_of_its_end(finish):
    with chat_server(lambda body, n: completion("A blue mug", finish)) as (url, _):
        assert ask(url) == [Text("A blue mug", True)]


def test_an_endless_answer_is_not_read_to_its_end():
    with chat_server(lambda body, n: Reply(content=b"x" * 2**23)) as (url, _):
        assert ask(url, tries=1) == [Failure("too-long-answer")]


# ---- what a server wants ---------------------------------------------------------------------------------------


def wants(*others: str):
    """A server that refuses ``max_tokens`` and these parameters, one at a time, as hosted reasoning models do."""

    def answer(body, n):
        for name, hint in (("max_tokens", ", use max_completion_tokens"), *((other, "") for other in others)):
            if name in body:
                message = f"Unsupported parameter: '{name}' is not supported with this model{hint}."
                return Reply(400, json.dumps({"error": {"message": message, "param": name}}).encode())
        return completion("A blue mug")

    return answer


def test_a_server_that_wants_max_completion_tokens_is_asked_so_from_then_on():
    with chat_server(wants()) as (url, requests):
        made = engine(url, concurrency=1)
        assert made.generate("text_summary", [MUG] * 3) == [BLUE] * 3
    assert [sorted({"max_tokens", "max_completion_tokens"} & request.body.keys()) for request in requests] == [
        ["max_tokens"],
        *[["max_completion_tokens"]] * 3,
    ]
    assert requests[1].body["max_completion_tokens"] == 80


def test_the_other_name_is_tried_even_if_the_server_does_not_give_it():
    refusal = Reply(422, b'{"error": "Unrecognized request argument supplied: max_tokens"}')
    with chat_server(lambda body, n: refusal if "max_tokens" in body else completion("A blue mug")) as (url, _):
        assert ask(url) == [BLUE]


def test_a_template_that_cannot_show_an_input_fails_it_alone():
    prompts = {"text_summary": "{{ title }}{% if title %}{{ text.nothing.more }}{% endif %}"}
    with chat_server(lambda body, n: completion("A blue mug")) as (url, _):
        made = OpenAIEngine("tiny", prompts, base_url=url)
        assert [type(answer) for answer in made.generate("text_summary", [MUG, Candidate(text="x")])] == [Failure, Text]


def test_parameters_of_sampling_that_a_server_refuses_are_left_out_with_a_warning(caplog):
    with chat_server(wants("temperature", "top_p", "seed")) as (url, requests):
        assert ask(url, 2, concurrency=1) == [BLUE] * 2
    assert len(requests) == 6 and not {"temperature", "top_p", "seed", "max_tokens"} & requests[-1].body.keys()
    assert "the server does not take temperature and top_p and seed" in caplog.text


def test_an_input_that_is_too_long_changes_nothing_for_others():
    with chat_server(lambda body, n: Reply(400, TOO_LONG) if n < 3 else completion("A blue mug")) as (url, requests):
        assert ask(url, 2, concurrency=1) == [Failure("http-400"), BLUE]
    assert "max_tokens" in requests[-1].body


@pytest.mark.parametrize("header", ["-5", "soon", "nan", "inf", "", "0", "99 bottles", "Wed, 99 Foo"])
def test_an_odd_retry_after_is_no_reason_to_wait_or_to_fail(header):
    busy = Reply(429, b"", {"Retry-After": header})
    start = time.monotonic()
    with chat_server(lambda body, n: busy if n == 1 else completion("A blue mug")) as (url, _):
        assert ask(url) == [BLUE]
    assert time.monotonic() - start < 50


@pytest.mark.parametrize("zone", [UTC, None])
def test_retry_after_may_be_a_date_or_a_fraction(zone):
    def answer(body, n):
        headers = ["1.2", format_datetime(datetime.now(UTC).replace(tzinfo=zone) + timedelta(seconds=2))]
        return Reply(503, b"", {"Retry-After": headers[n - 1]}) if n < 3 else completion("A blue mug")

    with chat_server(answer) as (url, requests):
        assert ask(url) == [BLUE]
    assert requests[1].time - requests[0].time >= 1.2 and requests[2].time - requests[1].time >= 0.9


@pytest.mark.parametrize("part", ["headers", "body"])
def test_a_request_has_a_deadline_even_if_its_answer_drips(part):
    start = time.monotonic()
    with chat_server(lambda body, n: Reply(content=b"{" * 10_000, drip=part)) as (url, _):
        assert ask(url, tries=1, timeout=0.6) == [Failure("timeout")]
        assert time.monotonic() - start < 50


# ---- where it is asked from ------------------------------------------------------------------------------------


def test_it_works_where_an_event_loop_runs_already_as_in_a_notebook():
    async def cell(url: str) -> list:
        return ask(url)

    with chat_server(lambda body, n: completion("A blue mug")) as (url, _):
        assert asyncio.run(cell(url)) == [BLUE]


def test_the_proxy_of_the_environment_is_used_but_not_for_its_exceptions(monkeypatch):
    with (
        chat_server(lambda body, n: completion("by proxy")) as (proxy, _),
        chat_server(lambda body, n: completion("directly")) as (url, _),
    ):
        monkeypatch.setenv("http_proxy", proxy.removesuffix("/v1"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert ask(url) == [Text("directly", True)]
        monkeypatch.setenv("no_proxy", "")
        assert ask(url) == [Text("by proxy", True)]


@pytest.mark.parametrize("suffix", ["", "/", "/chat/completions"])
def test_an_address_may_end_as_it_likes_and_have_a_query(suffix):
    with chat_server(lambda body, n: completion("A blue mug")) as (url, requests):
        assert ask(f" {url}{suffix} ") == ask(f"{url}?version=1") == [BLUE]
    assert [request.path for request in requests] == ["/v1/chat/completions", "/v1/chat/completions?version=1"]
