"""Item vectors: the mean over an item's own tokens, whatever else is in its batch."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from devices import DEVICE
from transformers import AutoModel

from mllm_msr.modeling.inputs import Candidate
from mllm_msr.modeling.item_vectors import encode_items, load_item_model
from mllm_msr.processing.auto import MllmMsrProcessor

ITEMS = [
    Candidate("a", "The Sea of No Return", "a quiet film with ships", tiny_models.draw_image(1)),
    Candidate("b", "Yes", "", tiny_models.draw_image(2)),
    Candidate("c", "No", "blue stripes and red ships and a long summer, all in one very long description", None),
]


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_vector_is_that_of_the_item_alone(tmp_path: Path, family: str) -> None:
    folder = str(tiny_models.save_backbone(family, tmp_path))
    model, processor = load_item_model(folder, dtype="float32"), MllmMsrProcessor.from_backbone(folder)
    together = encode_items(model, processor, ITEMS)
    assert together.dtype == np.float16
    for budget in (1, 60):
        apart = encode_items(model, processor, ITEMS, token_budget=budget)
        np.testing.assert_allclose(apart.astype(np.float32), together.astype(np.float32), atol=2e-3)
    one = processor.late_items(ITEMS[:1]).to(DEVICE)
    states = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()(**one).last_hidden_state
    np.testing.assert_allclose(states[0].mean(dim=0).detach().cpu().numpy(), together[0].astype(np.float32), atol=2e-3)


def test_an_image_changes_a_vector_and_the_id_does_not(tmp_path: Path) -> None:
    folder = str(tiny_models.save_backbone("llava", tmp_path))
    model, processor = load_item_model(folder, dtype="float32"), MllmMsrProcessor.from_backbone(folder)
    changed = [replace(ITEMS[0], item_id="z"), replace(ITEMS[0], image=tiny_models.draw_image(3))]
    as_it_was, other = encode_items(model, processor, [ITEMS[0], *changed])[[1, 2]] - encode_items(
        model, processor, ITEMS[:1]
    )
    assert np.abs(as_it_was).max() < 2e-3 < np.abs(other).max()


def test_a_language_model_reads_the_words_alone(tmp_path: Path) -> None:
    folder = str(tiny_models.save_language_model(tmp_path))
    model, processor = load_item_model(folder, dtype="float32"), MllmMsrProcessor.from_backbone(folder)
    words = [replace(item, image=None) for item in ITEMS]
    np.testing.assert_array_equal(encode_items(model, processor, ITEMS), encode_items(model, processor, words))
