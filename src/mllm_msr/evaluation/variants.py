"""The variants of the results table: what each is called, means and looks like, and what scores it; the one list."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import polars as pl

from mllm_msr.evaluation.kept_scores import MODEL_STAGES
from mllm_msr.evaluation.loading import load_backbone
from mllm_msr.evaluation.metrics import check_metric
from mllm_msr.evaluation.rankers import Chance, Popularity, Ranker, item_vectors, training_log
from mllm_msr.evaluation.scorers import ModelScorer, ModelView, Oracle, RankerScorer, Scorer
from mllm_msr.evaluation.scoring import (
    of_another_user,
    with_blank_images,
    with_shuffled_images,
    without_images,
    without_preference,
)
from mllm_msr.records.recipe import Recipe
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import ITEMS, POPULARITY
from mllm_msr.records.sections import HEAD_VARIANTS, OURS
from mllm_msr.records.typed import did_you_mean

Kind = Literal["ours", "head", "ablation", "baseline", "reference", "oracle"]


@dataclass(frozen=True)
class Variant:
    """A way of scoring the same frozen tasks, one row of the results table.

    Args:
        name: in recipes, ``scores.parquet`` and ``metrics.json``.
        label: for readers.
        meaning: what it measures, in half a sentence.
        kind: ``ours``; ``head``, which ranks by item vectors; ``ablation``, our model with something taken away;
            ``baseline``, trained on the same interactions; ``reference``, trained on nothing; ``oracle``, which knows
            the truth.
        scorer: makes what scores it from a run; a baseline is trained by it.
        colour: the CSS variable of its colour in charts.
        dash: its SVG dash pattern; "" is a full line.
        reads_vectors: whether a baseline reads the vectors of items, but none of our models.
    """

    name: str
    label: str
    meaning: str
    kind: Kind
    scorer: Callable[[RunFolder], Scorer]
    colour: str
    dash: str = ""
    reads_vectors: bool = False

    @property
    def needs_model(self) -> bool:
        """Whether it is scored by our model, trained or not."""
        return self.kind in ("ours", "ablation")

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages whose output it reads."""
        if self.needs_model:
            return MODEL_STAGES
        if self.reads_vectors:
            return ("prepare", "vectors")
        return ("prepare", "head") if self.kind == "head" else ("prepare",)


def ours(view: ModelView) -> Callable[[RunFolder], Scorer]:
    """What scores by our model under a view."""
    return partial(ModelScorer, view)


def ranked_by(make: Callable[[RunFolder], Ranker]) -> Callable[[RunFolder], Scorer]:
    """What scores by a ranker of histories."""
    return lambda run: RankerScorer(make(run))


def popularity(run: RunFolder) -> Ranker:
    return Popularity(run.read(POPULARITY))


def chance(run: RunFolder) -> Ranker:
    return Chance(run.read(ITEMS, ["item_id"]))


# Trained baselines need torch, which is imported only where one is made.


def tfidf(run: RunFolder) -> Ranker:
    from mllm_msr.evaluation.baselines import tfidf

    return tfidf(run.tasks("validation"), run.read(ITEMS, ["item_id", "title", "text"]))


def knn(run: RunFolder) -> Ranker:
    from mllm_msr.evaluation.baselines import knn

    return knn(*learnt_from(run))


def svd(run: RunFolder) -> Ranker:
    from mllm_msr.evaluation.baselines import svd

    return svd(*learnt_from(run), seed=run.recipe.evaluation.seed)


def sequential(name: str, with_vectors: bool = False) -> Callable[[RunFolder], Scorer]:
    """What scores by a sequential baseline, trained with the settings of the head that it stands beside."""

    def make(run: RunFolder) -> Ranker:
        from mllm_msr.evaluation import sequential_baselines

        settings = {"head": run.recipe.head, "seed": run.recipe.evaluation.seed, "folder": run.trained_baselines}
        vectors = [item_vectors(run)] if with_vectors else []
        return getattr(sequential_baselines, name)(*learnt_from(run), *vectors, **settings)

    return ranked_by(make)


def by_graph(name: str) -> Callable[[RunFolder], Scorer]:
    """What scores by a network over the graph of users and items."""

    def make(run: RunFolder) -> Ranker:
        from mllm_msr.evaluation import graph_baselines

        settings = {"seed": run.recipe.evaluation.seed, "folder": run.trained_baselines}
        return getattr(graph_baselines, name)(*learnt_from(run), item_vectors(run), **settings)

    return ranked_by(make)


def headed(name: str) -> Callable[[RunFolder], Scorer]:
    """What scores by one of the run's heads, or by all of them fused, without the answer."""

    def make(run: RunFolder) -> Ranker:
        from mllm_msr.evaluation.heads import head_ranker

        return head_ranker(run, name)

    return ranked_by(make)


def fused(run: RunFolder) -> Scorer:
    """What scores by the heads fused, and by the trained model's answer with them where the recipe says so."""
    if not run.recipe.fuses_answer:
        return headed("fused")(run)
    from mllm_msr.evaluation.answer_fusion import FusedScorer

    return FusedScorer(run)


def learnt_from(run: RunFolder) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """What collaborative baselines are made from: validation tasks, items, training interactions."""
    return run.tasks("validation"), run.read(ITEMS, ["item_id"]), training_log(run)


def not_known(run: RunFolder) -> Scorer:
    raise ValueError("this version of mllm-msr does not know the variant and cannot score it")


of_vectors = partial(Variant, kind="baseline", reads_vectors=True)
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(
            OURS, "MLLM-MSR", "the trained recommender: preference, title and image", "ours", ours(ModelView()), "blue"
        ),
        Variant(
            "sequence_head",
            "sequence head",
            "a small network over the history's item vectors, content and identity",
            "head",
            headed("sequence_head"),
            "blue",
            "6 3",
        ),
        Variant(
            "fused",
            "fused",
            "the answer, networks over histories with and without content, likeness of content, weighted by validation",
            "head",
            fused,
            "blue",
            "12 4",
        ),
        Variant(
            "neighbour_identity",
            "neighbours' identity",
            "the sequence head, each item with the mean identity of the ten nearest to it by content",
            "head",
            headed("neighbour_identity"),
            "blue",
            "2 3",
        ),
        Variant(
            "content_only",
            "content only",
            "the sequence head without identities",
            "head",
            headed("content_only"),
            "sky",
            "2 3",
        ),
        Variant(
            "identity_only",
            "identity only",
            "the sequence head without content",
            "head",
            headed("identity_only"),
            "green",
            "2 3",
        ),
        Variant(
            "likeness",
            "likeness",
            "cosine of the candidate's vector with those of the latest items; nothing is trained",
            "head",
            headed("likeness"),
            "orange",
            "2 3",
        ),
        Variant(
            "text_only",
            "text only",
            "the trained recommender without the candidate's image",
            "ablation",
            ours(ModelView(items=without_images)),
            "sky",
            "7 3",
        ),
        Variant(
            "blank_images",
            "blank images",
            "the trained recommender, every candidate's image replaced by a blank one",
            "ablation",
            ours(ModelView(items=with_blank_images)),
            "pink",
            "2 3",
        ),
        Variant(
            "shuffled_images",
            "shuffled images",
            "the trained recommender, every candidate with another item's image",
            "ablation",
            ours(ModelView(items=with_shuffled_images)),
            "pink",
            "6 2 2 2",
        ),
        Variant(
            "no_preference",
            "no preference",
            "the trained recommender, given nothing about the user",
            "ablation",
            ours(ModelView(users=without_preference)),
            "pink",
            "6 2 2 2",
        ),
        Variant(
            "other_user",
            "another user's",
            "the trained recommender, given another user's preference",
            "ablation",
            ours(ModelView(users=of_another_user)),
            "pink",
            "6 2 2 2",
        ),
        Variant(
            "no_sft",
            "no fine-tuning",
            "the backbone with the same prompts, before any training",
            "ablation",
            ours(ModelView(load=load_backbone)),
            "orange",
            "9 3 2 3",
        ),
        Variant(
            "sasrec",
            "SASRec",
            "self-attention over the sequence of item ids, trained on the same interactions",
            "baseline",
            sequential("sasrec"),
            "green",
        ),
        Variant(
            "gru4rec",
            "GRU4Rec",
            "a recurrent network over the sequence of item ids, trained likewise",
            "baseline",
            sequential("gru4rec"),
            "green",
            "6 3",
        ),
        of_vectors(
            "sasrecf",
            "SASRecF",
            "SASRec over identities and item vectors",
            scorer=sequential("sasrecf", with_vectors=True),
            colour="green",
            dash="9 3",
        ),
        of_vectors(
            "gru4recf",
            "GRU4RecF",
            "GRU4Rec over identities and item vectors",
            scorer=sequential("gru4recf", with_vectors=True),
            colour="green",
            dash="9 3 2 3",
        ),
        of_vectors(
            "mmgcn",
            "MMGCN",
            "graph convolution over users, items and their vectors",
            scorer=by_graph("mmgcn"),
            colour="orange",
            dash="9 3",
        ),
        of_vectors(
            "mgat",
            "MGAT",
            "graph attention over users, items and their vectors",
            scorer=by_graph("mgat"),
            colour="orange",
            dash="12 4",
        ),
        Variant(
            "svd", "PureSVD", "matrix factorisation of the training interactions", "baseline", ranked_by(svd), "orange"
        ),
        Variant(
            "knn",
            "item-kNN",
            "similarity of the items' training users to the recent history",
            "baseline",
            ranked_by(knn),
            "orange",
            "6 3",
        ),
        Variant(
            "tfidf",
            "TF-IDF",
            "similarity of the items' words to the recent history",
            "baseline",
            ranked_by(tfidf),
            "sky",
        ),
        Variant(
            "popularity",
            "popularity",
            "ranked by the number of training interactions",
            "reference",
            ranked_by(popularity),
            "red",
        ),
        Variant(
            "random", "chance", "what a random order expects, computed", "reference", ranked_by(chance), "grey", "4 4"
        ),
        Variant(
            "oracle",
            "oracle",
            "ranked by the true taste, which only a generator knows: the best that is possible",
            "oracle",
            Oracle,
            "green",
            "12 4",
        ),
    )
}


def variant_of(name: str) -> Variant:
    """The variant of this name; one that this version does not know keeps its name, in grey."""
    return VARIANTS.get(name) or Variant(name, name.replace("_", " "), "", "reference", not_known, "grey", "3 2")


def baselines() -> list[str]:
    """The names of all variants that need no model of ours and no knowledge of the truth."""
    return [name for name, variant in VARIANTS.items() if variant.kind in ("baseline", "reference")]


def check_evaluation(recipe: Recipe) -> None:
    """Raise ValueError for an unknown metric or variant, with what is known, or a variant that the source lacks."""
    for name in recipe.evaluation.metrics:
        try:
            check_metric(name)
        except ValueError as error:
            raise ValueError(f"evaluation.metrics: {error}") from error
    for name in recipe.evaluation.rows:
        if name in HEAD_VARIANTS and not recipe.head.enabled:
            raise ValueError(f"evaluation.rows: {name!r} needs the sequence head, but head.enabled is false")
        if name not in VARIANTS:
            raise ValueError(f"evaluation.rows: unknown variant {name!r}{did_you_mean(name, VARIANTS)}")
        if VARIANTS[name].kind == "oracle" and recipe.source.type != "demo":
            raise ValueError(f"evaluation.rows: {name!r} knows the true taste, which only the source 'demo' has")
