"""Errors as one line for the user."""

import errno
import re

# as torch and others say that a file could not be written whole
DISK_FULL = r"(?i)no space left|inline_container|PytorchStreamWriter failed|disk quota exceeded"

DAMAGED = ("polars.exceptions", "safetensors")  # whose errors say what is wrong with a file, and not with which


def in_words(error: BaseException, more: str) -> str:
    """An error as one line; of one that was not foreseen, its type and how to see more.

    Args:
        more: what shows where it comes from.

    >>> in_words(ValueError("row 3: no\\n  time"), "run again with --debug")
    'row 3: no time'
    >>> in_words(KeyError("time"), "run again with --debug")
    "unexpected KeyError: 'time'; run again with --debug to see where it comes from"
    >>> in_words(ValueError("500 for url 'https://cdn.org/file?sig=abc' here"), "run again with --debug")
    "500 for url 'https://cdn.org/file' here"
    >>> in_words(RuntimeError("[enforce fail at inline_container.cc:672]"), "run again with --debug")
    '[enforce fail at inline_container.cc:672]: there is no room left on the disk; make some and do it again'
    """
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())  # those of libraries may have many lines
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)  # and addresses with a signature
    if getattr(error, "errno", None) == errno.ENOSPC or re.search(DISK_FULL, text):
        return f"{text}: there is no room left on the disk; make some and do it again"
    if type(error).__module__.startswith(DAMAGED):  # of what no stage has noted the content
        return f"a file is damaged, or of another kind ({text}); {more} to see which"
    if isinstance(error, OSError | ValueError | RuntimeError | ImportError):  # the last: of an optional package
        return text
    return f"unexpected {type(error).__name__}: {text}; {more} to see where it comes from"
