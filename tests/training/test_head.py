"""training/head.py as users start it: a run and vectors in, a head out that ranks by item ids."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModel, AutoProcessor

from mllm_msr import MllmMsrForRecommendation, MllmMsrProcessor
from mllm_msr.modeling.item_ranking import ItemRanker
from mllm_msr.training import head as script


@pytest.fixture
def vectors(small_run, tmp_path) -> Path:
    ids = small_run.items.items["item_id"][::-1]
    rows = np.random.default_rng(0).random((len(ids), 5)).tolist()
    path = tmp_path / "vectors.parquet"
    pl.DataFrame({"item_id": ids, "vector": rows}).write_parquet(path)
    return path


def arguments(small_run, output: Path, *more: str) -> list[str]:
    own = ["--dataset_name", str(small_run.folder), "--output_dir", str(output), "--max_epochs", "2", "--hidden", "16"]
    return [sys.executable, str(Path(script.__file__)), *own, *more]


def test_the_script_trains_a_head_whose_items_are_those_of_the_run(small_run, vectors, tmp_path, monkeypatch):
    command = arguments(small_run, tmp_path / "head", "--vectors", str(vectors))
    monkeypatch.setattr(sys, "argv", command[1:])
    runpy.run_path(command[1], run_name="__main__")
    ranker = ItemRanker.from_pretrained(tmp_path / "head")
    assert ranker.item_ids == sorted(small_run.items.items["item_id"])
    given = pl.read_parquet(vectors).sort("item_id")["vector"].to_list()
    assert torch.allclose(ranker.content.float(), torch.tensor(given), atol=1e-3)
    assert ranker.score([ranker.item_ids[3:1:-1]]).shape == (1, len(ranker))
    assert not ranker.members["sequence_head"].identity[ranker.counts == 0].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.rename({"vector": "embedding"}), "no column 'vector'"),
        (lambda frame: frame.head(-1), "1 of \\d+ items have no vector, among them"),
        (lambda frame: pl.concat([frame, frame.head(1)]), "more than one vector"),
        (lambda frame: frame.with_columns(pl.col("vector").list.head(pl.int_range(pl.len()) + 1)), "is not as long"),
        (lambda frame: frame.with_columns(pl.lit([1.0, float("nan")]).alias("vector")), "is missing or not finite"),
    ],
)
def test_vectors_that_do_not_fit_the_run_are_refused(small_run, vectors, tmp_path, change, message):
    frame = pl.read_parquet(vectors)
    change(frame).write_parquet(vectors)
    with pytest.raises(ValueError, match=message):
        script.main(
            script.HeadArguments(str(small_run.folder), str(vectors), str(tmp_path / "head")),
            script.SequenceHeadOptions(hidden=16),
            script.FitOptions(max_epochs=1),
        )


def test_without_vectors_it_is_sasrec_and_a_missing_file_is_named(small_run, tmp_path):
    settings = script.SequenceHeadOptions(hidden=16), script.FitOptions(max_epochs=1)
    ranker = script.main(script.HeadArguments(str(small_run.folder), None, str(tmp_path / "head")), *settings)
    assert list(ranker.members) == ["identity_only"] and not ranker.content.shape[1]
    with pytest.raises(FileNotFoundError, match=r"nothing\.parquet is missing"):
        script.main(script.HeadArguments(str(small_run.folder), "nothing.parquet", str(tmp_path / "head")), *settings)
    with pytest.raises(ValueError, match="--dataset_name, a prepared run, and --output_dir"):
        script.HeadArguments()


def test_the_head_becomes_a_part_of_a_model(small_run, vectors, backbone, tmp_path):
    trained = tmp_path / "trained"
    processor = MllmMsrProcessor.from_backbone(str(backbone("llava")))
    MllmMsrForRecommendation.from_backbone(backbone("llava"), processor=processor, dtype="bfloat16").save_pretrained(
        trained
    )
    processor.save_pretrained(trained)
    ranker = script.main(
        script.HeadArguments(str(small_run.folder), str(vectors), str(tmp_path / "both"), str(trained)),
        script.SequenceHeadOptions(hidden=16),
        script.FitOptions(max_epochs=1),
    )
    model = AutoModel.from_pretrained(tmp_path / "both", dtype="auto")
    assert (
        model.dtype == torch.bfloat16 and AutoProcessor.from_pretrained(tmp_path / "both").prompts == processor.prompts
    )
    history = [ranker.item_ids[:3]]
    assert torch.allclose(model.item_ranker.score(history), ranker.score(history), atol=1e-6)


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--colour", "red"], 2, "'--colour'"),
        (["--heads", "0"], 2, "heads=0: must be at least 1"),
        (["--dropout", "1"], 2, "dropout=1.0: must be at least 0 and below 1"),
        (["--learning_rate", "-1"], 2, "learning_rate=-1.0: must be at least 0"),
        (["--dataset_name", "nowhere"], 1, "nowhere is not a run"),
        (["--seed", "-1"], 2, "seed=-1: must be at least 0"),
        (["--average", "1"], 2, "average=1.0: must be below 1"),
        (["--gate"], 1, "--gate is about content: give --vectors as well"),
        (["--max_epochs", "0"], 1, "--max_epochs 0: nothing would be trained"),
        (["--model", str(Path(__file__).parent)], 1, "is no recommender: it has no config.json with `vlm_config`"),
        (["--no_identity"], 1, "an item needs an identity, content, or both"),
    ],
)
def test_a_mistake_ends_with_one_sentence(small_run, tmp_path, monkeypatch, capsys, more, status, message):
    command = arguments(small_run, tmp_path / "head", *more)
    monkeypatch.setattr(sys, "argv", command[1:])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(command[1], run_name="__main__")
    err = capsys.readouterr().err
    assert stop.value.code == status and err.startswith("head.py: ") and message in err and err.count("\n") == 1


def test_started_alone_it_reads_a_trained_model_without_asking(small_run, vectors, backbone, tmp_path):
    processor = MllmMsrProcessor.from_backbone(str(backbone("llava")))
    model = MllmMsrForRecommendation.from_backbone(backbone("llava"), processor=processor)
    processor.save_pretrained(tmp_path / "trained")
    model.save_pretrained(tmp_path / "trained")
    command = arguments(small_run, tmp_path / "both", "--vectors", str(vectors), "--model", str(tmp_path / "trained"))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "custom code" not in done.stdout + done.stderr
    assert ItemRanker.from_pretrained(tmp_path / "both").members["sequence_head"].config.hidden == 16
