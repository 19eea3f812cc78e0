"""A prompt template as the content of a chat message, for servers and for training with other tools."""

import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cache
from typing import Any

from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mllm_msr.processing.safe_text import Field, mark, split

# Names of control tokens, which a server may take for such within a text: <|im_end|>, </s>, <image>, [INST], [gMASK];
# DeepSeek's are between wide bars (U+FF5C), with a low block (U+2581) for a space
_CONTROL = re.compile("<(?=[|\uff5c]?/?[^\\W\\d][\\w\u2581-]*[|\uff5c]?>)|\\[(?=/?[a-z]?[A-Z_]+\\])")


@cache
def _compiled(template: str) -> Template:
    return ImmutableSandboxedEnvironment(keep_trailing_newline=True).from_string(template)


def chat_parts(template: str, values: Mapping[str, Any], noun: str) -> list[Any]:
    """The prompt as texts (str) and, where it shows it, the image (whatever ``values["image"]`` is), in reading order.

    >>> chat_parts("{{ title }}{% if image %}: {{ image }}{% endif %}?", {"title": "Mug", "image": 7}, "item")
    ['Mug: ', 7, '?']
    """
    image, fields = values.get("image"), list[Field]()
    marked = mark({**values, "image": () if image is None else (image,)}, fields)
    parts: list[Any] = []
    for piece in split(_compiled(template).render(**marked, noun=noun).strip()):
        if isinstance(piece, int) and fields[piece].name == "image":
            parts += fields[piece].value
            continue
        text = fields[piece].value if isinstance(piece, int) else piece
        if parts and isinstance(parts[-1], str):
            parts[-1] += text
        else:
            parts.append(text)
    return parts


def harmless(value: Any) -> Any:
    """The variables of a prompt, with a space inside every name of a control token in their texts."""
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return {key: harmless(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [harmless(part) for part in value]
    return _CONTROL.sub(lambda match: f"{match[0]} ", value) if isinstance(value, str) else value
