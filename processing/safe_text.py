"""Prompts as pieces, so that what users wrote is always encoded as text and never as control tokens.

A template is rendered once with private-use sentinels in place of the fields; splitting at the sentinels leaves the
trusted pieces between which any texts can be put. After encoding, the control tokens of a prompt must be exactly those
of its trusted pieces. Where they are not, some field spells a control token, and a space is put inside it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "\ue000", "\ue001"
_SENTINEL = re.compile(f"{OPEN}(\\d+){CLOSE}")


@dataclass
class Field:
    """What stands at one place of a prompt: ``name`` is the template variable it comes from."""

    name: str
    value: Any  # a text, or a tuple of images


def addition(text: str, plain: str) -> str:
    """What ``text`` has that ``plain`` has not, in one piece."""
    start = next((i for i, (a, b) in enumerate(zip(text, plain, strict=False)) if a != b), min(len(text), len(plain)))
    rest = len(plain) - start  # as many characters at the end may be alike
    end = next((i for i in range(rest) if text[-1 - i] != plain[-1 - i]), rest)
    return text[start : len(text) - end]


def anchor(index: int) -> str:
    """The sentinel of a field."""
    return f"{OPEN}{index}{CLOSE}"


def clean(text: str) -> str:
    """A field's text without sentinels, halves of surrogate pairs (no tokenizer takes them) and outer white space."""
    return text.encode(errors="ignore").decode().replace(OPEN, "").replace(CLOSE, "").strip()


def mark(value: Any, fields: list["Field"], name: str = "") -> Any:
    """``value`` with a sentinel for every non-empty text and tuple of images, which are appended to ``fields``."""
    if isinstance(value, dict):
        return {key: mark(part, fields, name or key) for key, part in value.items()}
    if isinstance(value, list):
        return [mark(part, fields, name) for part in value]
    value = value if isinstance(value, tuple) else clean(str(value)) if isinstance(value, (str, int, float)) else ""
    if not value:
        return ""
    fields.append(Field(name, value))
    return anchor(len(fields) - 1)


def split(rendered: str) -> list[str | int]:
    """The trusted pieces (str) and the numbers of the fields between them (int)."""
    parts = _SENTINEL.split(rendered)
    pieces: list[str | int] = [int(part) if index % 2 else part for index, part in enumerate(parts)]
    if any(isinstance(piece, str) and (OPEN in piece or CLOSE in piece) for piece in pieces):
        raise ValueError("a prompt template may print its variables, but not cut or change them")
    return [piece for piece in pieces if piece != ""]


class Controls:
    """The control tokens of a tokenizer: special tokens, and added tokens that are not mere white space."""

    def __init__(self, tokenizer: Any, more: Iterable[int | None] = ()) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self.ids = {index for index, token in added if token.special or token.content.strip()}
        self.ids.update(tokenizer.all_special_ids)
        self.ids.update(index for index in more if index is not None)

    def of(self, ids: list[int]) -> list[int]:
        return [index for index in ids if index in self.ids]

    def defuse(self, text: str) -> str:
        """``text`` with a space inside whatever would be encoded as a control token."""
        for _ in range(len(text) + 1):
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            hits = [
                span
                for index, span in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
                if index in self.ids and span[0] < span[1]
            ]
            if not hits:
                break
            for start, end in reversed(hits):
                inside = text[start:end].strip()
                broken = f"{inside[0]} {inside[1:]}" if len(inside) > 1 else " "
                text = f"{text[:start]}{broken}{text[end:]}"
        return text
