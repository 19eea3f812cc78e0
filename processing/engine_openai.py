"""Texts from any OpenAI-compatible server: vLLM, SGLang, ``transformers serve``, a hosted one.

One request is one POST. The key comes from the environment variable ``OPENAI_API_KEY`` and goes nowhere but into the
header of a request, and never along with a redirection. What the server says when it refuses is not shown, since it may
quote the key, its own address or an input: a failure is named by its status.
"""

import asyncio
import base64
import io
import json
import logging
import math
import os
import re
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import cycle
from typing import Any, TypeVar
from urllib.request import getproxies, proxy_bypass

import aiohttp
from PIL import Image
from yarl import URL

from mllm_msr.modeling.generated_text import tidy
from mllm_msr.processing.chat import chat_parts, harmless
from mllm_msr.processing.engines import Answer, EngineUnavailable, Failure, Text, prompt_digest
from mllm_msr.processing.prompts import MAX_NEW_TOKENS, Task

logger = logging.getLogger(__name__)
Done = TypeVar("Done")
AGAIN = {"temperature": 0.7, "top_p": 0.9, "room": 1.5}  # for a second answer
GIVE_UP_AFTER = 3  # requests in a row that failed on the way, each after all its tries
OF_THE_INPUT = (400, 413, 415, 422)  # too long, or refused as it is: another may well pass
PASSING = (408, 409, 425, 429)  # and all above 499
REMEDIES = {
    401: "set OPENAI_API_KEY",
    402: "the account of this key has no credit",
    403: "this key may not use it",
    404: "check summaries.base_url and summaries.model",
}
LONGEST_PAUSE = 60.0  # seconds
MOST_BYTES = 2**22  # of an answer, which is a text of some hundred tokens
OPTIONAL = ("temperature", "top_p", "seed")  # parameters that some models do not take
# of a `finish_reason`: the text is as long as it may be, or a part of it was withheld; it was broken off
_CUT_SHORT = re.compile(r"length|max_|limit|filter|safety|recitation|block|prohibited|sensitive", re.IGNORECASE)
_BROKEN_OFF = re.compile(r"abort|error|cancel|incomplete|timeout", re.IGNORECASE)
_UNKNOWN = re.compile(r"unsupported|not (supported|permitted|allowed)|un(recogni[sz]ed|known|expected)", re.IGNORECASE)


class OpenAIEngine:
    """Chat completions, ``concurrency`` at a time.

    A request that fails on the way (connection, timeout, 5xx, 429, an answer cut short) is tried again after a pause
    that doubles, or as long as the server asks. An input the server refuses, or fails on while it serves others, has
    failed alone; when the server serves none, or knows no such model or key, the engine is unavailable, and no further
    input is tried. A server that asks for ``max_completion_tokens``, or refuses a parameter of sampling, gets the
    request in those terms, from then on always.

    Args:
        model: the name the server knows it by.
        prompts: templates by task.
        noun: what an item is called in the prompts.
        base_url: up to and with ``/v1``; by default ``OPENAI_BASE_URL``. Several have the same model: each request and
            each further try of one goes to the next.
        revision: what it has loaded, which no server tells: another name makes all texts anew.
        requests_per_minute: begin no more than so many.
        timeout: seconds after which a request has failed, however much of its answer has come.
        tries: of a request that fails on the way.
        pause: seconds before the second try.

    Raises:
        ValueError: no address, or a key that no HTTP header can hold.
    """

    def __init__(
        self,
        model: str,
        prompts: Mapping[str, str],
        noun: str = "item",
        *,
        base_url: str | Sequence[str] | None = None,
        revision: str | None = None,
        max_new_tokens: Mapping[str, int] | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        concurrency: int = 8,
        requests_per_minute: float | None = None,
        timeout: float = 120.0,
        tries: int = 5,
        batch_size: int = 64,
        pause: float = 1.0,
    ) -> None:
        given = base_url or os.environ.get("OPENAI_BASE_URL", "")
        urls = [_endpoint(url) for url in ([given] if isinstance(given, str) else given)]
        self._urls = cycle(urls)
        named = any(url.user for url in urls)
        self._headers = {"Content-Type": "application/json"} | ({} if named else authorization())
        self.generator, self.revision, self.prompts, self.noun = model, revision or "", prompts, noun
        self.max_new_tokens = {**MAX_NEW_TOKENS, **(max_new_tokens or {})}
        self.temperature, self.top_p = temperature, top_p
        self.concurrency, self.batch_size, self.timeout, self.tries = concurrency, batch_size, timeout, tries
        self.interval, self.pause = 60 / requests_per_minute if requests_per_minute else 0.0, pause
        self._next_start = 0.0
        self._terms: dict[str, str | None] = {}  # parameters by another name, or not sent at all (None)

    def prompt_hash(self, task: Task) -> str:
        return prompt_digest(self.prompts[task], self.noun)

    def settings(self, task: Task) -> str:
        return f"temperature {self.temperature}, top_p {self.top_p}, {self.max_new_tokens[task]}, {AGAIN}"

    def generate(
        self, task: Task, inputs: Sequence[Any], seeds: Sequence[int] | None = None, again: bool = False
    ) -> list[Answer]:
        """Failures come in place of texts, so that what a dying server still answered is kept.

        Mappings of the prompt's variables are taken as well.
        """

        async def answers() -> list[Answer]:
            async with aiohttp.ClientSession(
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=self.timeout),
                connector=aiohttp.TCPConnector(limit=0),  # waiting for a place would count as time of the request
                cookie_jar=aiohttp.DummyCookieJar(),
            ) as session:
                batch = _Batch(self, session, asyncio.Semaphore(self.concurrency))
                return await asyncio.gather(
                    *(
                        batch.answer(task, given, seed, again)
                        for given, seed in zip(inputs, seeds or [0] * len(inputs), strict=True)
                    )
                )

        return run_to_end(answers())

    def _request(self, task: Task, given: Any, seed: int, again: bool) -> dict[str, Any]:
        content = [_part(part) for part in chat_parts(self.prompts[task], harmless(given), self.noun)]
        plain = "".join(part["text"] for part in content if part["type"] == "text")
        return {
            "model": self.generator,
            "messages": [{"role": "user", "content": plain if all("text" in part for part in content) else content}],
            "max_tokens": int(self.max_new_tokens[task] * (AGAIN["room"] if again else 1)),
            "temperature": max(self.temperature, AGAIN["temperature"]) if again else self.temperature,
            "top_p": min(self.top_p, AGAIN["top_p"]) if again else self.top_p,
            "seed": seed % 2**31,
        }

    async def _exchange(self, session: aiohttp.ClientSession, request: Mapping[str, Any]) -> "Text | _Trouble":
        """One answer; if the server objects to a parameter, in the terms it asks for, which are kept if they help."""
        terms = self._terms
        url = next(self._urls)
        outcome = await self._post(session, url, _in_terms(request, terms))
        while isinstance(outcome, _Trouble) and outcome.status in (400, 422):
            objection = _objection(outcome.body, terms)
            if objection is None:
                break
            terms = {**terms, **objection}
            outcome = await self._post(session, url, _in_terms(request, terms))
        if isinstance(outcome, Text) and terms != self._terms:
            self._terms = terms
            if left_out := [name for name, other in terms.items() if other is None]:
                logger.warning("the server does not take %s: its own values hold", " and ".join(left_out))
        return outcome

    async def _post(self, session: aiohttp.ClientSession, url: URL, request: Mapping[str, Any]) -> "Text | _Trouble":
        now = time.monotonic()
        start = max(now, self._next_start)
        self._next_start = start + self.interval
        await asyncio.sleep(start - now)
        try:
            async with session.post(
                url, data=json.dumps(request).encode(), allow_redirects=False, proxy=proxy_of(url)
            ) as response:
                content = bytearray()
                async for chunk in response.content.iter_chunked(2**16):
                    content += chunk
                    if len(content) > MOST_BYTES:
                        return _Trouble("too-long-answer")
                body, status = content.decode("utf-8-sig", "replace"), response.status
                pause = _seconds(response.headers.get("Retry-After", ""))
        except TimeoutError:
            return _Trouble("timeout")
        except (aiohttp.ClientError, OSError):  # refused, reset, cut short
            return _Trouble("connection")
        if not 200 <= status < 300:
            return _Trouble(f"http-{status}", status, body, pause)
        try:
            choice = json.loads(body)["choices"][0]
            text, finish = _text_of(choice["message"].get("content")), str(choice.get("finish_reason"))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            return _Trouble("malformed-answer")
        if _BROKEN_OFF.search(finish):  # by a server that is stopped, say
            return _Trouble("broken-off")
        return Text(tidy(text), not _CUT_SHORT.search(finish))


@dataclass(frozen=True)
class _Trouble:
    """Why a request has no text: ``status`` is 0 if there was no HTTP answer; ``pause`` is what the server asks for."""

    reason: str
    status: int = 0
    body: str = ""
    pause: float = 0.0


@dataclass
class _Batch:
    """The requests of one ``generate``, which find out together whether the server is there."""

    engine: OpenAIEngine
    session: aiohttp.ClientSession
    places: asyncio.Semaphore
    checking: asyncio.Lock = field(default_factory=asyncio.Lock)
    lost_in_a_row: int = 0
    unavailable: EngineUnavailable | None = None

    async def answer(self, task: Task, given: Any, seed: int, again: bool) -> Answer:
        engine = self.engine
        async with self.places:
            try:
                request = await asyncio.to_thread(engine._request, task, given, seed, again)
            except Exception as error:  # a template of the user's that cannot show this input
                return Failure.of(error)
            trouble = _Trouble("not-tried")
            for attempt in range(engine.tries):
                async with self.checking:  # wait while another finds out whether the server is there
                    if self.unavailable:
                        return self.unavailable
                outcome = await engine._exchange(self.session, request)
                if isinstance(outcome, Text):
                    self.lost_in_a_row = 0
                    return outcome
                trouble = outcome
                if trouble.status in OF_THE_INPUT:
                    self.lost_in_a_row = 0
                    return Failure(trouble.reason)
                if 0 < trouble.status < 500 and trouble.status not in PASSING:
                    remedy = REMEDIES.get(trouble.status, "check summaries.base_url")
                    self.unavailable = EngineUnavailable(
                        f"the server answered {trouble.status} for model {engine.generator!r}: {remedy}"
                    )
                    return self.unavailable
                if attempt + 1 < engine.tries:
                    await asyncio.sleep(min(max(engine.pause * 2**attempt, trouble.pause), LONGEST_PAUSE))
            return await self._lost(trouble)

    async def _lost(self, trouble: _Trouble) -> Answer:
        """The input's own failure, unless the server fails on everything."""
        async with self.checking:
            self.lost_in_a_row += 1
            if self.lost_in_a_row >= GIVE_UP_AFTER and not self.unavailable:
                message = {"role": "user", "content": "Say yes."}  # the least that may be asked
                least = {"model": self.engine.generator, "messages": [message], "max_tokens": 1}
                if isinstance(await self.engine._exchange(self.session, least), Text):
                    self.lost_in_a_row = 0
                else:
                    self.unavailable = EngineUnavailable(
                        f"the server fails again and again ({trouble.reason}); run again to go on when it is back"
                    )
            return self.unavailable or Failure(trouble.reason)


def run_to_end(work: Coroutine[Any, Any, list[Done]]) -> list[Done]:
    """``work`` to its end; in a thread of its own where there is an event loop already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def _endpoint(base_url: str) -> URL:
    """The address of chat completions."""
    url = server_url(
        base_url.strip().rstrip("/").removesuffix("/chat/completions"), "summaries.base_url or OPENAI_BASE_URL"
    )
    return (url / "chat/completions").with_query(url.query)


def server_url(address: str, setting: str) -> URL:
    """The address of a server, which ``setting`` gives. It may be a secret, so that no error shows it."""
    try:
        url = URL(address.strip())
    except ValueError:
        url = URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"no server: set {setting} to an address http(s)://HOST/v1")
    return url


def authorization() -> dict[str, str]:
    """The header with the key, if there is one; ValueError, without the key, if no header can hold it."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not all("!" <= character <= "~" for character in key):
        raise ValueError(
            "OPENAI_API_KEY has a character that no HTTP header may have, such as a line break, a space or a letter "
            "that is not ASCII: copy the key anew"
        )
    return {"Authorization": f"Bearer {key}"} if key else {}


def proxy_of(url: URL) -> str | None:
    """As the environment says."""
    return None if proxy_bypass(url.host or "") else getproxies().get(url.scheme)


def _in_terms(request: Mapping[str, Any], terms: Mapping[str, str | None]) -> dict[str, Any]:
    named = ((terms.get(name, name), value) for name, value in request.items())
    return {name: value for name, value in named if name is not None}


def _objection(body: str, terms: Mapping[str, str | None]) -> dict[str, str | None] | None:
    """The first parameter not changed yet to which the server objects, and what to send in its place (None: nothing).

    >>> _objection("max_tokens is not supported, use max_completion_tokens", {})
    {'max_tokens': 'max_completion_tokens'}
    """
    unknown = "max_tokens" in body and _UNKNOWN.search(body)
    if "max_tokens" not in terms and (unknown or "max_completion_tokens" in body):
        return {"max_tokens": "max_completion_tokens"}
    for name in OPTIONAL:
        if name not in terms and re.search(rf"\b{name}\b", body):
            return {name: None}
    return None


def _seconds(retry_after: str) -> float:
    """What ``Retry-After`` asks for, a number or a date; 0 if it is neither or in the past.

    >>> _seconds("1.5"), _seconds("-3"), _seconds("soon"), _seconds("Wed, 21 Oct 2015 07:28:00 GMT")
    (1.5, 0.0, 0.0, 0.0)
    """
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            date = parsedate_to_datetime(retry_after)
            seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0


def _text_of(content: Any) -> str:
    """The text of a message's content: a text, or parts, of which those of reasoning are left out.

    >>> _text_of([{"type": "thinking", "thinking": "They want a summary."}, {"type": "text", "text": "A mug"}])
    'A mug'
    """
    if content is None or isinstance(content, str):
        return content or ""
    parts = [content] if isinstance(content, Mapping) else content
    texts = [
        part if isinstance(part, str) else part["text"]
        for part in parts
        if isinstance(part, str) or part.get("type", "text") in ("text", "output_text")
    ]
    return "".join(texts)


def _part(part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image_url", "image_url": {"url": data_url(part)}}


def data_url(image: Image.Image) -> str:
    """The image as a lossless data URL, so that the server sees what a model in this process would."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
