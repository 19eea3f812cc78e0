"""Stages shared among workers on a real Ray cluster, whose nodes see nothing of the run's folder, end as without it."""

import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import polars.selectors as cs
import pytest
from commands import printed
from ray.cluster_utils import Cluster as Nodes
from ray_nodes import ray_nodes
from tiny_models import save_language_model
from tiny_runs import tiny_recipe

from mllm_msr import rank, stages
from mllm_msr.cli import main
from mllm_msr.evaluation import spread_index
from mllm_msr.evaluation.loading import Computing, load_catalogue
from mllm_msr.evaluation.scoring import with_blank_images
from mllm_msr.modeling.item_shards import ShardFolder
from mllm_msr.processing import ray_workers
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import ITEM_SUMMARIES, ITEM_VECTORS, ITEMS, PREFERENCES, RANKINGS, SCORES

SIZES = {"source.n_users": 16, "source.n_items": 40, "summaries.batch_size": 8, "vectors.batch_size": 8}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with ray_nodes(2, tmp_path_factory.mktemp("copies")) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same prepared run twice; its item vectors are those of a model in a folder."""
    folder = tmp_path_factory.mktemp("runs")
    model = save_language_model(folder / "model")
    recipe = tiny_recipe({**SIZES, "vectors.model": str(model), "evaluation.rows": ["mllm_msr", "random"]})
    stages.prepare(RunFolder.create(folder / "alone", recipe))
    shutil.copytree(folder / "alone", folder / "shared")
    return folder / "alone", folder / "shared"


@pytest.mark.parametrize(
    "command",
    [
        ["run", "shop"],
        ["summarize", "items", "none"],
        ["summarize", "users", "none"],
        ["vectors", "none"],
        ["evaluate", "none"],
        ["rank", "none", "--users", "all", "--output", "none"],
        ["index", "none"],
    ],
    ids=" ".join,
)
def test_a_wrong_address_or_number_of_workers_is_refused_before_anything_else(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^mllm-msr: --ray 127.0.0.1:9: no cluster answers there .*--ray local$"):
        main([*command, "--ray", "127.0.0.1:9"])
    wrong = {
        "--ray localhost": "argument --ray: 'localhost' is not local, auto or HOST:PORT",
        "--ray localhost:none": "argument --ray: 'localhost:none' is not local, auto or HOST:PORT",
        "--ray ray://localhost:10001": "argument --ray: 'ray://localhost:10001' is not local, auto or HOST:PORT",
        "--ray local --workers 0": "argument --workers: '0' is not a positive whole number",
        "--ray local --workers -1": "argument --workers: '-1' is not a positive whole number",
        "--ray local --workers two": "argument --workers: 'two' is not a positive whole number",
        "--workers 2": "--workers are those of a cluster: say which one by --ray",
    }
    for flags, message in wrong.items():
        with pytest.raises(SystemExit) as ended:
            main([*command, *flags.split()])
        assert ended.value.code == 2 and message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match="--ray: Ray is not installed: `pip install 'mllm-msr\\[ray\\]'`"):
        main([*command, "--ray", "local"])


def test_a_place_where_something_else_answers_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_workers, "ANSWER", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as other:
        place = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(SystemExit, match=rf"^mllm-msr: --ray {place}: no cluster answers there .*--ray local$"):
            main(["vectors", "none", "--ray", place])


def test_a_launcher_of_processes_is_refused(runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="`mllm-msr summarize items` is one process, with workers by --ray"):
        main(["summarize", "items", str(runs[0])])


def test_every_stage_ends_as_in_one_process(nodes: Nodes, runs: tuple[Path, Path], tmp_path: Path) -> None:
    alone, shared = runs
    for workers, *stage in (["2", "summarize", "items"], ["1", "summarize", "users"], ["2", "vectors"]):
        main([*stage, str(alone)])
        main([*stage, str(shared), "--ray", "auto", "--workers", workers])
    for table in (ITEM_SUMMARIES, PREFERENCES, ITEM_VECTORS):
        files = [RunFolder.open(run).file(table).read_bytes() for run in runs]
        assert files[0] == files[1] and len(files[0]) > 1000
    main(["train", str(alone)])
    shutil.copytree(alone / "model", shared / "model")
    provenance = (alone / "provenance.json").read_text()
    (shared / "provenance.json").write_text(provenance)
    how = ["--users", "all", "--by", "answer", "--top-k", "3"]
    main(["rank", str(alone), *how, "--output", str(tmp_path / "alone")])
    main(["rank", str(shared), *how, "--output", str(tmp_path / "shared"), "--ray", "auto", "--workers", "1"])
    assert same_rankings(tmp_path).height == 16 * 3
    main(["evaluate", str(alone)])
    main(["evaluate", str(shared), "--ray", "auto", "--workers", "1"])
    assert_same_scores(runs)


def same_rankings(folder: Path, rounding: float = 0.0) -> pl.DataFrame:
    """The ranking of the run alone, which the shared one equals."""
    alone, shared = (RANKINGS.read(sorted((folder / name).glob("*.parquet"))) for name in ("alone", "shared"))
    assert alone.select(~cs.float()).equals(shared.select(~cs.float()))
    scores = [frame.select(cs.float()).to_numpy() for frame in (alone, shared)]
    assert np.allclose(*scores, rtol=0, atol=rounding, equal_nan=True)
    return alone


def assert_same_scores(runs: tuple[Path, Path]) -> None:
    alone, shared = (RunFolder.open(run).read(SCORES) for run in runs)
    same = ["variant", "user_id", "item_id", "label"]
    assert alone.select(same).equals(shared.select(same))
    assert np.allclose(alone["logit"], shared["logit"], atol=1e-5)


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same run twice, with a trained late model and trained heads."""
    folder = tmp_path_factory.mktemp("late")
    model = save_language_model(folder / "model")
    how = {"interaction": "late", "user_limit": 96, "item_limit": 48}
    settings = {
        **{f"training.{name}": value for name, value in how.items()},
        "prompts.late_user": "{{ preference }}",
        "prompts.late_item": "{{ title }} {{ image }}",
        "vectors.model": str(model),
        "head.max_epochs": 1,
        "head.answer": False,
        "evaluation.rows": ["mllm_msr"],
    }
    run = RunFolder.create(folder / "alone", tiny_recipe({**SIZES, **settings}))
    stages.prepare(run)
    for stage in ("summarize items", "summarize users", "vectors", "train", "head"):
        main([*stage.split(), str(run.path)])
    shutil.copytree(run.path, folder / "shared")
    return run.path, folder / "shared"


def test_what_a_late_model_keeps_of_items_is_computed_once_for_all_workers(
    nodes: Nodes, late: tuple[Path, Path], tmp_path: Path
) -> None:
    alone, shared = late
    main(["evaluate", str(alone)])
    ray = ["--ray", "auto", "--workers", "1"]
    main(["evaluate", str(shared), *ray])
    assert_same_scores(late)
    run = RunFolder.open(shared)
    asked = run.tasks("test")["candidates"].explode().n_unique()
    (shards,) = run.item_cache.iterdir()
    assert len(ShardFolder(shards).places) == sum(map(len, ShardFolder(shards).keys.values())) == asked < 40
    assert f"{40 - asked} items computed, {asked} were there" in printed("index", str(shared), *ray)
    how = ["--users", "all", "--by", "answer", "--top-k", "3"]
    printed("rank", str(alone), *how, "--output", str(tmp_path / "alone"))
    printed("rank", str(shared), *how, "--output", str(tmp_path / "shared"), *ray)
    assert same_rankings(tmp_path, 1e-5).height == 16 * 3


def test_the_process_that_asks_loads_a_late_model_once_for_an_index(
    late: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Computing] = []
    real = spread_index.load_recommender
    monkeypatch.setattr(spread_index, "load_recommender", lambda run, how: loads.append(how) or real(run, how))
    run = RunFolder.open(late[0])
    with spread_index.ViewIndex(run, with_blank_images, with_blank_images(load_catalogue(run), 0)) as index:
        items = run.read(ITEMS)["item_id"].to_list()
        assert index.add(items[:3]) and index.add(items[:5]) and not index.add(items[1:4])
        (shards,) = index.folder.iterdir()
        assert sum(map(len, ShardFolder(shards).keys.values())) == 5
    assert [how.device for how in loads].count("cpu") == 1 and not index.folder.exists()


def test_new_items_are_ranked_by_workers_that_have_not_the_model_of_their_vectors(
    nodes: Nodes, late: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, shared = late
    (tmp_path / "new.csv").write_text("item_id,title\nnew-1,A red cup\nnew-2,A green lamp\n")
    how = ["--users", "all", "--by", "head", "--top-k", "42", "--new-items", str(tmp_path / "new.csv")]
    printed("rank", str(alone), *how, "--output", str(tmp_path / "alone"))
    model, opened = alone.parent / "model", rank.open_workers

    def open_without_model(*args: Any) -> Any:
        model.rename(tmp_path / "away")
        return opened(*args)

    monkeypatch.setattr(rank, "open_workers", open_without_model)
    printed("rank", str(shared), *how, "--output", str(tmp_path / "shared"), "--ray", "auto", "--workers", "1")
    (tmp_path / "away").rename(model)
    assert {"new-1", "new-2"} < set(same_rankings(tmp_path)["item_id"])
