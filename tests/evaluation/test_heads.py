"""The heads of a run: trained once, read again to the same scores, and fused so that each can be shown alone."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from tiny_runs import TINY, tiny_recipe

from mllm_msr import stages
from mllm_msr.evaluation.coded_tasks import CodedTasks
from mllm_msr.evaluation.evaluate import evaluate
from mllm_msr.evaluation.heads import head_ranker, load_heads, train_heads
from mllm_msr.evaluation.rankers import training_interactions, training_log
from mllm_msr.evaluation.variants import VARIANTS
from mllm_msr.rank import Ranking, rank_user
from mllm_msr.records.recipe import parse_recipe, with_settings
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import INTERACTIONS, ITEM_VECTORS, ITEMS, POPULARITY
from mllm_msr.records.sections import HEAD_VARIANTS, HeadOptions

MEMBERS = HeadOptions().members

SETTINGS = {
    "head.max_epochs": 2,
    "head.hidden": 8,
    "head.answer": False,
    "evaluation.rows": [*HEAD_VARIANTS, "popularity"],
}


def prepared(folder: Path, **settings) -> RunFolder:
    """A run with data and with vectors of its own."""
    folder.mkdir(exist_ok=True)
    run = RunFolder.create(folder / "run", tiny_recipe({**SETTINGS, **settings}))
    stages.prepare(run)
    items = run.read(ITEMS, ["item_id"]).sort("item_id")
    numbers = np.random.default_rng(0).normal(size=(len(items), 6)).astype(np.float32)
    items.with_columns(vector=pl.Series(numbers)).write_parquet(folder / "own.parquet")
    recipe = replace(run.recipe, vectors=replace(run.recipe.vectors, file=str(folder / "own.parquet")))
    run = RunFolder.create(run.path, recipe)
    stages.vectors(run)
    return run


@pytest.fixture(scope="module")
def headed(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = prepared(tmp_path_factory.mktemp("heads"))
    stages.head(run)
    return run


def test_what_is_read_again_scores_as_what_was_trained(headed: RunFolder, tmp_path: Path) -> None:
    items = headed.read(ITEMS, ["item_id"])
    tasks = CodedTasks(headed.tasks("test"), items)
    trained, read = train_heads(headed, tmp_path), load_heads(headed)
    for name in (*MEMBERS, "fused"):
        ours, theirs = trained.ranker(name), read.ranker(name)
        np.testing.assert_allclose(
            ours.score(tasks.histories, tasks.candidates), theirs.score(tasks.histories, tasks.candidates), rtol=1e-5
        )
        whole = theirs.score_catalogue(tasks.histories)
        assert whole.shape == (len(tasks), len(items))
        picked = whole[tasks.candidates.owner, tasks.candidates.codes]
        np.testing.assert_allclose(picked, theirs.score(tasks.histories, tasks.candidates), rtol=1e-3, atol=1e-4)


def test_every_head_is_a_variant_of_the_table(headed: RunFolder) -> None:
    results = evaluate(headed)
    assert set(results.variants) == {*HEAD_VARIANTS, "popularity"}
    config = json.loads((headed.head / "config.json").read_text(encoding="utf-8"))
    assert config["sequence_head"]["fusion"]["members"] == MEMBERS


def with_members(run: RunFolder, path: Path, members: list[str]) -> RunFolder:
    """A copy of a run whose heads are to be fused anew, with these members."""
    recipe = parse_recipe(with_settings(run.recipe.to_dict(), {"head.members": members}))
    return RunFolder.create(shutil.copytree(run.path, path), recipe)


def test_the_fused_score_has_the_members_that_are_wanted(headed: RunFolder, tmp_path: Path) -> None:
    run = with_members(headed, tmp_path / "run", ["identity_only", "gru4rec"])
    stages.head(run)
    heads = load_heads(run)
    assert heads.item_ranker.fusion.members == ("identity_only", "gru4rec")
    assert set(heads.item_ranker.members) == {"sequence_head", "identity_only", "gru4rec", "likeness"}
    tasks = CodedTasks(run.tasks("test"), heads.items)
    assert np.isfinite(heads.ranker("fused").score_catalogue(tasks.histories)).all()
    # a variant that is no member is what it was
    left_out = [head_ranker(each, "content_only").score(tasks.histories, tasks.candidates) for each in (run, headed)]
    np.testing.assert_allclose(*left_out, rtol=1e-5)
    for wrong in ([], ["gru4rec", "gru4rec"], ["knn"]):
        with pytest.raises(ValueError, match="members"):
            with_members(headed, tmp_path / "wrong", wrong)


def test_networks_with_features_are_members_and_are_trained_once(headed: RunFolder, tmp_path: Path) -> None:
    run = with_members(headed, tmp_path / "run", ["sequence_head", "sasrecf", "gru4recf"])
    shutil.rmtree(run.trained_baselines)
    stages.head(run)
    trained = {path.name for path in run.trained_baselines.glob("*.pt")}
    assert {name.split("-")[0] for name in trained} == {"sasrecf", "gru4recf"}
    tasks = run.tasks("test")
    for name in ("sasrecf", "gru4recf"):
        theirs = VARIANTS[name].scorer(run).score(tasks)["logit"].to_numpy()
        np.testing.assert_allclose(head_ranker(run, name)(tasks), theirs, rtol=1e-4, atol=1e-5)
    assert {path.name for path in run.trained_baselines.glob("*.pt")} == trained

    ranker, history = load_heads(run).item_ranker, tasks["history"][0].to_list()
    known = ranker.score([history], history)
    ranker.put_items(["new"], ranker.content[:1].float() + 0.5)  # of which nothing is known but its vector
    shares = ranker.shares([history], [*history, "new"])
    assert set(shares) == {"sequence_head", "sasrecf", "gru4recf", "bias"}
    fused = ranker.score([history], [*history, "new"])
    torch.testing.assert_close(sum(shares.values()), fused)
    torch.testing.assert_close(fused[:, :-1], known)
    assert fused.isfinite().all()
    ranked = rank_user(run, tasks["user_id"][0], Ranking(top_k=3))
    assert ranked.select("sequence_head", "sasrecf", "gru4recf").null_count().row(0) == (0, 0, 0)
    assert ranked["gru4rec"].null_count() == len(ranked)


def test_other_vectors_make_the_heads_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = prepared(tmp_path)
    stages.head(run)
    stages.head(run)
    assert "head: up to date" in capsys.readouterr().out
    frame = run.read(ITEM_VECTORS).with_columns(pl.col("vector").list.reverse()).select("item_id", "vector")
    frame.write_parquet(tmp_path / "own.parquet")
    stages.vectors(run)
    with pytest.raises(ValueError, match="mllm-msr head"):
        run.require("head")
    stages.head(run)
    assert "head: is done again, as 'vectors' has been done anew" in capsys.readouterr().out


def test_what_max_history_cuts_off_is_learnt_from(tmp_path: Path) -> None:
    run, whole = prepared(tmp_path / "cut", **{"data.max_history": 3}), prepared(tmp_path / "whole")
    cut = training_interactions(run.read(INTERACTIONS), run.tasks("train"), "strict", run.read(POPULARITY))
    items = run.read(ITEMS, ["item_id"])
    log, longer = training_log(run), training_log(whole).join(items, on="item_id", how="semi", maintain_order="left")
    assert len(cut) < len(log)
    assert log.sort("user_id", maintain_order=True).equals(longer.sort("user_id", maintain_order=True))


def test_without_the_head_its_variants_are_left_out() -> None:

    content = {name: value for name, value in TINY.items() if name != "evaluation"}
    assert "fused" in parse_recipe(content).evaluation.rows
    assert not set(HEAD_VARIANTS) & set(parse_recipe({**content, "head": {"enabled": False}}).evaluation.rows)


def test_baselines_that_read_vectors_need_nothing_else(tmp_path: Path) -> None:
    rows = ["popularity", "sasrec", "sasrecf", "gru4recf", "mmgcn", "mgat"]
    run = prepared(tmp_path, **{"evaluation.rows": rows, "evaluation.full_catalogue": "all"})
    results = evaluate(run)
    assert list(results.variants) == rows and results.full_catalogue is not None
    assert set(results.full_catalogue.against_sasrec) == {*rows} - {"sasrec"}
    assert len(list(run.trained_baselines.glob("*.pt"))) == 5  # each saved before it scored


def test_users_of_two_choices_leave_nothing_to_train_on_and_are_ranked_by_content(tmp_path: Path) -> None:
    choices = [
        f"u{user},i{(2 * user + step) % 9},{1_600_000_000 + 100 * step + user}" for user in range(9) for step in (0, 1)
    ]
    (tmp_path / "log.csv").write_text("\n".join(["user_id,item_id,timestamp", *choices]))
    numbers = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    pl.DataFrame({"item_id": [f"i{item}" for item in range(9)], "vector": numbers}).write_parquet(
        tmp_path / "own.parquet"
    )
    source = {"type": "tables", "interactions": str(tmp_path / "log.csv")}
    own = {**SETTINGS, "vectors.file": str(tmp_path / "own.parquet")}
    run = RunFolder.create(tmp_path / "run", parse_recipe(with_settings({**TINY, "source": source}, own)))
    for stage in (stages.prepare, stages.vectors, stages.head):
        stage(run)
    assert run.tasks("validation").is_empty() and not training_log(run).height
    scores = load_heads(run).item_ranker.score([["i1"]])
    assert scores.isfinite().all()
    assert 0 <= evaluate(run).variants["fused"]["auc"].value <= 1
