"""The variants of the results table: what each row is called, means and looks like; the one list of them."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["ours", "ablation", "baseline", "reference", "oracle"]


@dataclass(frozen=True)
class Variant:
    """A way of scoring the same frozen tasks, one row of the results table.

    Args:
        name: in recipes, ``scores.parquet`` and ``metrics.json``.
        label: for readers.
        meaning: what it measures, in half a sentence.
        kind: ``ours``; ``ablation``, our model with something taken away; ``baseline``, trained on the same
            interactions; ``reference``, trained on nothing; ``oracle``, which knows the truth.
        colour: the CSS variable of its colour in charts.
        dash: its SVG dash pattern; "" is a full line.
    """

    name: str
    label: str
    meaning: str
    kind: Kind
    colour: str
    dash: str = ""

    @property
    def needs_model(self) -> bool:
        """Whether it is scored by our model, trained or not."""
        return self.kind in ("ours", "ablation")


OURS = "mllm_msr"
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(OURS, "MLLM-MSR", "the trained recommender: preference, title and image", "ours", "blue"),
        Variant(
            "text_only",
            "text only",
            "the trained recommender without the candidate's image",
            "ablation",
            "sky",
            "7 3",
        ),
        Variant(
            "blank_images",
            "blank images",
            "the trained recommender, every candidate's image replaced by a blank one",
            "ablation",
            "pink",
            "2 3",
        ),
        Variant(
            "shuffled_images",
            "shuffled images",
            "the trained recommender, every candidate with another item's image",
            "ablation",
            "pink",
            "6 2 2 2",
        ),
        Variant(
            "no_preference",
            "no preference",
            "the trained recommender, given nothing about the user",
            "ablation",
            "pink",
            "6 2 2 2",
        ),
        Variant(
            "other_user",
            "another user's",
            "the trained recommender, given another user's preference",
            "ablation",
            "pink",
            "6 2 2 2",
        ),
        Variant(
            "no_sft",
            "no fine-tuning",
            "the backbone with the same prompts, before any training",
            "ablation",
            "orange",
            "9 3 2 3",
        ),
        Variant(
            "sasrec",
            "SASRec",
            "self-attention over the sequence of item ids, trained on the same interactions",
            "baseline",
            "green",
        ),
        Variant(
            "gru4rec",
            "GRU4Rec",
            "a recurrent network over the sequence of item ids, trained likewise",
            "baseline",
            "green",
            "6 3",
        ),
        Variant("svd", "PureSVD", "matrix factorisation of the training interactions", "baseline", "orange"),
        Variant(
            "knn",
            "item-kNN",
            "similarity of the items' training users to the recent history",
            "baseline",
            "orange",
            "6 3",
        ),
        Variant("tfidf", "TF-IDF", "similarity of the items' words to the recent history", "baseline", "sky"),
        Variant("popularity", "popularity", "ranked by the number of training interactions", "reference", "red"),
        Variant("random", "random", "ranked by chance", "reference", "grey", "4 4"),
        Variant(
            "oracle",
            "oracle",
            "ranked by the true taste, which only a generator knows: the best that is possible",
            "oracle",
            "green",
            "12 4",
        ),
    )
}
DEFAULT_VARIANTS = (OURS, "popularity", "random", "text_only", "blank_images", "no_sft")


def baselines() -> list[str]:
    """The names of all variants that need no model of ours and no knowledge of the truth."""
    return [name for name, variant in VARIANTS.items() if variant.kind in ("baseline", "reference")]
