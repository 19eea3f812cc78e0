"""Fused scores: better than their members where these know different things, and never worse for a bucket of items."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mllm_msr.evaluation.coded_tasks import CodedLists, CodedTasks
from mllm_msr.evaluation.fusion import (
    FusionTasks,
    catalogue_lists,
    draw_lists,
    fit_fusion,
    fit_shared,
    listwise_loss,
    settle_bias,
    worse_buckets,
)
from mllm_msr.modeling.score_fusion import BUCKETS, ScoreFusion, frequency_buckets


def world(n_tasks: int = 1200, n_candidates: int = 20, seed: int = 0) -> FusionTasks:
    """An identity member that knows items of the last bucket alone, and a content member that knows all a little."""
    rng = torch.Generator().manual_seed(seed)
    buckets = torch.randint(0, 4, (n_tasks, n_candidates), generator=rng)
    positive = torch.zeros(n_tasks, n_candidates)
    positive[:, 0] = 1.0
    noise = torch.randn(n_tasks, n_candidates, 2, generator=rng)
    identity = torch.where(buckets == 3, 2.5 * positive + noise[..., 0], 3 * noise[..., 0])
    content = 1.2 * positive + noise[..., 1]
    return FusionTasks(torch.stack([identity, 10 * content + 5], dim=-1), buckets, torch.zeros(n_tasks, n_candidates))


def test_each_bucket_listens_to_the_member_that_knows_it():
    data, unseen = world(), world(seed=1)
    fusion = fit_fusion(data, ["identity", "content"])
    assert fusion.weights[3, 0] > 1.0 > 0.3 > fusion.weights[:3, 0].abs().max()
    quality = [float(unseen.ndcg(one).mean()) for one in (fusion, alone(data, 0), alone(data, 1))]
    assert quality[0] > max(quality[1:]) + 0.02


def alone(data: FusionTasks, member: int) -> ScoreFusion:
    blank = ScoreFusion(("identity", "content"), torch.zeros(2), torch.ones(2), torch.zeros(4, 2), torch.zeros(4))
    return fit_shared(data, blank, [member])


def test_no_buckets_targets_are_served_worse_than_by_the_best_member():
    data = world()
    fusion = fit_fusion(data, ["identity", "content"])
    best = max((alone(data, 0), alone(data, 1)), key=lambda one: float(data.ndcg(one).mean()))
    ours, theirs = (listwise_loss(one, data) for one in (fusion, best))
    assert not worse_buckets(ours - theirs, data.buckets[:, 0]).any()
    assert worse_buckets(theirs - ours, data.buckets[:, 0])[3]


def test_a_bucket_of_few_targets_is_not_worse_by_chance():
    """Else about every second fusion of four buckets would be refused, and one member alone taken in its place."""
    few = torch.tensor([0.5] * 5 + [-0.2] * 4)  # 1.6 standard errors above zero
    buckets = torch.full((9,), 1)
    assert not worse_buckets(few, buckets).any()
    assert worse_buckets(few + 0.2, buckets).tolist() == [False, True, False, False]


def rarely_chosen(seed: int = 0, members: int = 5) -> FusionTasks:
    """Many candidates are of a rare bucket and ten of 200 targets; the last member alone knows these, and most else."""
    rng = torch.Generator().manual_seed(seed)
    buckets = torch.full((200, 20), 3)
    buckets[:, 16:], buckets[:10, 0] = 1, 1
    positive = torch.zeros(200, 20)
    positive[:, 0] = 1.0
    scores = torch.randn(200, 20, members, generator=rng)
    scores[..., :-1] += torch.where(buckets == 3, 0.6 * positive, 0.2 * positive - 0.5)[..., None]
    scores[..., -1] += 1.5 * positive
    return FusionTasks(scores, buckets, torch.zeros(200, 20))


def test_ten_targets_of_a_rare_bucket_do_not_leave_one_member_alone():
    data, unseen = rarely_chosen(), rarely_chosen(seed=7)
    fusion = fit_fusion(data, list("abcde"))
    best = fit_shared(data, replace(fusion, bias=torch.zeros(4)), [4])
    assert (fusion.weights[3, :4] > 0.1).all()
    assert float((unseen.ndcg(fusion) - unseen.ndcg(best)).mean()) > 0.03
    assert not worse_buckets(listwise_loss(fusion, data) - listwise_loss(best, data), data.buckets[:, 0]).any()


def test_a_member_of_noise_changes_nothing():
    data = world()
    content = data.scores[..., 1]
    noise = torch.randn(content.shape, generator=torch.Generator().manual_seed(5))
    data = FusionTasks(torch.stack([noise, content], dim=-1), data.buckets, data.log_q)
    fusion, best = fit_fusion(data, ["noise", "content"]), alone(data, 1)
    assert float((data.ndcg(fusion) - data.ndcg(best)).mean().abs()) < 0.01


def test_lists_of_what_one_member_puts_first_do_not_count_against_it():
    rng = torch.Generator().manual_seed(2)
    n_tasks, n_items, none = 300, 200, CodedLists(np.empty(0, np.int64), np.zeros(301, np.int64))
    whole = torch.randn(n_tasks, n_items, 2, generator=rng)
    whole[:, 0] += torch.tensor([1.4, 0.6])  # of the target, item 0: the best weights are these
    target = torch.zeros(n_tasks, dtype=torch.int64)
    codes, log_q = draw_lists(whole[..., 1:], none, target, (20, 20), np.random.default_rng(0))
    data = FusionTasks(whole[torch.arange(n_tasks)[:, None], codes], torch.full(codes.shape, 3), log_q)
    fusion = fit_fusion(data, ["asked of few", "asked of all"], by_likelihood=True)
    by_ndcg = fit_fusion(data, ["asked of few", "asked of all"])
    assert by_ndcg.weights[3, 1] == 0.0
    assert (fusion.weights[3] / fusion.deviation).tolist() == pytest.approx([1.4, 0.6], abs=0.2)


def test_a_fusion_comes_back_from_json_and_scores_any_shape():
    fusion = fit_fusion(world(100), ["identity", "content"])
    again = ScoreFusion.from_dict(fusion.to_dict())
    scores, buckets = torch.randn(3, 5, 2), torch.randint(0, 4, (3, 5))
    assert torch.allclose(again(scores, buckets), fusion(scores, buckets), atol=1e-6)
    assert again(scores[0, 0], buckets[0, 0]).shape == ()
    assert tuple(fusion.to_dict()["weights"]) == BUCKETS


def test_a_fusion_whose_last_member_is_a_fusion_is_one_weighted_sum():
    rng = torch.Generator().manual_seed(3)
    inner = ScoreFusion(("b", "c"), *(torch.rand(shape, generator=rng) + 0.5 for shape in (2, 2, (4, 2), 4)))
    outer = ScoreFusion(("a", "inner"), *(torch.rand(shape, generator=rng) + 0.5 for shape in (2, 2, (4, 2), 4)))
    scores, buckets = torch.randn(50, 3, generator=rng), torch.randint(0, 4, (50,), generator=rng)
    whole = outer.spread(inner)
    nested = outer(torch.stack([scores[:, 0], inner(scores[:, 1:], buckets)], dim=-1), buckets)
    assert whole.members == ("a", "b", "c") and whole.weights.shape == (4, 3)
    assert torch.allclose(whole(scores, buckets), nested, atol=1e-5)


def test_the_best_are_ranked_anew_and_the_others_follow_in_their_order():
    fusion = ScoreFusion(("answer", "others"), torch.zeros(2), torch.ones(2), torch.eye(2)[[0] * 4], torch.zeros(4))
    scores, answers = torch.tensor([[5.0, 9.0, 3.0, 7.0, 1.0]]), torch.tensor([[-3.0, 0.0, 8.0, -2.0, 9.0]])
    left_out = torch.tensor([[False, True, False, False, False]])

    def order(depth: int) -> list[int]:
        ranked = fusion.rerank(
            scores, torch.zeros(5, dtype=torch.int64), left_out, depth, lambda best: answers.gather(1, best)
        )
        return ranked[0].argsort(descending=True).tolist()

    assert order(0) == [1, 3, 0, 2, 4]
    assert order(2) == [3, 0, 1, 2, 4]  # by the answer -2 before -3, then the left-out one and those that were behind
    assert order(3) == [2, 3, 0, 1, 4]
    assert order(9) == [4, 2, 1, 3, 0]


def test_the_bias_of_new_items_follows_how_often_they_are_chosen():
    data = world()
    fusion = fit_fusion(data, ["identity", "content"])
    seldom = settle_bias(fusion, data.part(data.buckets[:, 0] != 0))  # they are candidates and never chosen
    assert seldom.bias[0] < fusion.bias[0] - 2 and torch.equal(seldom.bias[1:], fusion.bias[1:])
    assert torch.equal(seldom.weights, fusion.weights)
    often = settle_bias(seldom, data)
    assert fusion.bias[0] < often.bias[0] < fusion.bias[0] + 1.5  # a chosen one counts twice


class Fixed:
    """A member with one score an item, whatever the history; -9 for hidden items."""

    def __init__(self, scores: np.ndarray) -> None:
        self.scores = scores.astype(np.float32)

    def score_catalogue(self, histories, hidden=None):
        scores = self.scores if hidden is None else np.where(hidden.numpy(), np.float32(-9), self.scores)
        return np.tile(scores, (len(histories), 1))


def tasks(n_tasks: int, n_items: int) -> CodedTasks:
    made = CodedTasks.__new__(CodedTasks)
    bounds = np.arange(n_tasks + 1)
    made.histories = CodedLists(np.arange(n_tasks) % n_items, bounds)
    made.candidates = CodedLists((np.arange(n_tasks) + 1) % n_items, bounds)
    made.labels = np.ones(n_tasks, np.int64)
    return made


def test_lists_hold_the_target_what_members_rank_first_and_a_weighed_sample_of_the_rest():
    n_items, counts = 60, np.arange(60)
    given = tasks(40, n_items)
    members = [Fixed(np.arange(60)), Fixed(-np.arange(60))]
    data = catalogue_lists(members, given, counts, n_tasks=40, top=5, drawn=10, hidden_share=0.0)
    assert data.scores.shape == (40, 21, 2)
    item = data.scores[..., 0].long()  # the first member's score is the item's code
    assert item[:, 0].tolist() == given.candidates.codes.tolist()
    for task, codes in enumerate(item.tolist()):
        assert len(set(codes)) == 21 and given.histories.codes[task] not in codes
        best = [code for code in range(59, -1, -1) if code not in (task % 60, codes[0])][:5]
        assert set(best) < set(codes)
    assert torch.equal(data.buckets, frequency_buckets(item))
    assert (data.log_q.exp()[:, 1:].reciprocal().sum(dim=1) - 58).abs().max() < 1e-3  # all others, on average


def test_a_small_catalogue_is_listed_whole_and_fills_up_with_what_counts_for_nothing():
    members = [Fixed(np.arange(6))]
    data = catalogue_lists(members, tasks(4, 6), np.full(6, 9), top=2, drawn=10, hidden_share=0.0)
    assert data.scores.shape == (4, 7, 1)
    assert ((data.log_q == 0).sum(dim=1) == 5).all() and (data.log_q.isinf().sum(dim=1) == 2).all()
    best = ScoreFusion(("one",), torch.zeros(1), torch.ones(1), torch.ones(4, 1), torch.zeros(4))
    assert data.ndcg(best).tolist() == pytest.approx([1 / np.log2(rank) for rank in (6, 5, 4, 3)])


def test_targets_that_are_taken_as_never_chosen_are_added_to_the_lists():
    counts = np.full(60, 30)
    data = catalogue_lists([Fixed(np.arange(60))], tasks(60, 60), counts, n_tasks=60, top=5, drawn=10, hidden_share=0.3)
    added = data.part(torch.arange(len(data)) >= 60)
    assert 5 <= len(added) <= 18
    assert (added.buckets[:, 0] == 0).all() and (added.scores[:, 0] == -9).all()
    assert not (data.part(torch.arange(60)).buckets == 0).any()
