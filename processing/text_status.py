"""The status of a generated text: ``ok``, ``suspect:why`` or ``failed:why``, as the column ``status`` has it.

A suspect text is there and may be poor; a failed one is not there, and is tried again by the next run.
"""

import re
from typing import NamedTuple

OK = "ok"
EMPTY = "suspect:empty"
REFUSED = "suspect:refused"
LOOPING = "suspect:looping"
UNFINISHED = "suspect:unfinished"
NOTHING_TO_DESCRIBE = "failed:nothing-to-describe"
_FAILED = "failed"
_RANKS = (OK, "suspect", _FAILED)  # from best to worst
_REFUSAL = re.compile(
    r"^\W*(i'?m (really |very )?sorry|i am (really |very )?sorry|sorry,|i apologi[sz]e|unfortunately, i\b|"
    r"as an? (ai|(large )?language model)\b|i('m| am) (unable|not able)|"
    r"i (cannot|can't|can not|could not|couldn't|do not|don't) "
    r"(help|assist|comply|provide|describe|see|view|identify|fulfil+|do that|have access|answer|infer|know)|"
    r"(yes|no|none|null|n/a|unknown|not available)\W*$)",
    re.IGNORECASE,
)


class StoredText(NamedTuple):
    """A text and its status; the text is "" where it has failed."""

    text: str
    status: str


def failed(reason: str) -> str:
    """The status of a text that is not there for ``reason``, see :class:`~mllm_msr.processing.engines.Failure`."""
    return f"{_FAILED}:{reason}"


def kind(status: str) -> str:
    """``ok``, ``suspect`` or ``failed``."""
    return status.partition(":")[0]


def has_failed(status: str) -> bool:
    return kind(status) == _FAILED


def is_useless(status: str) -> bool:
    """Whether a text says nothing of its input."""
    return has_failed(status) or status in (EMPTY, REFUSED)


def assess(text: str, ended: bool) -> str:
    """The status of a text that an engine has written.

    * empty: not a letter, not a digit
    * refused: it begins with an apology or with what the model cannot do, or is a bare yes, no or none
    * looping: it ends with the same two to six words three times in a row, or the same word six times
    * unfinished: it reached the longest length without an end

    >>> assess("likes red mugs", True), assess("", True), assess("and on and", False)
    ('ok', 'suspect:empty', 'suspect:unfinished')
    >>> assess("\u200b ...", True)
    'suspect:empty'
    >>> assess("a b " * 9, True), assess("I'm sorry, but I can't help with that.", True)
    ('suspect:looping', 'suspect:refused')
    """
    words = text.split()
    if not any(character.isalnum() for character in text):
        return EMPTY
    if _REFUSAL.match(text.replace("\u2019", "'")):
        return REFUSED
    for n, times in ((1, 6), *((n, 3) for n in range(2, 7))):
        if len(words) >= times * n and words[-times * n :] == words[-n:] * times:
            return LOOPING
    return OK if ended else UNFINISHED


def combine(*texts: StoredText | None) -> StoredText:
    """The first text that is not empty, with the worst status of all; an item that has nothing to describe has failed.

    >>> combine(StoredText("", "suspect:empty"), None, StoredText("red", "ok"))
    StoredText(text='red', status='suspect:empty')
    """
    given = [text for text in texts if text is not None]
    if not given:
        return StoredText("", NOTHING_TO_DESCRIBE)
    worst = max(given, key=lambda text: _RANKS.index(kind(text.status)))
    return StoredText(next((text.text for text in given if text.text), ""), worst.status)
