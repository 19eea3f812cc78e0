"""Packed rows make no layer wait: all is integer indices of shapes that are known before, so a forward is one graph."""

from typing import Any

import pytest
import tiny_models
import torch
from packed_rows import packed_recommender
from torch.utils._python_dispatch import TorchDispatchMode

from mllm_msr import Candidate, MllmMsrForRecommendation, MllmMsrProcessor, User
from mllm_msr.modeling.packing import compute_late_prefixes, pack_joint, pack_late, pack_late_answers

USERS = [User("quiet red films with ships"), User("long summers " * 4)]
ITEMS = [Candidate("a", "The Sea", image=tiny_models.draw_image(1)), Candidate("b", "The Sea of No Return")]
PAIRS = torch.tensor([[0, 0, 1], [0, 1, 1]])
LIMITS = (64, 96)
WAITING = {"aten::nonzero", "aten::_local_scalar_dense", "aten::masked_select", "aten::bincount", "aten::_unique2"}


def rows(model: MllmMsrForRecommendation, processor: MllmMsrProcessor) -> dict[str, Any]:
    """A packed row: of whole prompts, or of users, candidates and pairs."""
    if model.config.interaction == "joint":
        batch = processor([USERS[user] for user in PAIRS[0]], [ITEMS[item] for item in PAIRS[1]])
        return pack_joint(model, batch, PAIRS[0])
    return pack_late(model, **processor.late_blocks(USERS, ITEMS, (64, 96)), pairs=PAIRS)


class Waits(TorchDispatchMode):
    """Notes the operators whose outcome the host of a GPU waits for: shapes that depend on values, and values."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        indices = args[1] if name in ("aten::index", "aten::index_put", "aten::index_put_") else []
        if name in WAITING or any(index is not None and index.dtype == torch.bool for index in indices):
            self.names.append(name)
        return func(*args, **kwargs or {})


def embedded(model: MllmMsrForRecommendation, processor: MllmMsrProcessor) -> dict[str, Any]:
    """The arguments of the decoder for a packed row."""
    packed = rows(model, processor)
    shown = {key: packed[key] for key in ("position_ids", "attention_mask", "block_layout", "use_cache")}
    return {**shown, "inputs_embeds": model.get_input_embeddings()(packed["input_ids"])}


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_no_layer_waits_for_a_packed_row(backbone, family) -> None:
    for interaction, memory in (("joint", 0), ("late", 0), ("late", 2)):
        model, processor = packed_recommender(backbone(family), interaction, LIMITS, memory)
        shown = embedded(model, processor)
        with torch.no_grad(), Waits() as waits:
            model.get_decoder()(**shown)
        assert waits.names == []


@pytest.mark.parametrize(
    ("name", "interaction", "memory"), [("llava", "joint", 0), ("qwen2_5_vl", "late", 2), ("gemma3", "late", 0)]
)
def test_the_decoder_computes_a_packed_row_as_one_graph(backbone, name, interaction, memory) -> None:
    model, processor = packed_recommender(backbone(name), interaction, LIMITS, memory)
    shown, decoder = embedded(model, processor), model.get_decoder()
    torch.compiler.reset()
    with torch.no_grad():
        expected = decoder(**shown).last_hidden_state
        traced = torch.compile(decoder, backend="eager", fullgraph=True, dynamic=False)(**shown).last_hidden_state
    answers = shown["block_layout"].answers  # of the last layer nothing else is computed where it is not compiled
    torch.testing.assert_close(traced[:, answers], expected[:, answers], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_scoring_kept_users_and_items_waits_for_nothing_before_the_scores(backbone, family) -> None:
    model, processor = packed_recommender(backbone(family), "late", LIMITS)
    with torch.no_grad():
        users = compute_late_prefixes(model, processor.late_users(USERS, 64), "user")
        items = compute_late_prefixes(model, processor.late_items(ITEMS, 96), "item")
    packed = pack_late_answers(model, users, items, processor.late_answer_ids, PAIRS)
    with Waits() as waits:
        scores = model.score(**packed).logits
    assert waits.names == []
    expected = model.score(**rows(model, processor)).logits
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


def test_what_waits_is_noticed() -> None:
    values = torch.tensor([1, 0, 2])
    with Waits() as waits:
        _ = values[values > 0], values.nonzero(), int(values.max())
    assert waits.names == ["aten::index", "aten::nonzero", "aten::_local_scalar_dense"]
