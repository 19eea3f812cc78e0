"""Results in sentences: for the report, the cards, the console and a pasted comment."""

from collections.abc import Sequence
from dataclasses import dataclass

from mllm_msr.hub_cards.view import interval, percent, variant_of
from mllm_msr.records.public import public_text
from mllm_msr.records.results import Results
from mllm_msr.records.sections import OURS


@dataclass(frozen=True)
class Finding:
    """A figure, and what it is."""

    figure: str
    words: str


def headline(results: Results) -> str | None:
    """One sentence with the main result; None if HR@5 of our variants is missing."""
    hits = {name: percent(metrics["hr@5"].value) for name, metrics in results.variants.items() if "hr@5" in metrics}
    best = next((name for name in ("fused", OURS) if name in hits), None)
    if best is None:
        return None
    others: list[str] = []
    for name in (strongest_baseline(results, "hr@5"), "popularity", "random"):
        if name in hits:
            others.append(f"{variant_of(name).label}{'' if others else ' manages'} {hits[name]}%")
    sentence = f"{hits[best]}% of users find their next choice in the top five of {results.n_candidates:,} candidates"
    if best != OURS:
        sentence += " by the fused score" + (f", {hits[OURS]}% by the answer alone" if OURS in hits else "")
    return f"{sentence}; {', '.join(others)}." if others else f"{sentence}."


def strongest_baseline(results: Results, metric: str) -> str | None:
    """The trained baseline with the highest value of ``metric``; None if there is none."""
    values = {
        name: metrics[metric].value
        for name, metrics in results.variants.items()
        if metric in metrics and variant_of(name).kind == "baseline"
    }
    return max(values, key=lambda name: values[name], default=None)


def findings(results: Results) -> list[Finding]:
    """How variants compare by AUC; a difference that these users cannot show is called so."""
    auc = {name: metrics["auc"] for name, metrics in results.variants.items() if "auc" in metrics}
    if OURS not in auc:
        return []
    ours = auc[OURS]
    parts = [Finding(percent(ours.value), f"AUC, percent ({interval(ours)}); chance is 50")]
    strongest = strongest_baseline(results, "auc")
    compared = {
        "popularity": "AUC against popularity",
        "no_sft": "AUC from fine-tuning",
        "blank_images": "AUC from the images, against blank ones",
    }
    if strongest:
        compared = {strongest: f"AUC against {variant_of(strongest).label}, the strongest baseline"} | compared
    for name, words in compared.items():
        if name not in auc:
            continue
        if difference := results.against.get(name, {}).get("auc"):
            apart, reason = difference.significant, "the 95% interval of the difference spans 0"
        else:
            apart = ours.low > auc[name].high or ours.high < auc[name].low
            reason = "the 95% intervals overlap"
        doubt = "" if apart else f" ({reason})"
        parts.append(Finding(f"{100 * (ours.value - auc[name].value):+.1f}", words + doubt))
    if "oracle" in auc and auc["oracle"].value > 0.5 < ours.value:
        share = (ours.value - 0.5) / (auc["oracle"].value - 0.5)
        words = f"of the way from chance to the oracle's {percent(auc['oracle'].value)}"
        parts.append(Finding(f"{100 * share:.0f}%", words))
    return parts


def conditions(results: Results) -> Sequence[str]:
    """What was ranked, in a few words each."""
    parts = [
        f"{results.n_users:,} users",
        f"{results.n_candidates:,} candidates each",
        f"{results.protocol} protocol",
        f"{results.split} split",
        f"seed {results.seed}",
    ]
    return [*parts, f"model {public_text(results.model_of)}"] if results.model_of else parts


def measured_or_not(results: Results) -> tuple[list[str], list[str]]:
    """What of a recommender's worth was measured in this run, and what was not, each in a few words."""
    variants, cold = results.variants, results.cold_items
    cold_targets = cold.cold_targets if cold else 0
    trained = [variant_of(name).label for name in variants if variant_of(name).kind == "baseline"]
    questions = {
        "a ranking among sampled candidates": True,
        "a ranking among all items": results.full_catalogue is not None,
        "items that nobody chose in training": cold_targets > 0,
        "what the images add": "blank_images" in variants or "text_only" in variants,
        "what the user's preference adds": "no_preference" in variants or "other_user" in variants,
        "what fine-tuning adds": "no_sft" in variants,
        "trained baselines on the same candidates": bool(trained),
        "whether a probability of Yes is what it says": results.calibration is not None,
        "whether number formats agree": results.agreement is not None,
    }
    never = ["other seeds of training", "what people make of it: no user has seen it", "fairness to groups of users"]
    notes = {
        "items that nobody chose in training": f"{cold_targets:,} users",
        "trained baselines on the same candidates": ", ".join(trained),
    }
    measured = [f"{what} ({notes[what]})" if what in notes else what for what, done in questions.items() if done]
    return measured, [what for what, done in questions.items() if not done] + never
