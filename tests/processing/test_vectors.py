"""The table of item vectors: by content, changed items only, and not lost when a run is killed."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import tiny_models
from transformers import BertConfig, BertModel, BertTokenizer

from mllm_msr.modeling.inputs import Candidate
from mllm_msr.processing.vectors import item_encoder, vector_table
from mllm_msr.records.schema import IMAGE, ITEM_VECTORS

NO_IMAGE = {"bytes": None, "path": None}


def items(**titles: str) -> pl.DataFrame:
    rows = [(item, title, "", NO_IMAGE) for item, title in titles.items()]
    return pl.DataFrame(
        rows, {"item_id": pl.String, "title": pl.String, "text": pl.String, "image": IMAGE}, orient="row"
    )


class Encoder:
    """Counts letters, and what it is asked."""

    def __init__(self, breaks_at: str = "") -> None:
        self.asked: list[str] = []
        self.breaks_at = breaks_at

    def __call__(self, candidates: Sequence[Candidate]) -> np.ndarray:
        words = [f"{item.title}{item.text}" for item in candidates]
        if self.breaks_at in words:
            raise KeyboardInterrupt
        self.asked += words
        return np.array([[len(word), word.count("e")] for word in words], np.float16)


def test_only_changed_items_are_computed_and_equal_ones_once(tmp_path: Path) -> None:
    encoder = Encoder()
    frame = vector_table(items(b="green", a="red", c="red"), {}, lambda: encoder, [], tmp_path)
    ITEM_VECTORS.check(frame, "table")
    assert frame["vector"].to_list() == [[3, 1], [5, 2], [3, 1]] and frame["item_id"].to_list() == ["a", "b", "c"]
    assert sorted(encoder.asked) == ["green", "red"]
    again = Encoder()
    vector_table(items(b="green", a="blue"), {}, lambda: again, [], tmp_path)
    assert again.asked == ["blue"]
    vector_table(items(b="green", a="blue"), {}, lambda: pytest.fail("nothing is missing"), [], tmp_path)
    other = Encoder()
    vector_table(items(a="blue"), {"a": "a summary"}, lambda: other, [], tmp_path)
    vector_table(items(a="blue"), {}, lambda: other, ["another model"], tmp_path)
    assert other.asked == ["bluea summary", "blue"]
    assert len(list(tmp_path.glob("*.parquet"))) == 1


def test_what_was_computed_before_a_kill_is_kept(tmp_path: Path) -> None:
    shop = items(a="red", b="green", c="blue", d="grey")
    with pytest.raises(KeyboardInterrupt):
        vector_table(shop, {}, lambda: Encoder(breaks_at="grey"), [], tmp_path, batch_size=2)
    encoder = Encoder()
    frame = vector_table(shop, {}, lambda: encoder, [], tmp_path, batch_size=2)
    assert len(frame) == 4 and encoder.asked == ["blue", "grey"]


def test_a_damaged_file_is_computed_again(tmp_path: Path) -> None:
    vector_table(items(a="red"), {}, Encoder, [], tmp_path)
    next(tmp_path.glob("*.parquet")).write_bytes(b"damaged")
    assert vector_table(items(a="red"), {}, Encoder, [], tmp_path)["vector"].to_list() == [[3, 1]]


def test_an_empty_catalogue_has_no_vectors(tmp_path: Path) -> None:
    assert vector_table(items(), {}, Encoder, [], tmp_path).is_empty()


def test_an_encoder_of_sentences_needs_no_chat(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "ships", ":"]))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = BertConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = BertModel(config)
    tiny_models.randomise(model)
    model.save_pretrained(tmp_path)
    encode = item_encoder(str(tmp_path), None, "float32", {}, "film", 512)
    shop = [Candidate("a", "red"), Candidate("b", "ships red red ships : red")]
    together, alone = encode(shop), np.concatenate([encode(shop[:1]), encode(shop[1:])])
    np.testing.assert_allclose(together.astype(np.float32), alone.astype(np.float32), atol=2e-3)
    assert np.abs(together[0] - together[1]).max() > 0.01
