"""What a language model has generated, made fit to be stored and shown: no reasoning, no broken characters."""

import re

_NAME = r"(?:seed:)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|scratchpad)"
_MARK = re.compile(  # of a block of reasoning: its beginning (group 1) or its end
    rf"(<(?:\|start_|\|)?{_NAME}\|?>|\[{_NAME}\]|◁{_NAME}▷)|<(?:/|\|end_|\|/){_NAME}\|?>|\[/{_NAME}\]|◁/{_NAME}▷",
    re.IGNORECASE,
)
_CHANNELS = re.compile(  # of a model that has them: all but the last, whether or not the marks were taken out
    r"^.*<\|channel\|>final\s*<\|message\|>|^<\|channel\|>(?:analysis|commentary).*|^analysis.*assistantfinal",
    re.DOTALL,
)
_WRAPPING = re.compile(r"</?answer>|<\|(?:begin|end)_of_box\|>|<\|(?:end|return|channel|message|start)\|>")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def tidy(text: str) -> str:
    """``text`` without blocks of reasoning, control characters and outer white space.

    Halves of surrogate pairs, which no file can hold, become U+FFFD.

    >>> tidy("<think>They want a summary.</think> A blue mug "), tidy("They want a summary.</think> A blue mug")
    ('A blue mug', 'A blue mug')
    >>> tidy("<think>They want a"), tidy("A blue mug \\ud83d")
    ('', 'A blue mug �')
    """
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = _without_blocks(_CHANNELS.sub("", text))
    return _CONTROL.sub("", _WRAPPING.sub("", text)).strip()


def marks_reasoning(token: str) -> bool:
    """Whether a token begins or ends a block of reasoning, so that :func:`tidy` needs to see it."""
    return _MARK.fullmatch(token) is not None


def _without_blocks(text: str) -> str:
    """``text`` without blocks of reasoning. The chat template may have opened the first; the last may be cut off."""
    kept: list[str] = []
    start, inside = 0, False
    for mark in _MARK.finditer(text):
        if mark[1] and not inside:
            kept.append(text[start : mark.start()])
        elif not mark[1] and not inside:
            kept.clear()
        inside, start = bool(mark[1]), mark.end()
    return "".join(kept) + ("" if inside else text[start:])
