"""Whether our scores depend on how they are computed: the same tasks in other number formats and orders."""

import polars as pl

from mllm_msr.evaluation.diagnostics import agreement
from mllm_msr.evaluation.loading import Computing, load_catalogue, load_recommender
from mllm_msr.evaluation.scoring import score_with_model
from mllm_msr.records.results import Agreement
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import WAYS_OF_COMPUTING

WAYS = {
    "float32": Computing(dtype="float32"),
    "bfloat16": Computing(dtype="bfloat16"),
    "prefixes not shared": Computing(share_prefix=False),
    "eager attention, not shared": Computing(attn_implementation="eager", share_prefix=False),
    "one pair at a time": Computing(token_budget=1),
    "candidates kept in int8": Computing(cache_dtype="int8"),
}


def score_in_all_ways(run: RunFolder, contexts: pl.DataFrame) -> pl.DataFrame:
    """``records.schema.WAYS_OF_COMPUTING`` of the given tasks: as evaluated first, then in each of :data:`WAYS`."""
    catalogue, frames, late = load_catalogue(run), [], False
    for way, how in {"": Computing(), **WAYS}.items():
        if how.share_prefix is not None if late else how.cache_dtype is not None:
            continue  # a late model has no other way, and a joint one keeps no candidates
        recommender = load_recommender(run, how)
        model = recommender.model
        late = model.config.interaction == "late"
        name = way or f"{str(model.dtype).removeprefix('torch.')}, {model.config._attn_implementation} attention"
        scores = score_with_model(recommender, contexts, catalogue, progress=way or "as evaluated")
        frames.append(scores.select(pl.lit(name).alias("way"), "user_id", "item_id", "logit"))
    frame = pl.concat(frames)
    WAYS_OF_COMPUTING.check(frame, "the scores in other ways")
    return frame


def measure_agreement(scores: pl.DataFrame) -> Agreement:
    """How far all ways agree with the first; ``scores`` as :func:`score_in_all_ways` makes them."""
    (way, first), *others = [(str(way), frame) for (way,), frame in scores.group_by("way", maintain_order=True)]
    return Agreement(
        n_users=first["user_id"].n_unique(),
        way=way,
        others={other: agreement(first["user_id"], first["logit"], frame["logit"]) for other, frame in others},
    )
