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
    "training": {"resume_from_checkpoint"},
    "evaluation": {"served"},
}
SECRET_NAMES = re.compile(
    r"(^|_)(token|key|secret|password|passwd|passphrase|credentials?|auth|cookie|webhook|endpoint|ur[li]|proxy)$"
)
ADDRESSES = re.compile(
    r"""(?:
        \b(?!hf:)[a-z][a-z0-9+.-]*://[^\s"'<>]+  # of any kind but the Hub's
        |(?:localhost|[\w-]+(?:\.[\w-]+)+):\d{2,5}\b[^\s"'<>]*  # a host and its port
        |\[[0-9a-f:.]*:[0-9a-f:.]*\]:\d{2,5}\b[^\s"'<>]*  # the same by number
        |[^\s/@:"']+:[^\s/@"']+@[\w.-]+[^\s"'<>]*  # a user and a password
    )""",
    re.VERBOSE | re.IGNORECASE,
)
FOLDERS = re.compile(  # of a machine
    r"""(?:(?<![\w./])(?:~|/(?:home|users|root|mnt|media|volumes|private|var|srv|opt|tmp|scratch|data))/
        |(?<!\w)(?:[a-z]:\\|\\\\))[^\s"'<>:,;)]+""",
    re.VERBOSE | re.IGNORECASE,
)
SECRETS = re.compile(
    r"""\b(?:
        (?:hf_|sk[-_]|[pr]k_|gh[opsu]_|github_pat_|glpat-|xox[abprs]-|xapp-|AIza|ya29\.|eyJ)[\w.-]{6,}  # by its prefix
        |(?:gsk_|xai-|r8_|pplx-|nvapi-|npm_|pypi-|tgp_v1_|api_org_|dop_v1_|wandb_v1_|dapi|SG\.)[\w.-]{10,}
        |A[KS]IA[0-9A-Z]{12,}
        |(?i:bearer|basic)\s+[\w.+/=-]{8,}
        |(?:\w+-)*\w*(?i:token|key|secret|password|passwd|pwd|signature|\bsig)\s*[=:]\s*\S+
        |[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}
        |[0-9a-f]{32,}
        |(?=\w*[a-z])(?=\w*[A-Z])(?=\w*\d)[A-Za-z0-9_]{24,}
    )
    |-----BEGIN\ [A-Z ]*PRIVATE\ KEY-----.*?(?:-----END\ [A-Z ]*-----|\Z)""",
    re.VERBOSE | re.DOTALL,
)


def public_recipe(recipe: Recipe) -> dict[str, Any]:
    """A recipe's values as others may see them.

    Places of this machine and addresses of servers are left out, models and folders go by their last name, and what is
    a secret by its name or by its look is ``***``.
    """
    content = recipe.to_dict()
    for section, values in content.items():
        if section == "prompts":  # they decide results, addresses included
            content[section] = {name: SECRETS.sub(MASK, template) for name, template in values.items()}
        elif isinstance(values, dict):
            hidden = PLACES.get(section, ())
            content[section] = {name: _public(name, value) for name, value in values.items() if name not in hidden}
        elif section != "license":  # which may be an address
            content[section] = _public(section, values)
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
    if name.endswith(("model", "name_or_path")):
        return public_text(public_name(value))
    if value.startswith(("/", "~", "./", "../")) or re.match(r"[A-Za-z]:[\\/]|\\\\", value):
        value = re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return public_text(value)


def public_text(text: str) -> str:
    """:func:`hide_secrets`, and without the folders of this machine: for what others read.

    >>> public_text("/home/ann/log.csv, row 3: no time")
    '***, row 3: no time'
    """
    return FOLDERS.sub(MASK, hide_secrets(text))


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
