"""What clients send and get. Reranking has the shape that the clients of Cohere and Jina send."""

import re
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from mllm_msr.data.ids import MISSING, plain_id
from mllm_msr.data.raw import CONTROLS

MOST_DOCUMENTS = 10_000
MOST_EVENTS = 1_000
MOST_ITEMS = 200
DEEPEST = 32  # levels of what is sent


def storable(text: str) -> str:
    """A text that every database and file can hold."""
    if "\0" in text:
        raise ValueError("has a NUL character: leave it out")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("has half of a surrogate pair: send whole characters") from error
    return text


def as_id(text: str) -> str:
    """An id as a table would have it, so that ``10.0`` and ``" 10"`` are the item 10 here as well."""
    if (found := plain_id(text)) in MISSING:
        raise ValueError("is what tables write for a missing id: send an id")
    return found


Key = Annotated[str, Field(min_length=1, max_length=512)]
Id = Annotated[Key, AfterValidator(as_id)]
Words = Annotated[str, Field(max_length=200_000)]
Told = Annotated[Words, AfterValidator(lambda text: re.sub(CONTROLS, " ", text))]  # without what no word means
ImageText = Annotated[str, Field(description="base64, a data: URL or, if the server fetches them, an http(s) URL")]


class Body(BaseModel):
    """What is sent: no value passes for one of another type, as `true` would for 1."""

    model_config = ConfigDict(strict=True)


class Sent(Body):
    """A whole body: whatever is in it can be told again."""

    @model_validator(mode="before")
    @classmethod
    def _can_be_told(cls, value: Any) -> Any:
        places: list[tuple[tuple[Any, ...], Any]] = [((), value)]
        while places:
            place, each = places.pop()
            inner = each.items() if isinstance(each, dict) else enumerate(each) if isinstance(each, list) else ()
            for name, part in inner:
                if isinstance(name, str):
                    _check(place, name, "a name in it ")
                if len(place) == DEEPEST and isinstance(part, dict | list):
                    raise _wrong(place, f"is nested more than {DEEPEST} levels deep: send less in one another")
                if isinstance(part, str):
                    _check((*place, name), part)
                elif isinstance(part, dict | list):
                    places.append(((*place, name), part))
        return value


def _check(place: tuple[Any, ...], text: str, what: str = "") -> None:
    try:
        storable(text)
    except ValueError as error:
        raise _wrong(place, f"{what}{error}") from error


def _wrong(place: tuple[Any, ...], message: str) -> PydanticCustomError:
    return PydanticCustomError("not_tellable", "{message}", {"message": message, "place": list(place)})


class Strict(Body):
    """What is sent, without fields of the client's own."""

    model_config = ConfigDict(extra="forbid")


class Reply(BaseModel):
    """What every reply says: which model answered."""

    model: str = Field(description="name of the model")
    revision: str = Field(description="revision of the model")
    format: int = Field(description="version of the run's format")


# ---- reranking -----------------------------------------------------------------------------------------------------


class ImageUrl(Body):
    url: ImageText


class Part(Body):
    """A part of a document, as chats have it."""

    type: Literal["text", "image", "image_url"]
    text: Words | None = None
    image: ImageText | None = None
    image_url: ImageUrl | ImageText | None = None


class Document(Body):
    """A candidate. Of title, text and image one is enough."""

    model_config = ConfigDict(extra="allow")  # clients send fields of their own, and get them back

    title: Words | None = None
    text: Words | None = None
    image: ImageText | None = None


class RerankRequest(Sent):
    """Order documents for a user. Fields that are unknown, such as Cohere's `max_chunks_per_doc`, are left alone."""

    query: Words | dict[str, Words] = Field(description="a preference in words, or `user:` and the id of a user")
    documents: list[Words | list[Part] | Document] = Field(min_length=1, max_length=MOST_DOCUMENTS)
    top_n: int | None = Field(default=None, ge=1, description="how many to return, all by default")
    return_documents: bool | None = Field(
        default=None, description="whether the documents are returned as they were sent"
    )
    model: str | None = Field(
        default=None, description="for clients that must send one; there is only the model that is served"
    )

    @model_validator(mode="after")
    def _text_query(self) -> "RerankRequest":
        if isinstance(self.query, dict) and not self.query.get("text"):
            raise ValueError("query: send a text, or {'text': ...}; a query by image is not supported")
        return self


class RerankResult(BaseModel):
    index: int = Field(description="place among the documents that were sent")
    relevance_score: float = Field(description="p(yes) / (p(yes) + p(no))")
    logit: float
    document: Any = None


class RerankReply(Reply):
    id: str
    results: list[RerankResult]
    meta: dict[str, Any] = Field(description="what Cohere's clients expect: version and billed units")


# ---- users and items -----------------------------------------------------------------------------------------------


class Who(Sent, Strict):
    """A user: by id, by a history of item ids, or in words."""

    user_id: Id | None = None
    history: list[Id] | None = Field(default=None, max_length=10_000, description="item ids, oldest first")
    preference: Words | None = Field(default=None, description="in words; with `history`, the items chosen since")
    condense: bool = Field(
        default=False, description="write preferences for the blocks of `history` first, which takes longer"
    )

    @model_validator(mode="after")
    def _one_way(self) -> "Who":
        if (self.user_id is not None) == (self.history is not None or self.preference is not None):
            raise ValueError("send either `user_id`, or `history` and/or `preference`")
        if self.condense and (self.history is None or self.preference is not None):
            raise ValueError("`condense` goes with `history` alone")
        return self


class ScoreRequest(Who):
    items: list[Id] = Field(min_length=1, max_length=MOST_DOCUMENTS, description="item ids, each once")

    @model_validator(mode="after")
    def _distinct(self) -> "ScoreRequest":
        twice, count = Counter(self.items).most_common(1)[0]
        if count > 1:
            raise ValueError(f"items: {twice!r} is there twice, send each once")
        return self


class Scored(BaseModel):
    item_id: str
    logit: float = Field(description="of the answer: Yes over No")
    probability: float = Field(description="p(yes) / (p(yes) + p(no))")
    fused: float | None = Field(default=None, description="fused score of the heads; null without heads or history")


class ScoreReply(Reply):
    results: list[Scored]


class EventIn(Strict):
    item_id: Id
    timestamp: int | None = Field(default=None, ge=-(2**62), le=2**62, description="seconds; kept with the event")
    idempotency_key: Key | None = Field(
        default=None, description="an event whose key the user has already is not applied again"
    )


class EventsRequest(Sent, Strict):
    events: list[EventIn] = Field(min_length=1, max_length=MOST_EVENTS)


class EventsReply(Reply):
    user_id: str
    added: int
    duplicates: int = Field(description="events whose key was there already")
    history_length: int


class UserReply(Reply):
    user_id: str
    history: list[str] = Field(description="all items, oldest first")
    preferences: list[str] = Field(description="after each history block that is condensed")
    preference: str = Field(description="the one in force; empty if none has been written yet")
    recent: list[str] = Field(description="items that no preference has read yet")
    block_size: int
    blocks_due: int = Field(description="history blocks that are full and not condensed yet")


class ForgottenReply(Reply):
    user_id: str
    existed: bool


Value = str | int | Annotated[float, Field(allow_inf_nan=False)] | bool


class Filters(Sent, Strict):
    n: int = Field(default=10, ge=1, le=1000, description="how many to return")
    by: Literal["answer", "head", "fused"] | None = Field(
        default=None, description="what orders the result; by default fused, and the answer where there are no heads"
    )
    rerank: int = Field(
        default=100,
        ge=0,
        le=MOST_DOCUMENTS,
        description="how many of the heads' best the answer scores; n of them at least where `by` is answer",
    )
    exclude: list[Id] = Field(default=[], max_length=100_000, description="items that are not to be recommended")
    only: list[Id] | None = Field(
        default=None, max_length=100_000, description="the only items that may be recommended"
    )
    where: dict[str, Value | list[Value]] = Field(
        default={}, description="columns of items and the value, or values, that an item must have"
    )
    explain: bool = False


class RecommendRequest(Filters):
    """For a user whose id is in the path."""


class RecommendHistoryRequest(Who, Filters):
    """For anyone."""


class AlikeOut(BaseModel):
    item_id: str
    title: str
    cosine: float


class Explanation(BaseModel):
    """Why an item stands where it stands."""

    nearest: list[AlikeOut] = Field(description="the items of the history that are most like it")
    shares: dict[str, float] = Field(description="what each member adds to the fused score")


class Recommended(BaseModel):
    item_id: str
    title: str
    rank: int
    score: float = Field(description="what the list is ordered by")
    fused: float | None = Field(
        default=None, description="of an item that the answer has not scored, that of the heads, on a scale of its own"
    )
    head: float | None = None
    logit: float | None = Field(default=None, description="of the answer, for the best that were reranked")
    probability: float | None = None
    explanation: Explanation | None = None


class RecommendReply(Reply):
    by: str
    preference: str | None = Field(default=None, description="with `explain`: what the answer was told of the user")
    recent: list[str] | None = Field(
        default=None, description="with `explain`: items chosen since, which it was told as well"
    )
    unknown: list[str] = Field(
        default=[], description="ids of `only` and `exclude` that no item of the catalogue has, the first 100 of them"
    )
    results: list[Recommended]


class ItemIn(Strict):
    item_id: Id
    title: Told = ""
    text: Told = ""
    image: ImageText | None = None
    summary: Words | None = Field(default=None, description="by default the run's engine writes one")
    vector: list[float] | None = Field(
        default=None, description="made as those of the run; by default the run's model makes one"
    )
    columns: dict[str, Value] = Field(default={}, max_length=100, description="further values to filter by")

    @model_validator(mode="after")
    def _says_something(self) -> "ItemIn":
        if not (self.title.strip() or self.text.strip() or self.image):
            raise ValueError("an item needs a title, a text or an image")
        return self


class ItemsRequest(Sent, Strict):
    items: list[ItemIn] = Field(min_length=1, max_length=MOST_ITEMS)

    @model_validator(mode="after")
    def _distinct(self) -> "ItemsRequest":
        if len({item.item_id for item in self.items}) < len(self.items):
            raise ValueError("items: an item_id is there twice, send each once")
        return self


class ItemsReply(Reply):
    put: list[str]
    n_items: int = Field(description="items of the catalogue now")


class DeletedReply(Reply):
    item_id: str
    n_items: int


class Problem(BaseModel):
    field: str | None = None
    message: str


class ErrorReply(BaseModel):
    """Every error: one sentence with the remedy, and for a wrong request which field is meant."""

    message: str
    errors: list[Problem] = []


class HealthReply(Reply):
    status: str
    n_items: int | None = None
    waiting: int | None = Field(default=None, description="requests in the queue")
    blocks_due: int | None = Field(default=None, description="users with a history block that is not condensed yet")
