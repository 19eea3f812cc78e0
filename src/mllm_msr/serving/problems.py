"""Errors as clients see them: a status, one sentence with the remedy, and for a wrong request which field is meant."""

import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from mllm_msr.modeling.recommending import Refused
from mllm_msr.processing.engines import EngineUnavailable, NoTextOfUse
from mllm_msr.serving.batching import QueueClosed, QueueFull
from mllm_msr.serving.client import ClientGone
from mllm_msr.serving.schemas import ErrorReply, Problem
from mllm_msr.serving.service import Unknown
from mllm_msr.serving.store import KeyReused, StoreUnavailable

FIELD = re.compile(r"[a-z][a-z0-9_]*$")
KINDS = {"str", "int", "float", "bool"}  # with which pydantic marks the ways that a value was tried


def problem(status: int, message: str, errors: list[Problem] | None = None, **headers: str) -> JSONResponse:
    told = {name.replace("_", "-"): value for name, value in headers.items()}
    return JSONResponse(ErrorReply(message=message, errors=errors or []).model_dump(), status, headers=told)


def add_error_handlers(app: FastAPI) -> None:
    """Have every error that is foreseen told in the one form."""

    @app.exception_handler(RequestValidationError)
    def wrong_request(request: Request, error: RequestValidationError) -> JSONResponse:
        errors = [wrong_field(each) for each in error.errors()]
        distinct = list({(each.field, each.message): each for each in errors}.values())[:20]
        distinct.sort(key=lambda each: -(each.field or "").count("."))  # of several ways to read a value the nearest
        first = distinct[0]
        return problem(422, f"{first.field}: {first.message}" if first.field else first.message, distinct)

    @app.exception_handler(Refused)
    def refused(request: Request, error: Refused) -> JSONResponse:
        return problem(422, f"{error.field}: {error}", [Problem(field=error.field, message=str(error))])

    @app.exception_handler(Unknown)
    def unknown(request: Request, error: Unknown) -> JSONResponse:
        return problem(404, str(error))

    @app.exception_handler(KeyReused)
    def key_reused(request: Request, error: KeyReused) -> JSONResponse:
        return problem(409, str(error))

    @app.exception_handler(QueueFull)
    def queue_full(request: Request, error: QueueFull) -> JSONResponse:
        return problem(429, str(error), retry_after=str(error.retry_after))

    @app.exception_handler(QueueClosed)
    @app.exception_handler(StoreUnavailable)
    def unavailable(request: Request, error: Exception) -> JSONResponse:
        return problem(503, str(error), retry_after="1")

    @app.exception_handler(NoTextOfUse)
    def no_text_of_use(request: Request, error: NoTextOfUse) -> JSONResponse:
        message = "the run's text engine has nothing of use to say of them: send a `summary` with each"
        return problem(422, f"items: {message}", [Problem(field="items", message=message)])

    @app.exception_handler(EngineUnavailable)
    def no_texts(request: Request, error: EngineUnavailable) -> JSONResponse:
        message = "the run's text engine cannot be used now: send a `summary` with each item, or try again later"
        return problem(503, message, retry_after="20")

    @app.exception_handler(TimeoutError)
    def too_late(request: Request, error: TimeoutError) -> JSONResponse:
        return problem(504, str(error))

    @app.exception_handler(ClientGone)
    def gone(request: Request, error: ClientGone) -> JSONResponse:
        return problem(499, str(error))  # nobody reads it; the log and the metrics have the status

    @app.exception_handler(HTTPException)
    def by_status(request: Request, error: HTTPException) -> JSONResponse:
        unread = "the body cannot be read: send JSON in UTF-8, neither compressed nor deeply nested"
        messages = {
            400: unread,
            404: "there is no such path: see /docs",
            405: "this path does not take this method: see /docs",
        }
        return problem(error.status_code, messages.get(error.status_code, str(error.detail)))


def wrong_field(error: Any) -> Problem:
    """What pydantic found, with the field as a path and the remedy."""
    place = error["loc"][1:] if error["loc"][:1] in (("body",), ("query",), ("header",)) else error["loc"]
    if error["loc"][0] == "header":
        return Problem(field=error["loc"][1], message=error["msg"][:1].lower() + error["msg"][1:])
    if error["type"] == "not_tellable":
        place = error["ctx"]["place"]
    parts = [str(part) for part in place if isinstance(part, int) or (FIELD.match(part) and part not in KINDS)]
    field = ".".join(parts) or None
    if error["type"] == "json_invalid" or (field is None and error["type"] == "model_attributes_type"):
        return Problem(message="the body is no JSON object with Content-Type: application/json")
    if error["type"] == "missing":
        return Problem(field=field, message="is missing: send it" if field else "a JSON body is missing: send one")
    if error["type"] == "extra_forbidden":
        return Problem(field=field, message="is not known: leave it out, or see /docs for the names")
    message = error["msg"].removeprefix("Value error, ")
    return Problem(field=field, message=message[:1].lower() + message[1:])
