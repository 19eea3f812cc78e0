"""Which models make item vectors: with a chat or without, of two libraries; and what is said of one that makes none."""

import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from tiny_runs import tiny_recipe
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

from mllm_msr.modeling.inputs import Candidate
from mllm_msr.processing.vectors import Encode, recipe_encoder

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
ITEMS = [
    Candidate("a", "red ships", "a quiet film", tiny_models.draw_image(1)),
    Candidate("b", "The Sea of No Return, " * 20),
    Candidate("c", "Yes"),
]


def bert(size: int) -> PreTrainedModel:
    return BertModel(BertConfig(vocab_size=size, max_position_embeddings=64, **SMALL))


def roberta(size: int) -> PreTrainedModel:
    """Whose first positions are no places of a text: it takes two tokens less than it has positions."""
    return RobertaModel(RobertaConfig(vocab_size=size, max_position_embeddings=66, pad_token_id=1, **SMALL))


def gpt2(size: int) -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=2, n_positions=64))


def t5(size: int) -> PreTrainedModel:
    return T5Model(T5Config(vocab_size=size, d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16))


def clip(size: int) -> PreTrainedModel:
    text = {**SMALL, "vocab_size": size, "max_position_embeddings": 64, "eos_token_id": 2, "bos_token_id": 1}
    vision = {**SMALL, "image_size": 28, "patch_size": 14}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def save(make, folder: Path) -> str:
    """A repository of a model without a chat."""
    tokenizer = tiny_models.tokenizer((), "", {}, False)
    tokenizer.chat_template, tokenizer.model_max_length = None, 64
    if make is gpt2:
        tokenizer.pad_token = None
    model = make(len(tokenizer))
    tiny_models.randomise(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if make is clip:
        tiny_models.CLIP.save_pretrained(folder)
    return str(folder)


def encoder(folder: str, engine: str = "transformers") -> Encode:
    return recipe_encoder(tiny_recipe({"vectors.model": folder, "vectors.engine": engine}))


def close(vectors: np.ndarray, others: np.ndarray) -> None:
    np.testing.assert_allclose(vectors.astype(np.float32), others.astype(np.float32), atol=4e-3)


@pytest.mark.parametrize("make", [bert, roberta, gpt2, t5])
def test_a_model_without_a_chat_reads_title_and_text_whatever_else_is_in_the_batch(tmp_path: Path, make) -> None:
    encode = encoder(save(make, tmp_path))
    together = encode(ITEMS)
    assert together.dtype == np.float16 and together.shape == (3, 32)
    close(together, np.concatenate([encode([item]) for item in ITEMS]))
    assert np.abs(together[0] - together[2]).max() > 0.01
    close(encode([Candidate("z", "red ships", "a quiet film")])[0], together[0])
    assert np.abs(encode([Candidate("a", "red ships")])[0] - together[0]).max() > 0.01


def test_the_backbone_of_the_recipe_is_the_default_and_sees_images() -> None:
    encode = recipe_encoder(tiny_recipe())
    blind = [Candidate(item.item_id, item.title, item.text) for item in ITEMS[:1]]
    assert np.abs(encode(ITEMS[:1]) - encode(blind)).max() > 0.01


def test_sentence_transformers_has_the_same_mean_of_an_encoder(tmp_path: Path) -> None:
    folder = save(bert, tmp_path)
    close(encoder(folder, "sentence-transformers")(ITEMS), encoder(folder)(ITEMS))


def test_a_model_of_sentence_transformers_sees_images_in_its_own_way(tmp_path: Path) -> None:
    blind = [Candidate(item.item_id, item.title, item.text) for item in ITEMS]
    apart = encoder(save(clip, tmp_path / "clip"), "sentence-transformers")
    vectors, without = apart(ITEMS), apart(blind)
    assert vectors.shape == (3, 32) and vectors[0, 16:].any() and not vectors[1:, 16:].any()
    close(vectors[:, :16], without[:, :16])
    assert not without[:, 16:].any() and np.abs(vectors[0, :16] - vectors[1, :16]).max() > 0.01
    together = encoder(str(tiny_models.save_backbone("llava", tmp_path / "llava")), "sentence-transformers")
    vectors, without = together(ITEMS), together(blind)
    assert np.abs(vectors[0] - without[0]).max() > 0.01
    close(vectors[1:], without[1:])


def test_a_model_that_makes_no_vectors_is_named_with_the_remedy(tmp_path: Path, monkeypatch) -> None:
    sighted = ViTModel(ViTConfig(image_size=28, patch_size=14, **SMALL))
    sighted.save_pretrained(tmp_path / "vit")
    save(clip, tmp_path / "clip")
    (tmp_path / "empty").mkdir()
    for name, words in {"vit": "tokenizer", "clip": "no chat template", "empty": "model_type"}.items():
        with pytest.raises(ValueError, match=words) as error:
            encoder(str(tmp_path / name))
        assert str(error.value).startswith(f"{tmp_path / name} makes no item vectors: ")
        assert str(error.value).endswith("or give your own vectors by --vectors or vectors.column")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'mllm-msr\[sentence-transformers\]'"):
        encoder(str(tmp_path / "clip"), "sentence-transformers")


def test_a_model_in_half_precision_makes_about_the_same_vectors(tmp_path: Path) -> None:
    folder = save(bert, tmp_path)
    half = recipe_encoder(tiny_recipe({"vectors.model": folder, "vectors.dtype": "bfloat16"}))(ITEMS)
    whole = encoder(folder)(ITEMS)
    cosines = torch.cosine_similarity(torch.from_numpy(half).float(), torch.from_numpy(whole).float())
    assert cosines.min() > 0.999
