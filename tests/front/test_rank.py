"""`mllm-msr rank` and `index`: for one user, for many into files by workers, and what is never offered."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from commands import printed, ranking_rows

from mllm_msr.cli import main
from mllm_msr.evaluation.loading import Computing, load_catalogue
from mllm_msr.modeling.score_fusion import ScoreFusion
from mllm_msr.rank import (
    AnswerRanker,
    FusedRanker,
    HeadRanker,
    Ranking,
    RunUser,
    Scores,
    best_of,
    known_users,
    load_ranker,
    read_users,
)
from mllm_msr.records.recipe import demo_recipe
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import CUT_INTERACTIONS, INTERACTIONS, PREFERENCES, RANKINGS
from mllm_msr.serving.opening import open_run


@pytest.fixture(scope="module")
def late(tmp_path_factory) -> Path:
    content = yaml.safe_load(demo_recipe().read_text(encoding="utf-8"))
    content["source"].update(n_users=70, n_items=45)
    content["summaries"] = {"engine": "extractive", "block_size": 3}
    content["training"].update(max_steps=3, eval_strategy="no", interaction="late", user_limit=96, item_limit=48)
    content["prompts"].update(late_user="{{ preference }}", late_item="{{ title }} {{ image }}")
    content["evaluation"]["rows"] = ["mllm_msr", "popularity"]
    path, folder = tmp_path_factory.mktemp("recipes") / "late.yaml", tmp_path_factory.mktemp("runs") / "late"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    printed("run", str(path), "--output", str(folder))
    return folder


def ranking(folder: Path) -> pl.DataFrame:
    return RANKINGS.read(sorted(folder.glob("*.parquet")))


def test_many_users_are_ranked_into_files_by_workers_as_by_one_process(late, tmp_path):
    first = printed("index", str(late), "--ray", "local", "--workers", "2")
    assert "45 items computed, 0 were there, 0 dropped" in first
    assert re.search(r"; \d+\.\d MB, \d+\.\d kB an item, in ", first)
    assert "0 items computed, 45 were there, 0 dropped" in printed("index", str(late))
    together, alone = tmp_path / "together", tmp_path / "alone"
    rank = ["rank", str(late), "--by", "answer", "--users", "all", "--top-k"]
    said = printed(*rank, "4", "--output", str(together), "--ray", "local", "--workers", "2")
    assert said.count("70 users x 45 candidates") == 1
    printed(*rank, "4", "--output", str(alone))
    names = sorted(path.name for path in alone.glob("*.parquet"))
    assert names == ["ranking-00000-of-00002.parquet", "ranking-00001-of-00002.parquet"]
    frame = ranking(together)
    assert frame.equals(ranking(alone))
    assert frame.height == 70 * 4 and frame["user_id"].n_unique() == 70
    for _, part in frame.group_by("user_id"):
        assert part["rank"].to_list() == [1, 2, 3, 4] and part["score"].is_sorted(descending=True)
    seen = pl.read_parquet(late / "data/interactions.parquet")
    assert frame.join(seen, on=["user_id", "item_id"]).is_empty()

    kept = (alone / names[0]).stat().st_mtime_ns
    (alone / names[1]).unlink()
    printed(*rank, "4", "--output", str(alone))
    assert (alone / names[0]).stat().st_mtime_ns == kept and ranking(alone).equals(ranking(alone))
    with pytest.raises(SystemExit, match="holds another ranking"):
        printed(*rank, "5", "--output", str(alone))

    user = frame["user_id"][0]
    shown = printed("rank", str(late), "--by", "answer", "--user", user, "--top-k", "4")
    assert shown_items(shown) == frame.filter(user_id=user)["item_id"].to_list()


def test_a_run_keeps_items_in_eight_bits_for_every_command_once_it_is_told_so(late, tmp_path):
    run = shutil.copytree(late, tmp_path / "run")
    rank = ["rank", str(run), "--by", "answer", "--users", "u0001,u0002", "--output", str(tmp_path / "ranking")]
    plain = printed("index", str(run))
    printed(*rank)
    exact = pl.read_parquet(run / "scores.parquet").filter(variant="mllm_msr")
    printed("evaluate", str(run), "--set", "evaluation.cache_dtype=int8", "--agreement", "2")
    difference = (pl.read_parquet(run / "scores.parquet").filter(variant="mllm_msr")["logit"] - exact["logit"]).abs()
    assert 0 < difference.max() < 0.03 * exact["logit"].std()
    ways = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["agreement"]["others"]
    assert ways["candidates kept in int8"]["max_difference"] < 1e-5 and len(ways) == 4
    (run / "cache/late_items/of-an-earlier-model").mkdir()
    coded = printed("index", str(run))
    assert len(list((run / "cache/late_items").iterdir())) == 1
    assert "45 items computed, 0 were there, 45 dropped" in coded
    sizes = [float(re.search(r"([0-9.]+) kB an item", said)[1]) for said in (plain, coded)]
    assert 0.25 < sizes[1] / sizes[0] < 0.33, "1 byte and 1/8 in place of 4, and the headers"
    with pytest.raises(SystemExit, match="holds another ranking"):
        printed(*rank)
    answer = load_ranker(RunFolder.open(run), "answer", Ranking())
    assert answer.recommender.plan.store.eight_bits and not answer.recommender.not_indexed(
        load_catalogue(RunFolder.open(run))
    )
    served = open_run(run, Computing()).recommender
    assert served.plan.store.eight_bits and served.cache.folder == answer.recommender.cache.folder


# ---- candidates ----------------------------------------------------------------------------------------------------


def shown_items(out: str) -> list[str]:
    """The items of a ranking on the screen, best first."""
    return [row[2] for row in ranking_rows(out)]


def test_a_candidate_that_is_named_twice_counts_once_and_a_chosen_one_never(
    finished: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = finished.read(INTERACTIONS)
    user = log["user_id"][0]
    old = log.filter(user_id=user)["item_id"].to_list()
    new = [item for item in log["item_id"].unique(maintain_order=True) if item not in old][:2]
    items = ",".join([old[0], new[0], old[0], new[1], new[0]])
    main(
        ["rank", str(finished.path), "--users", f"{user},{user}", "--items", items, "--output", str(tmp_path / "best")]
    )
    frame = ranking(tmp_path / "best")
    assert sorted(frame["item_id"]) == sorted(new) and frame["rank"].to_list() == [1, 2]
    capsys.readouterr()
    main(["rank", str(finished.path), "--user", user, "--items", items])
    assert shown_items(capsys.readouterr().out) == frame["item_id"].to_list()


def test_what_max_history_has_cut_is_not_offered_again(finished: RunFolder, recipe_file: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    main(["prepare", str(recipe_file), "--set", "data.max_history=6", "--output", path])
    main(["summarize", "items", path])
    main(["summarize", "users", path])
    run = RunFolder.open(Path(path))
    cut, log = run.read(CUT_INTERACTIONS), run.read(INTERACTIONS)
    users = read_users(run, log["user_id"].unique(maintain_order=True).to_list())
    assert not cut.is_empty()
    for user in users:
        chosen = pl.concat([log, cut], how="diagonal").filter(user_id=user.user_id)["item_id"]
        assert user.chosen == set(chosen)


class Constant:
    """A ranker to which every item is as good."""

    def score(self, users: list, names: list, catalogue: object) -> Scores:
        return Scores(np.zeros((len(users), len(names)), dtype=np.float32))

    def members(self, users: list, names: list) -> dict[str, np.ndarray]:
        return {"likeness": np.ones((len(users), len(names)), dtype=np.float32)}


def test_equal_scores_keep_the_order_given_and_the_best_are_numbered_from_1(finished: RunFolder) -> None:
    (user,) = read_users(finished, ["u0000"])
    names = [item for item in finished.read(INTERACTIONS)["item_id"].unique(maintain_order=True)]
    best = best_of([user], Constant(), names, load_catalogue(finished), 3)
    fresh = [item for item in names if item not in user.chosen]
    assert best.select("user_id", "rank", "item_id", "score", "probability", "index", "likeness", "answer").rows() == [
        ("u0000", place, item, 0.0, None, names.index(item), 1.0, None) for place, item in enumerate(fresh[:3], 1)
    ]
    assert set(best["preference"]) == {user.words.preference}


def test_a_user_is_told_by_the_last_preference_and_what_came_since(finished: RunFolder) -> None:
    (user,) = read_users(finished, ["u0003"])
    steps = finished.read(PREFERENCES).filter(user_id="u0003").sort("step")
    history = finished.read(INTERACTIONS).filter(user_id="u0003")["item_id"]
    assert user.words.preference == steps["preference"][-1]
    assert len(user.words.recent) == len(history) - steps.height * finished.block_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--user", "nobody"], "'nobody' is no user of .*; ids look like 'u0000'"),
        (["--users", "u0000,nobody,noone", "--output", "x"], "'nobody', 'noone' are no user of"),
        (["--user", "u0000", "--items", "i0001,i9999"], r"'i9999' is no item of the catalogue \(39 items, such as 'i"),
        (["--preference", "red", "--items", "a,b,c,d,e"], "'a', 'b', 'c' and 2 more are no item of the catalogue"),
    ],
)
def test_unknown_ids_are_named(finished: RunFolder, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["rank", str(finished.path), *arguments])


def test_a_user_who_has_chosen_all_candidates_is_one_sentence(finished: RunFolder) -> None:
    old = finished.read(INTERACTIONS).filter(user_id="u0000")["item_id"]
    with pytest.raises(SystemExit, match="user 'u0000' has chosen all of these items already"):
        main(["rank", str(finished.path), "--user", "u0000", "--items", ",".join(old)])


def test_a_folder_of_other_things_takes_no_rankings(finished: RunFolder) -> None:
    before = sorted(finished.path.iterdir())
    with pytest.raises(SystemExit, match="is not empty and holds no ranking"):
        main(["rank", str(finished.path), "--users", "all", "--output", str(finished.path)])
    assert sorted(finished.path.iterdir()) == before


def test_a_file_of_other_things_takes_no_ranking(finished: RunFolder, tmp_path: Path) -> None:
    for name, content in {"log.csv": "user_id,item_id\nu,1\n", "log.json": "{}", "log.parquet": "PAR1"}.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(SystemExit, match=f"{name}: is there already, and is no ranking"):
            main(["rank", str(finished.path), "--user", "u0000", "--output", str(tmp_path / name)])
        assert (tmp_path / name).read_text() == content
    for name in ("rank.csv", "rank.json", "rank.parquet"):
        for _ in range(2):  # the second time it takes the place of the first
            main(["rank", str(finished.path), "--user", "u0000", "--by", "head", "--output", str(tmp_path / name)])


def test_the_fused_score_is_the_default_where_the_head_is_there(
    finished: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    by_way: dict[str, list[str]] = {}
    for by in ("fused", "head", "answer"):
        main(["rank", str(finished.path), "--user", "u0003", "--by", by])
        by_way[by] = shown_items(capsys.readouterr().out)
    main(["rank", str(finished.path), "--user", "u0003"])
    assert shown_items(capsys.readouterr().out) == by_way["fused"]
    assert sorted(map(len, by_way.values())) == [10, 10, 10] and by_way["head"] != by_way["answer"]


def test_the_answer_is_asked_of_the_best_alone(finished: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    users, catalogue = read_users(finished, ["u0003", "u0000"]), load_catalogue(finished)
    names = list(catalogue)
    ranker = FusedRanker(finished, Ranking(rerank=4))
    ranker.others.answer_fusion = ScoreFusion(
        ("mllm_msr", "others"), torch.zeros(2), torch.ones(2), torch.eye(2)[[0] * 4], torch.zeros(4)
    )
    answers = AnswerRanker(finished, Ranking()).score(users, names, catalogue).logits
    others = HeadRanker(finished, "fused", None).score(users, names, catalogue).logits
    scores = ranker.score(users, names, catalogue)
    assert scores.answers is not None and (~np.isnan(scores.answers)).sum(axis=1).tolist() == [4, 4]
    for user, ours, answer, other in zip(users, scores.logits, answers, others, strict=True):
        fresh = [place for place in np.argsort(-other) if names[place] not in user.chosen]
        order = [place for place in np.argsort(-ours) if names[place] not in user.chosen]
        assert order == sorted(fresh[:4], key=lambda place: -answer[place]) + fresh[4:]
    main(["rank", str(finished.path), "--user", "u0003", "--rerank", "0"])
    assert shown_items(capsys.readouterr().out) == best_items(users[0], others[0], names)


def best_items(user: RunUser, scores: np.ndarray, names: list[str]) -> list[str]:
    return [names[place] for place in np.argsort(-scores) if names[place] not in user.chosen][:10]


def test_a_history_is_enough_to_rank_by(finished: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    (user,) = read_users(finished, ["u0003"], in_words=False)
    main(["rank", str(finished.path), "--user", "u0003", "--rerank", "0"])
    known = capsys.readouterr().out
    main(["rank", str(finished.path), "--history", ",".join(user.history)])
    ours = capsys.readouterr().out.splitlines()
    assert ours == known.splitlines()[1:] and known.startswith("preference: ")  # which only a user of the run has


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--history", "i0001,i9999"], "'i9999' is no item of the catalogue"),
        (["--history", "i0001", "--by", "answer"], "--history is ranked by head or fused"),
        (["--preference", "red", "--by", "fused"], "only the answer reads a preference"),
    ],
)
def test_each_way_says_what_it_reads(finished: RunFolder, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["rank", str(finished.path), *arguments])


def test_a_joint_model_has_nothing_to_index(finished: RunFolder) -> None:
    with pytest.raises(SystemExit, match=r"interaction='joint'.*nothing to index; `mllm-msr rank` works without"):
        main(["index", str(finished.path)])


def test_ids_of_a_command_line_are_read_as_those_of_a_table(
    finished: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert known_users(finished, [" u0003", "u0003\u200b"]) == ["u0003"]
    assert Ranking(["10.0", "cafe\u0301", "10"]).candidates({"10": 1, "caf\u00e9": 2}) == ["10", "caf\u00e9"]
    assert Ranking(["10.0"]).candidates({"10.0": 1}) == ["10.0"]
    main(["rank", str(finished.path), "--user", "u0003", "--rerank", "0"])
    ours = capsys.readouterr().out
    main(["rank", str(finished.path), "--user", " u0003", "--rerank", "0"])
    assert capsys.readouterr().out == ours


def test_candidates_are_the_catalogue_unless_they_are_named() -> None:
    catalogue = dict.fromkeys("abc")
    assert Ranking().candidates(catalogue) == ["a", "b", "c"]
    assert Ranking(["c", "a", "c"]).candidates(catalogue) == ["c", "a"]
