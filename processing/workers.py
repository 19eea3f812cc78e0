"""Map-like work: pieces in, results out, by a worker that holds what is expensive to make, such as a model.

Without a cluster the worker is this process. With one, workers are actors on Ray, see ``processing.ray_workers``, and
whoever asks alone writes what comes back.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Generic, Protocol, TypeVar

Piece = TypeVar("Piece")
Result = TypeVar("Result")
PieceIn = TypeVar("PieceIn", contravariant=True)
ResultOut = TypeVar("ResultOut", covariant=True)


@dataclass(frozen=True)
class Folder:
    """What workers read of a folder of this machine: it may be of another name where they are.

    ``parts``: files and folders in it, by name; those that are not there are left out. None: all of it.
    """

    path: Path
    parts: tuple[str, ...] | None = None


class Workers(Protocol[PieceIn, ResultOut]):
    """Who does pieces of work."""

    def map(self, pieces: Iterable[PieceIn]) -> Iterator[ResultOut]:
        """The result of every piece, as they are done, which may be in another order.

        Pieces are taken as they are needed. To be called again and again: what workers hold, they keep.
        """
        ...


class InProcess(Generic[Piece, Result]):
    """This process: one piece after another, in their order.

    ``make`` makes what does a piece, when the first is there.
    """

    def __init__(self, make: Callable[[], Callable[[Piece], Result]]) -> None:
        self.make = make

    @cached_property
    def work(self) -> Callable[[Piece], Result]:
        return self.make()

    def map(self, pieces: Iterable[Piece]) -> Iterator[Result]:
        for piece in pieces:
            yield self.work(piece)
