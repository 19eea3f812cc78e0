"""What transformers' own common tests ask of a model and its configuration, on every family.

Elsewhere in this folder are of `ModelTesterMixin`: batching equivalence, eager against sdpa, gradient checkpointing,
missing keys of a plain backbone, LoRA; of `GenerationTesterMixin`: cached against uncached, left padding. Not asked
are tests for what no backbone of ours has (feed-forward chunking, resizable position embeddings) or what needs several
GPUs (parallel and offloaded execution, flash attention).
"""

import copy
import json
from pathlib import Path

import pytest
import torch
from devices import DEVICE
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, draw_image
from transformers import AutoConfig, BatchFeature, PreTrainedConfig

from mllm_msr import Candidate, MllmMsrConfig, MllmMsrForRecommendation, MllmMsrProcessor, User

FAMILY = pytest.mark.parametrize("name", FAMILIES)


def pairs(processor: MllmMsrProcessor, labels: list[int] | None = None, image: bool = True) -> BatchFeature:
    first = Candidate(title="One", text="about ships", image=draw_image(1) if image else None)
    return processor([User("likes quiet red films"), User()], [first, Candidate(title="Two")], labels=labels).to(DEVICE)


# ---- configuration ---------------------------------------------------------------------------------------------------


@FAMILY
def test_configurations_survive_dicts_json_and_files(build, name: str, tmp_path: Path) -> None:
    config = build(name)[0].config
    written = config.to_dict()
    assert MllmMsrConfig.from_dict(written).to_dict() == written
    config.to_json_file(tmp_path / "one.json")
    assert MllmMsrConfig.from_json_file(tmp_path / "one.json").to_json_string() == config.to_json_string()
    config.save_pretrained(tmp_path / "sub" / "folder")
    for read in (
        MllmMsrConfig.from_pretrained(tmp_path / "sub" / "folder"),
        AutoConfig.from_pretrained(tmp_path / "sub", subfolder="folder"),
        copy.deepcopy(config),
    ):
        assert type(read) is MllmMsrConfig and type(read.vlm_config) is type(config.vlm_config)
        kept = {**read.to_dict(), "_name_or_path": written["_name_or_path"]}
        kept.pop("auto_map", None)  # of a folder only
        kept["vlm_config"]["_name_or_path"] = written["vlm_config"]["_name_or_path"]
        assert kept == written


def test_configurations_have_the_common_attributes(build) -> None:
    assert MllmMsrConfig().vlm_config is None  # as transformers asks; the model refuses it
    config = build("llava")[0].config
    config.output_hidden_states = True
    changed = MllmMsrConfig(vlm_config=config.vlm_config.to_dict(), id2label={0: "No", 1: "Yes"}, custom=3)
    assert isinstance(changed.vlm_config, PreTrainedConfig) and changed.num_labels == 2 and changed.custom == 3
    assert config.get_text_config() is config.vlm_config.text_config
    assert MllmMsrConfig.from_dict(config.to_dict()).output_hidden_states


# ---- weights ---------------------------------------------------------------------------------------------------------


@FAMILY
def test_what_is_saved_is_loaded_and_nothing_else(build, name: str, tmp_path: Path) -> None:
    model, processor = build(name)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    files = {path.suffix for path in tmp_path.iterdir() if path.is_file()}
    assert files <= {".safetensors", ".json", ".py"}, "nothing is pickled"
    again, loading = MllmMsrForRecommendation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not again.training and again.config.answer_token_ids == model.config.answer_token_ids
    state, other = model.state_dict(), again.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)
    torch.testing.assert_close(again.score(**pairs(processor)).logits, model.score(**pairs(processor)).logits)


def test_pickled_weights_are_not_read(build, tmp_path: Path) -> None:
    model, _ = build("llava")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        MllmMsrForRecommendation.from_pretrained(tmp_path, use_safetensors=True)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_loading_says_what_it_lacks_and_refuses_other_shapes(build, name: str, tmp_path: Path) -> None:
    model, _ = build(name)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    key = next(key for key in weights if "q_proj" in key and "vision" not in key)
    save_file({k: v for k, v in weights.items() if k != key} | {"else": torch.ones(1)}, tmp_path / "model.safetensors")
    _, loading = MllmMsrForRecommendation.from_pretrained(tmp_path, output_loading_info=True)
    assert len(loading["missing_keys"]) == 1 and loading["unexpected_keys"] == {"else"}
    save_file(weights | {key: torch.ones(3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="ismatch"):
        MllmMsrForRecommendation.from_pretrained(tmp_path)
    _, loading = MllmMsrForRecommendation.from_pretrained(
        tmp_path, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert len(loading["mismatched_keys"]) == 1


@FAMILY
def test_embeddings_can_be_resized_and_tied(build, name: str, tmp_path: Path) -> None:
    model, processor = build(name)
    batch = pairs(processor)
    before = model.score(**batch).logits
    size = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(size + 7, mean_resizing=False)
    text = model.config.get_text_config()
    assert text is model.config.vlm_config.get_text_config() is model.backbone.config.get_text_config()
    assert model.get_input_embeddings().num_embeddings == text.vocab_size == size + 7
    assert model.get_output_embeddings().weight.shape[0] == size + 7
    torch.testing.assert_close(model.score(**batch).logits, before)
    model.save_pretrained(tmp_path)
    again = MllmMsrForRecommendation.from_pretrained(tmp_path)
    assert again.get_input_embeddings().num_embeddings == again.config.get_text_config().vocab_size == size + 7
    for one in (model, again):
        tied = one.get_input_embeddings().weight is one.get_output_embeddings().weight
        assert tied == one.config.vlm_config.tie_word_embeddings
    torch.testing.assert_close(again.score(**batch).logits, before)
    new = torch.nn.Embedding(5, 32, device=DEVICE)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new is model.backbone.get_input_embeddings()


@FAMILY
def test_converts_to_half_and_back(build, name: str) -> None:
    model, processor = build(name)
    model.half()
    assert {value.dtype for value in model.parameters()} == {torch.float16}
    assert {value.dtype for value in model.float().parameters()} == {torch.float32}
    assert model.to(torch.bfloat16).dtype == torch.bfloat16
    scores = model.score(**pairs(processor))
    assert scores.logits.dtype == scores.probabilities.dtype == torch.float32


# ---- forward and backward --------------------------------------------------------------------------------------------


@FAMILY
def test_attentions_and_hidden_states_have_their_shapes(build, name: str) -> None:
    model, processor = build(name, attn_implementation="eager")
    batch = pairs(processor)
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True, output_attentions=True, use_cache=True)
        bare = model(**batch, use_cache=False)
        listed = model(**batch, return_dict=False)
        last = model(**batch, logits_to_keep=1).logits
    rows, length = batch["input_ids"].shape
    assert [states.shape for states in output.hidden_states] == [(rows, length, 32)] * 3
    assert [weights.shape for weights in output.attentions] == [(rows, 4, length, length)] * 2
    assert output.past_key_values.get_seq_length() == length and bare.past_key_values is None
    assert bare.hidden_states is None and bare.attentions is None
    assert isinstance(listed, tuple) and torch.equal(listed[0], bare.logits)
    torch.testing.assert_close(last, bare.logits[:, -1:])
    torch.testing.assert_close(output.logits, bare.logits)


@FAMILY
def test_a_cache_continues_a_prompt(build, name: str) -> None:
    model, processor = build(name)
    batch = pairs(processor, image=False)
    ids, mask = batch["input_ids"][:1], batch["attention_mask"][:1]
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask).logits[:, -1]
        some = model(input_ids=ids[:, :-3], attention_mask=mask[:, :-3], use_cache=True)
        rest = model(input_ids=ids[:, -3:], attention_mask=mask, past_key_values=some.past_key_values).logits[:, -1]
    torch.testing.assert_close(rest, whole, atol=1e-5, rtol=1e-5)


@FAMILY
def test_embeddings_may_stand_for_tokens(build, name: str) -> None:
    model, processor = build(name)
    batch = pairs(processor, image=False)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(batch["input_ids"])
        given = model(inputs_embeds=embedded, attention_mask=batch["attention_mask"]).logits[:, -1]
        expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, -1]
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)


@FAMILY
def test_every_weight_that_is_used_is_trained_the_same_when_checkpointed(build, name: str) -> None:
    model, processor = build(name)
    batch = pairs(processor, [1, 0])
    model.train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**batch).loss.backward()
        return {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}

    plain = gradients()
    decoder = {id(value) for value in model.get_decoder().parameters()}
    assert decoder <= {id(value) for key, value in model.named_parameters() if plain.get(key, torch.zeros(1)).any()}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = gradients()
    assert plain.keys() == again.keys()
    for key, value in again.items():
        torch.testing.assert_close(value, plain[key], atol=1e-6, rtol=1e-4)
    model.gradient_checkpointing_disable()
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_forward_compiles_in_one_graph(build, name: str) -> None:
    """`benchmarks/families.py` has them all; some cut images by the values of tensors, which breaks graphs."""
    model, processor = build(name)
    batch = pairs(processor, image=name == "llava")
    torch.compiler.reset()
    with torch.no_grad():
        expected = model(**batch).logits  # also lets transformers put up its hooks, which cannot be traced
        compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
        torch.testing.assert_close(compiled(**batch).logits, expected, atol=1e-5, rtol=1e-5)


# ---- where the weights go --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", "cpu"], ids=str)
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_device_map_and_dtype_pass_through(build, name: str, device_map: object, tmp_path: Path) -> None:
    plain, processor = build(name)
    model, _ = build(name, device_map=device_map, dtype="bfloat16")
    place = "cuda" if device_map == "auto" and torch.cuda.is_available() else "cpu"
    assert {(value.device.type, value.dtype) for value in model.parameters()} == {(place, torch.bfloat16)}
    assert json.loads(model.config.to_json_string())["dtype"] == "bfloat16"
    model.save_pretrained(tmp_path)
    again = MllmMsrForRecommendation.from_pretrained(tmp_path, device_map=device_map)
    assert again.dtype == torch.bfloat16
    wide = MllmMsrForRecommendation.from_pretrained(tmp_path, device_map=device_map, dtype=torch.float32)
    scores, expected = (each.score(**pairs(processor)).logits.cpu() for each in (wide, plain))
    torch.testing.assert_close(scores, expected, atol=0.3, rtol=0.1)


def test_layers_may_live_on_disk(build, tmp_path: Path) -> None:
    model, processor = build("llava")
    model.save_pretrained(tmp_path / "model")
    places = {"backbone.model.vision_tower": "disk", "backbone.model.multi_modal_projector": "cpu"}
    places |= {"backbone.model.language_model": "cpu", "backbone.lm_head": "cpu"}
    spread = MllmMsrForRecommendation.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "rest"
    )
    assert spread.hf_device_map == places
    batch = pairs(processor)
    torch.testing.assert_close(spread.score(**batch.to("cpu")).logits.cpu(), model.score(**batch).logits.cpu())
