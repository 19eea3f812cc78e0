"""The stage as a whole: one scorer a variant, nothing scored twice, results that are those of the scores."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mllm_msr import stages
from mllm_msr.evaluation import scorers
from mllm_msr.evaluation.evaluate import evaluate, scorable, with_evaluation
from mllm_msr.evaluation.full_catalogue import catalogue_pairs
from mllm_msr.evaluation.kept_scores import scores_folder
from mllm_msr.evaluation.metrics import METRICS, paired_differences, ranking_metrics
from mllm_msr.evaluation.rankers import training_log
from mllm_msr.evaluation.variants import VARIANTS, check_evaluation, variant_of
from mllm_msr.records.recipe import parse_recipe
from mllm_msr.records.results import Results
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import INTERACTIONS, ITEM_SUMMARIES, ITEMS, PREFERENCES, SCORES
from mllm_msr.records.sections import OURS

RECIPE = {
    "name": "small",
    "source": {"type": "demo", "n_users": 12, "n_items": 40},
    "data": {"n_negatives": 8, "max_train_targets": 1, "k_core_users": 1, "k_core_items": 1},
    "summaries": {"engine": "titles"},
    "training": {"model_name_or_path": "demo"},
    "evaluation": {"rows": [OURS, "text_only", "popularity", "random", "oracle"]},
}


@dataclass
class Model:
    """Stands in for our model: knows the truth but for noise, and counts what it is asked."""

    run: RunFolder
    pairs_scored: int = 0


class NoisyOracle(scorers.Oracle):
    def __init__(self, model: Model, noise: float) -> None:
        super().__init__(model.run)
        self.model, self.noise = model, noise

    def score(self, tasks: pl.DataFrame) -> pl.DataFrame:
        assert {"preference", "recent"} <= set(tasks.columns)
        frame = super().score(tasks)
        self.model.pairs_scored += frame.height
        noise = self.noise * np.random.default_rng(0).normal(size=frame.height)
        return frame.with_columns((pl.col("logit") + pl.Series(noise)).cast(pl.Float32))


def noisy(model: Model, noise: float, run: RunFolder) -> NoisyOracle:
    return NoisyOracle(model, noise)


@pytest.fixture
def prepared(tmp_path: Path) -> RunFolder:
    """A run whose data is prepared, and nothing more."""
    run = RunFolder.create(tmp_path / "run", parse_recipe(RECIPE))
    stages.prepare(run)
    return run


@pytest.fixture
def trained(prepared: RunFolder, monkeypatch: pytest.MonkeyPatch) -> Model:
    """The run with empty texts and something in place of a model."""
    items = prepared.read(ITEMS, ["item_id"])["item_id"]
    prepared.write(ITEM_SUMMARIES, ITEM_SUMMARIES.frame([(item, "", "ok", "", "", "") for item in items]))
    prepared.write(PREFERENCES, PREFERENCES.frame())
    prepared.model.mkdir()
    (prepared.model / "model.safetensors").write_bytes(b"weights")
    prepared.take_over("summarize items", "texts", [prepared.file(ITEM_SUMMARIES)])
    prepared.take_over("summarize users", "texts", [prepared.file(PREFERENCES)])
    prepared.take_over("train", "model", [prepared.model])
    model = Model(prepared)
    for name, noise in ((OURS, 0.1), ("text_only", 5.0)):
        monkeypatch.setitem(VARIANTS, name, replace(VARIANTS[name], scorer=partial(noisy, model, noise)))
    return model


def scored(run: RunFolder, name: str) -> pl.DataFrame:
    return run.read(SCORES).filter(variant=name)


def test_what_is_said_to_need_our_model_is_scored_by_it():
    models = {
        name for name, variant in VARIANTS.items() if getattr(variant.scorer, "func", None) is scorers.ModelScorer
    }
    assert {name for name, variant in VARIANTS.items() if variant.needs_model} == models
    assert all(name == variant.name for name, variant in VARIANTS.items())


def test_a_variant_of_another_version_keeps_its_name_and_is_not_scored(prepared):
    variant = variant_of("of_tomorrow")
    assert (variant.label, variant.needs_model) == ("of tomorrow", False)
    with pytest.raises(ValueError, match="this version of mllm-msr does not know the variant"):
        variant.scorer(prepared)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"evaluation": {"rows": ["populrity"]}},
            "evaluation.rows: unknown variant 'populrity'; did you mean 'po",
        ),
        (
            {"source": {"type": "movielens"}, "evaluation": {"rows": ["popularity", "oracle"]}},
            "'oracle' knows the true taste, which only the source 'demo' has",
        ),
    ],
)
def test_a_recipe_names_variants_that_there_are(changes, message):
    check_evaluation(parse_recipe(RECIPE))
    with pytest.raises(ValueError, match=message):
        check_evaluation(parse_recipe({**RECIPE, **changes}))


def test_results_are_those_of_the_scores(trained):
    run = trained.run
    results = evaluate(run)
    assert Results.read(run.metrics) == results
    assert list(results.variants) == RECIPE["evaluation"]["rows"]
    assert (results.n_users, results.n_candidates, results.protocol) == (12, 9, "strict")
    ours = scored(run, OURS)
    for name, metrics in results.variants.items():
        own = scored(run, name)
        assert own.select("user_id", "item_id", "label").equals(ours.select("user_id", "item_id", "label"))
        expected = ranking_metrics(own["user_id"], own["label"], own["logit"])
        assert {metric: estimate.to_json() for metric, estimate in metrics.items()} == expected
    assert set(results.against) == set(results.variants) - {OURS}
    for name, differences in results.against.items():
        expected = paired_differences(ours["user_id"], ours["label"], ours["logit"], scored(run, name)["logit"])
        assert {metric: difference.to_json() for metric, difference in differences.items()} == expected
    assert results.variants["oracle"]["auc"].value >= results.variants[OURS]["auc"].value > 0.7
    assert results.checks.keys() == results.variants.keys()
    assert results.calibration is not None and results.full_catalogue is None and results.agreement is None
    assert all(part.variants.keys() == results.variants.keys() for part in results.slices)


def test_nothing_is_scored_twice_and_a_new_model_leaves_baselines_alone(trained, capsys):
    run = trained.run
    results = evaluate(run)
    assert evaluate(run) == results and "evaluate: up to date" in capsys.readouterr().out
    n_scored = trained.pairs_scored
    further = with_evaluation(run, ["knn", "popularity"])
    assert list(evaluate(further).variants) == [*RECIPE["evaluation"]["rows"], "knn"]
    assert trained.pairs_scored == n_scored
    baselines, models = (
        scores_folder(further, stages) for stages in (("prepare",), ("prepare", "summarize users", "train"))
    )
    before = (baselines / "knn.parquet").stat().st_mtime_ns
    (run.model / "model.safetensors").write_bytes(b"better weights")
    with pytest.raises(ValueError, match=r"model.safetensors has changed: run `mllm-msr train"):
        evaluate(further)
    assert not any(variant.needs_model for variant in scorable(further))
    further.take_over("train", "model", [run.model])
    assert scorable(further)[0].name == OURS
    evaluate(further)
    assert trained.pairs_scored == 2 * n_scored and not models.exists()
    assert (baselines / "knn.parquet").stat().st_mtime_ns == before


def test_baselines_need_no_model(prepared, capsys):
    with_vectors = ["sasrecf", "gru4recf", "mmgcn", "mgat"]
    run = with_evaluation(prepared, ["knn", "svd", "tfidf", "sasrec", "gru4rec", *with_vectors], full_catalogue="all")
    with pytest.raises(FileNotFoundError, match="run `mllm-msr summarize items"):
        evaluate(run)
    assert [variant.name for variant in scorable(run)] == [
        "popularity", "random", "oracle", "knn", "svd", "tfidf", "sasrec", "gru4rec",
    ]  # fmt: skip
    left_out = capsys.readouterr().out
    assert "without MLLM-MSR, text only: stage 'train' of" in left_out
    assert "without SASRecF, GRU4RecF, MMGCN, MGAT: stage 'vectors' of" in left_out and "mllm-msr vectors" in left_out
    results = evaluate(run, scorable(run))
    assert list(results.variants) == [variant.name for variant in scorable(run)]
    assert not results.against and results.calibration is None
    assert results.full_catalogue is not None and results.full_catalogue.n_users == 12
    assert set(results.full_catalogue.against_sasrec["knn"]) >= {"hr@10", "ndcg@10"}
    assert RunFolder.open(run.path).recipe.evaluation.rows == [
        *RECIPE["evaluation"]["rows"],
        *list(results.variants)[3:],
        *with_vectors,
    ]


def test_choices_are_ranked_among_all_items_never_chosen(trained, capsys):
    run = with_evaluation(trained.run, full_catalogue=5)
    catalogue = evaluate(run).full_catalogue
    assert catalogue is not None and catalogue.n_users == 5
    assert set(catalogue.variants) == {OURS, "popularity", "random", "oracle"}  # of our model, one is enough
    n_items = run.read(ITEMS, ["item_id"]).height
    chosen = run.read(INTERACTIONS).group_by("user_id").len()["len"].to_numpy()
    assert n_items + 1 - chosen.max() <= catalogue.n_candidates <= n_items + 1 - chosen.min()
    for name, figures in catalogue.variants.items():  # more candidates put nobody higher
        assert set(figures.full) == set(figures.sampled) == set(METRICS) - {"auc"}
        if name in ("oracle", "popularity"):
            assert figures.full["map"].value <= figures.sampled["map"].value
    assert catalogue_pairs(run, 5) == 5 * n_items and catalogue_pairs(run, "all") == 12 * n_items
    few = {**RECIPE, "evaluation": {**RECIPE["evaluation"], "full_catalogue": 6, "full_catalogue_pairs": 5 * n_items}}
    results = evaluate(RunFolder.create(run.path, parse_recipe(few)))
    assert results.full_catalogue is not None and set(results.full_catalogue.variants) == {
        "popularity",
        "random",
        "oracle",
    }
    assert f"{6 * n_items} pairs are more than evaluation.full_catalogue_pairs" in capsys.readouterr().out


def test_the_protocol_may_ask_for_a_ranking_among_all_items(trained, capsys):
    among_all = {**RECIPE, "data": {**RECIPE["data"], "negatives": "all"}}
    run = trained.run
    stages.prepare(RunFolder.create(run.path, parse_recipe(among_all)))
    run = RunFolder.open(run.path)
    for stage, path in (
        ("summarize items", run.file(ITEM_SUMMARIES)), ("summarize users", run.file(PREFERENCES)), ("train", run.model)
    ):  # fmt: skip
        run.take_over(stage, "new data", [path])
    results = evaluate(run)
    assert results.full_catalogue is not None
    n_items = run.read(ITEMS, ["item_id"]).height
    assert n_items - 30 < results.n_candidates <= n_items and results.n_users == 12
    for name in RECIPE["evaluation"]["rows"]:
        assert results.variants[name] == results.full_catalogue.variants[name].full
    assert set(results.against) == set(results.variants) - {OURS} and results.calibration is not None
    for part in results.slices:
        assert part.variants.keys() == results.variants.keys()
    assert run.read(SCORES).height == 5 * 12 * 9  # the tasks have a sample, as ever
    cheap = {"rows": [OURS, "text_only", "popularity"], "full_catalogue_pairs": 1}
    results = evaluate(RunFolder.create(run.path, parse_recipe({**among_all, "evaluation": cheap})))
    assert list(results.variants) == ["popularity"] and not results.against
    cheap |= {"rows": ["popularity"], "metrics": ["auc"]}
    with pytest.raises(ValueError, match="another metric than auc, which places do not tell"):
        evaluate(RunFolder.create(run.path, parse_recipe({**among_all, "evaluation": cheap})))
    cheap = {"rows": [OURS], "full_catalogue_pairs": 1}
    with pytest.raises(ValueError, match="nothing was ranked among all items, as the protocol asks"):
        evaluate(RunFolder.create(run.path, parse_recipe({**among_all, "evaluation": cheap})))


def test_scores_of_other_candidates_are_refused(trained):
    run = trained.run
    evaluate(run)
    path = scores_folder(run, ("prepare",)) / "popularity.parquet"
    SCORES.write(SCORES.read(path).reverse(), path)
    path.with_suffix(".seal").unlink()  # as an earlier release leaves it
    run.metrics.unlink()
    with pytest.raises(ValueError, match=r"'popularity' was scored on other candidates: remove .*scores and evaluate"):
        evaluate(run)


def test_the_recipe_says_which_metrics(prepared):
    assert tuple(prepared.recipe.evaluation.metrics) == METRICS
    wanted = ["hr@3", "ndcg@10", "auc"]
    recipe = {**RECIPE, "evaluation": {"rows": ["popularity", "knn"], "metrics": wanted, "full_catalogue": "all"}}
    results = evaluate(RunFolder.create(prepared.path, parse_recipe(recipe)))
    assert all(list(metrics) == wanted for metrics in results.variants.values())
    assert results.full_catalogue is not None
    assert all(list(figures.full) == wanted[:2] for figures in results.full_catalogue.variants.values())
    for wrong in (["recall@5"], ["hr@0"], ["hr"], []):
        with pytest.raises(ValueError, match=r"evaluation\.metrics"):
            check_evaluation(parse_recipe({**RECIPE, "evaluation": {"metrics": wrong}}))
    with pytest.raises(ValueError, match=r"evaluation\.full_catalogue=0: must be at least 1"):
        parse_recipe({**RECIPE, "evaluation": {"full_catalogue": 0}})


def test_an_unknown_baseline_is_named(prepared):
    with pytest.raises(ValueError, match=r"unknown baseline 'nonsense'; known are .*popularity"):
        with_evaluation(prepared, ["knn", "nonsense"])


def test_what_max_history_has_cut_counts_as_training(tmp_path: Path) -> None:
    data = {**RECIPE["data"], "max_history": 3}
    run = RunFolder.create(
        tmp_path / "run", parse_recipe({**RECIPE, "data": data, "evaluation": {"rows": ["popularity"]}})
    )
    stages.prepare(run)
    results, log, tasks = evaluate(run), training_log(run), run.tasks("test")
    targets = tasks.select(item_id=pl.col("candidates").list.get(pl.col("labels").list.arg_max()))
    cold = targets.join(log, on="item_id", how="anti").height
    assert 0 < cold < tasks.filter(target_train_count=0).height
    assert [part.users for part in results.slices if (part.by, part.part) == ("target_train_count", "0")] == [cold]
    assert results.cold_items.cold_targets == cold and not results.cold_items.among_all
