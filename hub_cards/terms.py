"""Whose data and weights a run rests on, and what their terms allow: for the cards and for whoever publishes.

What the owners of a source say stands with its reader, in ``data/sources``.
"""

from functools import cache

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from mllm_msr.data.sources.registry import SOURCES
from mllm_msr.hub_cards.facts import RunFacts

SOURCE_TERMS = {name: kind.terms for name, kind in SOURCES.items() if kind.terms is not None}
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
    if public and (closed := kept_private(facts)):
        terms, vectors = SOURCE_TERMS[source], "model" in closed
        reasons.append(
            f"{', '.join(closed[:-1])} and {closed[-1]} stay private: they show histories of {terms.name} ({terms.log})"
            + (f", and the model's item vectors are made of its texts or images ({terms.images})" if vectors else "")
            + f". With permission, open them in their settings on the Hub. Its terms: {terms.link}"
        )
    return reasons


def kept_private(facts: RunFacts) -> tuple[str, ...]:
    """The parts of a release that ``--public`` does not open, for a source that forbids to pass on what they hold.

    These are the log of its users in the data set and the demo, and a model's item vectors: like the summaries in the
    data set they are what a model made of the texts and images, an item each.
    """
    if facts.source not in RESTRICTED_SOURCES:
        return ()
    return ("dataset", "space", "model") if facts.model.head_items else ("dataset", "space")
