"""A joint model's answers from a server: vLLM's ``/generative_scoring`` or SGLang's ``/v1/score``.

Both take prompts as token ids, so the server is asked exactly our prompts: `query` is what the prompts of a user begin
with, which it computes once, and each of `items` the rest of one. It answers with the probabilities of the first tokens
of Yes and No among one another. What is served is the backbone that `export_backbone` writes. The key is that of the
other servers, `OPENAI_API_KEY`; as there, nothing that a server says is shown.
"""

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import aiohttp
import numpy as np
from yarl import URL

from mllm_msr.modeling.inputs import Candidate, User
from mllm_msr.modeling.late_ranking import Scores
from mllm_msr.modeling.ranking import Recommender
from mllm_msr.processing.engine_openai import PASSING, REMEDIES, authorization, proxy_of, run_to_end, server_url
from mllm_msr.processing.engines import EngineUnavailable
from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor

VLLM, SGLANG = "generative_scoring", "v1/score"
CANDIDATES = 256  # of one request
ROUNDING = 1e-3  # by which probabilities in half precision may be beyond 0 and 1
USERS = 64  # whose prompts are made at a time


class ServedRecommender(Recommender):
    """Ranks as :class:`Recommender` does, but for images, by a model on a server.

    Args:
        processor: of the model that is served.
        url: where the server listens, with or without ``/v1``.
        concurrency: requests in flight.
        timeout: seconds after which a request has failed.
        tries: of a request that fails on the way, with a pause that doubles.

    Raises:
        ValueError: no address; when scoring, a candidate with an image that the prompt would show.
        EngineUnavailable: when scoring, what the server lacks.
    """

    def __init__(
        self,
        processor: MllmMsrProcessor,
        url: str,
        concurrency: int = 8,
        timeout: float = 120.0,
        tries: int = 4,
        pause: float = 1.0,
    ) -> None:
        self.processor, self.cache = processor, None
        root = server_url(url.strip().rstrip("/").removesuffix("/v1"), "evaluation.served")
        self.plan = _ServedPlan(processor, root, concurrency, timeout, tries, pause)


class _ServedPlan:
    """See :class:`ServedRecommender`."""

    def __init__(
        self, processor: MllmMsrProcessor, url: URL, concurrency: int, timeout: float, tries: int, pause: float
    ) -> None:
        self.processor, self.url, self.concurrency, self.timeout = processor, url, concurrency, timeout
        self.tries, self.pause = tries, pause
        self.path = VLLM  # until it turns out that the server has another
        self.yes, self.no = (processor.answer_token_ids[side] for side in ("yes", "no"))

    def scores(
        self, users: Sequence[User], rows: Sequence[np.ndarray], names: Sequence[str], catalogue: Mapping[str, Any]
    ) -> Iterator[Scores]:
        """The logits of all pairs, some users at a time."""
        shows_images = self.processor.prints_image("recommendation")
        for first in range(0, len(users), USERS):
            parts, requests = [], []
            for user in range(first, min(first + USERS, len(users))):
                for start in range(0, len(rows[user]), CANDIDATES):
                    places = np.arange(start, min(start + CANDIDATES, len(rows[user])))
                    candidates = [Candidate.of(catalogue[names[item]]) for item in rows[user][places]]
                    if with_image := next(
                        (each for each in candidates if shows_images and each.image is not None), None
                    ):
                        raise ValueError(
                            f"item {with_image.item_id!r} has an image, and a served model is sent text only: score in "
                            "this process, or the variant 'text_only'"
                        )
                    parts.append((user, places))
                    requests.append(self._prompts(users[user], candidates))
            for (user, places), logits in zip(parts, run_to_end(self._all(requests)), strict=True):
                yield Scores(np.full(len(places), user), places, logits)

    def _prompts(self, user: User, candidates: Sequence[Candidate]) -> dict[str, Any]:
        """The prompts of a user as token ids, divided where they begin to differ."""
        batch = self.processor([user] * len(candidates), candidates)
        prompts = [
            ids[inside.bool()].tolist() for ids, inside in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        most = min(map(len, prompts)) - 1  # no rest is empty
        shared = next((place for place, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1), most)
        shared = min(shared, most)
        return {"query": prompts[0][:shared], "items": [ids[shared:] for ids in prompts]}

    async def _all(self, requests: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
        async with aiohttp.ClientSession(
            headers={"Content-Type": "application/json"} | ({} if self.url.user else authorization()),
            timeout=aiohttp.ClientTimeout(total=self.timeout),
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
        ) as session:
            places = asyncio.Semaphore(self.concurrency)

            async def one(request: Mapping[str, Any]) -> np.ndarray:
                async with places:
                    return await self._logits(session, request)

            return await asyncio.gather(*map(one, requests))

    async def _logits(self, session: aiohttp.ClientSession, request: Mapping[str, Any]) -> np.ndarray:
        """(C,) the logits of the items of a request: those of all spellings of Yes against those of No."""
        if self.path == VLLM:
            # it tells the probability of the first label only, so each spelling of Yes is the first once
            answers = [await self._post(session, self._asked(request, token)) for token in self.yes]
            if None not in answers:
                return _logit(np.sum([_of_vllm(answer, len(request["items"])) for answer in answers], axis=0), VLLM)
            self.path = SGLANG
        answer = await self._post(session, self._asked(request, self.yes[0]))
        if answer is None:
            raise EngineUnavailable(
                f"the server has neither /{VLLM} (vLLM) nor /{SGLANG} (SGLang): check evaluation.served"
            )
        shape = (len(request["items"]), len(self.yes) + len(self.no))
        return _logit(_of_sglang(answer, shape)[:, : len(self.yes)].sum(1), SGLANG)

    def _asked(self, request: Mapping[str, Any], first: int) -> dict[str, Any]:
        labels = [first, *(token for token in (*self.yes, *self.no) if token != first)]
        return {**request, "label_token_ids": labels, "apply_softmax": True, "item_first": False}

    async def _post(self, session: aiohttp.ClientSession, request: Mapping[str, Any]) -> Any:
        """What the server answers, as JSON; None if it has no such path."""
        url, reason = (self.url / self.path).with_query(self.url.query), ""
        remedy = "start it again, or check the address"
        for attempt in range(self.tries):
            try:
                async with session.post(
                    url, data=json.dumps(request).encode(), allow_redirects=False, proxy=proxy_of(url)
                ) as response:
                    if response.status == 200:
                        if (answer := json.loads(await response.read())) is not None:
                            return answer
                        raise ValueError("null")
                    if response.status in (404, 405):
                        return None
                    reason = f"http-{response.status}"
                    remedy = REMEDIES.get(response.status, remedy)
                    if response.status not in PASSING and response.status < 500:
                        break
            except TimeoutError:
                reason = "timeout"
            except (aiohttp.ClientError, OSError):
                reason = "connection"
            except (ValueError, RecursionError):
                reason = "malformed-answer"
                break
            await asyncio.sleep(self.pause * 2**attempt)
        raise EngineUnavailable(f"the server of evaluation.served failed ({reason}): {remedy}")


def _of_vllm(answer: Any, count: int) -> np.ndarray:
    """(C,) the probability of the first label."""
    try:
        scores = {result["index"]: float(result["score"]) for result in answer["data"]}
        return np.array([scores[index] for index in range(count)])
    except (KeyError, TypeError, ValueError) as error:
        raise EngineUnavailable(f"the server's answer is not that of /{VLLM}") from error


def _of_sglang(answer: Any, shape: tuple[int, int]) -> np.ndarray:
    """(C, labels) their probabilities."""
    try:
        scores = np.array(answer["scores"], dtype=np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise EngineUnavailable(f"the server's answer is not that of /{SGLANG}") from error
    if scores.shape != shape:
        raise EngineUnavailable(f"the server's answer is not that of /{SGLANG}")
    return scores


def _logit(probability: np.ndarray, path: str) -> np.ndarray:
    """float32; beyond what float64 tells apart from 0 and 1, its ends."""
    if not np.all((probability >= -ROUNDING) & (probability <= 1 + ROUNDING)):  # NaN is neither
        raise EngineUnavailable(
            f"the server's answers of /{path} are no probabilities, as it does not apply the softmax it was asked for: "
            "serve the model by another version"
        )
    p = np.clip(probability, 1e-15, 1 - 1e-15)
    return (np.log(p) - np.log1p(-p)).astype(np.float32)
