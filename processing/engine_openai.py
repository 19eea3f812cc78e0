"""Texts from any OpenAI-compatible server: vLLM, SGLang, ``transformers serve``, a hosted one.

Only the standard library speaks here: one request is one POST. The key comes from the environment variable
``OPENAI_API_KEY`` and goes nowhere but into the header of a request, and never along with a redirection.
"""

import base64
import http.client
import io
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from mllm_msr.processing.chat import chat_parts
from mllm_msr.processing.engines import MAX_NEW_TOKENS, EngineUnavailable, Task, Text, prompt_digest

AGAIN = {"temperature": 0.7, "top_p": 0.9, "room": 1.5}  # for a second answer
GIVE_UP_AFTER = 3  # requests in a row that failed on the way, each after all its tries
OF_THE_INPUT = (400, 413, 415, 422)  # too long, or refused as it is: another may well pass
CUT_SHORT = ("length", "content_filter")
PASSING = (408, 409, 425, 429)  # and all above 499
LONGEST_PAUSE = 60.0  # seconds
# Names of control tokens, which a server may take for such within a text: <|im_end|>, </s>, <image>, [INST]
_CONTROL = re.compile(r"<(?=\|?/?[A-Za-z_][\w-]*\|?>)|\[(?=/?[A-Z_]+\])")


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        return None


class OpenAIEngine:
    """Chat completions, ``concurrency`` at a time.

    A request that fails on the way (connection, timeout, 5xx, 429, an answer cut short) is tried again after a pause
    that doubles, or as long as the server asks. An input the server refuses, or fails on while it serves others, has
    failed alone; when the server serves none, or knows no such model or key, the engine is unavailable, and no further
    input is tried.

    Args:
        model: the name the server knows it by.
        prompts: templates by task.
        noun: what an item is called in the prompts.
        base_url: up to and with ``/v1``; by default ``OPENAI_BASE_URL``.
        revision: what it has loaded, which no server tells: another name makes all texts anew.
        requests_per_minute: begin no more than so many.
        timeout: seconds without a byte after which a request has failed.
    """

    def __init__(
        self,
        model: str,
        prompts: Mapping[str, str],
        noun: str = "item",
        *,
        base_url: str | None = None,
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
        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        if not (base_url or "").startswith(("http://", "https://")):
            raise ValueError(
                f"no server: set summaries.base_url or OPENAI_BASE_URL to http(s)://.../v1, not {base_url!r}"
            )
        self.url = f"{str(base_url).rstrip('/')}/chat/completions"
        self.generator, self.revision, self.prompts, self.noun = model, revision or "", prompts, noun
        self.max_new_tokens = {**MAX_NEW_TOKENS, **(max_new_tokens or {})}
        self.temperature, self.top_p = temperature, top_p
        self.concurrency, self.batch_size, self.timeout, self.tries = concurrency, batch_size, timeout, tries
        self.interval, self.pause = 60 / requests_per_minute if requests_per_minute else 0.0, pause
        self._lock, self._next_start, self._lost_in_a_row = threading.Lock(), 0.0, 0
        self._opener = urllib.request.build_opener(_NoRedirection)

    def prompt_hash(self, task: Task) -> str:
        return prompt_digest(self.prompts[task], self.noun)

    def settings(self, task: Task) -> str:
        return f"temperature {self.temperature}, top_p {self.top_p}, {self.max_new_tokens[task]}, {AGAIN}"

    def generate(
        self, task: Task, inputs: Sequence[Mapping[str, Any]], seeds: Sequence[int] | None = None, again: bool = False
    ) -> list[Text | Exception]:
        """Failures come in place of texts, so that what a dying server still answered is kept."""
        self._lost_in_a_row = 0
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(
                pool.map(lambda one, seed: self._one(task, one, seed, again), inputs, seeds or [0] * len(inputs))
            )

    def _one(self, task: Task, values: Mapping[str, Any], seed: int, again: bool) -> Text | Exception:
        content = [_part(part) for part in chat_parts(self.prompts[task], _harmless(values), self.noun)]
        plain = "".join(part["text"] for part in content if part["type"] == "text")
        request = {
            "model": self.generator,
            "messages": [{"role": "user", "content": plain if all("text" in part for part in content) else content}],
            "max_tokens": int(self.max_new_tokens[task] * (AGAIN["room"] if again else 1)),
            "temperature": max(self.temperature, AGAIN["temperature"]) if again else self.temperature,
            "top_p": min(self.top_p, AGAIN["top_p"]) if again else self.top_p,
            "seed": seed % 2**31,
        }
        body = json.dumps(request).encode()
        problem: Exception = EngineUnavailable("nothing was tried")
        for attempt in range(self.tries):
            with self._lock:  # who comes while another finds out whether the server lives waits for the answer
                lost = self._lost_in_a_row
            if lost >= GIVE_UP_AFTER:
                return EngineUnavailable(f"{self.url} fails again and again; run again to go on when it is back")
            pause = min(self.pause * 2**attempt, LONGEST_PAUSE)
            try:
                choice = self._post(body)["choices"][0]
                text = choice["message"]["content"] or ""
                self._lost_in_a_row = 0
                return Text(text.strip(), choice.get("finish_reason") not in CUT_SHORT)
            except urllib.error.HTTPError as error:
                said = error.read(500).decode(errors="replace").replace(os.environ.get("OPENAI_API_KEY") or "\0", "***")
                problem = RuntimeError(f"{self.url} answered {error.code}: {said}")
                if error.code in OF_THE_INPUT:
                    self._lost_in_a_row = 0
                    return problem
                if error.code < 500 and error.code not in PASSING:
                    return self._unavailable(error.code, said)
                asked = error.headers.get("Retry-After", "")
                pause = min(max(pause, float(asked)), LONGEST_PAUSE) if asked.isdigit() else pause
            except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, cut short
                problem = ConnectionError(f"{self.url} cannot be reached or broke off ({error!r})")
            except (ValueError, KeyError, IndexError, TypeError) as error:
                problem = RuntimeError(f"{self.url} sent no whole chat completion ({error!r})")
            if attempt + 1 < self.tries:
                time.sleep(pause)
        with self._lock:
            self._lost_in_a_row += 1
            if self._lost_in_a_row >= GIVE_UP_AFTER and self._answers():
                self._lost_in_a_row = 0  # so the inputs are at fault
            lost = self._lost_in_a_row
        if lost >= GIVE_UP_AFTER:
            return EngineUnavailable(f"{problem}; run again to go on when it is back")
        return problem

    def _answers(self) -> bool:
        """Whether the server can do the least that may be asked."""
        message = {"role": "user", "content": "Say yes."}
        try:
            self._send(json.dumps({"model": self.generator, "messages": [message], "max_tokens": 1}).encode())
        except (OSError, http.client.HTTPException, ValueError):
            return False
        return True

    def _unavailable(self, code: int, said: str) -> EngineUnavailable:
        self._lost_in_a_row = GIVE_UP_AFTER  # no use for the others either
        remedies = {
            401: "set OPENAI_API_KEY",
            403: "this key may not use it",
            404: "check summaries.base_url and model",
        }
        remedy = remedies.get(code, "check summaries.base_url")
        return EngineUnavailable(f"{self.url} answered {code} for model {self.generator!r}: {remedy} ({said})")

    def _post(self, body: bytes) -> Any:
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next_start)
            self._next_start = start + self.interval
        time.sleep(start - now)
        return self._send(body)

    def _send(self, body: bytes) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, body, headers)
        with self._opener.open(request, timeout=self.timeout) as response:
            return json.loads(response.read())


def _part(part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image_url", "image_url": {"url": data_url(part)}}


def data_url(image: Image.Image) -> str:
    """The picture as a lossless data URL, so that the server sees what a model in this process would."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _harmless(value: Any) -> Any:
    """``value`` with a space inside every name of a control token in its texts."""
    if isinstance(value, Mapping):
        return {key: _harmless(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_harmless(part) for part in value]
    return _CONTROL.sub(lambda found: f"{found[0]} ", value) if isinstance(value, str) else value
