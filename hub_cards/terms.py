"""Whose data and weights a run rests on, and what their terms allow: for the cards and for whoever publishes.

The table of sources says what their own pages and readmes say, in short; it is no legal advice, and terms change.
"""

from functools import cache
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError

# fmt: off
SOURCE_TERMS = {
    "movielens": {
        "name": "MovieLens (GroupLens)",
        "allows": "research; acknowledge GroupLens in publications",
        "forbids": "redistribution and commercial use without permission; implying endorsement",
        "link": "https://grouplens.org/datasets/movielens/",
        "pictures": "posters and overviews belong to the studios and to TMDB, whose own terms apply",
    },
    "microlens": {
        "name": "MicroLens (Westlake University)",
        "allows": "non-commercial research, citing the paper",
        "forbids": "commercial use; passing on texts, covers and videos, which belong to their authors",
        "link": "https://github.com/westlake-repl/MicroLens",
        "pictures": "covers belong to the authors of the videos",
    },
    "amazon": {
        "name": "Amazon Reviews (McAuley Lab, UCSD)",
        "allows": "research, citing the paper; no licence is stated for texts and pictures",
        "forbids": "nothing beyond that is granted: texts and pictures belong to reviewers, sellers and Amazon",
        "link": "https://amazon-reviews-2023.github.io",
        "pictures": "product pictures belong to sellers and Amazon",
    },
}
# fmt: on
RESTRICTED_SOURCES = tuple(SOURCE_TERMS)  # texts and pictures of others, not ours to pass on
PERMISSIVE = {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-3.0", "odc-by"}


@cache
def backbone_license(backbone: str | None) -> str | None:
    """The licence a backbone on the Hub states; None if it has none or the Hub does not answer at once."""
    if not backbone or "/" not in backbone:
        return None
    try:
        data = HfApi().model_info(backbone, timeout=5).card_data
    except (HfHubHTTPError, HTTPError, OSError, ValueError):
        return None
    fields = data.to_dict() if data else {}
    license = fields.get("license")
    return fields.get("license_name") or license if license == "other" else license


def conflicts(license: str | None, backbone: str | None, source: str | None) -> list[str]:
    """Why ``license`` of a run promises more than the licence of its backbone or the terms of its source allow.

    >>> conflicts("apache-2.0", "gemma", "demo")
    ["the backbone's licence is gemma, which apache-2.0 on this model cannot widen: state gemma"]
    >>> conflicts("apache-2.0", "apache-2.0", "demo")
    []
    """
    found = []
    stated = (license or "").lower()
    if backbone and backbone.lower() not in PERMISSIVE and stated != backbone.lower():
        found.append(
            f"the backbone's licence is {backbone}, which {stated or 'no licence'} on this model cannot widen: "
            f"state {backbone}"
        )
    if source in SOURCE_TERMS and stated in PERMISSIVE:
        terms = SOURCE_TERMS[source]
        found.append(
            f"the data are from {terms['name']}, whose terms forbid {terms['forbids']}; {stated} promises more: state "
            "`license: other`"
        )
    return found


def warnings(facts: dict[str, Any], public: bool) -> list[str]:
    """What whoever publishes a run should hear first."""
    recipe = facts["recipe"]
    source = (recipe.get("source") or {}).get("type")
    training = recipe.get("training") or {}
    found = conflicts(
        recipe.get("license"),
        backbone_license(training.get("model_name_or_path")),
        source,
    )
    if not recipe.get("license"):
        found.append("the recipe states no `license`: others may then not use what is published")
    if public and source in SOURCE_TERMS:
        terms = SOURCE_TERMS[source]
        found.append(
            f"{terms['name']} forbids {terms['forbids']}; histories and candidates are part of it, so ask first or "
            f"keep the data set private ({terms['link']})"
        )
    return found
