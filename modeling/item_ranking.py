"""All that ranks by item vectors, as one object: heads, likeness of content, their fusion, and what each item is.

It takes histories as lists of item ids and needs nothing else of a user; of an item it needs a content vector, so that
new ones are ranked among all others without training. What it keeps of items is computed once and kept between calls.
Letters: B histories, L places of the longest one, I items it knows, N items asked for, F content features, M members.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .content_likeness import ContentLikeness
from .naming import naming, pinned
from .neighbours import taken
from .score_fusion import ScoreFusion, frequency_buckets
from .sequence_head import PADDING, SequenceHead
from .sequence_head_options import SequenceHeadConfig

LIKENESS, FUSED = "likeness", "fused"
ITEMS, PREFIX = "items.json", "item_ranker."  # the table of items; of the weights' names in a checkpoint
PAIRS = 1 << 22  # of histories and items that are scored at a time


@dataclass(frozen=True)
class AlikeItem:
    """An item of a history, and the cosine of its vector with that of another item."""

    item_id: str
    cosine: float


class ItemRanker(nn.Module):
    """Scores items from histories. It is never trained: its parts are, one by one, before they are put together.

    All numbers are in float32 but content, which is kept in float16, whatever the dtype of a model that it is a part
    of. Scores of one history must not be asked for while another thread puts or removes items.

    Args:
        config: as :meth:`to_config` gives it; the weights are blank and to be loaded.
        item_ids: of the I items, in the order of their codes.
    """

    members: Any  # a ModuleDict
    content: Tensor
    counts: Tensor
    answer_fusion: ScoreFusion | None = None  # of a model's answer, first, and the fused score, second

    def __init__(self, config: Mapping[str, Any], item_ids: Sequence[str]) -> None:
        super().__init__()
        n_items = config["n_items"]
        members: dict[str, Any] = {
            name: SequenceHead(SequenceHeadConfig(n_items=n_items, **options))
            for name, options in config["heads"].items()
        }
        if config["likeness"] is not None:
            members[LIKENESS] = ContentLikeness(n_items, **config["likeness"])
        self._assemble(item_ids, members, ScoreFusion.from_dict(config["fusion"]))
        if config.get("answer_fusion") is not None:
            self.answer_fusion = ScoreFusion.from_dict(config["answer_fusion"])

    @classmethod
    def of(cls, item_ids: Sequence[str], members: Mapping[str, Any], fusion: ScoreFusion) -> "ItemRanker":
        """Put trained members together.

        Args:
            item_ids: of the I items, in the order of their codes.
            members: a :class:`ContentLikeness` by the name "likeness" and :class:`SequenceHead` objects by any other,
                all of the same items and content; they share from now on what they keep of it.
            fusion: weights of members.
        """
        ranker = cls.__new__(cls)
        nn.Module.__init__(ranker)
        ranker._assemble(item_ids, members, fusion)
        return ranker

    def _assemble(self, item_ids: Sequence[str], members: Mapping[str, Any], fusion: ScoreFusion) -> None:
        if lost := [name for name in fusion.members if name not in members]:
            raise ValueError(f"the fusion weighs {lost[0]!r}, which is no member; there are {', '.join(members)}")
        self.members, self.fusion = nn.ModuleDict(members), fusion
        read = [member.content for member in members.values() if hasattr(member, "content")]
        heads = list(self._heads())
        self.register_buffer("content", read[0] if read else torch.zeros(len(item_ids), 0, dtype=torch.float16))
        counts = heads[0].counts if heads else torch.zeros(len(item_ids), dtype=torch.int32)
        self.register_buffer("counts", counts)
        self._name(item_ids)
        self._share()
        self.requires_grad_(False).eval()

    def _heads(self) -> Iterator[Any]:
        return (member for name, member in self.members.items() if name != LIKENESS)

    def _name(self, item_ids: Sequence[str]) -> None:
        if len(item_ids) != len(self.counts):
            raise ValueError(f"{len(item_ids)} item ids for the vectors of {len(self.counts)} items")
        self._ids, self._codes = list(item_ids), {item: code for code, item in enumerate(item_ids)}
        if len(self._codes) < len(self._ids):
            raise ValueError("an item id comes twice")

    def _share(self) -> None:
        """Let all members see this object's content and counts, which alone are saved; forget what came of others."""
        for member in self.members.values():
            for name in ("content", "counts"):
                if hasattr(member, name):
                    member.register_buffer(name, getattr(self, name), persistent=False)
        self._vectors: dict[str, Tensor] = {}

    # ---- items ---------------------------------------------------------------------------------------------------

    @property
    def item_ids(self) -> list[str]:
        """The ids of all I items in the order of their codes, which is that of the columns of scores."""
        return list(self._ids)

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._codes

    def __len__(self) -> int:
        return len(self._ids)

    def codes_of(self, item_ids: Sequence[str]) -> Tensor:
        """(N,) codes of items; ValueError names one that is unknown."""
        if unknown := [item for item in item_ids if item not in self._codes]:
            more = f" and {len(unknown) - 1} others are" if len(unknown) > 1 else " is"
            raise ValueError(
                f"{unknown[0]!r}{more} none of the {len(self)} items that have a vector: put_items adds new ones"
            )
        return torch.tensor([self._codes[item] for item in item_ids], dtype=torch.int64, device=self.counts.device)

    @torch.no_grad()
    def put_items(self, item_ids: Sequence[str], content: Tensor | Sequence[Any]) -> None:
        """Add new items, of which nobody's choice is known, or change the content of others, which keep their identity.

        Args:
            item_ids: of N items, each once.
            content: (N, F), a tensor, array or lists: their vectors, made as those of the catalogue were.

        Raises:
            ValueError: an item comes twice, a vector is of another length, or a number in one is not finite.
        """
        size = self.content.shape[1]
        if not size:
            raise ValueError("these heads know items by their identity alone: they cannot rank new ones")
        if len(set(item_ids)) < len(item_ids):
            raise ValueError("an item comes twice: give each once")
        content = torch.as_tensor(content)
        if content.shape != (len(item_ids), size):
            raise ValueError(f"the vectors of {len(item_ids)} items are {tuple(content.shape)}, not (items, {size})")
        half = content.to(self.content.device, torch.float16)
        if wrong := (~half.isfinite().all(dim=1)).nonzero()[:, 0].tolist():
            raise ValueError(f"the vector of item {item_ids[wrong[0]]!r} has a number that float16 cannot hold")
        new, kept = [item for item in item_ids if item not in self._codes], self._vectors
        if new:
            rows = torch.arange(len(self) + len(new), device=self.counts.device)
            self._take(rows.where(rows < len(self), PADDING), self._ids + new)
        codes = self.codes_of(item_ids)
        self.content[codes] = half
        self._share()
        for head in self._heads():
            head.find_neighbours(codes)
        for name, rows in kept.items():
            grown = torch.cat([rows, rows.new_empty(len(new), rows.shape[1])])
            grown[codes] = self.members[name].item_vectors(codes)
            self._vectors[name] = grown

    @torch.no_grad()
    def remove_items(self, item_ids: Sequence[str]) -> None:
        """Forget items: they are no candidates any more, and skipped in histories; ValueError for an unknown one."""
        stay = torch.ones(len(self), dtype=torch.bool, device=self.counts.device)
        stay[self.codes_of(item_ids)] = False
        gone, kept = set(item_ids), self._vectors
        self._take(stay.nonzero()[:, 0], [item for item in self._ids if item not in gone])
        self._share()
        lent = {name for name, member in self.members.items() if name != LIKENESS and member.config.neighbours}
        self._vectors = {name: rows[stay] for name, rows in kept.items() if name not in lent}

    def _take(self, rows: Tensor, item_ids: Sequence[str]) -> None:
        """Go over to (M,) items that have these codes among the present ones, ``PADDING`` for new ones."""
        self.content, self.counts = taken(self.content, rows), taken(self.counts, rows)
        for head in self._heads():
            head.take_items(rows)
        self._name(item_ids)

    # ---- scores --------------------------------------------------------------------------------------------------

    def read(self, histories: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """(B, L) codes of histories, oldest first, padded at the end, and (B,) how many of each one's items are unknown
        and were skipped; TypeError for a text in the place of a history."""
        if isinstance(histories, str) or any(isinstance(history, str) for history in histories):
            raise TypeError("histories are lists of item ids, one list for each user, such as [['a', 'b']]")
        known = [[self._codes[item] for item in history if item in self._codes] for history in histories]
        codes = torch.full((len(known), max([1, *map(len, known)])), PADDING)
        for row, history in zip(codes, known, strict=True):
            row[: len(history)] = torch.tensor(history, dtype=torch.int64)
        skipped = [len(history) - len(codes) for history, codes in zip(histories, known, strict=True)]
        return codes.to(self.counts.device), torch.tensor(skipped, dtype=torch.int64)

    @torch.no_grad()
    def vectors(self, member: str) -> Tensor:
        """(I, D): what a member keeps of every item, computed once."""
        if member not in self._vectors:
            self._vectors[member] = self.members[member].item_vectors()
        return self._vectors[member]

    def score(
        self, histories: Sequence[Sequence[str]], item_ids: Sequence[str] | None = None, by: str = FUSED
    ) -> Tensor:
        """(B, N) float32: the score of every item after every history, a higher one for a better item.

        Args:
            histories: item ids, oldest first; unknown ones are skipped, see :meth:`read` for how many.
            item_ids: of N candidates; None: all items, in the order of :attr:`item_ids`. Items of a history are not
                left out.
            by: "fused", or the name of a member.

        Raises:
            ValueError: a candidate or ``by`` is unknown.
        """
        codes, _ = self.read(histories)
        return self.score_codes(codes, None if item_ids is None else self.codes_of(item_ids), by)

    @torch.no_grad()
    def score_codes(self, histories: Tensor, items: Tensor | None = None, by: str = FUSED) -> Tensor:
        """As :meth:`score`, by (B, L) codes of :meth:`read` and (N,) of :meth:`codes_of`."""
        if by != FUSED and by not in self.members:
            raise ValueError(f"by={by!r} is not known; there are {', '.join([FUSED, *self.members])}")
        if not histories.shape[1]:  # all are empty
            histories = F.pad(histories, (0, 1), value=PADDING)
        buckets = self.buckets(items)
        step = max(1, PAIRS // max(1, len(buckets)))
        parts = [buckets.new_zeros(0, len(buckets), dtype=torch.float32)]
        for part in histories.split(step) if len(histories) else ():
            if by == FUSED:
                parts.append(self.fusion(self._scores(part, items), buckets))
            else:
                parts.append(self._score(by, part, items))
        return torch.cat(parts)

    @torch.no_grad()
    def member_scores(
        self, histories: Sequence[Sequence[str]], item_ids: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """(B, N) of each member of the fusion: its own score, as it is. Arguments as for :meth:`score`."""
        codes, items = self.read(histories)[0], None if item_ids is None else self.codes_of(item_ids)
        return {name: self._score(name, codes, items) for name in self.fusion.members}

    @torch.no_grad()
    def shares(self, histories: Sequence[Sequence[str]], item_ids: Sequence[str] | None = None) -> dict[str, Tensor]:
        """(B, N) of each member of the fusion, weight times standardised score, and "bias": their sum is the fused
        score. Arguments as for :meth:`score`."""
        codes, items = self.read(histories)[0], None if item_ids is None else self.codes_of(item_ids)
        buckets = self.buckets(items)
        shares = self.fusion.shares(self._scores(codes, items), buckets)
        bias = self.fusion.bias.to(buckets.device)[buckets].expand(len(codes), -1)
        return {**dict(zip(self.fusion.members, shares.unbind(dim=-1), strict=True)), "bias": bias}

    def buckets(self, items: Tensor | None = None) -> Tensor:
        """(N,) buckets of training frequency, by (N,) codes; of all items without."""
        return frequency_buckets(self.counts if items is None else self.counts[items])

    def _scores(self, histories: Tensor, items: Tensor | None) -> Tensor:
        """(B, N, M)."""
        return torch.stack([self._score(name, histories, items) for name in self.fusion.members], dim=-1)

    def _score(self, member: str, histories: Tensor, items: Tensor | None) -> Tensor:
        """(B, N), as one product."""
        vectors = self.vectors(member)
        states = self.members[member].user_states(histories, vectors)
        return states @ (vectors if items is None else vectors[items]).T

    def nearest(self, item_id: str, history: Sequence[str], k: int = 3) -> list[AlikeItem]:
        """The ``k`` items of a history that are most like an item, the most alike first; unknown ones are skipped.

        Alike are items by their content, or, if the members see none, by the vectors of the first member.
        """
        vectors = self.vectors(LIKENESS if LIKENESS in self.members else next(iter(self.members)))
        chosen = [item for item in dict.fromkeys(history) if item in self._codes]
        of_history = F.normalize(vectors[self.codes_of(chosen)], dim=1)
        cosines = (of_history @ F.normalize(vectors[self.codes_of([item_id])], dim=1)[0]).tolist()
        ordered = sorted(zip(chosen, cosines, strict=True), key=lambda pair: -pair[1])
        return [AlikeItem(*pair) for pair in ordered[:k]]

    # ---- as a part of a model, in files --------------------------------------------------------------------------

    def to_config(self) -> dict[str, Any]:
        """All but weights and item ids, as JSON holds it."""
        heads = {name: asdict(head.config) for name, head in self.members.items() if name != LIKENESS}
        for options in heads.values():
            del options["n_items"]
        likeness = None
        if LIKENESS in self.members:
            member = self.members[LIKENESS]
            content_size, rank = member.whitening.shape
            likeness = {"content_size": content_size, "rank": rank, "reach": member.reach}
        answer = None if self.answer_fusion is None else self.answer_fusion.to_dict()
        fusions = {"fusion": self.fusion.to_dict(), "answer_fusion": answer}
        return {"n_items": len(self), "item_ids": self._digest(), "heads": heads, "likeness": likeness, **fusions}

    def _digest(self) -> str:
        """A hash of the item ids in their order, by which a table of other items is told."""
        return hashlib.sha256(json.dumps(self._ids).encode()).hexdigest()[:16]

    def train(self, mode: bool = True) -> "ItemRanker":
        """Stays as it is: a model around it may be trained, this is not."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ItemRanker":
        """Goes to other devices with a model around it, but stays in its own dtypes."""

        def moved(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        super()._apply(moved, recurse)
        self._share()
        return self

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write a folder of this alone, which :meth:`from_pretrained` reads as it reads a whole model's."""
        self.save_weights(folder)
        self.save_items(folder)
        config = json.dumps({"sequence_head": self.to_config()}, indent=1)
        (Path(folder) / "config.json").write_text(config, encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | PathLike[str], config: Mapping[str, Any] | None = None, **hub: Any
    ) -> "ItemRanker":
        """The ranker of a repository or folder, on the CPU, without the model that it may be a part of.

        Args:
            name_or_path: a Hub id or a folder, of a model or of a ranker alone.
            config: ``sequence_head`` of the model's configuration, if it is read already.
            hub: as in `from_pretrained` (`revision`, `token`, `cache_dir`, ...).

        Raises:
            OSError: one of the files is missing.
            ValueError: there is no ranker in the repository, or its files are damaged or do not belong together.
        """
        try:
            return cls._read(str(name_or_path), config, hub)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split()).removeprefix("ValueError: ")
            raise ValueError(
                f"{name_or_path}: the sequence head cannot be loaded ({reason}). Its config.json, {ITEMS} and weights "
                "must be whole and of one model: save or download them again"
            ) from error

    @classmethod
    def _read(cls, name_or_path: str, config: Mapping[str, Any] | None, hub: Mapping[str, Any]) -> "ItemRanker":
        hub = {**hub, "revision": pinned(name_or_path, **hub)}

        def file(name: str, **options: Any) -> str:
            with naming(name_or_path):
                return str(cached_file(name_or_path, name, **hub, **options) or "")

        config = config or json.loads(Path(file("config.json")).read_text(encoding="utf-8")).get("sequence_head")
        if config is None:
            raise ValueError("it has no sequence head: its config.json has no `sequence_head`")
        items = json.loads(Path(file(ITEMS)).read_text(encoding="utf-8"))
        shards = [file(SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)]
        if not shards[0]:
            places = json.loads(Path(file(SAFE_WEIGHTS_INDEX_NAME)).read_text(encoding="utf-8"))["weight_map"]
            shards = [file(shard) for shard in sorted({shard for key, shard in places.items() if PREFIX in key})]
        weights = dict[str, Tensor]()
        for shard in shards:
            with safe_open(shard, framework="pt") as tensors:
                own = [key for key in tensors.keys() if key.startswith(PREFIX)]  # noqa: SIM118 (no dict)
                weights.update({key.removeprefix(PREFIX): tensors.get_tensor(key) for key in own})
        if not weights:
            raise ValueError("its weights are missing")
        ranker = cls(config, list(items))
        ranker.load_state_dict(weights)
        if list(items.values()) != ranker.counts.tolist() or config.get("item_ids") not in (None, ranker._digest()):
            raise ValueError(f"{ITEMS} is not of these weights")
        return ranker

    def weights(self) -> dict[str, Tensor]:
        """All weights under the names that they have in a checkpoint."""
        return {PREFIX + name: value.contiguous() for name, value in self.state_dict().items()}

    def save_weights(self, folder: str | PathLike[str]) -> None:
        """Write the weights as a file of their own."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(self.weights(), Path(folder) / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})

    def save_items(self, folder: str | PathLike[str]) -> None:
        """Write the table of items: how often each was chosen in training, by its id, in the order of codes."""
        table = dict(zip(self._ids, self.counts.tolist(), strict=True))
        (Path(folder) / ITEMS).write_text(json.dumps(table, ensure_ascii=False, indent=0), encoding="utf-8")
