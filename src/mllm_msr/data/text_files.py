"""Text files of other people's making, opened in the encoding that they are in; what is no text is named."""

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from mllm_msr.data.raw import BadRows, short

BLOCK = 1 << 22  # characters read at a time
MARKS = {  # the longer ones first
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
PACKED: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
    b"(\xb5/\xfd": lambda path: pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"),
}
NO_TEXT = {
    b"PAR1": "a Parquet file: let its name end in .parquet",
    b"PK\x03\x04": "a ZIP archive or an Excel workbook: unpack it, or save the sheet as CSV",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook: save the sheet as CSV",
    b"SQLite format 3": "an SQLite database: export the table as CSV",
    b"ARROW1": "an Arrow or Feather file: write it as Parquet",
    b"ORC": "an ORC file: write it as Parquet",
    b"Obj\x01": "an Avro file: write it as Parquet",
    b"\x89HDF": "an HDF5 file: write the table as Parquet",
    b"\x1b$": "a text in ISO-2022: save it as UTF-8",
}
# Bytes that show another encoding than Windows-1252, where hardly a letter beyond ASCII stands beside two others, and
# where five bytes mean nothing and one a florin sign; an emoji of UTF-8 that was cut shows nothing.
FOREIGN = re.compile(rb"(?!\xf0[\x90-\xbf][\x80-\xbf](?![\x80-\xff]))[\x80-\xff]{3,}|[\x81\x83\x8d\x8f\x90\x9d]")
HIGH = bytes(range(0x80, 0x100))


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn what decoders of files raise within the block into an error that names the file.

    Raises:
        ValueError: the content is not what the file's name says.
        OSError: a packed file is cut short or damaged.
    """
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise OSError(f"{path}: the packed file is cut short or damaged ({error}); fetch it anew") from error
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and (error.errno or str(path) in str(error)):
            raise  # of the system, such as a full disk, or one that names the file
        what = f"cannot be read, it is damaged or of another kind ({short(error)}): fetch or write it anew"
        raise ValueError(f"{path}: {what}") from error


def text_blocks(path: Path, bad: BadRows) -> Iterator[str]:
    """The text of a file in blocks of whole lines that end in "\\\\n", however the file ends them.

    A file may be packed by gzip, bzip2, xz or Zstandard. It is read as UTF-8 (also with a mark), UTF-16 or UTF-32, else
    as Windows-1252, which is noted; what cannot be decoded becomes U+FFFD. A carriage return that ends no line, where
    others end in line feeds, is a space.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: a packed file is cut short.
        ValueError: the file is empty, no text, or in an encoding that cannot be told.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with reading(path):
        encoding = _encoding(path, bad)
        with _unpacked(path) as file, io.TextIOWrapper(file, encoding, errors="replace", newline="\n") as text:
            feeds = None
            while block := text.read(BLOCK):
                block += text.readline()
                if "\r" in block:
                    block = re.sub("\r+\n", "\n", block)
                    feeds = block.count("\n") >= block.count("\r") if feeds is None else feeds
                    block = block.replace("\r", " " if feeds else "\n")
                yield block if block.endswith("\n") else block + "\n"


def kind_of(path: Path) -> str | None:
    """What a file is that is no table as text, with what to do; None if its beginning does not tell."""
    with path.open("rb") as file:
        return _no_text(file.read(64))


def _no_text(head: bytes) -> str | None:
    return next((kind for sign, kind in NO_TEXT.items() if head.startswith(sign)), None)


def _unpacked(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(6)
    unpack = next((unpack for sign, unpack in PACKED.items() if head.startswith(sign)), None)
    return unpack(path) if unpack else path.open("rb")


def _encoding(path: Path, bad: BadRows) -> str:
    with _unpacked(path) as file:
        head = file.read(BLOCK)
    if not head:
        raise ValueError(f"{path}: the file is empty")
    if (kind := _no_text(head)) or (kind := NO_TEXT[b"\x1b$"] if b"\x1b$" in head else None):
        raise ValueError(f"{path}: this is {kind}")
    if encoding := next((encoding for mark, encoding in MARKS.items() if head.startswith(mark)), None):
        return encoding
    if b"\0" in head:
        for encoding, high, low in (("utf-16-le", head[1::2], head[::2]), ("utf-16-be", head[::2], head[1::2])):
            if high.count(0) > len(high) / 10 and high.count(0) > 4 * low.count(0):
                return encoding
    encoding = _utf8_or_windows(path, bad)
    if head.count(0) > (len(head) / 20 if encoding == "utf-8" else 0):
        raise ValueError(f"{path}: this is no text, it has NUL bytes; save it as UTF-8 text")
    if encoding is None:
        raise ValueError(
            f"{path}: neither UTF-8 nor a Western encoding; save it as UTF-8, such as by iconv -f ENCODING -t UTF-8, "
            "where ENCODING is SHIFT_JIS, GB18030, BIG5, EUC-KR, CP1251 or whatever it is in"
        )
    return encoding


def _utf8_or_windows(path: Path, bad: BadRows) -> str | None:
    """UTF-8 if all of the file is, or nearly all beyond ASCII; else Windows-1252, if it can be."""
    decoder, lenient = (codecs.getincrementaldecoder("utf-8")(errors) for errors in ("strict", "replace"))
    try:
        with _unpacked(path) as file:
            while block := file.read(BLOCK):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        return "utf-8"
    except UnicodeDecodeError as error:
        first = error
    broken = beyond = high = foreign = 0
    with _unpacked(path) as file:
        while block := file.read(BLOCK):
            text = lenient.decode(block)
            broken += text.count("\ufffd")
            beyond += len(text) - len(text.encode("ascii", "ignore"))
            high += len(block) - len(block.translate(None, HIGH))
            foreign += sum(map(len, FOREIGN.findall(block)))
    if broken < beyond - broken:
        bad.note(f"{path.name}: characters that are not UTF-8, read as U+FFFD", broken, [first])
        return "utf-8"
    if 2 * foreign > high:
        return None
    bad.note(f"{path.name}: not UTF-8, read as Windows-1252", 1, [first])
    return "cp1252"


def whole(text: Any) -> Any:
    """A text of which every half of a surrogate pair is U+FFFD, so that it can be encoded."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(text, str) else text
