"""Every way of saving and loading scores the same, also where the package is not installed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from devices import DEVICE
from huggingface_hub.errors import HTTPError
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from tiny_models import FAMILIES, WITHOUT_PACKAGE, draw_image, randomise
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    BatchFeature,
    TorchAoConfig,
    pipeline,
)

from mllm_msr import Candidate, MllmMsrForRecommendation, MllmMsrProcessor, User
from mllm_msr.modeling.lora import language_model_lora_targets, without_adapter
from mllm_msr.modeling.naming import naming
from mllm_msr.modeling.ranking import Recommender

FAMILY = pytest.mark.parametrize("name", FAMILIES)
SCORE = """
def score(model, processor):
    from types import SimpleNamespace as Item
    from PIL import Image
    users = [Item(preference="likes ships", recent=[]), Item(preference="", recent=[])]
    first = Item(title="One", text="", image=Image.new("RGB", (40, 30), "red"))
    return model.score(**processor(users, [first, Item(title="Two <image> </s>", text="", image=None)])).logits
"""
LOAD = """
from transformers import AutoModel, AutoProcessor
trust = {"trust_remote_code": True} if "trust" in sys.argv else {}
folders = [argument for argument in sys.argv[1:] if "/" in argument and "=" not in argument]
pinned = dict(argument.split("=") for argument in sys.argv[1:] if "=" in argument)
for folder in folders:
    for revisions in [pinned, {}] if pinned else [{}]:
        model = AutoModel.from_pretrained(folder, **trust, **revisions)
        processor = AutoProcessor.from_pretrained(folder, **trust)
        print("SCORES", *score(model, processor).tolist())
"""
REQUESTS = [
    {"preference": "red", "candidates": [{"title": "A"}, {"title": "B"}]},
    {
        "history": [{"title": "C", "summary": "d"}, {"title": "E"}, {"title": "G"}, {"title": "H"}],
        "candidates": [{"title": "A"}, {"title": "F"}],
    },
]
RANK = f"""
import json
from transformers import pipeline
rank = pipeline("sequential-recommendation", model=folders[-1], max_new_tokens=4, **trust)
print(json.dumps(rank({REQUESTS}, batch_size=2)))
"""


def score(model: MllmMsrForRecommendation, processor: MllmMsrProcessor) -> torch.Tensor:
    """What ``SCORE`` does in other processes."""
    candidates = [
        Candidate(title="One", image=Image.new("RGB", (40, 30), "red")),
        Candidate(title="Two <image> </s>"),
    ]
    return model.score(**processor([User("likes ships"), User()], candidates)).logits


def run(code: str, *arguments: str, home: Path, **environment: str) -> str:
    """The standard output of a fresh process with its own Hugging Face caches and no network."""
    own = {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules"), "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env={**os.environ, **own}, cwd=home
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def scores(output: str) -> list[torch.Tensor]:
    lines = [line.split()[1:] for line in output.splitlines() if line.startswith("SCORES")]
    return [torch.tensor([float(part) for part in line], device=DEVICE) for line in lines]


def make(path: Path) -> tuple[MllmMsrForRecommendation, MllmMsrProcessor]:
    processor = MllmMsrProcessor.from_backbone(str(path))
    return MllmMsrForRecommendation.from_backbone(path, processor=processor), processor


def adapt(model: MllmMsrForRecommendation) -> None:
    config = LoraConfig(r=2, target_modules=language_model_lora_targets(model), init_lora_weights=False)
    get_peft_model(model, config).eval()


def pairs(processor: MllmMsrProcessor) -> BatchFeature:
    candidates = [Candidate(title="One", text="t", image=draw_image(1)), Candidate(title="Two")]
    return processor([User("ships"), User()], candidates).to(DEVICE)


@FAMILY
def test_every_kind_of_repository_scores_the_same(backbone, name: str, tmp_path: Path) -> None:
    model, processor = make(backbone(name))
    batch = pairs(processor)
    plain = model.score(**batch).logits
    model.save_pretrained(tmp_path / "full")
    adapt(model)
    expected = model.score(**batch).logits
    assert (expected - plain).abs().max() > 1e-3

    def check(other: MllmMsrForRecommendation, wanted: torch.Tensor = expected) -> None:
        assert not other.training
        torch.testing.assert_close(other.score(**batch).logits, wanted, atol=1e-5, rtol=1e-5)

    check(AutoModel.from_pretrained(tmp_path / "full"), plain)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModel.from_pretrained(tmp_path / "adapter")
    check(loaded)
    loaded.save_pretrained(tmp_path / "again")
    check(AutoModelForMultimodalLM.from_pretrained(tmp_path / "again"))
    loaded.merge()
    check(loaded)
    loaded.save_pretrained(tmp_path / "merged")
    check(AutoModel.from_pretrained(tmp_path / "merged"))
    loaded.export_backbone(tmp_path / "exported")
    check(MllmMsrForRecommendation.from_backbone(tmp_path / "exported", processor=processor))

    stock = AutoModelForImageTextToText.from_pretrained(backbone(name))
    stock = PeftModel.from_pretrained(stock, tmp_path / "adapter" / "adapter").eval()
    with torch.no_grad():
        answer = stock(**batch).logits[:, -1]
    torch.testing.assert_close(model.answer_logits(answer), expected, atol=1e-5, rtol=0)


@FAMILY
def test_a_trained_recommender_can_be_the_start_of_training(backbone, name: str, tmp_path: Path) -> None:
    model, processor = make(backbone(name))
    adapt(model)
    expected = score(model, processor)
    model.save_pretrained(tmp_path / "adapter")
    model.merge().save_pretrained(tmp_path / "whole")
    for folder in (tmp_path / "adapter", tmp_path / "whole"):
        processor.save_pretrained(folder)
        prompts = {"recommendation": processor.prompts["recommendation"] + " Once more."}
        again = MllmMsrProcessor.from_backbone(str(folder), prompts=prompts, item_noun="film", max_length=400)
        assert again.prompts["recommendation"].endswith("Once more.") and again.item_noun == "film"
        again.prompts, again.item_noun = processor.prompts, processor.item_noun
        start = MllmMsrForRecommendation.from_backbone(str(folder), processor=again).eval()
        assert torch.allclose(score(start, again), expected, atol=1e-4)
        assert start.config.adapter is None and start.config.backbone_name_or_path is None
        adapt(start)  # a fresh adapter goes on top


@FAMILY
def test_weights_trained_whole_beside_an_adapter_are_saved_loaded_and_merged(backbone, name: str, tmp_path) -> None:
    model, processor = make(backbone(name))
    batch = pairs(processor)
    plain = model.score(**batch).logits
    targets = language_model_lora_targets(model)
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, modules_to_save=["lm_head"])
    get_peft_model(model, config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(-1)
    expected = model.score(**batch).logits
    assert (expected - plain).abs().min() > 1e-3
    with without_adapter(model):
        torch.testing.assert_close(model.score(**batch).logits, plain)
    model.save_pretrained(tmp_path / "adapter")
    loaded = MllmMsrForRecommendation.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(loaded.score(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    loaded.merge().save_pretrained(tmp_path / "merged")
    merged = MllmMsrForRecommendation.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged.score(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    assert not [key for key in merged.state_dict() if "modules_to_save" in key or "lora" in key]


def test_an_adapter_repository_holds_the_adapter_and_no_other_weights(backbone, tmp_path: Path) -> None:
    model, processor = make(backbone("llava"))
    adapt(model)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors")} == {
        "adapter/adapter_model.safetensors"
    }
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(backbone("llava"))
    assert settings["target_modules"].startswith("model")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["adapter"] == "adapter" and model.config.adapter is None
    assert config["auto_map"]["AutoModel"] == "modeling_mllm_msr.MllmMsrForRecommendation"
    with pytest.raises(ValueError, match="merge"):
        model.export_backbone(tmp_path / "out")
    model.config.backbone_name_or_path = None
    with pytest.raises(ValueError, match="backbone_name_or_path"):
        model.save_pretrained(tmp_path / "out")


def test_a_repository_that_cannot_be_reached_is_named(backbone, tmp_path: Path, monkeypatch) -> None:
    model, _ = make(backbone("llava"))
    adapt(model)
    model.config.backbone_name_or_path = "org/backbone"
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="org/backbone"):
        MllmMsrForRecommendation.from_pretrained(tmp_path)
    for load in (MllmMsrForRecommendation.from_pretrained, MllmMsrForRecommendation.from_backbone):
        with pytest.raises(OSError, match=r"^org/model: "):
            load("org/model")


def test_loads_by_remote_code_where_the_package_is_not_installed(backbone, tmp_path: Path) -> None:
    """A full and an adapter repository, and the pipeline of the latter, in a process of its own."""
    model, processor = make(backbone("llava"))
    model.save_pretrained(tmp_path / "full")
    processor.save_pretrained(tmp_path / "full")
    expected = [score(model, processor)]
    adapt(model)
    expected.append(score(model, processor))
    rank = pipeline("sequential-recommendation", model=model, processor=processor, max_new_tokens=4)
    rank.save_pretrained(tmp_path / "adapter")
    output = run(
        WITHOUT_PACKAGE + SCORE + LOAD + RANK, str(tmp_path / "full"), str(tmp_path / "adapter"), "trust", home=tmp_path
    )
    for there, here in zip(scores(output), expected, strict=True):
        torch.testing.assert_close(there, here, atol=1e-5, rtol=0)
    answers = json.loads(output.splitlines()[-1])
    for there, here in zip(answers, rank(REQUESTS, batch_size=2), strict=True):
        assert [one["title"] for one in there] == [one["title"] for one in here]
        assert [one["logit"] for one in there] == pytest.approx([one["logit"] for one in here], abs=1e-5)


@pytest.mark.parametrize(
    "first",
    [
        "from transformers import AutoModel; import mllm_msr.processing.auto",
        "import mllm_msr, peft, trl; from transformers import Trainer, GenerationMixin; mllm_msr.User",
        "from mllm_msr import MllmMsrProcessor, MllmMsrForRecommendation",
    ],
)
def test_needs_no_trust_once_a_public_name_is_used(backbone, tmp_path: Path, first: str) -> None:
    model, processor = make(backbone("llava"))
    for one in (model, processor):
        one.save_pretrained(tmp_path / "repo")
    output = run(f"import sys\n{first}\n{SCORE}\n{LOAD}", str(tmp_path / "repo"), home=tmp_path)
    torch.testing.assert_close(scores(output)[0], score(model, processor), atol=1e-5, rtol=0)


def test_importing_the_package_loads_nothing_else(tmp_path: Path) -> None:
    code = "import sys, mllm_msr; print(sorted({'torch', 'transformers', 'polars', 'peft'} & set(sys.modules)))"
    assert run(code, home=tmp_path).strip() == "[]"


def hub_repository(home: Path, name: str, commits: dict[str, Path], main: str) -> None:
    """What the Hub's cache holds of a repository with several commits."""
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(main)
    for commit, source in commits.items():
        shutil.copytree(source, folder / "snapshots" / commit)


def test_revisions_of_adapter_and_backbone_are_independent(backbone, tmp_path: Path) -> None:
    """The adapter's old commit is asked for; it pins the backbone's old commit; both repositories have moved on."""
    old, new = "a" * 40, "b" * 40
    base = backbone("llava")
    changed = AutoModelForImageTextToText.from_pretrained(base)
    randomise(changed, seed=1)
    shutil.copytree(base, tmp_path / "changed")
    changed.save_pretrained(tmp_path / "changed")
    hub_repository(tmp_path, "org/base", {old: base, new: tmp_path / "changed"}, main=new)

    model, processor = make(base)
    model.config.backbone_name_or_path, model.config.backbone_revision = "org/base", old
    adapt(model)
    expected = score(model, processor)
    for folder in ("first", "second"):
        model.save_pretrained(tmp_path / folder)
        processor.save_pretrained(tmp_path / folder)
        with torch.no_grad():
            for key, value in model.named_parameters():
                if "lora_" in key:
                    value.neg_() if "lora_A" in key else value.mul_(2)
    hub_repository(tmp_path, "org/adapter", {old: tmp_path / "first", new: tmp_path / "second"}, main=new)
    code = WITHOUT_PACKAGE + SCORE + LOAD + 'print(type(model).from_backbone("org/base").config.backbone_revision)'
    output = run(code, "org/adapter", "trust", f"revision={old}", f"code_revision={new}", home=tmp_path)
    assert output.splitlines()[-1] == new, "a new recommender pins the commit of its backbone"
    pinned, latest = scores(output)
    torch.testing.assert_close(pinned, expected, atol=1e-5, rtol=0)
    assert (latest - expected).abs().max() > 1e-3


def test_quantisation_passes_through(backbone, tmp_path: Path) -> None:
    """Eight-bit weights on the fly; saved, adapted, exported; an adapter alone fits full and quantised backbones."""
    quantization = pytest.importorskip("torchao.quantization")
    eight_bits = TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2))
    full, processor = make(backbone("llava"))
    batch = pairs(processor)
    model = MllmMsrForRecommendation.from_backbone(
        backbone("llava"), processor=processor, quantization_config=eight_bits
    )
    layer = model.get_decoder().layers[0].self_attn.q_proj
    assert type(layer.weight).__name__ == "Int8Tensor" and model.hf_quantizer is not None
    expected = model.score(**batch).logits.cpu()
    torch.testing.assert_close(expected, full.score(**batch).logits.cpu(), atol=0.05, rtol=0)
    model.save_pretrained(tmp_path / "full")
    again = AutoModel.from_pretrained(tmp_path / "full")
    assert type(again.get_decoder().layers[0].self_attn.q_proj.weight).__name__ == "Int8Tensor"
    torch.testing.assert_close(again.score(**batch).logits.cpu(), expected)
    model.export_backbone(tmp_path / "stock")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "stock")
    with torch.no_grad():
        torch.testing.assert_close(model.answer_logits(stock(**batch.to(stock.device)).logits[:, -1]).cpu(), expected)

    adapt(model)
    expected = model.score(**batch).logits.cpu()
    model.save_pretrained(tmp_path / "adapter")
    assert "quantization_config" not in json.loads((tmp_path / "adapter" / "config.json").read_text())
    loaded = AutoModel.from_pretrained(tmp_path / "adapter", quantization_config=eight_bits)
    torch.testing.assert_close(loaded.score(**batch).logits.cpu(), expected)
    whole = AutoModel.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(whole.score(**batch).logits.cpu(), expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_memory_tokens_are_part_of_every_kind_of_repository(backbone, name: str, tmp_path: Path) -> None:
    model, processor = make(backbone(name))
    model.config.interaction, model.config.user_limit, model.config.item_limit = "late", 64, 96
    model.set_item_memory(2)
    items = [Candidate(title="One", text="t", image=draw_image(1)), Candidate(title="Two")]

    def ranked(other: MllmMsrForRecommendation) -> torch.Tensor:
        return torch.tensor([each.logit for each in Recommender(other, processor).rank([User("ships")], items)[0]])

    model.save_pretrained(tmp_path / "full")
    torch.testing.assert_close(ranked(AutoModel.from_pretrained(tmp_path / "full")), ranked(model))
    targets = language_model_lora_targets(model)
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, modules_to_save=["item_memory"])
    before = ranked(model)
    get_peft_model(model, config).eval()
    with torch.no_grad():
        model.item_memory.modules_to_save["default"].weight.mul_(-1)
    expected = ranked(model)
    assert (expected - before).abs().max() > 1e-4
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModel.from_pretrained(tmp_path / "adapter")
    assert loaded.config.item_memory == 2
    torch.testing.assert_close(ranked(loaded), expected)
    loaded.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(ranked(AutoModel.from_pretrained(tmp_path / "again")), expected)
    for other, folder in ((loaded, "merged"), (model, "trained")):
        other.merge().save_pretrained(tmp_path / folder)
        torch.testing.assert_close(ranked(AutoModel.from_pretrained(tmp_path / folder)), expected)


def test_damaged_weights_are_named(build, tmp_path):
    model, _ = build("llava")
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OSError, match=rf"{tmp_path}: its weights are damaged .*: save or download them again"):
        MllmMsrForRecommendation.from_pretrained(tmp_path)


def test_a_connection_that_breaks_off_is_named():
    with (
        pytest.raises(OSError, match=r"org/mugs cannot be fetched from the Hub \(peer closed\): do it again"),
        naming("org/mugs"),
    ):
        raise HTTPError("peer closed")
