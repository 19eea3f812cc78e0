"""Answers that were computed lately: what the same user is asked again is not computed again."""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from mllm_msr.modeling.inputs import User

MOST = 100_000  # logits that are kept, some 20 MB


class KeptAnswers:
    """Logits by user in words and by item as it is, those of the users that were asked about last.

    A user's next event changes the words, and putting an item its version, so that nothing kept is ever out of date.
    Methods may be called from any thread.
    """

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self._by_user: OrderedDict[Any, dict[Any, float]] = OrderedDict()
        self._count = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    def of(self, user: User) -> dict[Any, float]:
        """All that is kept of a user, by item."""
        key = _key(user)
        with self._lock:
            if key in self._by_user:
                self._by_user.move_to_end(key)
            return dict(self._by_user.get(key, ()))

    def add(self, user: User, logits: Mapping[Any, float]) -> None:
        """Keep more of a user; the users that nobody has asked about for longest go."""
        with self._lock:
            kept = self._by_user.setdefault(_key(user), {})
            self._count -= len(kept)
            kept.update(logits)
            self._count += len(kept)
            self._by_user.move_to_end(_key(user))
            while self._count > self.most and self._by_user:
                self._count -= len(self._by_user.popitem(last=False)[1])


def _key(user: User) -> Any:
    return user.preference, tuple(user.recent)
