"""A released model with its data set is served as the run that it was published from."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mllm_msr.evaluation.loading import Computing
from mllm_msr.hub_cards.publishing import build_hub
from mllm_msr.modeling.inputs import User
from mllm_msr.records.run import RunFolder
from mllm_msr.serving.opening import open_run
from mllm_msr.serving.released import is_release, its_dataset, open_release


def test_a_release_is_opened_as_its_run(run: RunFolder, tmp_path: Path, backbone: Callable[[str], Path]) -> None:
    folders = build_hub(run)
    released, own = open_release(str(folders["model"]), None, Computing()), open_run(run.path, Computing())
    assert (released.name, released.format, released.titles, released.summaries) == (
        *(own.name, own.format, own.titles, own.summaries),
    )
    ids = list(own.items)[:5]
    logits = [each.recommender.score([User("red")], [ids], each.items)[0] for each in (released, own)]
    np.testing.assert_allclose(*logits, atol=1e-5)
    assert released.item_ranker is not None and own.item_ranker is not None
    scores = [each.item_ranker.score([["i0001", "i0002"]])[0] for each in (released, own) if each.item_ranker]
    np.testing.assert_allclose(*scores, atol=1e-5)
    for user in ("u0000", "u0003"):
        history = released.users.histories[user]
        assert (
            history == own.users.histories[user][: len(history)] and len(history) == len(own.users.histories[user]) - 1
        )
        assert released.users.preferences[user] == own.users.preferences[user]
    assert is_release(str(folders["model"])) and is_release("org/name@v1") and not is_release(str(tmp_path))
    (tmp_path / "README.md").write_text("---\ndatasets:\n- org/data\n---\n", encoding="utf-8")
    assert its_dataset(str(tmp_path), "") == "org/data"
    with pytest.raises(ValueError, match="a commit is of one repository: name the data set's too, --dataset org/data@"):
        its_dataset(str(tmp_path), "a" * 40, "a" * 40)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    with pytest.raises(ValueError, match="its card names no data set: name the one published with it by --dataset"):
        its_dataset(str(tmp_path), "")
