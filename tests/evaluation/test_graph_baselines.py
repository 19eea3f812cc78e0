"""MMGCN and MGAT as rankers of a run's tasks, for users whom training knows and others."""

import numpy as np
import pytest
from baseline_worlds import GRAPH, two_tastes

from mllm_msr.evaluation.graph_baselines import GraphOptions, mgat, mmgcn
from mllm_msr.evaluation.metrics import ranking_metrics
from mllm_msr.evaluation.scorers import RankerScorer
from mllm_msr.evaluation.scoring import pairs

KINDS = [mmgcn, mgat]


@pytest.mark.parametrize("train", KINDS)
@pytest.mark.parametrize("protocol", ["strict", "paper"])
def test_it_finds_two_tastes_of_users_it_knows_and_of_others(train, protocol):
    data, test = two_tastes(protocol)
    ranker = train(*data, options=GRAPH)
    assert (ranker.known(test) >= 0).all() == (protocol == "strict")
    frame = pairs(test)
    values = ranker(test)
    assert ranking_metrics(frame["user_id"], frame["label"], values)["auc"]["value"] > 0.7  # half are of the same taste
    whole = RankerScorer(ranker).score_catalogue(test, data[1]["item_id"].sort().to_list())
    codes = {item: code for code, item in enumerate(data[1]["item_id"].sort())}
    owner = np.repeat(np.arange(len(test)), test["candidates"].list.len())
    picked = whole[owner, [codes[item] for item in frame["item_id"]]]
    np.testing.assert_allclose(picked, values, atol=1e-5)


@pytest.mark.parametrize("train", KINDS)
def test_one_seed_gives_one_result_and_every_weight_is_trained(train):
    data, test = two_tastes("strict", n_users=20)
    few = GraphOptions(**{**GRAPH.__dict__, "max_epochs": 2})
    none = GraphOptions(**{**GRAPH.__dict__, "max_epochs": 0})
    first, before = train(*data, options=few, seed=1), train(*data, options=none, seed=1)
    assert np.array_equal(first(test), train(*data, options=few, seed=1)(test))
    assert not np.array_equal(first(test), train(*data, options=few, seed=2)(test))
    for (name, old), new in zip(before.network.named_parameters(), first.network.parameters(), strict=True):
        assert (old != new).any(), name
