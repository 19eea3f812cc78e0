"""Typed sections from parsed YAML: an unknown name or a wrong type is an error that says where, and what is meant."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from huggingface_hub.dataclasses import type_validator

Section = TypeVar("Section")


def build(kind: type[Section], content: Any, section: str) -> Section:
    """A section from parsed YAML.

    Raises:
        ValueError: no mapping, an unknown key (with the nearest known one), a missing key, or a wrong type or value.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"section {section!r} is a mapping of names to values, not {content!r}")
    hints = declared(kind)
    check_names(content, hints, section)
    values = {name: as_number(value, hints[name]) for name, value in content.items()}
    try:
        return kind(**values)
    except ValueError as error:
        named = str(error).startswith((f"{section}.", f"{section}:"))
        raise ValueError(str(error) if named else f"{section}.{error}") from error
    except TypeError as error:
        raise ValueError(f"{section}: {error}") from error


def check_names(content: Iterable[Any], known: Iterable[str], section: str) -> None:
    """Raise ValueError for the first name that is not ``known``, with the nearest that is."""
    for name in content:
        if name not in known:
            raise ValueError(f"{section}: unknown key {name!r}{did_you_mean(str(name), known)}")


def check_types(section: Any, name: str) -> None:
    """Raise ValueError, naming section and field, for a field of a dataclass that has not its declared type."""
    for key, hint in declared(type(section)).items():
        check_type(getattr(section, key), hint, f"{name}.{key}")


def declared(kind: type[Any]) -> dict[str, Any]:
    """The fields of a dataclass with their types."""
    hints = get_type_hints(kind)
    return {each.name: hints[each.name] for each in fields(kind)}


def check_type(value: Any, hint: Any, where: str) -> None:
    """Raise ValueError, naming ``where``, for a value that has not the declared type."""
    try:
        type_validator(where, value, hint)
    except (TypeError, ValueError) as error:
        one_of = "one of " if get_origin(hint) is Literal else ""
        raise ValueError(f"{where}={value!r}: must be {one_of}{_in_words(hint)}") from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(known))}"


def as_number(value: Any, hint: Any) -> Any:
    """A number as its declared type has it: YAML writes 1 for 1.0, and reads 1e-4 as a text."""
    kinds = get_args(hint) or (hint,)
    if float not in kinds or isinstance(value, bool) or (isinstance(value, str) and str in kinds):
        return value
    try:
        return float(value) if isinstance(value, int | str) else value
    except ValueError:
        return value


def _in_words(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    words |= {list[str]: "a list of texts", list[int]: "a list of whole numbers", dict: "a mapping"}
    words |= {dict[str, int]: "a mapping of names to whole numbers", dict[str, str]: "a mapping of names to texts"}
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_in_words, get_args(hint)))
    if get_origin(hint) is Literal:
        return ", ".join(map(repr, get_args(hint)))
    if get_origin(hint) is list and hint not in words:
        return f"a list of {_in_words(*get_args(hint))}"
    return words.get(hint, words.get(get_origin(hint), str(hint)))
