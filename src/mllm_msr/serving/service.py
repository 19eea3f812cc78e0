"""What a server does, for the HTTP application and the demo page alike: score, rerank, recommend, explain, put items.

Methods may be called from any thread and wait for the model's; each takes the moment, on the monotonic clock, after
which its answer is not wanted any more.
"""

import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from mllm_msr.modeling.inputs import Candidate, HistoryItem, User
from mllm_msr.modeling.preference import split_history
from mllm_msr.modeling.recommending import By, Recommendation, Refused, Wanted, fused_scores, recommend
from mllm_msr.processing.prompt_encoding import PromptRefused
from mllm_msr.serving.answers import KeptAnswers
from mllm_msr.serving.batching import ModelQueue
from mllm_msr.serving.catalogue import ServedCatalogue
from mllm_msr.serving.client import CLIENT, ClientGone
from mllm_msr.serving.condensing import Condenser, PreferenceWriter
from mllm_msr.serving.items import ItemMaker, NewItem
from mllm_msr.serving.opening import Opened
from mllm_msr.serving.store import Appended, Event, Store, StoredItem
from mllm_msr.serving.users import MOST_TOLD, Users, UserState

logger = logging.getLogger(__name__)
AGAIN = 10  # times that recommendations are made anew when an item goes meanwhile
LINE = 16  # tokens of an item of the history, at least, if there are many
FRAME = 16  # tokens, about, that a prompt adds to the words of an item


class Unknown(LookupError):
    """A user or an item that is not there."""


class ItemGone(Refused):
    """An item was there when a request came, and is not any more."""


@dataclass(frozen=True)
class Asker:
    """Whom a ranking is for: in words, for the answer, and all items chosen so far, for the heads."""

    words: User
    history: Sequence[str] = ()
    recent: Sequence[str] = ()


class Service:
    """See the module.

    Args:
        opened: what is served.
        store: of users and items.
        token_budget: of the queue, see :class:`~mllm_msr.serving.batching.ModelQueue`.
        max_tokens: that may wait in it.
    """

    def __init__(self, opened: Opened, store: Store, token_budget: int = 16384, max_tokens: int = 4_000_000) -> None:
        self.opened, self.store = opened, store
        recommender = opened.recommender
        # what is kept of a late model's items is found by their images as they were
        prepare = (lambda image: image) if recommender.late else self._prepared
        self.catalogue = ServedCatalogue(
            opened.items, opened.titles, opened.summaries, opened.columns, store.image, prepare
        )
        processor: Any = recommender.processor
        limit = recommender.model.config.user_limit if recommender.late else processor.max_length
        most_told = min(MOST_TOLD, (limit or 10**6) // LINE)
        self.users = Users(opened.users, store, opened.recipe.summaries.block_size, most_told)
        self.queue = ModelQueue(recommender.score, token_budget, max_tokens=max_tokens)
        self.answers = KeptAnswers()
        self.writer = PreferenceWriter(opened.recipe, self._alone)
        self.maker = ItemMaker(opened.recipe, self.writer.lock, self._alone)
        self.condenser = Condenser(self.users, store, self.writer, self.described, lambda: self.queue.busy)
        self._numbers = itertools.count()
        self._item_cost = self._cost_of(next(iter(opened.items.values()), Candidate()))
        # of items that were put before, a late model's cache has what it needs, or gets it when they are first asked of
        self._alone(self._apply_changes)

    def _prepared(self, image: Any) -> Any:
        (prepared,) = self.opened.recommender.processor.prepare_images([image])
        return prepared

    def _alone(self, function: Callable[[], Any]) -> Any:
        return _result(self.queue.call(function), float("inf"))

    def start(self) -> None:
        """Begin to condense what is due."""
        self.condenser.start()

    def close(self) -> None:
        """Finish what has begun."""
        self.queue.close()
        self.condenser.close()
        self.store.close()

    # ---- users -------------------------------------------------------------------------------------------------

    def described(self, item_id: str) -> HistoryItem | None:
        """An item in words, as preferences are written from it; None for one that is no more."""
        summary = self.catalogue.summary(item_id)
        return None if summary is None else HistoryItem(self.catalogue.title(item_id), summary)

    def state(self, user_id: str) -> UserState:
        """A user as of now; :class:`Unknown` for one of whom nothing is known."""
        state = self.users.state(user_id)
        if not state.known:
            raise Unknown(f"user {user_id!r} is not known: send events of this user first, or a history")
        return state

    def append(self, user_id: str, events: Sequence[Event], until: float = float("inf")) -> tuple[Appended, int]:
        """Append events, durably; also the length of the user's history now."""
        for place, event in enumerate(events):
            self.check_item(f"events.{place}.item_id", event.item_id, until)
        appended = self.users.append(user_id, events)
        self.condenser.wake()
        return appended, sum(map(len, self.users.of_run(user_id)[:2])) + appended.total

    def check_item(self, field: str, item_id: str, until: float = float("inf")) -> None:
        """Raise :class:`Refused` for an item that is not in the catalogue."""
        if item_id not in self.catalogue:
            self.refresh(until)  # another server may have just put it
            if item_id not in self.catalogue:
                raise Refused(field, f"item {item_id!r} is not in the catalogue: put it by PUT /v1/items first")

    def asker(
        self,
        user_id: str | None = None,
        history: Sequence[str] | None = None,
        preference: str | None = None,
        condense: bool = False,
        until: float = float("inf"),
    ) -> Asker:
        """Whom a request means: a user by id, or a history, a preference in words, or both.

        Args:
            condense: write the preferences of the history's blocks first.
        """
        if user_id is not None:
            state = self.state(user_id)
            return Asker(state.words(self.catalogue.summary), state.whole, state.told)
        history = history or []
        for place, item in enumerate(history):
            self.check_item(f"history.{place}", item, until)
        recent, words = history, preference or ""
        if condense:
            described = [item for item in map(self.described, history) if item is not None]
            texts = self.writer.preferences(described, until)
            words, recent = texts[-1] if texts else "", split_history(history, self.users.block_size)[1]
        state = UserState("", list(recent), self.users.block_size, most_told=self.users.most_told)
        return Asker(User(words, state.words(self.catalogue.summary).recent), history, state.told)

    # ---- answers -----------------------------------------------------------------------------------------------

    def answer(self, user: User, item_ids: Sequence[str], until: float) -> np.ndarray:
        """(N,) logits of items of the catalogue.

        Raises:
            QueueFull: too much is waiting. TimeoutError: not done in time.
        """
        keys = [(item, self.catalogue.version_of(item)) for item in item_ids]
        kept = self.answers.of(user)
        if missing := [item for item, key in zip(item_ids, keys, strict=True) if key not in kept]:
            costs = [self._item_cost] * len(missing)
            scored = self.queue.submit(user, missing, self.catalogue, costs, _tokens(user), until)
            try:
                new = dict(zip(missing, _result(scored, until).tolist(), strict=True))
            except PromptRefused as error:
                raise Refused("items", str(error)) from error
            except KeyError as error:
                raise ItemGone("items", "one was deleted before it could be scored: send the request again") from error
            found = {key: new[key[0]] for key in keys if key[0] in new}
            self.answers.add(user, found)
            kept |= found
        return np.array([kept[key] for key in keys], dtype=np.float32)

    def answer_documents(self, user: User, documents: Sequence[Candidate], until: float) -> np.ndarray:
        """(N,) logits of candidates that a request brings; errors as for :meth:`answer`."""
        number = next(self._numbers)
        named = {f"\0{number}\0{place}": document for place, document in enumerate(documents)}
        costs = [self._cost_of(document) for document in documents]
        scored = self.queue.submit(user, list(named), named, costs, _tokens(user), until)
        try:
            return _result(scored, until)
        except PromptRefused as error:
            raise Refused("documents", str(error)) from error

    def _cost_of(self, item: Candidate) -> int:
        image = self.opened.image_tokens if item.image is not None else 0
        return FRAME + (len(item.title) + len(item.text)) // 4 + image

    def fused(self, asker: Asker, item_ids: Sequence[str], logits: np.ndarray, until: float) -> list[float | None]:
        """The fused score of each item; None without heads, a history, or a vector of the item."""
        ranker = self.opened.item_ranker
        if ranker is None or not asker.history:
            return [None] * len(item_ids)
        return _result(self.queue.call(lambda: fused_scores(ranker, asker.history, item_ids, logits), until), until)

    # ---- recommendations ---------------------------------------------------------------------------------------

    def recommend(
        self, asker: Asker, wanted: Wanted, where: Mapping[str, Sequence[Any]], until: float
    ) -> tuple[By, list[Recommendation]]:
        """The best items of the catalogue that were not chosen yet, and what they are ordered by.

        Args:
            where: values of columns, of which an item must have one.

        Raises:
            Refused: see :func:`~mllm_msr.modeling.recommending.recommend`; or a column is unknown.
        """
        for column in where:
            if not self.catalogue.has_column(column):
                raise Refused(f"where.{column}", f"no item has a column {column!r}")

        def allowed(item: str) -> bool:
            return all(self.catalogue.value(item, column) in values for column, values in where.items())

        def best() -> tuple[By, list[Recommendation]]:
            return recommend(
                self.opened.item_ranker,
                asker.history,
                self.catalogue,
                replace(wanted, allowed=allowed if where else None),
                lambda ids: self.answer(asker.words, ids, until),
                lambda work: _result(self.queue.call(work, until), until),
            )

        for _ in range(AGAIN):
            with suppress(ItemGone):  # between heads and answer, which nobody has asked for by name
                return best()
        return best()

    # ---- items -------------------------------------------------------------------------------------------------

    def put(self, items: Sequence[NewItem], until: float) -> None:
        """Put new or changed items: each gets a summary, a vector, and what a late model keeps of it.

        Raises:
            Refused: an item lacks a vector that only the client has.
            EngineUnavailable: the run's text engine writes nothing of use now.
        """
        summaries = self.maker.summaries(items)
        vectors: list[bytes | None] = [None] * len(items)
        ranker = self.opened.item_ranker
        if ranker is not None and ranker.content.shape[1]:
            try:
                made = self.maker.vectors(items, summaries)
                if made.shape[1:] != ranker.content.shape[1:] or not np.isfinite(made).all():
                    raise ValueError(f"vectors of this run are {ranker.content.shape[1]} finite numbers each")
            except ValueError as error:
                raise Refused("items", str(error)) from error
            vectors = [vector.tobytes() for vector in made]
        made_by = self.opened.vectors_key
        self.store.put(
            [
                StoredItem(
                    item.item_id, item.title, item.text, summary, item.image, vector, made_by, item.columns or {}
                )
                for item, summary, vector in zip(items, summaries, vectors, strict=True)
            ]
        )
        self.refresh(until)

    def delete(self, item_id: str, until: float = float("inf")) -> None:
        """Take an item out of the catalogue; :class:`Unknown` if it is not there."""
        if item_id not in self.catalogue:
            raise Unknown(f"item {item_id!r} is not in the catalogue")
        self.store.put([StoredItem(item_id, deleted=True)])
        self.refresh(until)

    def refresh(self, until: float = float("inf")) -> None:
        """Take over items that this or another server has put or deleted."""
        changed = _result(self.queue.call(self._apply_changes, until), until)
        if self.opened.recommender.cache is None:
            return
        for item in changed:  # one by one, so that others' requests get in between
            if item in self.catalogue:
                _result(self.queue.call(partial(self._encode, item), until), until)

    @torch.inference_mode()
    def _encode(self, item_id: str) -> None:
        """On the model's thread: what a late model keeps of an item."""
        plan: Any = self.opened.recommender.plan
        for _ in plan.encode_items([item_id], self.catalogue):
            pass

    def _apply_changes(self) -> list[str]:
        """On the model's thread: catalogue and heads as the store has them; the items that have changed."""
        changes = self.store.items_since(self.catalogue.version)
        self.catalogue.apply(changes)
        last = {item.item_id: item for item in changes}
        ranker = self.opened.item_ranker
        if ranker is not None and last:
            usable = {item: each for item, each in last.items() if each.vector}
            if other := [item for item, each in usable.items() if each.made_by != self.opened.vectors_key]:
                logger.warning(
                    "%d items were put under other vectors: put them again, such as %r", len(other), other[0]
                )
                usable = {item: each for item, each in usable.items() if item not in set(other)}
            if gone := [item for item in last if item not in usable and item in ranker]:
                ranker.remove_items(gone)
            if usable:
                vectors = np.stack([np.frombuffer(each.vector or b"", np.float16) for each in usable.values()])
                ranker.put_items(list(usable), torch.from_numpy(vectors.copy()))
        return list(last)


def _tokens(user: User) -> int:
    return FRAME + (len(user.preference) + sum(len(item.title) + len(item.summary) for item in user.recent)) // 4


def _result(future: Future, until: float) -> Any:
    """What a future gives in time; one that is late, or whose client hangs up, is given up."""
    CLIENT.get().wait_for(future)
    try:
        return future.result(None if until == float("inf") else max(0.0, until - time.monotonic()))
    except FutureTimeout as error:
        future.cancel()
        raise TimeoutError("the request was not done in time: ask for fewer items, or try again later") from error
    except CancelledError as error:
        raise ClientGone from error
