"""The items that are served: those of the run, and over them what clients have put or deleted since."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mllm_msr.data.images import BrokenImage, decode
from mllm_msr.modeling.inputs import Candidate
from mllm_msr.serving.store import StoredItem

KEPT = 1_000_000_000  # bytes of decoded images that are kept


class ServedCatalogue(Mapping[str, Candidate]):
    """Items by id; candidates that were asked for lately are kept, with their images decoded and prepared.

    Titles, summaries and columns may be read by any thread, candidates only by that of the model.

    Args:
        items: of the run.
        titles, summaries: of the run's items.
        columns: further values of the run's items, by column and item, to filter by.
        load_image: the encoded image of an item that a client has put.
        prepare: what becomes of an image before it is kept.
    """

    def __init__(
        self,
        items: Mapping[str, Candidate],
        titles: Mapping[str, str],
        summaries: Mapping[str, str],
        columns: Mapping[str, Mapping[str, Any]],
        load_image: Callable[[str], bytes | None],
        prepare: Callable[[Any], Any],
    ) -> None:
        self.items_of_run, self.titles, self.summaries = items, titles, summaries
        self.columns_of_run, self.load_image, self.prepare = columns, load_image, prepare
        self.put_items: dict[str, StoredItem] = {}
        self.version = 0  # of the last change that is applied
        self._kept: OrderedDict[str, tuple[Candidate, int]] = OrderedDict()  # with their bytes
        self.nbytes = 0

    def apply(self, changes: Sequence[StoredItem]) -> None:
        """Take over what clients have put or deleted, in order."""
        for item in changes:
            self.put_items[item.item_id] = item
            self.nbytes -= self._kept.pop(item.item_id, (None, 0))[1]
            self.version = item.version

    def __contains__(self, item_id: object) -> bool:
        put = self.put_items.get(item_id) if isinstance(item_id, str) else None
        return item_id in self.items_of_run if put is None else not put.deleted

    def __iter__(self) -> Iterator[str]:
        put = self.put_items
        yield from (item for item in self.items_of_run if item not in put)
        yield from (item for item, each in list(put.items()) if not each.deleted)

    def __len__(self) -> int:
        put = list(self.put_items.values())
        return len(self.items_of_run) + sum((not each.deleted) - (each.item_id in self.items_of_run) for each in put)

    def __getitem__(self, item_id: str) -> Candidate:
        """One item; KeyError names an unknown id."""
        if item_id in self._kept:
            self._kept.move_to_end(item_id)
            return self._kept[item_id][0]
        if item_id not in self:
            raise KeyError(f"item {item_id!r} is not in the catalogue")
        put = self.put_items.get(item_id)
        if put is None:
            candidate = self.items_of_run[item_id]
        else:
            candidate = Candidate(item_id, put.title, put.text, _decoded(self.load_image(item_id)))
        if candidate.image is not None:
            image = self.prepare(candidate.image)
            candidate = Candidate(candidate.item_id, candidate.title, candidate.text, image)
        self._kept[item_id] = candidate, _size(candidate.image)
        self.nbytes += self._kept[item_id][1]
        while self.nbytes > KEPT and len(self._kept) > 1:
            self.nbytes -= self._kept.popitem(last=False)[1][1]
        return candidate

    def version_of(self, item_id: str) -> int:
        """Of what the item is now; 0 for one of the run."""
        put = self.put_items.get(item_id)
        return 0 if put is None else put.version

    def title(self, item_id: str) -> str:
        """The title of an item, "" for one that is not there."""
        put = self.put_items.get(item_id)
        return self.titles.get(item_id, "") if put is None else put.title

    def summary(self, item_id: str) -> str | None:
        """The summary of an item; None for one that is not there."""
        put = self.put_items.get(item_id)
        if put is None:
            return self.summaries.get(item_id)
        return None if put.deleted else put.summary

    def value(self, item_id: str, column: str) -> Any:
        """What a column says of an item; None where it says nothing."""
        put = self.put_items.get(item_id)
        return self.columns_of_run.get(column, {}).get(item_id) if put is None else put.columns.get(column)

    def has_column(self, column: str) -> bool:
        return column in self.columns_of_run or any(column in item.columns for item in list(self.put_items.values()))


def _size(image: Any) -> int:
    """Bytes, about, of a candidate whose image is decoded, or prepared."""
    if image is None:
        return 1000
    if hasattr(image, "tensors"):
        return 1000 + sum(tensor.nbytes for tensor in image.tensors.values())
    return 1000 + 4 * image.width * image.height


def _decoded(content: bytes | None) -> Any:
    try:
        return decode(content) if content else None
    except BrokenImage:  # it was sound when it was put: better no image than no answer
        return None
