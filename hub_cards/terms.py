"""Whose data and weights a run rests on, and what their terms allow: for the cards and for whoever publishes.

The table of sources says in short what their readmes and owners say, each with what was read and when; it is no legal
advice, and terms change.
"""

from dataclasses import dataclass
from functools import cache

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from mllm_msr.hub_cards.facts import RunFacts


@dataclass(frozen=True)
class Terms:
    """What the owner of a source allows.

    Args:
        name: of the source and its owner.
        allows, forbids: in short.
        link: to the terms themselves.
        images: whose the images and texts are.
        log: whether histories may be passed on.
        read: what we read, and when.
    """

    name: str
    allows: str
    forbids: str
    link: str
    images: str
    log: str
    read: str


SOURCE_TERMS = {
    "movielens": Terms(
        name="MovieLens (GroupLens)",
        allows="research; acknowledge GroupLens in publications",
        forbids="redistribution and commercial use without permission; implying endorsement",
        link="https://grouplens.org/datasets/movielens/",
        images="posters and overviews belong to the studios and to TMDB, whose own terms apply",
        log="100k and 1M: not to be passed on without permission; ml-latest and 32M: only under the same conditions",
        read="readmes of 100k, 1M, ml-latest-small and 32M, in others' copies, November 2026",
    ),
    "microlens": Terms(
        name="MicroLens (Westlake University)",
        allows="use in research, citing the paper; its page names no licence",
        forbids="offering changed copies of the data set for download; share the code that makes them instead",
        link="https://github.com/westlake-repl/MicroLens",
        images="titles, covers and videos belong to the authors of the videos",
        log="a split of it is a changed copy: not to be passed on",
        read="readme of its repository, as of commit 033cac7, November 2026",
    ),
    "amazon": Terms(
        name="Amazon Reviews (McAuley Lab, UCSD)",
        allows="research, citing the paper; the lab says that it cannot assign a licence",
        forbids="nothing beyond that is granted: texts and images belong to reviewers, sellers and Amazon",
        link="https://amazon-reviews-2023.github.io",
        images="product images belong to sellers and Amazon",
        log="no licence, so no permission to pass it on",
        read="the lab's answers to questions about the licence, as quoted by others, November 2026",
    ),
}
RESTRICTED_SOURCES = tuple(SOURCE_TERMS)  # texts and images of others, not ours to pass on
PERMISSIVE = {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-3.0", "odc-by"}


@cache
def backbone_license(backbone: str | None, revision: str | None = None) -> str | None:
    """The licence that a backbone on the Hub states; None if it has none or the Hub does not answer at once."""
    if not backbone:
        return None
    try:
        data = HfApi().model_info(backbone, revision=revision, timeout=5).card_data
    except (HfHubHTTPError, HTTPError, OSError, ValueError):
        return None
    fields = data.to_dict() if data else {}
    license = fields.get("license")
    return fields.get("license_name") or license if license == "other" else license


def conflicts(license: str | None, backbone: str | None, source: str) -> list[str]:
    """Why ``license`` of a run promises more than the licence of its backbone or the terms of its source allow.

    >>> conflicts("apache-2.0", "gemma", "demo")
    ["the backbone's licence is gemma, which apache-2.0 on this model cannot widen: state gemma"]
    >>> conflicts("apache-2.0", "apache-2.0", "demo")
    []
    """
    reasons = []
    stated = (license or "").lower()
    if backbone and backbone.lower() not in PERMISSIVE and stated != backbone.lower():
        reasons.append(
            f"the backbone's licence is {backbone}, which {stated or 'no licence'} on this model cannot widen: "
            f"state {backbone}"
        )
    if source in SOURCE_TERMS and stated in PERMISSIVE:
        terms = SOURCE_TERMS[source]
        reasons.append(
            f"the data are from {terms.name}, whose terms forbid {terms.forbids}; {stated} promises more: state "
            "`license: other`"
        )
    return reasons


def warnings(facts: RunFacts, public: bool) -> list[str]:
    """What whoever publishes a run should know first."""
    license, source = facts.recipe.license, facts.source
    reasons = conflicts(license, backbone_license(facts.backbone, facts.backbone_revision), source)
    if not license:
        reasons.append("the recipe states no `license`: others may then not use what is published")
    if public and source in SOURCE_TERMS:
        terms = SOURCE_TERMS[source]
        reasons.append(
            f"{' and '.join(kept_private(source))} stay private: they show histories of {terms.name} ({terms.log}). "
            f"With permission, open them in their settings on the Hub. Its terms: {terms.link}"
        )
    return reasons


def kept_private(source: str) -> tuple[str, ...]:
    """The parts of a release that ``--public`` does not open, as they pass on the log of a source that forbids it.

    >>> kept_private("amazon"), kept_private("demo")
    (('dataset', 'space'), ())
    """
    return ("dataset", "space") if source in RESTRICTED_SOURCES else ()
