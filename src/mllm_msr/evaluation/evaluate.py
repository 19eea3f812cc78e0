"""Stage 4: every variant of the results table on the same frozen tasks, and what they say beside each other."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

import numpy as np
import polars as pl

from mllm_msr.evaluation.cold_items import cold_items
from mllm_msr.evaluation.diagnostics import SLICE_METRICS, checks, compared, measured, notes, reliability, slices
from mllm_msr.evaluation.full_catalogue import (
    catalogue_pairs,
    measure_catalogue,
    rank_in_catalogue,
    rerank_depth,
    users_among_all,
)
from mllm_msr.evaluation.kept_scores import MODEL_STAGES, Parts, kept, kept_parts, kept_scores, scores_folder
from mllm_msr.evaluation.metrics import Columns, user_columns
from mllm_msr.evaluation.places import place_columns
from mllm_msr.evaluation.rankers import training_counts
from mllm_msr.evaluation.scorers import Scorer
from mllm_msr.evaluation.scoring import random_tasks
from mllm_msr.evaluation.variants import VARIANTS, Variant, baselines
from mllm_msr.evaluation.ways import measure_agreement, score_in_all_ways
from mllm_msr.processing.examples import run_contexts
from mllm_msr.records.results import Calibration, Results
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import ITEMS, PLACES, SCORES, WAYS_OF_COMPUTING
from mllm_msr.records.sections import OURS
from mllm_msr.records.stage_specs import STAGES
from mllm_msr.records.storage import read_json
from mllm_msr.records.typed import did_you_mean


def with_evaluation(
    run: RunFolder,
    further: Sequence[str] = (),
    full_catalogue: int | Literal["all"] | None = None,
    agreement: int | None = None,
) -> RunFolder:
    """The run with more to evaluate, kept in its ``config.yaml``.

    Args:
        further: names of baselines that are added to its variants.
        full_catalogue: users whose choices are ranked among all items as well; None: as it was.
        agreement: tasks on which ways of computing are compared; None: as it was.
    """
    if unknown := [name for name in further if name not in baselines()]:
        raise ValueError(f"unknown baseline {unknown[0]!r}{did_you_mean(unknown[0], baselines())}")
    evaluation = run.recipe.evaluation
    evaluation = replace(
        evaluation,
        rows=list(dict.fromkeys([*evaluation.rows, *further])),
        full_catalogue=full_catalogue or evaluation.full_catalogue,
        agreement=agreement or evaluation.agreement,
    )
    if evaluation == run.recipe.evaluation:
        return run
    return RunFolder.create(run.path, replace(run.recipe, evaluation=evaluation))


def scorable(run: RunFolder) -> list[Variant]:
    """The recipe's variants; those that read a stage which is not done on the run's data are left out."""
    variants = [VARIANTS[name] for name in run.recipe.evaluation.rows]
    for stage in ("train", "vectors", "head"):
        if left_out := [variant.label for variant in variants if stage in variant.stages]:
            try:
                run.require(stage)
            except (FileNotFoundError, ValueError) as error:
                print(f"without {', '.join(left_out)}: {error}", flush=True)
                variants = [variant for variant in variants if stage not in variant.stages]
    return variants


def evaluate(run: RunFolder, variants: Sequence[Variant] | None = None) -> Results:
    """Score the frozen tasks with every variant, and measure; what is scored already is not scored again.

    Args:
        variants: of the results table; None: the recipe's. Where none needs our model, the run need not be trained.
    """
    wanted = [VARIANTS[name] for name in run.recipe.evaluation.rows] if variants is None else variants
    read = {stage for variant in wanted for stage in variant.stages}
    after = [stage for stage in STAGES if stage in read]

    def work(key: str) -> None:
        by_answer = (
            {MODEL_STAGES} if run.recipe.fuses_answer and any(each.name == "fused" for each in wanted) else set()
        )
        stages = {variant.stages for variant in wanted} | by_answer
        folders = {names: scores_folder(run, names) for names in stages}
        score_and_measure(run, wanted, folders).write(run.metrics)
        for stale in set(run.scores.iterdir()) - set(folders.values()):
            if stale.is_dir():  # a file is somebody else's
                shutil.rmtree(stale)

    facts = [[variant.name for variant in wanted], asdict(run.recipe.evaluation), asdict(run.recipe.head)]
    run.stage("evaluate", work, writes=[run.metrics, run.file(SCORES)], facts=facts, after=after)
    return run.results()


@dataclass(frozen=True)
class ScoredVariant:
    """A variant of a run; what it has scored is kept in ``folder``, and its scorer made only if something is not."""

    run: RunFolder
    variant: Variant
    folder: Path

    @cached_property
    def scorer(self) -> Scorer:
        print(f"  {self.variant.label} ...", flush=True)
        return self.variant.scorer(self.run)

    @cached_property
    def tasks(self) -> pl.DataFrame:
        split = self.run.recipe.evaluation.split
        return run_contexts(self.run, split) if self.variant.needs_model else self.run.tasks(split)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if "scorer" in vars(self):
            self.scorer.__exit__(*error)

    def scores(self) -> pl.DataFrame:
        return kept_scores(self.folder, self.variant.name, lambda: self.scorer, self.tasks)

    def places(self, users: int | Literal["all"]) -> pl.DataFrame | None:
        """Where the choices of some users stand among all items; None if our model had to score too many."""
        options = self.run.recipe.evaluation
        if self.variant.needs_model and (pairs := catalogue_pairs(self.run, users)) > options.full_catalogue_pairs:
            print(
                f"  {self.variant.label} is not ranked among all items: {pairs:,} pairs are more than "
                f"evaluation.full_catalogue_pairs, {options.full_catalogue_pairs:,}"
            )
            return None
        depth = rerank_depth(self.run) if self.variant.name == "fused" else 0
        path = self.folder / f"{self.variant.name}.places-{users}{f'-{depth}' if depth else ''}.parquet"

        def plan() -> Parts:
            shown = self.scorer.shown(random_tasks(self.tasks, None if users == "all" else users, options.seed))
            size = self.scorer.catalogue_part(self.run.scan(ITEMS).select(pl.len()).collect().item()) or len(shown)
            return Parts(shown, size, lambda part: rank_in_catalogue(self.run, part, self.scorer))

        return kept_parts(PLACES, path, plan).sort("user_id")

    def in_all_ways(self, count: int) -> pl.DataFrame:
        """A sample of ``count`` tasks scored in all ways of computing."""
        tasks = random_tasks(self.tasks, count, self.run.recipe.evaluation.seed)
        path = self.folder / f"agreement-{count}.parquet"
        return kept(WAYS_OF_COMPUTING, path, lambda: score_in_all_ways(self.run, tasks))


def score_and_measure(run: RunFolder, variants: Sequence[Variant], folders: Mapping[tuple[str, ...], Path]) -> Results:
    """Score with every variant, write ``scores.parquet``, and measure.

    ``folders``: where scores are kept, by the stages that a variant reads.
    """
    options, scores, places, agreement = run.recipe.evaluation, {}, {}, None
    among_all, users = run.recipe.data.negatives == "all", users_among_all(run)
    for variant in variants:
        with ScoredVariant(run, variant, folders[variant.stages]) as scored:
            scores[variant.name] = scored.scores()
            is_ours = variant.name == OURS
            if users and (among_all or is_ours or not variant.needs_model):
                places[variant.name] = scored.places(users)
            if options.agreement and is_ours:
                agreement = measure_agreement(scored.in_all_ways(options.agreement))
    run.write(SCORES, pl.concat(scores.values()))
    ranked = {name: frame for name, frame in places.items() if frame is not None}
    names = [name for name in options.metrics if name != "auc"]  # which places do not tell
    full_catalogue = measure_catalogue(scores, ranked, names, rerank_depth(run)) if ranked and names else None
    results = measure(run, scores, ranked if among_all else None)
    cold = cold_items(scores, ranked, training_counts(run))
    results = replace(results, full_catalogue=full_catalogue, cold_items=cold, agreement=agreement)
    if "fused" not in scores:
        return results
    from mllm_msr.evaluation.answer_fusion import fusion_weights  # which needs torch

    fusion, without_answer = fusion_weights(run)
    return replace(results, fusion=fusion, fusion_without_answer=without_answer)


def measure(
    run: RunFolder, scores: Mapping[str, pl.DataFrame], places: Mapping[str, pl.DataFrame] | None = None
) -> Results:
    """Every variant's metrics, ours against each, slices, calibration and checks.

    Args:
        scores: by variant.
        places: by variant, where the protocol ranks among all items: metrics, differences and slices are then of these,
            and the scores of the sampled candidates serve calibration and checks alone.
    """
    report = read_json(run.data_report)
    protocol = report["protocol"]
    tasks, counts = run.tasks(run.recipe.evaluation.split), training_counts(run)
    target = pl.col("candidates").list.get(pl.col("labels").list.arg_max())
    how_often = target.replace_strict(counts["item_id"], counts["count"], return_dtype=pl.Int64)
    tasks = tasks.with_columns(target_train_count=how_often)  # with what max_history has cut off, which is learnt from
    first = next(iter(scores.values()))
    for name, frame in scores.items():
        if not frame.select("user_id", "item_id").equals(first.select("user_id", "item_id")):
            raise ValueError(f"variant {name!r} was scored on other candidates: remove {run.scores} and evaluate again")
    names = [name for name in run.recipe.evaluation.metrics if places is None or name != "auc"]
    if places is not None and not (places and names):
        raise ValueError(
            "nothing was ranked among all items, as the protocol asks: name a baseline, and another "
            "metric than auc, which places do not tell"
        )
    users, labels = first["user_id"], first["label"].to_numpy()

    def columns_of(metrics: Sequence[str]) -> dict[str, Columns]:
        if places is not None:
            return {name: place_columns(frame, metrics) for name, frame in places.items()}
        return {name: user_columns(users, labels, frame["logit"], metrics) for name, frame in scores.items()}

    columns = columns_of(names)
    against, calibration = {}, None
    if OURS in columns:
        against = {name: compared(columns[OURS], other) for name, other in columns.items() if name != OURS}
    against_sasrec = {}
    if (sasrec := columns.get("sasrec")) is not None:
        against_sasrec = {name: compared(own, sasrec) for name, own in columns.items() if name != "sasrec"}
    if OURS in scores:
        logits = scores[OURS]["logit"].to_numpy()
        odds, training_odds = (_positive_odds(part) for part in (tasks, run.tasks("train")))
        shift = float(np.log(odds / training_odds)) if training_odds else 0.0
        calibration = Calibration(reliability(labels, logits), reliability(labels, logits, shift), shift)
    variants = {name: measured(own) for name, own in columns.items()}
    sizes = tasks["candidates"].list.len() if places is None else next(iter(places.values()))["candidates"]
    return Results(
        dataset=run.recipe.name,
        protocol=protocol["name"],
        split=run.recipe.evaluation.split,
        n_users=users.n_unique(),
        n_candidates=int(sizes.to_numpy().max()),
        seed=protocol["seed"],
        candidate_hash=protocol["candidate_hash"],
        variants=variants,
        against=against,
        against_sasrec=against_sasrec,
        slices=slices(columns_of(SLICE_METRICS), tasks, counts),
        checks=checks(pl.concat(scores.values()), counts),
        calibration=calibration,
        model_of=run.recipe.evaluation.model_of,
        notes=notes(report, variants),
    )


def _positive_odds(tasks: pl.DataFrame) -> float:
    """Positives for each negative among all candidates of ``tasks``; 0 if there is no negative."""
    labels = tasks["labels"].explode().to_numpy()
    negatives = int((labels == 0).sum())
    return float(labels.sum()) / negatives if negatives else 0.0
