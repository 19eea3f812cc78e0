"""Which items are nearest by content, and what they lend."""

import torch
from tiny_rankers import N_ITEMS, SIZE, content

from mllm_msr.modeling import neighbours
from mllm_msr.modeling.neighbours import PADDING, mean_of, nearest_chosen
from mllm_msr.modeling.sequence_head import SequenceHead
from mllm_msr.modeling.sequence_head_options import SequenceHeadConfig


def test_they_are_those_of_highest_cosine_that_somebody_chose_and_never_the_item_itself(monkeypatch):
    catalogue, counts = content(), torch.arange(N_ITEMS) % 3
    own = torch.arange(N_ITEMS)
    found = nearest_chosen(catalogue, own, catalogue, counts, 4)
    centred = torch.nn.functional.normalize(catalogue - catalogue.mean(dim=0), dim=1)
    for code, row in enumerate(found.tolist()):
        order = sorted(range(N_ITEMS), key=lambda other, code=code: -float(centred[code] @ centred[other]))
        assert row == [other for other in order if other != code and counts[other]][:4]
    monkeypatch.setattr(neighbours, "CELLS", 50)  # a few rows at a time
    assert torch.equal(nearest_chosen(catalogue, own, catalogue, counts, 4), found)


def test_there_may_be_fewer_of_them_or_none():
    catalogue, own = content(4), torch.tensor([0, 1, PADDING])
    asked = torch.cat([catalogue[:2], catalogue[2:3]])
    found = nearest_chosen(asked, own, catalogue, torch.tensor([3, 1, 0, 0]), 3)
    assert found.tolist()[:2] == [[1, PADDING, PADDING], [0, PADDING, PADDING]]
    assert set(found[2].tolist()) == {0, 1, PADDING}
    assert (nearest_chosen(asked, own, catalogue, torch.zeros(4), 3) == PADDING).all()


def test_their_mean_is_of_those_that_count():
    values = torch.tensor([[1.0], [2.0], [4.0]])
    near = torch.tensor([[0, 2], [1, PADDING], [PADDING, PADDING]], dtype=torch.int32)
    assert mean_of(values, near).tolist() == [[2.5], [2.0], [0.0]]
    assert mean_of(values, near, torch.tensor([True, True, False])).tolist() == [[4.0], [0.0], [0.0]]


def test_a_head_lends_their_identities_and_learns_them_by_it():
    torch.manual_seed(0)
    config = SequenceHeadConfig(n_items=N_ITEMS, content_size=SIZE, hidden=8, layers=1, neighbours=2, dropout=0.0)
    head = SequenceHead(config)
    head.set_items(torch.arange(N_ITEMS), content())
    alone = SequenceHead(SequenceHeadConfig(**{**vars(config), "neighbours": 0}))
    alone.load_state_dict({name: value for name, value in head.state_dict().items() if name != "near"})
    codes = torch.tensor([0, 7])
    head.eval(), alone.eval()
    lent = head.item_vectors(codes) - alone.item_vectors(codes)
    assert torch.allclose(lent, head.identity[head.near[codes].long()].mean(dim=1), atol=1e-6)
    assert torch.allclose(head.item_vectors()[codes], head.item_vectors(codes), atol=1e-6)
    hidden = torch.zeros(N_ITEMS, dtype=torch.bool)
    hidden[head.near[7].long()] = True
    assert torch.allclose(head.item_vectors(codes, hidden)[1], alone.item_vectors(codes)[1], atol=1e-6)
    head.item_vectors(codes).sum().backward()
    learnt = head.identity.grad.abs().sum(dim=1).nonzero()[:, 0].tolist()
    assert set(learnt) == {*codes.tolist()[1:], *head.near[codes].flatten().tolist()}
