"""What of a run may be shown to others: no folder of this machine, no address of a server, nothing like a secret.

Reports, cards, published recipes and tables take a recipe's values from here.
"""

import re
from pathlib import Path
from typing import Any

from mllm_msr.records.recipe import Recipe

MASK = "***"
PLACES = {
    "source": {"folder", "interactions", "items", "images", "covers"},
    "summaries": {"base_url", "cache"},
    "evaluation": {"served"},
}
SECRET_NAMES = re.compile(
    r"(^|_)(token|key|secret|password|passwd|passphrase|credentials?|auth|cookie|webhook|endpoint|ur[li]|proxy)$"
)
ADDRESSES = re.compile(
    r"""(?:
        \b(?!hf:)[a-z][a-z0-9+.-]*://[^\s"'<>]+  # of any kind but the Hub's
        |(?:localhost|[\w-]+(?:\.[\w-]+)+):\d{2,5}\b[^\s"'<>]*  # a host and its port
        |[^\s/@:"']+:[^\s/@"']+@[\w.-]+[^\s"'<>]*  # a user and a password
    )""",
    re.VERBOSE | re.IGNORECASE,
)
SECRETS = re.compile(
    r"""\b(?:
        (?:hf_|sk[-_]|[pr]k_|gh[opsu]_|github_pat_|glpat-|xox[abprs]-|AKIA|AIza|ya29\.|eyJ)[\w.-]{6,}  # by its prefix
        |(?i:bearer|basic)\s+[\w.+/=-]{8,}
        |\w*(?i:token|key|secret|password)\s*[=:]\s*\S+
        |[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}
        |[0-9a-f]{32,}
        |(?=\w*[a-z])(?=\w*[A-Z])(?=\w*\d)[A-Za-z0-9_]{24,}
    )""",
    re.VERBOSE,
)


def public_recipe(recipe: Recipe) -> dict[str, Any]:
    """A recipe's values as others may see them.

    Places of this machine and addresses of servers are left out, models and folders go by their last name, and what is
    a secret by its name or by its look is ``***``.
    """
    content = recipe.to_dict()
    for section in ("source", "data", "summaries", "training", "evaluation"):
        content[section] = {
            name: _public(name, value)
            for name, value in content[section].items()
            if name not in PLACES.get(section, ())
        }
    return content


def _public(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _public(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_public(name, inner) for inner in value]
    if not isinstance(value, str):
        return value
    if value and SECRET_NAMES.search(name.lower()):
        return MASK
    if name.endswith("revision"):
        return public_revision(value)
    if name == "model" or name.endswith("name_or_path"):
        return hide_secrets(public_name(value))
    if value.startswith(("/", "~", "./", "../")) or re.match(r"[A-Za-z]:[\\/]|\\\\", value):
        value = re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return hide_secrets(value)


def hide_secrets(text: str) -> str:
    """``text`` with ``***`` in place of addresses, but for those of the Hub, and of what looks like a key.

    >>> hide_secrets("key sk-abcdef123456 refused by https://me:pass@inner.host/secret/v1")
    'key *** refused by ***'
    """
    return SECRETS.sub(MASK, ADDRESSES.sub(MASK, text))


def public_revision(revision: str) -> str:
    """A revision without an address; a commit, which is as long as a key, stays."""
    return ADDRESSES.sub(MASK, revision)


def is_hub_id(name: str | None) -> bool:
    """Whether ``name`` can only be a repository on the Hub, not a folder.

    >>> is_hub_id("llava-hf/llava-v1.6-mistral-7b-hf"), is_hub_id("/models/llava"), is_hub_id("demo")
    (True, False, False)
    """
    return bool(name and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) and not Path(name).exists())


def public_name(model: str) -> str:
    """The name of a model without the folder of this machine that it may lie in.

    >>> public_name("/home/me/models/llava"), public_name("llava-hf/llava-1.5-7b-hf"), public_name("demo")
    ('llava', 'llava-hf/llava-1.5-7b-hf', 'demo')
    """
    return model if is_hub_id(model) else Path(model).name
