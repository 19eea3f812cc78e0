"""What every source of raw data says of itself: the options a recipe may give it, where it reads, and its terms."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mllm_msr.data.raw import RawData
from mllm_msr.records.sections import OnBadRows
from mllm_msr.records.typed import check_types


@dataclass(frozen=True)
class Terms:
    """What the owner of a source allows, in short; it is no legal advice, and terms change.

    Args:
        name: of the source and its owner.
        allows, forbids: in short.
        link: to the terms themselves.
        images: whose the images and texts are.
        log: whether histories may be passed on.
        read: what we read, and when.
    """

    name: str
    allows: str
    forbids: str
    link: str
    images: str
    log: str
    read: str


class SourceOptions(ABC):
    """The options of one source, as fields of a frozen dataclass: the keys of a recipe's section ``source``.

    Attributes:
        required: the fields it cannot do without, whose default is None.
        places: the fields that say where files lie. What a run rests on is their content and not their names.
        terms: of its owner; with them, its texts and images are not ours to pass on.
        drawn: whether we have drawn it, so that no person stands behind a user.
        language: of its texts, if it is known.
    """

    required: ClassVar[tuple[str, ...]] = ()
    places: ClassVar[tuple[str, ...]] = ("folder",)
    terms: ClassVar[Terms | None] = None
    drawn: ClassVar[bool] = False
    language: ClassVar[str | None] = "en"

    def __post_init__(self) -> None:
        check_types(self, "source")

    @abstractmethod
    def read(self, on_bad_rows: OnBadRows) -> RawData:
        """The raw data.

        Raises:
            OSError: a file that is missing or damaged.
            ValueError: a bad row, unless they are skipped, or a table of another shape.
        """

    def roots(self) -> list[Path | str]:
        """The files and folders that it reads, and as text the addresses on the Hub."""
        return [local_or_hub(place) for name in self.places if (place := getattr(self, name, None)) is not None]

    def reads(self, path: Path) -> bool:
        """Whether it reads this file below one of its folders."""
        return True

    def named_images(self) -> Iterable[Path]:
        """Images of this machine that its tables name."""
        return ()


def local_or_hub(place: str, folder: Path = Path()) -> Path | str:
    """A path, below ``folder`` if it is relative; an address on the Hub stays a text."""
    return place if ":" in place else folder / place.split("?")[0]
