"""The answer in the fused score: scored once for each model, weighed beside the heads, asked of the best of all."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from tiny_runs import tiny_recipe

from mllm_msr import stages
from mllm_msr.evaluation.answer_fusion import TOP, FusedScorer, answer_lists, fusion_weights
from mllm_msr.evaluation.coded_tasks import CodedTasks
from mllm_msr.evaluation.evaluate import evaluate
from mllm_msr.evaluation.heads import load_heads
from mllm_msr.evaluation.kept_scores import answer_scores
from mllm_msr.modeling.score_fusion import ScoreFusion, frequency_buckets
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import SCORES
from mllm_msr.records.sections import OURS, HeadOptions

MEMBERS = HeadOptions().members

SETTINGS = {
    "head.max_epochs": 1,
    "head.hidden": 8,
    "head.answer_tasks": 8,
    "evaluation.rows": ["fused", OURS, "likeness"],
    "evaluation.full_catalogue": 5,
    "evaluation.rerank": 6,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with a trained model and with the heads."""
    run = RunFolder.create(tmp_path_factory.mktemp("answers") / "run", tiny_recipe(SETTINGS))
    for stage in (stages.prepare, stages.summarize_items, stages.summarize_users, stages.vectors):
        stage(run)
    with pytest.raises(FileNotFoundError, match=r"mllm-msr train.*leave the answer out.*head\.answer=false"):
        stages.head(run)
    stages.train(run)
    stages.head(run)
    return run


def copy_of(run: RunFolder, folder: Path) -> RunFolder:
    shutil.copytree(run.path, folder / "run")
    return RunFolder.open(folder / "run")


def test_lists_have_the_target_and_what_the_others_put_first(trained: RunFolder) -> None:
    heads = load_heads(trained)
    tasks = CodedTasks(trained.tasks("validation"), heads.items)
    lists = answer_lists(heads, tasks, n_tasks=5, seed=0)
    whole = heads.ranker("fused").score_catalogue(tasks.histories.pick(lists.tasks))
    assert len(lists.tasks) == 5
    for row, task in enumerate(lists.tasks):
        codes = lists.codes[row][~lists.log_q[row].isinf()].tolist()
        target = tasks.candidates.codes[np.flatnonzero(tasks.labels)[task]]
        history = set(tasks.histories.pick(np.array([task])).codes)
        best = [code for code in np.argsort(-whole[row]) if code != target and code not in history][:TOP]
        assert codes[0] == target and set(best) < set(codes) and not history & set(codes)
        np.testing.assert_allclose(lists.scores[row], whole[row][lists.codes[row]], rtol=1e-5)


def test_answers_are_scored_once_for_each_model(trained: RunFolder, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path)
    (folder,) = run.answers.iterdir()
    (block,) = folder.glob("*.parquet")
    scores = SCORES.read(block)
    assert scores.group_by("user_id").agg(pl.col("label").sum())["label"].to_list() == [1] * 8
    SCORES.write(scores.with_columns(logit=pl.lit(0.0, pl.Float32)), block)  # would be seen if it were read again
    block.with_suffix(".seal").unlink()
    run = RunFolder.create(run.path, replace(run.recipe, head=replace(run.recipe.head, patience=9)))
    stages.head(run)
    assert load_heads(run).item_ranker.answer_fusion.mean[0] == 0.0
    run = RunFolder.create(run.path, replace(run.recipe, training={**run.recipe.training, "seed": 5}))
    with pytest.raises(ValueError, match=r"mllm-msr train.*leave the answer out"):
        stages.head(run)
    stages.train(run)
    stages.head(run)
    (other,) = run.answers.iterdir()
    assert other != folder


def test_the_variant_weighs_the_answers_that_are_there_with_the_other_members(
    trained: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(trained, tmp_path)
    results = evaluate(run)
    assert set(results.variants) == {"fused", OURS, "likeness"} and results.full_catalogue.reranked == 6
    assert results.fusion.members == [OURS, *MEMBERS] and results.fusion_without_answer.members == MEMBERS
    scores, heads, tasks = run.read(SCORES), load_heads(run), run.tasks("test")
    coded = CodedTasks(tasks, heads.items)
    answers = scores.filter(variant=OURS)["logit"].to_numpy()
    assert answer_scores(run)["logit"].to_numpy().tolist() == answers.tolist()
    members = [heads.ranker(name).score(coded.histories, coded.candidates) for name in MEMBERS]
    weights, _ = fusion_weights(run)
    fused = heads.item_ranker.answer_fusion.spread(heads.item_ranker.fusion)
    assert fused.to_dict()["weights"] == weights.weights
    stacked = torch.from_numpy(np.stack([answers, *members], axis=-1)).float()
    expected = fused(stacked, frequency_buckets(heads.item_ranker.counts)[coded.candidates.codes])
    np.testing.assert_allclose(scores.filter(variant="fused")["logit"], expected, rtol=1e-3, atol=1e-4)
    capsys.readouterr()
    evaluate(run)
    assert "up to date" in capsys.readouterr().out


def test_of_a_whole_catalogue_only_the_best_are_asked_the_answer(trained: RunFolder) -> None:
    scorer, tasks = FusedScorer(trained), trained.tasks("test")[:3]
    scorer.fusion = ScoreFusion(
        scorer.fusion.members, torch.zeros(2), torch.ones(2), torch.eye(2)[[0] * 4], torch.zeros(4)
    )
    items = scorer.ranker.items["item_id"].sort().to_list()
    values, others = (
        scorer.score_catalogue(tasks, items),
        scorer.ranker.score_catalogue(CodedTasks(tasks, scorer.ranker.items).histories),
    )
    answers = scorer.model.score_catalogue(tasks.select("task_id").join(scorer.contexts, on="task_id"), items)
    assert scorer.depth == 6
    for row, history in enumerate(tasks["history"]):
        fresh = [code for code in np.argsort(-others[row]) if items[code] not in history]
        best = sorted(fresh[:6], key=lambda code: -answers[row, code])
        order = [code for code in np.argsort(-values[row]) if items[code] not in history]
        assert order == best + fresh[6:]
        np.testing.assert_allclose(values[row, best], answers[row, best], atol=1e-4)


def test_without_the_answer_fused_is_of_four_and_needs_no_model(trained: RunFolder, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path)
    recipe = replace(run.recipe, head=replace(run.recipe.head, answer=False), training={})
    run = RunFolder.create(run.path, replace(recipe, vectors=replace(recipe.vectors, model="demo")))
    stages.vectors(run)
    stages.head(run)
    weights, without_answer = fusion_weights(run)
    assert weights.members == MEMBERS and without_answer is None
