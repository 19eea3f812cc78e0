"""Stages shared among workers on a real Ray cluster, whose nodes see nothing of the run's folder, end as without it."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ray.cluster_utils import Cluster as Nodes
from ray_nodes import ray_nodes
from tiny_models import save_language_model
from tiny_runs import tiny_recipe

from mllm_msr import stages
from mllm_msr.cli import main
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import ITEM_SUMMARIES, ITEM_VECTORS, PREFERENCES, RANKINGS, SCORES

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


def test_no_cluster_no_ray_or_a_launcher_is_said_in_one_line(
    runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = [str(runs[0])]
    with pytest.raises(SystemExit) as wrong:
        main(["summarize", "items", *run, "--workers", "2"])
    assert wrong.value.code == 2
    with pytest.raises(SystemExit, match=r"--ray 127.0.0.1:9: no cluster answers there .*use --ray local"):
        main(["summarize", "items", *run, "--ray", "127.0.0.1:9"])
    monkeypatch.delitem(sys.modules, "mllm_msr.processing.ray_workers")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match="--ray: Ray is not installed: `pip install 'mllm-msr\\[ray\\]'`"):
        main(["summarize", "items", *run, "--ray", "local"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="`mllm-msr summarize items` is one process, with workers by --ray"):
        main(["summarize", "items", *run])


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
    rankings = [RANKINGS.read(sorted((tmp_path / name).glob("*.parquet"))) for name in ("alone", "shared")]
    assert rankings[0].equals(rankings[1]) and rankings[0].height == 16 * 3
    main(["evaluate", str(alone)])
    main(["evaluate", str(shared), "--ray", "auto", "--workers", "1"])
    scores = [RunFolder.open(run).read(SCORES) for run in runs]
    same = ["variant", "user_id", "item_id", "label"]
    assert scores[0].select(same).equals(scores[1].select(same))
    assert np.allclose(scores[0]["logit"], scores[1]["logit"], atol=1e-5)
