"""Where the images of a catalogue are: in its image column, however that is written, or in a folder, named by id."""

import ast
import base64
import binascii
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

import polars as pl
from PIL import Image

from mllm_msr.data.ids import MISSING, plain_id
from mllm_msr.data.raw import EXAMPLES, BadRows, Wrong, short
from mllm_msr.data.spool import spool_folder

KEYS = ("bytes", "path", "url", "uri", "src", "href", "link", "file", "file_name", "image", "large", "hi_res", "thumb")
SHORTEST = 64  # characters of an image as base64 text
URL = "(?i)^https?://"


@dataclass
class ImageColumn:
    """Values of a catalogue's image column -> the path of a file, or a URL; counts what is neither.

    Bytes go into temporary files, so that memory holds a few images at a time. Of several images the first is taken.

    Args:
        root: the folder that paths are relative to.
        inside: a folder that no path may leave, for a catalogue of other people; None lets it name any file.

    ``given`` counts the values that were there.
    """

    root: Path
    inside: Path | None = None
    given: int = 0
    missing: Wrong = field(default_factory=Wrong)
    unknown: Wrong = field(default_factory=Wrong)
    several: Wrong = field(default_factory=Wrong)
    folder: Path = field(default_factory=spool_folder)
    numbers: Iterator[int] = field(default_factory=count)

    def places(self, values: pl.Series) -> pl.Series:
        """Path, URL or null of each value."""
        self.given += values.count()
        return pl.Series("image_path", [self._place(value) for value in values.to_list()], pl.String)

    def report(self, bad: BadRows) -> None:
        """Note all that could not be used."""
        bad.note("images: no such file", self.missing.count, self.missing.examples)
        bad.note("images: neither bytes nor a file nor a URL", self.unknown.count, self.unknown.examples)
        bad.note("images: several of one item (first one taken)", self.several.count, self.several.examples)

    def _place(self, value: Any) -> str | None:
        value = opened(value)
        if isinstance(value, list) and value and all(isinstance(byte, int) and -128 <= byte < 256 for byte in value):
            return self._store(bytes(byte & 255 for byte in value))
        if isinstance(value, list) and value and isinstance(value[0], list):  # such as the pixels themselves
            self.unknown.add(0, value)
            return None
        if isinstance(value, list):
            usable = [image for image in value if image is not None]
            if len(usable) > 1:
                self.several.add(0, value)
            return self._place(usable[0]) if usable else None
        if isinstance(value, dict):
            inner = next((value[key] for key in KEYS if value.get(key)), None)
            if inner is None and any(field is not None for field in value.values()):
                self.unknown.add(0, value)
            return self._place(inner)
        if isinstance(value, bytes):
            return self._store(value)
        if value is None or value != value or (text := str(value).strip()) in MISSING:
            return None
        if re.match(URL, text):
            return text
        if path := self.file(text):
            return path
        if (data := _base64(text)) is not None:
            return self._store(data)
        (self.missing if isinstance(value, str | int) else self.unknown).add(0, value)
        return None

    def file(self, name: str) -> str | None:
        """The file that a path means, if it is there and may be read."""
        name = unquote(name[7:]) if name[:8].lower() == "file:///" else name
        for spelled in dict.fromkeys((name, name.replace("\\", "/"))):  # the latter of a path that Windows wrote
            path = Path(os.path.normpath(self.root / spelled))
            try:
                if path.is_file() and (self.inside is None or path.is_relative_to(os.path.normpath(self.inside))):
                    return str(path)
            except (OSError, ValueError):  # no name that a file could have
                continue
        return None

    def _store(self, data: bytes) -> str:
        file = self.folder / str(next(self.numbers))
        file.write_bytes(data)
        return str(file)


def opened(value: Any) -> Any:
    """A list or record that is written as text (JSON, or as Python prints it) as what it says; others as they are."""
    if isinstance(value, str) and value.strip().startswith(("[", "{")):
        for parse in (json.loads, ast.literal_eval):
            try:
                return parse(value.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    return value


def _base64(text: str) -> bytes | None:
    """The bytes that a ``data:`` URL or bare base64 text holds; None if it is neither."""
    head, comma, body = text.partition(",") if text[:5].lower() == "data:" else ("", "", text)
    if comma and not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    if not comma and len(text) < SHORTEST:
        return None
    body = "".join((unquote(body) if comma else body).split()).translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None


@cache
def image_suffixes() -> frozenset[str]:
    """How the names of images end that can be read."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def image_files(folder: Path | None) -> dict[str, str]:
    """Name without suffix, also as the id that it means -> path, for the images of a folder (searched one level deep);
    {} when there is none."""
    if folder is None or not folder.is_dir():
        return {}
    paths = (path for pattern in ("*", "*/*") for path in sorted(folder.glob(pattern)))
    files = {path.stem: str(path) for path in paths if path.suffix.lower() in image_suffixes() and path.is_file()}
    return {plain_id(stem): path for stem, path in files.items()} | files


def images_by_id(ids: pl.Series, folder: Path | None) -> pl.Series:
    """The image file of each item id in a folder, null where there is none.

    Raises:
        ValueError: the folder has images, but none of any item.
    """
    files = image_files(folder)
    places = ids.replace_strict(files, default=None, return_dtype=pl.String).alias("image_path")
    if files and len(ids) and not places.count():
        names = short([Path(path).name for path in list(files.values())[:EXAMPLES]])
        raise ValueError(
            f"{folder}: none of its {len(files)} images is called by the id of an item. There are {names}, and items "
            f"{short(ids.head(EXAMPLES).to_list())}"
        )
    return places
