"""Training of sequence heads: they learn what order and content say, and a killed training ends as one that was not."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mllm_msr.evaluation import sequence_training
from mllm_msr.evaluation.coded_tasks import CodedLists, CodedTasks
from mllm_msr.evaluation.sequence_training import (
    Classes,
    FitOptions,
    TrainingData,
    batches_by_length,
    fit,
    next_item_loss,
    score_candidates,
    score_catalogue,
)
from mllm_msr.modeling.sequence_head import PADDING, SequenceHead
from mllm_msr.modeling.sequence_head_options import SequenceHeadConfig

N_ITEMS = 24
OPTIONS = FitOptions(batch_size=16, learning_rate=1e-2, max_epochs=3)


def lists(codes: np.ndarray) -> CodedLists:
    return CodedLists(codes.reshape(-1), np.arange(len(codes) + 1) * codes.shape[1])


def circle(n_users: int = 80, length: int = 8, never: tuple[int, ...] = ()) -> TrainingData:
    """Whoever chose item i chooses i + 1 next; content tells the item. Users whose training would have an item of
    ``never`` are left out of it."""
    walks = (np.arange(length + 1) + np.arange(n_users)[:, None]) % N_ITEMS
    training = walks[:, :-1][~np.isin(walks[:, :-1], never).any(axis=1)]
    tasks = CodedTasks.__new__(CodedTasks)
    others = (walks[:, -1:] + np.arange(1, 11)) % N_ITEMS
    tasks.histories, tasks.candidates = lists(walks[:, :-1]), lists(np.concatenate([walks[:, -1:], others], axis=1))
    tasks.labels = np.tile([1] + [0] * 10, n_users)
    content = torch.from_numpy(np.eye(N_ITEMS)[:, :12] + np.roll(np.eye(N_ITEMS), 12, axis=0)[:, 12:])
    return TrainingData(N_ITEMS, lists(training), tasks, torch.cat([content, torch.eye(N_ITEMS)], dim=1))


def config(**settings) -> SequenceHeadConfig:
    return SequenceHeadConfig(
        n_items=N_ITEMS, **{"hidden": 16, "layers": 1, "max_length": 8, "dropout": 0.1, **settings}
    )


@pytest.mark.parametrize("stop_by", ["candidates", "catalogue"])
@pytest.mark.parametrize("content_size", [0, 36])
def test_it_learns_order_and_ranks_candidates_as_it_does_the_catalogue(stop_by, content_size):
    data = circle()
    options = FitOptions(batch_size=16, learning_rate=1e-2, max_epochs=25, stop_by=stop_by)
    head = fit(config(content_size=content_size), data, options)
    tasks = data.validation
    values = score_candidates(head, tasks.histories, tasks.candidates)
    assert tasks.quality(values) > 0.9
    whole = score_catalogue(head, tasks.histories)
    assert np.allclose(whole[tasks.candidates.owner, tasks.candidates.codes], values, atol=1e-5)


def test_every_parameter_is_trained_but_identities_of_items_without_interactions():
    data = circle(never=(5,))
    assert not data.counts()[5]
    head = fit(config(content_size=36, gate=True), data, OPTIONS)
    torch.manual_seed(0)
    before = SequenceHead(head.config)
    before.set_items(data.counts(), data.content)
    for (name, old), new in zip(before.named_parameters(), head.parameters(), strict=True):
        if name not in ("identity", "gate"):
            assert not torch.equal(old, new), name
    assert not head.identity[5].any()
    assert (head.identity != before.identity).any(dim=1).sum() == (data.counts() > 0).sum()


def test_one_seed_gives_one_result_and_leaves_the_global_one_alone():
    data, settings = circle(20), config(content_size=36)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = score_catalogue(fit(settings, data, OPTIONS, seed=1), data.validation.histories)
    assert torch.equal(torch.rand(1), expected)
    assert np.array_equal(first, score_catalogue(fit(settings, data, OPTIONS, seed=1), data.validation.histories))
    assert not np.array_equal(first, score_catalogue(fit(settings, data, OPTIONS, seed=2), data.validation.histories))


def test_a_killed_training_goes_on_to_the_same_result_and_a_finished_one_is_only_loaded(tmp_path, monkeypatch):
    data, settings, options = circle(20), config(content_size=36), FitOptions(batch_size=8, max_epochs=4, patience=9)
    whole = fit(settings, data, options)
    epoch, done = sequence_training.Training.epoch, []

    def dies_in_the_third(training, name):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(training.done)
        epoch(training, name)

    monkeypatch.setattr(sequence_training.Training, "epoch", dies_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        fit(settings, data, options, folder=tmp_path)
    done.clear()
    resumed = fit(settings, data, options, folder=tmp_path)
    assert done == [2, 3]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    done.clear()
    fit(settings, data, options, folder=tmp_path)
    assert done == []
    fit(settings, circle(21), FitOptions(batch_size=8, max_epochs=1), folder=tmp_path)  # other data, same folder
    assert done == [0] and len(list(tmp_path.iterdir())) == 2


def test_what_is_validated_and_kept_is_an_average_over_the_steps():
    data, head = circle(20), SequenceHead(config())
    head.set_items(data.counts())
    training = sequence_training.Training(head, data, FitOptions(batch_size=200, average=0.1), seed=0)
    expected = head.identity.detach().clone()
    for left in (1 / 11, 0.1, 0.1):  # less than 0.1 of the beginning
        training.epoch("head")  # of one step
        expected = left * expected + (1 - left) * head.identity.detach()
        assert torch.allclose(training.averaged.identity, expected, atol=1e-6)
    assert torch.equal(training.best_weights["identity"], training.averaged.identity) == (training.best_epoch == 3)


def test_it_begins_with_what_another_head_has_learnt():
    data = circle(20)
    start = fit(config(), data, OPTIONS)
    begun = fit(config(content_size=36), data, FitOptions(max_epochs=0), start=start)
    assert torch.equal(begun.identity, start.identity)
    assert torch.equal(begun.encoder.layers[0].distance, start.encoder.layers[0].distance)


def test_the_sampled_softmax_meets_the_whole_one_on_average():
    """The sum of exponentials over sampled classes, each over its chance to be sampled, is right on average."""
    data = circle()
    torch.manual_seed(0)
    counts = data.counts()
    weights = torch.randn(N_ITEMS).exp()
    rng = np.random.default_rng(0)
    classes = Classes(counts, 80, FitOptions(batch_size=2, most_classes=4))
    assert not classes.whole
    sums = []
    for _ in range(20_000):
        pieces = rng.permutation(len(data.histories))[:2]
        batch = torch.from_numpy(data.histories.padded(data.histories.bounds[pieces], data.histories.lengths[pieces]))
        codes, log_q, places = classes.of(batch, rng)
        assert torch.equal(codes[places], batch)
        sums.append((weights[codes] / log_q.exp()).sum())
    assert torch.stack(sums).mean() == pytest.approx(float(weights[counts > 0].sum()), rel=0.02)


def test_the_whole_loss_is_plain_cross_entropy_at_real_places():
    data = circle(4, length=4)
    model = SequenceHead(config(dropout=0.0))
    model.set_items(data.counts())
    batch = torch.tensor([[0, 1, 2], [2, 3, PADDING]])
    loss = next_item_loss(model, batch, Classes(data.counts(), 4, OPTIONS), np.random.default_rng(0))
    trained = data.counts().nonzero()[:, 0]
    logits = model(batch[:, :-1].masked_fill(batch[:, 1:] == PADDING, PADDING)).states @ model.item_vectors().T
    expected = F.cross_entropy(
        logits[[0, 0, 1], [0, 1, 0]][:, trained], torch.searchsorted(trained, torch.tensor([1, 2, 3]))
    )
    torch.testing.assert_close(loss, expected)


def test_batches_hold_every_piece_once_with_its_like():
    lengths = np.random.default_rng(0).integers(2, 100, 1000)
    batches = list(batches_by_length(lengths, 16, np.random.default_rng(0)))
    assert sorted(np.concatenate(batches).tolist()) == list(range(1000))
    assert max(map(len, batches)) <= 16
    assert np.mean([np.ptp(lengths[batch]) for batch in batches]) < 10


def test_no_training_history_leaves_a_head_as_it_began():
    data = circle(3)
    nothing = TrainingData(N_ITEMS, CodedLists(np.empty(0, np.int64), np.array([0])), data.validation)
    assert not fit(config(), nothing, OPTIONS).identity.any()


def test_an_unknown_rule_to_stop_by_is_refused():
    with pytest.raises(ValueError, match="'candidates' and 'catalogue'"):
        FitOptions(stop_by="loss")


def test_a_training_that_leaves_all_bounds_is_stopped_and_says_what_to_lower():
    with pytest.raises(
        ValueError, match=r"sasrec: weights are no longer finite after epoch 1: lower its learning_rate"
    ):
        fit(config(), circle(), FitOptions(batch_size=16, learning_rate=1e30, max_epochs=2), name="sasrec")


def test_a_damaged_state_is_named(tmp_path):
    options = FitOptions(batch_size=16, max_epochs=1)
    fit(config(), circle(), options, folder=tmp_path)
    (path,) = tmp_path.glob("*.pt")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"head-\w+\.pt is damaged: remove it"):
        fit(config(), circle(), options, folder=tmp_path)
