"""A checkpoint brings what ranks by item vectors, with the same scores, however it is saved, loaded and trained."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from devices import DEVICE
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from tiny_models import FAMILIES, WITHOUT_PACKAGE
from tiny_rankers import IDS, content, make
from transformers import AutoModel, TorchAoConfig, Trainer, TrainingArguments

from mllm_msr import Candidate, MllmMsrForRecommendation, User
from mllm_msr.modeling.item_ranking import ItemRanker
from mllm_msr.modeling.lora import language_model_lora_targets

HISTORIES = [["film-3", "film-7", "new", "film-29"], ["film-0"], []]


@pytest.fixture
def headed(build) -> MllmMsrForRecommendation:
    """A llava with a head, one of whose items training never saw."""
    return with_head(build("llava")[0])


def with_head(model: MllmMsrForRecommendation) -> MllmMsrForRecommendation:
    ranker = make()
    ranker.put_items(["new"], content(1, seed=5))
    model.attach(ranker)
    return model


def check(model: MllmMsrForRecommendation, expected: torch.Tensor) -> None:
    ranker = model.item_ranker
    assert ranker is not None and ranker.item_ids == [*IDS, "new"]
    assert {value.dtype for value in ranker.parameters()} == {torch.float32}
    torch.testing.assert_close(ranker.score(HISTORIES), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_head_is_in_the_weights_of_every_family(build, name: str, tmp_path: Path) -> None:
    model = with_head(build(name)[0])
    expected, names = model.item_ranker.score(HISTORIES), set(model.state_dict())
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert any(key.startswith("item_ranker.members.sequence_head.") for key in file.keys())  # noqa: SIM118 (no dict)
    assert json.loads((tmp_path / "items.json").read_text())["film-4"] == 4
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    check(loaded, expected)
    assert set(model.state_dict()) == names == set(loaded.state_dict())  # the model's own are as they were


def test_saved_again_and_again_sharded_cast_and_taken_away(headed, tmp_path: Path) -> None:
    expected = headed.item_ranker.score(HISTORIES)
    headed.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    half = AutoModel.from_pretrained(tmp_path / "shards", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    check(half, expected)
    check(half.to(torch.float16), expected)
    half.item_ranker.remove_items(["film-2"])
    half.save_pretrained(tmp_path / "again", state_dict=half.state_dict())  # as a trainer does
    again = AutoModel.from_pretrained(tmp_path / "again")
    assert "film-2" not in again.item_ranker and len(again.item_ranker) == again.config.sequence_head["n_items"] == 30
    again.attach(None)
    again.save_pretrained(tmp_path / "without")
    assert AutoModel.from_pretrained(tmp_path / "without").item_ranker is None
    with pytest.raises(ValueError, match="has no sequence head"):
        ItemRanker.from_pretrained(tmp_path / "without")


def test_the_ranker_loads_without_its_model(headed, tmp_path: Path) -> None:
    headed.save_pretrained(tmp_path, max_shard_size="20KB")
    ranker = ItemRanker.from_pretrained(tmp_path)
    assert torch.equal(ranker.score(HISTORIES), headed.item_ranker.score(HISTORIES))
    (tmp_path / "items.json").unlink()
    with pytest.raises(OSError, match=r"items\.json"):
        AutoModel.from_pretrained(tmp_path)


def test_an_adapter_repository_has_it_beside_the_adapter(headed, tmp_path: Path) -> None:
    expected = headed.item_ranker.score(HISTORIES)
    get_peft_model(headed, LoraConfig(r=2, target_modules=language_model_lora_targets(headed)))
    headed.save_pretrained(tmp_path / "adapter")
    assert ItemRanker.from_pretrained(tmp_path / "adapter").item_ids == [*IDS, "new"]
    loaded = AutoModel.from_pretrained(tmp_path / "adapter")
    check(loaded, expected)
    loaded.merge().save_pretrained(tmp_path / "merged")
    check(AutoModel.from_pretrained(tmp_path / "merged"), expected)
    assert MllmMsrForRecommendation.from_backbone(tmp_path / "adapter").item_ranker is None  # to be trained further


def test_a_quantised_model_leaves_it_as_it_is(backbone, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    eight_bits = TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2))
    model = with_head(MllmMsrForRecommendation.from_backbone(backbone("llava"), quantization_config=eight_bits))
    expected = model.item_ranker.score(HISTORIES)
    model.save_pretrained(tmp_path / "full")
    again = AutoModel.from_pretrained(tmp_path / "full")
    assert type(again.get_decoder().layers[0].self_attn.q_proj.weight).__name__ == "Int8Tensor"
    check(again, expected)


def test_a_trainer_neither_trains_nor_loses_it(headed, processor_of, tmp_path: Path) -> None:
    expected, processor = headed.item_ranker.score(HISTORIES), processor_of("llava")
    assert not any("item_ranker" in name for name, _ in [*headed.named_parameters(), *headed.named_buffers()])
    batch = processor([User("ships")], [Candidate(title="One")], labels=[1])
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], save_strategy="no", use_cpu=DEVICE.type == "cpu"
    )
    trainer = Trainer(headed, arguments, train_dataset=[{}], data_collator=lambda rows: dict(batch))
    trainer.train()
    check(headed, expected)
    trainer.save_model(str(tmp_path / "trained"))
    check(AutoModel.from_pretrained(tmp_path / "trained"), expected)


def test_code_of_the_repository_brings_it_where_the_package_is_not_installed(headed, tmp_path: Path) -> None:
    headed.save_pretrained(tmp_path / "model")
    code = WITHOUT_PACKAGE + (
        "import sys\nfrom transformers import AutoModel\n"
        "model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        f"print(*model.item_ranker.score({HISTORIES}).flatten().tolist())"
    )
    own = {"HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        env={**os.environ, **own},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    scores = torch.tensor([float(part) for part in done.stdout.splitlines()[-1].split()])
    torch.testing.assert_close(scores, headed.item_ranker.score(HISTORIES).flatten(), atol=1e-5, rtol=0)
