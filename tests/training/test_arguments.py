"""Flags: known by name and type, whole in a recipe, and honoured or refused before anything is loaded."""

import runpy
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import yaml
from trl import ModelConfig, SFTConfig

from mllm_msr import stages
from mllm_msr.records.recipe import backbone_path, demo_recipe, load_recipe
from mllm_msr.training import dpo, sft
from mllm_msr.training.arguments import RecommenderArguments, check_flags, effective_flags
from mllm_msr.training.unsupported import UNSUPPORTED, WITH_WHOLE_TASKS, supports_bfloat16

RECIPES = [*sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")), demo_recipe()]
NAMED = {"model_name_or_path": "demo", "dataset_name": "run"}
ASKED = {  # a value that asks for something
    "max_length": 8,
    "truncation_mode": "keep_end",
    "eos_token": "</s>",
    "pad_token": "</s>",
    "chat_template_path": "org/name",
    "dataset_text_field": "content",
    "completion_only_loss": False,
    "eval_packing": True,
    "packing_strategy": "wrapped",
    "pad_to_multiple_of": 8,
    "dataset_kwargs": {"add_special_tokens": False},
    "dataset_num_proc": 2,
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "tokens",
    "model_init_kwargs": {"device_map": "auto"},
    "liger_kernel_config": {"rope": True},
    "lora_task_type": "SEQ_CLS",
    "label_names": ["label"],
    "include_for_metrics": ["loss"],
    "hub_strategy": "checkpoint",
    "precompute_ref_batch_size": 4,
    "ld_alpha": 0.5,
    "label_smoothing_factor": 0.1,
    "loss_type": "dft",
    "router_aux_loss_coef": 0.1,
    "include_num_input_tokens_seen": True,
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_flag_without_effect_is_refused_with_what_to_use_instead(name):
    script = sft if name in {one.name for kind in (SFTConfig, ModelConfig) for one in fields(kind)} else dpo
    flags = {**NAMED, "bf16": False, name: ASKED.get(name, True)}
    with pytest.raises(ValueError, match=f"--{name} ") as error:
        script.parse([], **flags)
    assert UNSUPPORTED[name].reason in str(error.value)
    script.parse([], **{**flags, name: UNSUPPORTED[name].neutral[-1]})


@pytest.mark.parametrize("name", WITH_WHOLE_TASKS)
@pytest.mark.parametrize("whole_tasks", [{"packed": True}, {"interaction": "late"}])
def test_what_the_loss_of_whole_tasks_has_not_is_refused_with_it(name, whole_tasks):
    with pytest.raises(ValueError, match=f"--{name} .*--packed or --interaction late"):
        sft.parse([], **NAMED, **whole_tasks, **{name: ASKED[name]})
    sft.parse([], **NAMED, **{name: ASKED[name]})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lora_modules_to_save": ["lm_head"], "use_peft": True}, "modules_to_save .* add --merge_adapter"),
        ({"early_stopping_patience": 2}, "give --eval_strategy and --metric_for_best_model"),
        ({"eval_on_start": True}, "give --eval_strategy"),
        ({"load_best_model_at_end": True}, "--load_best_model_at_end: give --eval_strategy"),
        ({"popular_negatives": True}, "give --negatives_per_positive or --hard_negatives"),
        ({"hard_negatives": 60}, "raise --hard_negatives_pool"),
        ({"negatives_per_positive": 1, "dataloader_persistent_workers": True}, "negatives of the first epoch"),
        ({"positive_weight": 2.0, "loss_type": "dft"}, "cannot be combined with --positive_weight"),
        ({"bf16": True}, "no GPU that computes in bfloat16; give --bf16 false"),
        ({"fp16": True}, "float16 needs a GPU; give --fp16 false"),
        ({"use_cpu": True, "activation_offloading": True}, "no GPU whose memory it would save"),
        ({"gradient_accumulation_steps": 0}, "training.gradient_accumulation_steps=0: must be at least 1"),
        ({"per_device_train_batch_size": -1}, "must be at least 1"),
        ({"lora_alpha": 0}, "must be at least 1"),
        ({"prompt_max_length": 0}, "must be at least 1"),
        ({"interaction": "late", "pairs_per_user": 0}, "must be at least 1"),
        ({"interaction": "late", "item_memory_from": 1.0}, "--item_memory_from 1.0: must be at least 0 and below 1"),
        ({"item_memory_from": 0.5}, "--item_memory_from needs --interaction late"),
        ({"user_limit": 40}, "--user_limit needs --interaction late"),
        ({"item_limit": 40, "packed": True}, "--item_limit needs --interaction late"),
        ({"lr_scheduler_kwargs": {"power": 2}}, "--lr_scheduler_type linear takes none; leave"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"pow": 2}}, "no 'pow'; did you mean 'power'"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": '{"power": "x"}'}, "polynomial refuses them"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, r"cosine_with_min_lr refuses them \(One of min_lr"),
        ({"gradient_checkpointing_kwargs": {"reentrant": True}}, "no 'reentrant'; did you mean 'use_reentrant'"),
        ({"accelerator_config": {"split_batch": True}}, "no 'split_batch'; did you mean 'split_batches'"),
        ({"seed": -1}, "training.seed=-1: must be at least 0"),
        ({"warmup_steps": float("inf")}, "training.warmup_steps=inf: must be at least 0, and finite"),
        ({"max_grad_norm": float("nan")}, "training.max_grad_norm=nan: must be at least 0"),
        ({"lora_dropout": 2.0}, "training.lora_dropout=2.0: must be at most 1"),
        ({"save_steps": 0}, "training.save_steps=0: must be at least 0.001"),
        ({"optim_args": "fast"}, "--optim_args fast: give name=value pairs"),
        ({"optim_args": "rank=4"}, "--optim_args rank=4: --optim adamw_torch_fused takes none"),
        ({"optim_target_modules": "all-linear"}, "--optim_target_modules: --optim adamw_torch_fused has none"),
        ({"bf16_full_eval": True}, "--bf16_full_eval: evaluations during training compute as training does"),
        ({"lora_r": 8}, "--lora_r 8: give --use_peft as well"),
        ({"use_dora": True}, "--use_dora True: give --use_peft as well"),
        ({"hard_negatives_pool": 9}, "--hard_negatives_pool 9: give --hard_negatives as well"),
        ({"packed": True, "pair_loss": "listwise", "positive_weight": 2.0}, "--pair_loss listwise weighs no answers"),
        ({"max_steps": 0}, "nothing would be trained"),
        ({"num_train_epochs": 0}, "nothing would be trained"),
        ({"item_noun": " "}, "--item_noun: is empty"),
        ({"prompts": "likes {{ preference }}"}, "--prompts likes .*: give a JSON object"),
        ({"prompts": "[1]"}, "--prompts .*: give a JSON object"),
        ({"gradient_checkpointing_kwargs": "use_reentrant"}, "give a JSON object"),
        ({"positive_weight": "nan"}, "give a number above 0"),
        ({"positive_weight": "inf"}, "give a number above 0"),
        ({"resume_from_checkpoint": "true"}, "goes on from the last whole checkpoint by itself"),
        ({"metric_for_best_model": "eval_ndgc@5"}, "no evaluation finds it; give one of eval_loss, eval_auc"),
        ({"model_name_or_path": ".", "model_revision": "v2"}, "--model_revision v2: a folder has no revisions"),
    ],
)
def test_flags_that_cannot_be_honoured_together_or_here_are_refused(flags, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        sft.parse([], **{**NAMED, "model_name_or_path": "org/name", **flags})


@pytest.mark.parametrize("flag", ["--seed", "--learning_rate", "--gradient_accumulation_steps"])
def test_numbers_of_a_command_line_are_refused_by_the_flags_name(flag):
    with pytest.raises(ValueError, match=rf"^{flag} -1(\.0)?: must be at least [01], and finite$"):
        sft.parse([f"{flag}=-1"], **{**NAMED, "model_name_or_path": "org/name"})


def test_flags_of_dpo_are_read():
    _, training_args, _ = dpo.parse([], **NAMED, loss_type="ipo", beta=1)
    assert training_args.loss_type == ["ipo"] and training_args.beta == 1.0
    dpo.parse([], **NAMED, loss_type="robust", label_smoothing=0.1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "give --label_smoothing, which is DPO's own"),
        ({"label_smoothing": 0.1}, "--label_smoothing 0.1: --loss_type sigmoid has none; these have: aot,"),
        ({"loss_type": "exo_pair"}, "give --label_smoothing above 0"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "must be below 0.5"),
        ({"loss_type": "sigmoit"}, "--loss_type sigmoit: is not known; there are aot,"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "are 1, for 2 of --loss_type .sigmoid, sft."),
        ({"loss_type": "apo_zero", "f_divergence_type": "js_divergence"}, "--f_divergence_type js_divergence: goes"),
        ({"f_divergence_type": "kl"}, "--f_divergence_type kl: give one of reverse_kl, "),
        ({"loss_type": "aot", "use_weighting": True}, "--use_weighting: --loss_type aot sorts"),
        ({"sync_ref_model": True, "use_peft": True}, "--sync_ref_model: with --use_peft"),
        ({"ref_model_sync_steps": 8}, "--ref_model_sync_steps 8: give --sync_ref_model as well"),
        ({"f_alpha_divergence_coef": 0.7}, "give --f_divergence_type alpha_divergence as well"),
        ({"discopop_tau": 0.1}, "give --loss_type discopop as well"),
    ],
)
def test_flags_of_dpo_that_trl_would_ignore_or_refuse_in_its_own_words_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        dpo.parse([], **NAMED, **flags)


def test_an_adapter_that_is_said_not_to_be_needs_no_other_flag_changed(monkeypatch):
    recipe = {**NAMED, "lora_r": 8, "use_peft": True}
    assert not sft.parse(["--use_peft", "false"], **recipe)[2].use_peft
    assert effective_flags({})["use_peft"] is False
    with pytest.raises(ValueError, match="--do_train false: training is all"):
        sft.parse(["--do_train", "false"], **NAMED)
    assert sft.parse(["--do_train"], **NAMED)


def test_whole_modules_are_saved_with_whole_weights():
    whole = {"lora_modules_to_save": ["lm_head"], "use_peft": True}
    sft.parse([], **NAMED, **whole)  # a backbone in a folder
    sft.parse([], **{**NAMED, "model_name_or_path": "org/name"}, **whole, merge_adapter=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"per_device_train_batch_size": 0}, "training.per_device_train_batch_size=0: must be at least 1"),
        ({"lora_r": 0}, "training.lora_r=0: must be at least 1"),
        ({"learning_rate": float("nan")}, "training.learning_rate=nan: must be at least 0, and finite"),
        ({"seed": 2**40}, "training.seed=1099511627776: must be at most 4294967295"),
        ({"report_to": "wandbb"}, "training.report_to: unknown 'wandbb'; did you mean 'wandb'"),
        ({"lerning_rate": 0.1}, "training: unknown key 'lerning_rate'; did you mean 'learning_rate'"),
        ({"negative_per_positive": 1}, "did you mean 'negatives_per_positive'"),
        ({"max_steps": "ten"}, "training.max_steps='ten': must be a whole number"),
        ({"bf16": "yes"}, "training.bf16='yes': must be true or false or null"),
        ({"lr_scheduler_type": "cosin"}, "training.lr_scheduler_type='cosin': must be one of linear, cosine"),
        ({"dtype": "bf16"}, "training.dtype='bf16': must be one of auto, bfloat16"),
        ({"interaction": "early"}, "must be one of 'joint', 'late'"),
        ({"pair_loss": "listwise"}, "add --packed"),
        ({"positive_weight": 0}, "give a number above 0, or 'balanced'"),
    ],
)
def test_a_mistake_in_a_recipe_s_training_section_is_named(flags, message):
    with pytest.raises(ValueError, match=message):
        effective_flags(flags)


def test_values_are_read_as_yaml_has_them():
    section = yaml.safe_load(
        "{learning_rate: 1e-4, eval_strategy: no, use_peft: true, lora_target_modules: all-linear, seed: null}"
    )
    flags = effective_flags(section)
    assert flags["learning_rate"] == 1e-4 and flags["eval_strategy"] == "no" and flags["seed"] == 42
    assert flags["lora_target_modules"] == ["all-linear"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_effective_flags_are_whole_and_change_nothing(path, recwarn):
    section = load_recipe(path).training
    flags = effective_flags(section)
    assert not [warning for warning in recwarn if "training will stop" in str(warning.message)]
    names = {one.name for kind in (RecommenderArguments, SFTConfig, ModelConfig) for one in fields(kind)}
    own = {"dataset_name", "output_dir", "item_noun", "prompts", "debug"}
    assert flags.keys() == names - UNSUPPORTED.keys() - own
    assert yaml.safe_load(yaml.safe_dump(flags)) == flags
    assert yaml.safe_dump(effective_flags(flags)) == yaml.safe_dump(flags)  # 0 is not 0.0: else training is done again
    # the recipes of large models ask for bfloat16, and some for trackio, which is an extra
    machine = {"dataset_name": "run", "use_cpu": True, "report_to": "none"}
    if not section.get("model_name_or_path"):  # of the head alone
        machine["model_name_or_path"] = "demo"
    given, effective = (sft.parse([], **{**some, **machine}) for some in (section, flags))
    assert given[0] == effective[0] and given[1].to_dict() == effective[1].to_dict() and given[2] == effective[2]


def test_a_flag_that_stops_training_stays_in_the_section_with_a_warning():
    with pytest.warns(UserWarning, match="training will stop: --packing True"):
        flags = effective_flags({"packing": True})
    assert flags["packing"] is True
    with pytest.raises(ValueError, match="--packed"):
        check_flags({**flags, **NAMED})


def test_what_the_trainer_itself_refuses_is_known_before_the_first_stage():
    flags = effective_flags({"model_name_or_path": "demo", "use_cpu": True, "report_to": "none"})
    check_flags(flags)
    for name, value, message in (
        ("load_best_model_at_end", True, "requires the save and eval strategy to match"),
        ("accelerator_config", "nowhere.json", "nowhere.json"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            check_flags({**flags, "eval_strategy": "epoch", name: value})


def test_bfloat16_is_the_default_where_the_machine_has_it(monkeypatch):
    _, training_args, _ = sft.parse([], **NAMED)
    assert training_args.bf16 == supports_bfloat16(False)
    assert not supports_bfloat16(use_cpu=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert not supports_bfloat16(use_cpu=False)
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert supports_bfloat16(use_cpu=False) is native


def test_the_command_line_is_over_the_flags_and_these_over_a_recipe(tmp_path):
    training = {"seed": 1, "max_steps": 1, "use_peft": True, "lora_r": 1, **NAMED}
    recipe = {"name": "x", "source": {"type": "demo"}, "item_noun": "mug", "training": training}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    line = ["--config", str(tmp_path / "recipe.yaml"), "--max_steps", "3"]
    script_args, training_args, model_args = sft.parse(line, max_steps=2, lora_r=2)
    assert (training_args.seed, training_args.max_steps, model_args.lora_r) == (1, 3, 2)
    assert script_args.item_noun == "mug"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--max_lenght", "8"], "sft.py: unknown argument '--max_lenght'; did you mean 'max_length'?"),
        (["--max_steps", "ten"], "sft.py: argument --max_steps/--max-steps: invalid int value: 'ten'"),
        (["--config", "none.yaml"], "sft.py: none.yaml: No such file or directory"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(line, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [sft.__file__, *line])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(sft.__file__, run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == message


@pytest.mark.parametrize(
    ("script", "more", "message"),
    [
        (sft, ["--dataset_name", "/nowhere/run"], "/nowhere/run"),
        (sft, ["--model_name_or_path", "/nowhere/model"], "/nowhere/model"),
        (sft, ["--load_in_4bit"], "bitsandbytes"),
        (
            sft,
            ["--use_peft", "--lora_modules_to_save", "lm_haed"],
            "lm_haed: the model has none",
        ),
        (sft, ["--use_peft", "--lora_target_modules", "q_porj"], "--lora_target_modules q_porj: the model has none"),
        (sft, ["--resume_from_checkpoint", "nowhere"], "--resume_from_checkpoint nowhere: there is no such folder"),
        (sft, ["--per_device_train_batch_size", "9999", "--dataloader_drop_last", "true"], "nothing was trained"),
        (sft, ["--learning_rate", "1e30"], "training has diverged"),
        (dpo, ["--model_name_or_path", "/nowhere/model"], "/nowhere/model"),
        (dpo, ["--model_name_or_path", str(Path(__file__).parent)], "is no recommender: it has no config.json"),
    ],
)
def test_what_stops_a_training_is_one_sentence(script, more, message, small_run, tmp_path, monkeypatch, capsys):
    named = ["--dataset_name", str(small_run.folder), "--output_dir", str(tmp_path), "--model_name_or_path"]
    quick = ["--max_steps", "2", "--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no"]
    line = [script.__file__, *named, backbone_path("demo"), *quick, "--gradient_checkpointing", "false", *more]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(script.__file__, run_name="__main__")
    assert stop.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"{Path(script.__file__).name}: ") and message in last and "unexpected" not in last


def test_training_works_under_the_defaults_of_trl_alone(small_run, tmp_path):
    trainer = sft.train(
        *sft.parse(
            [], model_name_or_path="demo", dataset_name=str(small_run.folder), output_dir=str(tmp_path), max_steps=1
        )
    )
    assert trainer.state.global_step == 1 and trainer.args.gradient_checkpointing


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"push_to_hub": True}, "training.push_to_hub: .*mllm-msr publish"),
        ({"output_dir": "elsewhere"}, "training.output_dir: .* its own folder"),
        ({"model_name_or_path": None}, "training.model_name_or_path: name the model to fine-tune"),
        ({"padding_free": True}, "--padding_free True: tasks are packed by --packed"),
    ],
)
def test_a_run_says_what_its_training_would_refuse_before_its_first_stage(small_run, flags, message):
    recipe = small_run.run.recipe
    with pytest.raises(ValueError, match=message):
        stages.check_training(replace(recipe, training={**recipe.training, **flags}))
    stages.check_training(recipe)


@pytest.mark.parametrize(("said", "on_cpu"), [("true", True), ("false", False), (None, False)])
def test_accelerate_launch_cpu_is_heard(said, on_cpu, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if said:
        monkeypatch.setenv("ACCELERATE_USE_CPU", said)
    _, training, _ = sft.parse([], **NAMED, output_dir="out")
    assert training.use_cpu is on_cpu
