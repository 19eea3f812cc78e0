"""The sequence head: no look ahead, no trace of padding, identity where it was learnt, new items by content alone."""

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mllm_msr.modeling.history_encoders import Dropout
from mllm_msr.modeling.sequence_head import PADDING, SequenceHead, last_places
from mllm_msr.modeling.sequence_head_options import SequenceHeadConfig

N_ITEMS, SIZE = 20, 6
COUNTS = torch.arange(N_ITEMS)  # item 0 was never chosen


def head(content: bool = True, **settings) -> SequenceHead:
    torch.manual_seed(0)
    config = SequenceHeadConfig(
        n_items=N_ITEMS, content_size=SIZE if content else 0, hidden=16, layers=1, max_length=8, **settings
    )
    made = SequenceHead(config).eval()
    made.set_items(COUNTS, torch.randn(N_ITEMS, SIZE) if content else None)
    return made


@pytest.mark.parametrize("encoder", ["transformer", "gru", "both"])
def test_it_neither_looks_ahead_nor_sees_padding(encoder):
    model = head(encoder=encoder)
    with torch.inference_mode():
        whole = model(torch.tensor([[3, 7, 5, 9]])).states
        other = model(torch.tensor([[3, 7, 5, 1]])).states
        padded = model(torch.tensor([[3, 7, 5, 9, PADDING, PADDING], [PADDING] * 6]))
    assert torch.allclose(whole[:, :3], other[:, :3], atol=1e-6)
    assert not torch.allclose(whole[:, 3], other[:, 3], atol=1e-3)
    assert torch.allclose(whole[0], padded.states[0, :4], atol=1e-6)
    assert torch.allclose(padded.last[0], whole[0, -1], atol=1e-6)
    assert not padded.last[1].any()  # an empty history says nothing


def test_dropout_leaves_out_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    dropout = Dropout(0.3)
    kept = dropout(torch.ones(1001, 7))
    assert abs(float((kept == 0).float().mean()) - 77 / 256) < 0.02 and abs(float(kept.mean()) - 1) < 0.03
    assert dropout.eval()(kept) is kept and Dropout(0.0)(kept) is kept


def test_attention_knows_how_far_away_an_item_is():
    model = head()
    with torch.no_grad():
        model.encoder.place.weight.zero_()  # what is left is the distance
        history = torch.tensor([[3, 7, 5, 9]])
        before = model(history).last
        model.encoder.layers[0].distance[:, 2] = 5.0
        near = model(history).last
        assert not torch.allclose(before, near, atol=1e-3)
        model.encoder.layers[0].distance[:, 4:] = 9.0  # no item is so far away
        assert torch.equal(model(history).last, near)


def test_a_long_history_is_read_from_its_end():
    model = head()
    with torch.inference_mode():
        assert torch.allclose(
            model(torch.tensor([[0, 1, *range(2, 10)]])).last, model(torch.tensor([[*range(2, 10)]])).last, atol=1e-6
        )
    assert last_places(torch.tensor([[1, 2, 3, 4], [5, 6, PADDING, PADDING]]), 3).tolist() == [
        [2, 3, 4],
        [5, 6, PADDING],
    ]


def test_an_item_is_content_and_identity_and_content_alone_if_never_chosen():
    model = head()
    vectors = model.item_vectors()
    content = model.new_item_vectors(model.content)
    assert torch.allclose(vectors[0], content[0])
    assert torch.allclose(vectors - content, model.identity, atol=1e-6)
    assert torch.allclose(model.item_vectors(torch.tensor([4, 2])), vectors[[4, 2]], atol=1e-6)
    alone = head(content=False)
    assert not alone.item_vectors()[0].any() and alone.item_vectors()[1].any()
    with pytest.raises(ValueError, match="cannot rank new ones"):
        alone.new_item_vectors(torch.zeros(1, SIZE))


def test_in_training_some_items_go_without_their_identity_and_it_learns_nothing_from_that_step():
    model = head(identity_dropout=0.5, dropout=0.0).train()
    vectors = model.item_vectors()
    dropped = (vectors == model.new_item_vectors(model.content)).all(dim=1)
    assert 3 < dropped.sum() < 17
    vectors.sum().backward()
    assert not model.identity.grad[dropped].any() and model.identity.grad[~dropped].all()
    assert not head(identity=False).train().item_vectors().isnan().any()


@pytest.mark.parametrize("settings", [{}, {"join": "concatenation"}, {"neighbours": 2}])
def test_items_of_one_length_differ_by_their_direction_alone(settings: dict[str, Any]):
    model, plain = head(unit_items=True, **settings), head(**settings)
    with torch.no_grad():
        model.load_state_dict(plain.state_dict(), strict=False)
        model.log_length.fill_(math.log(3.0))
    vectors = model.item_vectors()
    assert torch.allclose(vectors.norm(dim=1), torch.tensor(3.0))
    assert torch.allclose(F.cosine_similarity(vectors, plain.item_vectors()), torch.tensor(1.0), atol=1e-5)
    if "neighbours" not in settings:  # of which each item is none of its own
        assert torch.allclose(model.new_item_vectors(model.content)[0], vectors[0], atol=1e-6)
    assert torch.allclose(model.new_item_vectors(model.content).norm(dim=1), torch.tensor(3.0))
    vectors[3].sum().backward()
    assert model.log_length.grad and model.identity.grad[3].any()


def test_the_gate_weighs_content_by_how_often_an_item_was_chosen():
    model = head(gate=True)
    plain = model.item_vectors() - model.identity
    with torch.no_grad():
        model.gate[1] = 3.0  # chosen once
    assert torch.allclose((model.item_vectors() - model.identity)[1], 3 * plain[1], atol=1e-6)
    assert torch.allclose((model.item_vectors() - model.identity)[2:], plain[2:], atol=1e-6)


def test_candidates_and_catalogue_have_the_same_scores_and_new_items_are_ranked_beside_them():
    model = head()
    histories = torch.tensor([[1, 2, 3], [4, PADDING, PADDING]])
    candidates = torch.tensor([[5, 0], [6, PADDING]])
    with torch.inference_mode():
        scores, whole = model.score(histories, candidates), model.score_catalogue(histories)
        vectors = torch.cat([model.item_vectors(), model.new_item_vectors(torch.ones(1, SIZE))])
        more = model.score_catalogue(torch.tensor([[1, 2, N_ITEMS]]), vectors)
    assert torch.allclose(scores[0], whole[0, [5, 0]]) and torch.allclose(scores[1, 0], whole[1, 6])
    assert scores[1, 1] == float("-inf")
    assert more.shape == (1, N_ITEMS + 1)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="an identity, content, or both"):
        SequenceHeadConfig(identity=False)
    with pytest.raises(ValueError, match="no multiple of heads"):
        SequenceHeadConfig(hidden=15)
    with pytest.raises(ValueError, match="'lstm' is not known"):
        SequenceHeadConfig(encoder="lstm")
    with pytest.raises(ValueError, match=r"is \(20, 6\), not \(3, 6\)"):
        head().set_items(COUNTS, torch.zeros(3, SIZE))
