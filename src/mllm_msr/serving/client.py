"""The client of a request, who may hang up before the answer: then what waits for it is dropped."""

import threading
from concurrent.futures import Future
from contextvars import ContextVar


class ClientGone(RuntimeError):
    """Nobody waits for this answer any more."""

    def __init__(self) -> None:
        super().__init__("the client has hung up")


class Client:
    """What a client waits for. Methods may be called from any thread."""

    def __init__(self) -> None:
        self._gone = False
        self._waits_for: list[Future] = []
        self._lock = threading.Lock()

    def hang_up(self) -> None:
        """Give up all that it waits for."""
        with self._lock:
            self._gone = True
        for future in self._waits_for:
            future.cancel()

    def wait_for(self, future: Future) -> None:
        """Have a future given up when it hangs up, or at once if it has."""
        if self is NOBODY:
            return
        with self._lock:
            self._waits_for.append(future)
            gone = self._gone
        if gone:
            future.cancel()

    def check(self) -> None:
        """Raise :class:`ClientGone` if it has hung up."""
        if self._gone:
            raise ClientGone


NOBODY = Client()  # whose work is not a client's
CLIENT: ContextVar[Client] = ContextVar("client", default=NOBODY)  # of the request that this thread or task answers
