"""Users as they are now: what the run knows of them, and the events and preferences that came since."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mllm_msr.modeling.inputs import HistoryItem, User
from mllm_msr.modeling.preference import whole_blocks
from mllm_msr.records.storage import digest
from mllm_msr.serving.opening import RunUsers
from mllm_msr.serving.store import Appended, Event, Store

MOST_TOLD = 32


@dataclass(frozen=True)
class UserState:
    """A user's history, and how far it is condensed.

    Args:
        history: item ids, oldest first, as far as prompts read them.
        cut: items before these, which no prompt reads.
        steps: the preference after each history block, as far as they are written.
        block_size: items of a history block.
        most_told: items that no preference has read yet and answers are told of; more only where blocks are large.
    """

    user_id: str
    history: Sequence[str]
    block_size: int
    cut: Sequence[str] = ()
    steps: Sequence[str] = ()
    most_told: int = MOST_TOLD

    @property
    def known(self) -> bool:
        return bool(self.history or self.cut)

    @property
    def whole(self) -> list[str]:
        """All items that the user has ever chosen, oldest first."""
        return [*self.cut, *self.history]

    @property
    def preference(self) -> str:
        """The preference in force; "" if none has been written yet."""
        return self.steps[-1] if self.steps else ""

    @property
    def recent(self) -> Sequence[str]:
        """The items that no preference has read yet."""
        return self.history[len(self.steps) * self.block_size :]

    @property
    def told(self) -> Sequence[str]:
        """Of these the newest, as many as answers are told of."""
        return self.recent[max(0, len(self.recent) - max(self.most_told, 2 * self.block_size)) :]

    @property
    def blocks_due(self) -> int:
        """History blocks that are full and not condensed."""
        return whole_blocks(len(self.history), self.block_size) - len(self.steps)

    def words(self, summary: Callable[[str], str | None]) -> User:
        """As the model reads the user; items that are no more are left out."""
        summaries = [summary(item) for item in self.told]
        return User(self.preference, [HistoryItem(summary=text) for text in summaries if text is not None])


def rests_on(history: Sequence[str], step: int, block_size: int) -> str:
    """What decides the preference after a history block: a text that rests on anything else is not this user's."""
    return digest(list(history[: step * block_size]))


@dataclass(frozen=True)
class Users:
    """The users of a run and of a store, which is asked each time: what another server has added counts at once."""

    run: RunUsers
    store: Store
    block_size: int
    most_told: int = MOST_TOLD

    def state(self, user_id: str) -> UserState:
        """A user as of now; of one that nobody knows, an empty history."""
        history, cut, steps = self.of_run(user_id)
        history = [*history, *self.store.history(user_id)]
        steps = steps[: whole_blocks(len(history), self.block_size)]
        for step, (grounds, text) in sorted(self.store.preferences(user_id).items()):
            if step == len(steps) + 1 and grounds == rests_on(history, step, self.block_size):
                steps = [*steps, text]
        return UserState(user_id, history, self.block_size, cut, steps, self.most_told)

    def of_run(self, user_id: str) -> tuple[list[str], list[str], list[str]]:
        """History, what was cut off before it, and preferences that the run has of a user who is not forgotten."""
        if user_id not in self.run.histories or self.store.is_forgotten(user_id):
            return [], [], []
        run = self.run
        return run.histories.get(user_id, []), run.cut.get(user_id, []), run.preferences.get(user_id, [])

    def append(self, user_id: str, events: Sequence[Event]) -> Appended:
        """Append events; :class:`~mllm_msr.serving.store.KeyReused` for a key of another event."""
        return self.store.append(user_id, events, len(self.of_run(user_id)[0]), self.block_size)

    def forget(self, user_id: str) -> bool:
        """Delete everything of a user, and use nothing of the run's either; whether there was anything."""
        of_run = any(self.of_run(user_id))
        return self.store.forget(user_id, leave_mark=user_id in self.run.histories) or of_run
