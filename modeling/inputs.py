"""What the recommender reads: users and candidates, as processor, ranking, pipeline and collators take them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class HistoryItem:
    """An item of a user's history in words: its title, its summary, or both."""

    title: str = ""
    summary: str = ""

    @classmethod
    def of(cls, value: Any) -> "HistoryItem":
        """From a ``HistoryItem`` or a mapping with ``title`` and ``summary``; TypeError or ValueError for others."""
        return _from(cls, value, "an item of `recent`")


@dataclass(frozen=True)
class User:
    """A user in words.

    Args:
        preference: the preference in force; "" if none has been written yet.
        recent: the items chosen since it was written, oldest first.
    """

    preference: str = ""
    recent: Sequence[HistoryItem] = ()

    @cached_property
    def content(self) -> str:
        """A name for all that a prompt may show of the user: 64 hex digits."""
        recent = [[item.title, item.summary] for item in self.recent]
        return hashlib.sha256(json.dumps([self.preference, recent]).encode()).hexdigest()

    @classmethod
    def of(cls, value: Any) -> "User":
        """From a ``User`` or a mapping with ``preference`` and, if there are any, ``recent`` items.

        Raises:
            TypeError: something else, or a field of another type.
            ValueError: a mapping without a preference and recent items, or with a key that is unknown.
        """
        user = _from(cls, value, "a user")
        if not isinstance(user.recent, Sequence) or isinstance(user.recent, str):
            raise TypeError(
                f"`recent` of a user is a list of items with `title` and `summary`, not {_kind(user.recent)}"
            )
        return cls(user.preference, tuple(HistoryItem.of(item) for item in user.recent))


@dataclass(frozen=True)
class Candidate:
    """An item that may be recommended.

    Args:
        item_id: for whoever asks; no prompt shows it.
        title, text: its words.
        image: a PIL image, or what the processor's ``prepare_images`` made of one; None if there is none.
    """

    item_id: str = ""
    title: str = ""
    text: str = ""
    image: Any = None

    @classmethod
    def of(cls, value: Any) -> "Candidate":
        """From a ``Candidate`` or a mapping with any of ``item_id``, ``title``, ``text`` and ``image``.

        Raises:
            TypeError: something else, a field of another type, or several images.
            ValueError: a mapping that shows nothing, or with a key that is unknown.
        """
        candidate = _from(cls, value, "a candidate")
        image = candidate.image
        if image is not None and not isinstance(image, Image.Image) and not hasattr(image, "tensors"):
            raise TypeError(f"`image` of a candidate is one opened image (PIL.Image) or None, not {_kind(image)}")
        return candidate

    @cached_property
    def content(self) -> str:
        """A name for all that a prompt may show of it: 64 hex digits."""
        content = hashlib.sha256(json.dumps([self.title, self.text]).encode())
        if self.image is not None:
            content.update(content_key(self.image))
        return content.hexdigest()

    @classmethod
    def of_document(cls, value: Any) -> "Candidate":
        """From a document as rerankers take it: a text, or a mapping that `of` takes.

        Rerankers know no titles: of a text without one, the first line is the title, and what follows is the text.
        """
        candidate = cls.of({"text": value} if isinstance(value, str) else value)
        if candidate.title:
            return candidate
        title, _, text = candidate.text.strip().partition("\n")
        return cls(candidate.item_id, title.strip(), text.strip(), candidate.image)


def content_key(image: Any) -> bytes:
    """A key of an image's content: of a PIL image, or of one that was prepared."""
    if hasattr(image, "tensors"):
        parts = [f"{name} {tuple(tensor.shape)}".encode() for name, tensor in image.tensors.items()]
        parts += [tensor.numpy().tobytes() for tensor in image.tensors.values()]
    else:
        parts = [f"{image.mode} {image.size}".encode(), image.tobytes()]
    return hashlib.sha256(b"".join(parts)).digest()


def as_users(values: Any) -> list[User]:
    """A list of users from a list of ``User`` or mappings; TypeError for a single one."""
    return [User.of(value) for value in _several(values, "users")]


def as_candidates(values: Any) -> list[Candidate]:
    """A list of candidates from a list of ``Candidate`` or mappings; TypeError for a single one."""
    return [Candidate.of(value) for value in _several(values, "candidates")]


def _several(values: Any, what: str) -> Sequence[Any]:
    if isinstance(values, str | bytes | Mapping | User | Candidate) or not isinstance(values, Sequence):
        raise TypeError(f"`{what}` is a list, not {_kind(values)}")
    return values


def _from(kind: Any, value: Any, what: str) -> Any:
    names = [field.name for field in fields(kind)]
    if isinstance(value, kind):
        _check_texts(vars(value), what)
        return value
    if all(hasattr(value, name) for name in names):  # of the package, where this file came from a repository
        value = {name: getattr(value, name) for name in names}
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} is a mapping with any of {', '.join(names)}, or a {kind.__name__}, not {_kind(value)}")
    if unknown := [name for name in value if name not in names]:
        raise ValueError(f"{what} has the unknown key {unknown[0]!r}; known are {', '.join(names)}")
    if not any(value.get(name) is not None for name in names if name != "item_id"):
        raise ValueError(f"{what} needs at least one of {', '.join(name for name in names if name != 'item_id')}")
    given = {name: part for name, part in value.items() if part is not None}
    _check_texts(given, what)
    return kind(**given)


def _check_texts(given: Mapping[str, Any], what: str) -> None:
    for name in ("item_id", "title", "text", "summary", "preference"):
        if not isinstance(given.get(name, ""), str):
            raise TypeError(f"`{name}` of {what} is a text, not {_kind(given[name])}")


def _kind(value: Any) -> str:
    return f"{type(value).__name__} ({str(value)[:40]!r})" if isinstance(value, str) else type(value).__name__
