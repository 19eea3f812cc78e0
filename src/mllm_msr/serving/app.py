"""The HTTP application: routes, and how errors are told. What routes do is in ``service.py``."""

import asyncio
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any
from urllib.parse import unquote

import anyio.to_thread
from fastapi import Depends, FastAPI, Header, Path, Request, Security
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, Response
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from mllm_msr.data.ids import plain_id
from mllm_msr.data.images import encode
from mllm_msr.modeling.inputs import Candidate
from mllm_msr.modeling.recommending import Recommendation, Refused, Wanted
from mllm_msr.serving import schemas
from mllm_msr.serving.auth import Keys
from mllm_msr.serving.batching import QueueClosed, QueueFull
from mllm_msr.serving.door import Door, Limits
from mllm_msr.serving.images import ImageReader, ImageRefused
from mllm_msr.serving.items import NewItem
from mllm_msr.serving.metrics import Metrics
from mllm_msr.serving.problems import add_error_handlers
from mllm_msr.serving.service import Asker, Service
from mllm_msr.serving.store import Event, StoreUnavailable

EMPTY_DOCS = '<div id="swagger-ui">'
OFFLINE_DOCS = (
    "<p>This page needs a script from cdn.jsdelivr.net, which your browser has not loaded. "
    '<a href="/openapi.json">openapi.json</a> describes every endpoint as well, without it.</p>'
)
REFRESH = 1.0  # seconds between looks at items that other servers have put
logger = logging.getLogger(__name__)
TOLD = 100  # unknown items that a reply names
USER = "user:"  # what a query begins with that names a user


def decoded(text: str, field: str) -> str:
    """An id from a path, in which every reserved character is encoded."""
    try:
        found = schemas.storable(unquote(text, errors="strict"))
    except (UnicodeDecodeError, ValueError) as error:
        raise Refused(field, "the id in the path is not valid UTF-8: encode it as URLs are") from error
    if not 0 < len(found) <= 512:
        raise Refused(field, "the id in the path has to have 1 to 512 characters")
    try:
        return schemas.as_id(found)
    except ValueError as error:
        raise Refused(field, f"the id in the path {error}") from error


def _user_id(user_id: Annotated[str, Path(description="percent-encoded, slashes included")]) -> str:
    return decoded(user_id, "user_id")


def _item_id(item_id: Annotated[str, Path(description="percent-encoded, slashes included")]) -> str:
    return decoded(item_id, "item_id")


UserId = Annotated[str, Depends(_user_id)]
ItemId = Annotated[str, Depends(_item_id)]


def create_app(service: Service, keys: Keys, limits: Limits, reader: ImageReader, log_texts: bool = False) -> Door:
    """The application around a service, whose life ends with it."""
    metrics = Metrics(service)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = limits.max_requests
        service.start()
        watching = asyncio.create_task(watch(service))
        yield
        watching.cancel()
        await anyio.to_thread.run_sync(service.close)

    app = FastAPI(
        title="mllm-msr",
        description="Multimodal sequential recommendation: score, rerank, recommend and explain.",
        version=f"{service.opened.name} {service.opened.revision}",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        dependencies=[Security(HTTPBearer(auto_error=False, description="a key, if this server has any"))],
        responses={status: {"model": schemas.ErrorReply} for status in (401, 403, 404, 422, 429, 503, 504)},
    )
    add_error_handlers(app)
    opened = service.opened
    told: dict[str, Any] = {"model": opened.name, "revision": opened.revision, "format": opened.format}

    def until(request: Request, x_deadline_seconds: Annotated[float | None, Header(gt=0)] = None) -> float:
        """When the request is given up: the server's deadline, or an earlier one that the client asks for."""
        return request.scope["arrived"] + min(x_deadline_seconds or limits.deadline, limits.deadline)

    Until = Annotated[float, Depends(until)]

    def asker(who: schemas.Who, until: float) -> Asker:
        return service.asker(who.user_id, who.history, who.preference, who.condense, until)

    def image_of(field: str, text: str | None, until: float) -> Any:
        try:
            return None if text is None else reader.open(text, until)
        except ImageRefused as error:
            raise Refused(field, f"the image: {error}") from error

    @app.post("/v1/rerank", tags=["ranking"], response_model_exclude_none=True)
    @app.post("/v2/rerank", response_model_exclude_none=True, include_in_schema=False)  # of Cohere's later clients
    def rerank(body: schemas.RerankRequest, until: Until) -> schemas.RerankReply:
        """Order documents for a preference in words, or for a known user."""
        query = body.query if isinstance(body.query, str) else body.query["text"]
        user = (
            service.asker(plain_id(query.removeprefix(USER)))
            if query.startswith(USER)
            else service.asker(preference=query)
        )
        documents = [
            candidate_of(document, lambda text, place=place: image_of(f"documents.{place}", text, until))
            for place, document in enumerate(body.documents)
        ]
        logits = service.answer_documents(user.words, documents, until)
        best = (-logits).argsort(kind="stable")[: body.top_n]
        results = [
            schemas.RerankResult(
                index=int(place),
                relevance_score=probability(float(logits[place])),
                logit=float(logits[place]),
                document=as_sent(body.documents[place]) if body.return_documents else None,
            )
            for place in best
        ]
        meta = {"api_version": {"version": "1"}, "billed_units": {"search_units": 0}}
        return schemas.RerankReply(id=str(uuid.uuid4()), results=results, meta=meta, **told)

    @app.post("/v1/score", tags=["ranking"])
    def score(body: schemas.ScoreRequest, until: Until) -> schemas.ScoreReply:
        """Score items of the catalogue for a user, a history or a preference, in the order in which they are named."""
        for place, item in enumerate(body.items):
            service.check_item(f"items.{place}", item, until)
        user = asker(body, until)
        logits = service.answer(user.words, body.items, until)
        fused = service.fused(user, body.items, logits, until)
        results = [
            schemas.Scored(item_id=item, logit=logit, probability=probability(logit), fused=value)
            for item, logit, value in zip(body.items, logits.tolist(), fused, strict=True)
        ]
        return schemas.ScoreReply(results=results, **told)

    def recommended(user: Asker, body: schemas.Filters, until: float) -> schemas.RecommendReply:
        where = {name: value if isinstance(value, list) else [value] for name, value in body.where.items()}
        explain = body.n if body.explain else 0
        wanted = Wanted(body.n, body.by, body.rerank, body.exclude, body.only, explain=explain)
        by, found = service.recommend(user, wanted, where, until)
        results = [result_of(service, place, each, body.explain) for place, each in enumerate(found, 1)]
        said: dict[str, Any] = {"preference": user.words.preference, "recent": list(user.recent)}
        named = dict.fromkeys([*(body.only or []), *body.exclude])
        unknown = [item for item in named if item not in service.catalogue][:TOLD]
        return schemas.RecommendReply(by=by, unknown=unknown, results=results, **(said if body.explain else {}), **told)

    @app.post("/v1/recommendations", tags=["recommendations"])
    def recommend_anyone(body: schemas.RecommendHistoryRequest, until: Until) -> schemas.RecommendReply:
        """The best items of the catalogue after a history, or for a preference, of anyone."""
        return recommended(asker(body, until), body, until)

    @app.post("/v1/users/{user_id}/recommendations", tags=["recommendations"])
    def recommend_user(user_id: UserId, body: schemas.RecommendRequest, until: Until) -> schemas.RecommendReply:
        """The best items of the catalogue that a user has not chosen yet."""
        return recommended(service.asker(user_id), body, until)

    @app.post("/v1/users/{user_id}/events", tags=["users"])
    def append_events(user_id: UserId, body: schemas.EventsRequest, until: Until) -> schemas.EventsReply:
        """Append to a user's history; the reply comes once it is durable."""
        events = [Event(each.item_id, each.timestamp, each.idempotency_key) for each in body.events]
        done, length = service.append(user_id, events, until)
        metrics.events.inc(done.added)
        return schemas.EventsReply(
            user_id=user_id, added=done.added, duplicates=done.duplicates, history_length=length, **told
        )

    @app.get("/v1/users/{user_id}", tags=["users"])
    def show_user(user_id: UserId) -> schemas.UserReply:
        """A user's history, the preference after each history block, and what is not condensed yet."""
        state = service.state(user_id)
        return schemas.UserReply(
            user_id=user_id,
            history=state.whole,
            preferences=list(state.steps),
            preference=state.preference,
            recent=list(state.recent),
            block_size=state.block_size,
            blocks_due=max(0, state.blocks_due),
            **told,
        )

    @app.delete("/v1/users/{user_id}", tags=["users"])
    def forget_user(user_id: UserId) -> schemas.ForgottenReply:
        """Delete everything of a user."""
        return schemas.ForgottenReply(user_id=user_id, existed=service.users.forget(user_id), **told)

    @app.put("/v1/items", tags=["items"])
    def put_items(body: schemas.ItemsRequest, until: Until) -> schemas.ItemsReply:
        """Add items, or change them; they are ranked among all others at once."""
        new = []
        for place, item in enumerate(body.items):
            image = image_of(f"items.{place}.image", item.image, until)
            stored = None if image is None else encode(image)
            new.append(NewItem(item.item_id, item.title, item.text, stored, item.summary, item.vector, item.columns))
        service.put(new, until)
        return schemas.ItemsReply(put=[item.item_id for item in new], n_items=len(service.catalogue), **told)

    @app.delete("/v1/items/{item_id}", tags=["items"])
    def delete_item(item_id: ItemId, until: Until) -> schemas.DeletedReply:
        """Take an item out of the catalogue: it is not recommended any more, and left out of histories."""
        service.delete(item_id, until)
        return schemas.DeletedReply(item_id=item_id, n_items=len(service.catalogue), **told)

    @app.get("/docs", include_in_schema=False)
    def show_docs() -> HTMLResponse:
        """The page of all endpoints, whose script is fetched by the browser; without it the page says what to do."""
        page = get_swagger_ui_html(openapi_url="/openapi.json", title=app.title)
        return HTMLResponse(bytes(page.body).decode().replace(EMPTY_DOCS, EMPTY_DOCS + OFFLINE_DOCS))

    @app.get("/health", tags=["operation"])
    def health() -> schemas.HealthReply:
        """Whether the process lives."""
        return schemas.HealthReply(status="ok", **told)

    @app.get("/ready", tags=["operation"])
    def ready() -> schemas.HealthReply:
        """Whether requests can be answered: the model is loaded, and the database answers."""
        due, waiting = service.store.due(), len(service.queue)
        n_items = len(service.catalogue)
        return schemas.HealthReply(status="ready", n_items=n_items, waiting=waiting, blocks_due=due, **told)

    @app.get("/metrics", tags=["operation"])
    def show_metrics() -> Response:
        """What Prometheus reads."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return Door(app, service, keys, limits, metrics, log_texts)


async def watch(service: Service) -> None:
    """Take over, again and again, what other servers have put."""
    while True:
        await asyncio.sleep(REFRESH)
        try:
            await anyio.to_thread.run_sync(service.refresh, REFRESH + time.monotonic())
        except (StoreUnavailable, TimeoutError, QueueFull, QueueClosed):
            continue
        except Exception as error:  # whatever it is, it must not be the last look
            logger.error("items of other servers are not taken over (%s)", type(error).__name__)


def candidate_of(document: Any, image_of: Any) -> Candidate:
    """A document as a candidate; of a text without a title the first line is the title."""
    if isinstance(document, str):
        return Candidate.of_document(document)
    if isinstance(document, list):
        urls = [part.image or getattr(part.image_url, "url", part.image_url) for part in document]
        text, url = "\n".join(part.text for part in document if part.text), next(filter(None, urls), None)
        return Candidate.of_document(Candidate(text=text, image=image_of(url)))
    title, text = document.title or "", document.text or ""
    return Candidate.of_document(Candidate(title=title, text=text, image=image_of(document.image)))


def as_sent(document: Any) -> Any:
    """A document as replies show it."""
    if isinstance(document, str):
        return {"text": document}
    if isinstance(document, list):
        return [part.model_dump(exclude_none=True) for part in document]
    return document.model_dump(exclude_none=True)


def result_of(service: Service, rank: int, found: Recommendation, explained: bool) -> schemas.Recommended:
    explanation = None
    if explained:
        nearest = [
            schemas.AlikeOut(item_id=each.item_id, title=service.catalogue.title(each.item_id), cosine=each.cosine)
            for each in found.nearest
        ]
        explanation = schemas.Explanation(nearest=nearest, shares=found.shares)
    return schemas.Recommended(
        item_id=found.item_id,
        title=service.catalogue.title(found.item_id),
        rank=rank,
        score=found.score,
        fused=found.fused,
        head=found.head,
        logit=found.logit,
        probability=None if found.logit is None else probability(found.logit),
        explanation=explanation,
    )


def probability(logit: float) -> float:
    """p(yes) / (p(yes) + p(no))."""
    return 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0
