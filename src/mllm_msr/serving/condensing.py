"""Full history blocks become preferences, in the background, by the text engine that wrote those of the run.

Until then answers use the recent items. What is to be condensed is in the store, so that a server that was killed
leaves nothing undone, and several servers share the work: who writes a user's next preference holds a lease.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from mllm_msr.modeling.inputs import HistoryItem
from mllm_msr.modeling.preference import preference_step, preference_waves
from mllm_msr.processing.engine_registry import build_engine
from mllm_msr.processing.engines import EngineUnavailable, HistoryBlock, load
from mllm_msr.processing.text_store import TextStore
from mllm_msr.processing.text_writer import Inputs, TextWriter
from mllm_msr.records.recipe import Recipe
from mllm_msr.serving.client import CLIENT
from mllm_msr.serving.store import Claim, Store, StoreUnavailable
from mllm_msr.serving.users import Users, rests_on

logger = logging.getLogger(__name__)
LEASE = 15.0  # seconds after which what a server was writing when it was killed is another's
POLL = 1.0  # seconds between looks at what other servers may have left
GIVE_WAY = 2.0  # seconds that a text waits, at most, while requests are answered: both compute on the same device
AGAIN = 20.0  # seconds until an engine that could not be used is tried again


class PreferenceWriter:
    """The run's text engine, for one history at a time; its model is loaded when the first text is wanted.

    Args:
        alone: calls a function while no other model computes, as a load needs it; see
            :class:`~mllm_msr.serving.items.ItemMaker`.
    """

    def __init__(self, recipe: Recipe, alone: Callable[[Callable], Any] = lambda function: function()) -> None:
        self.options = recipe.summaries.for_users()
        self.engine = build_engine(self.options, recipe.prompts, recipe.item_noun)
        self.lock, self._alone, self._loaded = threading.Lock(), alone, False

    def write(self, items: Sequence[HistoryItem], previous: str | None) -> str:
        """The preference after some items; "" if the engine has no answer to them.

        Raises:
            EngineUnavailable: no text can be written now.
        """
        block = HistoryBlock(items, previous)
        inputs = Inputs([""], [asdict(block)], [0], [block].__getitem__)
        with self.lock, TemporaryDirectory() as folder, tqdm(disable=True) as progress:
            if not self._loaded:
                self._alone(partial(load, self.engine))
                self._loaded = True
            store = TextStore(Path(folder))
            (key,) = TextWriter(self.engine, store, self.options.seed).write("preference", inputs, progress)
            return store.rows[key].text

    def preferences(self, history: Sequence[HistoryItem], until: float = float("inf")) -> list[str]:
        """The preference after each history block of a history; TimeoutError if they are not written ``until`` then."""

        def write(items: Sequence[HistoryItem], previous: str | None) -> str:
            CLIENT.get().check()
            if time.monotonic() > until:
                raise TimeoutError("the history was not condensed in time: send less of it, or leave out `condense`")
            return self.write(items, previous)

        waves = preference_waves(
            [history],
            self.options.block_size,
            lambda steps: [write(step.items, step.previous) for step in steps],
            self.options.recurrent,
        )
        return [text for wave in waves for _, text in wave]


class Condenser:
    """Writes the preferences that are due, on a thread of its own, from :meth:`start` to :meth:`close`.

    Args:
        describe: an item in words, None for one that is no more.
        busy: whether requests are being answered, to which a text gives way for a while.
    """

    def __init__(
        self,
        users: Users,
        store: Store,
        writer: PreferenceWriter,
        describe: Callable[[str], HistoryItem | None],
        busy: Callable[[], bool] = lambda: False,
    ) -> None:
        self.users, self.store, self.writer, self.describe, self.busy = users, store, writer, describe, busy
        self.owner = secrets.token_hex(8)
        self.written = self.failures = 0
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="condenser", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There may be something to do."""
        self._wake.set()

    def close(self) -> None:
        """Finish the text that is being written; the others stay due."""
        self._closing.set()
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                claim = self.store.claim(self.owner, LEASE)
                if claim is not None:
                    self._condense(claim)
                    continue
            except Exception as error:  # the thread must live on, whatever a database or its driver raises
                logger.warning("condensing waits (%s)", type(error).__name__)
            self._wake.wait(POLL)
            self._wake.clear()

    def _condense(self, claim: Claim) -> None:
        try:
            with self._renewed(claim):
                while not self._closing.is_set():
                    if not self._step(claim):
                        return
            self.store.renew(claim, self.owner, 0.0)
        except StoreUnavailable:
            raise
        except Exception as error:
            self.failures += 1
            unavailable = isinstance(error, EngineUnavailable)
            logger.warning(
                "a history is not condensed (%s); tried again in %d s",
                error if unavailable else type(error).__name__,
                AGAIN,
            )
            self.store.renew(claim, self.owner, AGAIN)

    def _step(self, claim: Claim) -> bool:
        """Write one preference; whether there may be more."""
        state = self.users.state(claim.user_id)
        if state.blocks_due <= 0:
            self.store.done(claim)
            return False
        step = preference_step(
            0,
            len(state.steps) + 1,
            state.history,
            state.block_size,
            state.preference or None,
            self.writer.options.recurrent,
        )
        described = [self.describe(item) for item in step.items]
        words = [item for item in described if item is not None]
        until = time.monotonic() + GIVE_WAY
        while self.busy() and time.monotonic() < until and not self._closing.wait(0.01):
            pass
        text = (self.writer.write(words, step.previous) if words else "") or state.preference
        self.written += 1
        grounds = rests_on(state.history, step.step, state.block_size)
        return self.store.add_preference(claim, self.owner, step.step, grounds, text)

    @contextmanager
    def _renewed(self, claim: Claim) -> Iterator[None]:
        """Keep the lease within the block, however long a text takes."""
        done = threading.Event()

        def renew() -> None:
            while not done.wait(LEASE / 3):
                try:
                    self.store.renew(claim, self.owner, LEASE)
                except StoreUnavailable:
                    continue

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
