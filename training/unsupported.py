"""Flags that mean nothing here or that the machine cannot honour: refused before training, with what to use instead."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from inspect import signature
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.checkpoint import checkpoint
from transformers import SchedulerType, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils import is_torch_bf16_gpu_available, strtobool
from trl import ModelConfig

from mllm_msr.evaluation.metrics import METRICS
from mllm_msr.records.recipe import backbone_path
from mllm_msr.records.sections import LARGEST_SEED
from mllm_msr.records.typed import did_you_mean


@dataclass(frozen=True)
class Unsupported:
    """A flag without effect.

    Args:
        neutral: the values that ask for nothing, that of the trainer first.
        reason: why it has no effect, and what to use in its place.
    """

    neutral: tuple[Any, ...]
    reason: str


_PACK = "tasks are packed by --packed, and always with --interaction late"
_PROMPTS = "prompts are written by this project's processor in the backbone's own chat template; change --prompts"
_ONE_ANSWER = "the answer is the one supervised token of every example; leave the flag out"
_LOADING = "the model is loaded by --dtype, --attn_implementation, --model_revision and the flags of quantisation"
_LENGTH = "prompts are shortened, and never cut, by --prompt_max_length of sft.py"
_BATCHES = "examples become tokens when their batch is made; give --dataloader_num_workers for more processes"
_METRICS = "an evaluation computes the loss and the ranking metrics, and keeps no predictions; leave the flag out"
_PUSH = "the finished model is sent once, at the end, by --push_to_hub; leave the flag out"
_KERNELS = "these kernels do not know the recommender's model type; choose the attention by --attn_implementation"

UNSUPPORTED: dict[str, Unsupported] = {
    # the text of examples
    "max_length": Unsupported((None,), _LENGTH),
    "truncation_mode": Unsupported(("keep_start",), _LENGTH),
    "chat_template_path": Unsupported((None,), _PROMPTS),
    "dataset_text_field": Unsupported(("text",), _PROMPTS),
    "eos_token": Unsupported((None,), _PROMPTS),
    "pad_token": Unsupported((None,), _PROMPTS),
    "completion_only_loss": Unsupported((None, True), _ONE_ANSWER),
    "assistant_only_loss": Unsupported((False,), _ONE_ANSWER),
    # batches
    "packing": Unsupported((False,), _PACK),
    "eval_packing": Unsupported((None, False), _PACK),
    "packing_strategy": Unsupported(("bfd",), _PACK),
    "padding_free": Unsupported((False,), _PACK),
    "pad_to_multiple_of": Unsupported(("auto", None), "batches are as long as their longest prompt; leave it out"),
    "dataset_kwargs": Unsupported((None,), _BATCHES),
    "dataset_num_proc": Unsupported((None,), _BATCHES),
    "remove_unused_columns": Unsupported((False,), "prompts are made of the columns, so all stay; leave it out"),
    "shuffle_dataset": Unsupported((False,), "every epoch is shuffled by --seed or --data_seed; leave the flag out"),
    "train_sampling_strategy": Unsupported(
        ("random", "sequential"), "lengths are not known before a batch is made; give random or sequential"
    ),
    "length_column_name": Unsupported(("length",), "lengths are not known before a batch is made; leave it out"),
    # the model
    "model_init_kwargs": Unsupported((None,), _LOADING),
    "trust_remote_code": Unsupported((False,), "backbones are models that transformers itself has; leave it out"),
    "use_liger_kernel": Unsupported((False,), _KERNELS),
    "liger_kernel_config": Unsupported((None,), _KERNELS),
    "lora_task_type": Unsupported(("CAUSAL_LM",), "the recommender is a causal language model; leave the flag out"),
    # evaluation, and what is sent to the Hub
    "label_names": Unsupported((None,), _METRICS),
    "include_for_metrics": Unsupported(([],), _METRICS),
    "batch_eval_metrics": Unsupported((False,), _METRICS),
    "do_predict": Unsupported((False,), "rankings are made by `mllm-msr rank`; leave the flag out"),
    "hub_strategy": Unsupported(("every_save", "end"), _PUSH),
    "hub_always_push": Unsupported((False,), _PUSH),
    # of DPOConfig
    "precompute_ref_log_probs": Unsupported(
        (False,), "the reference is computed with each batch, as negatives may change; leave the flag out"
    ),
    "precompute_ref_batch_size": Unsupported((None,), "the reference is computed with each batch; leave it out"),
    "ld_alpha": Unsupported((None,), "it weighs what a longer answer has more, and both answers are one token"),
}
# flags whose lower values are an error of a library, without a name, once training begins
LEAST: dict[str, float] = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "prompt_max_length": 1,
    "user_limit": 1,
    "item_limit": 1,
    "pairs_per_user": 1,
    "lora_r": 1,
    "lora_alpha": 1,
    "learning_rate": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
    "max_grad_norm": 0,
    "adam_epsilon": 0,
    "lora_dropout": 0,
    "adam_beta1": 0,
    "adam_beta2": 0,
    "label_smoothing_factor": 0,
    "logging_steps": 0.001,  # below 1 they are shares of all steps
    "eval_steps": 0.001,
    "save_steps": 0.001,
    "dataloader_num_workers": 0,
    "neftune_noise_alpha": 0,
    "beta": 0,
    "label_smoothing": 0,
    "ld_alpha": 0,
    "f_alpha_divergence_coef": 0,
    "discopop_tau": 0,
    "ref_model_mixup_alpha": 0,
    "seed": 0,
    "data_seed": 0,
}
MOST: dict[str, float] = {"lora_dropout": 1, "adam_beta1": 1, "adam_beta2": 1, "label_smoothing_factor": 1}
FOUND = (  # by an evaluation: by its ranking, by TRL's trainers, by those of pairs
    *METRICS,
    *("loss", "entropy", "mean_token_accuracy", "num_tokens", "aux_loss", "answer_accuracy", "pairs"),
    *("runtime", "samples_per_second", "steps_per_second"),
)
_PAIRS = "the loss of whole tasks (--packed or --interaction late) has no such part; leave one of the two out"
WITH_WHOLE_TASKS: dict[str, Unsupported] = {
    "label_smoothing_factor": Unsupported((0.0,), _PAIRS),
    "loss_type": Unsupported(("nll", "chunked_nll"), _PAIRS),
    "router_aux_loss_coef": Unsupported((None,), _PAIRS),
    "include_num_input_tokens_seen": Unsupported(("no", False), _PAIRS),
}


# optimizers of transformers that read no --optim_args
WITHOUT_ARGS = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor", "lomo")
LORA: dict[str, Any] = {  # what says how an adapter is, and what each asks for unless it is given
    one.name: one.default
    for one in fields(ModelConfig)
    if one.name.startswith("lora_") or one.name in ("use_dora", "use_rslora")
}
OTHER_DIVERGENCES = {"forward_kl", "js_divergence", "alpha_divergence"}
SMOOTHED = {"exo_pair", "robust", "aot", "aot_unpaired"}  # of DPO's losses
OF_DIVERGENCE = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
DPO_LOSSES = {*SMOOTHED, *OF_DIVERGENCE, "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"}


def obstacles(values: Mapping[str, Any]) -> Iterator[str]:
    """One sentence for each flag, or pair of flags, that training cannot honour.

    Args:
        values: those of all flags, as the command line and the recipe have them.
    """
    for name, unsupported in UNSUPPORTED.items():
        if name in values and values[name] not in unsupported.neutral:
            yield f"--{name} {values[name]}: {unsupported.reason}"
    yield from _malformed(values)
    yield from _of_schedule(values)
    yield from _of_mappings(values)
    if values.get("packed") or values.get("interaction") == "late":
        for name, unsupported in WITH_WHOLE_TASKS.items():
            if values[name] not in unsupported.neutral:
                yield f"--{name} {values[name]}: {unsupported.reason}"
    elif values.get("positive_weight") not in (None, 1.0, "1"):
        for name in ("label_smoothing_factor", "loss_type"):
            if values[name] not in WITH_WHOLE_TASKS[name].neutral:
                yield f"--{name} {values[name]}: it cannot be combined with --positive_weight; leave one of the two out"
    if "beta" in values:  # of DPOConfig
        yield from _of_preferences(values)
    if values.get("pair_loss") == "listwise" and values["positive_weight"] is not None:
        yield f"--positive_weight {values['positive_weight']}: --pair_loss listwise weighs no answers; leave it out"
    optimizer = str(getattr(values["optim"], "value", values["optim"]))
    if values["optim_target_modules"] is not None and not optimizer.startswith(("galore", "apollo")):
        yield f"--optim_target_modules: --optim {optimizer} has none; give one of galore or apollo, or leave it out"
    if values["optim_args"] and optimizer in WITHOUT_ARGS:
        yield f"--optim_args {values['optim_args']}: --optim {optimizer} takes none; leave the flag out"
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if values[name]:
            yield f"--{name}: evaluations during training compute as training does; leave the flag out"
    if values["use_peft"] is None:  # said nowhere, though something of an adapter is
        given = next(name for name, default in LORA.items() if values[name] != default)
        yield f"--{given} {values[given]}: give --use_peft as well; or --use_peft false, to train all weights"
    evaluates = values["eval_strategy"] != "no"
    if values["early_stopping_patience"] is not None and not (evaluates and values["metric_for_best_model"]):
        yield "--early_stopping_patience: give --eval_strategy and --metric_for_best_model, such as eval_auc, as well"
    for name in ("eval_on_start", "do_eval", "load_best_model_at_end"):
        if values[name] and not evaluates:
            yield f"--{name}: give --eval_strategy steps or epoch as well"
    samples = values["negatives_per_positive"] is not None or values["hard_negatives"]
    if samples and values["dataloader_persistent_workers"]:
        yield "--dataloader_persistent_workers: such workers keep the negatives of the first epoch; leave the flag out"
    folder = Path(backbone_path(values["model_name_or_path"] or "")).is_dir()
    if folder and values["model_revision"] not in (None, "main"):
        yield f"--model_revision {values['model_revision']}: a folder has no revisions; leave the flag out"
    if values.get("lora_modules_to_save") and values["use_peft"] and not (folder or values.get("merge_adapter", True)):
        yield (
            f"--lora_modules_to_save {values['lora_modules_to_save']}: modules_to_save are whole weights, which an "
            "adapter of a backbone on the Hub cannot hold; add --merge_adapter to save whole weights"
        )


def _of_schedule(values: Mapping[str, Any]) -> Iterator[str]:
    """A sentence on ``lr_scheduler_kwargs`` if the schedule of the learning rate has no such parameters or values.

    It is made and gone through for a parameter of no meaning: only the whole says whether they go together.
    """
    kwargs, kind = _object(values["lr_scheduler_kwargs"]), SchedulerType(values["lr_scheduler_type"])
    if kwargs is None:  # said already
        return
    given = f"--lr_scheduler_kwargs {kwargs}: --lr_scheduler_type {kind.value}"
    plateau = kind == SchedulerType.REDUCE_ON_PLATEAU
    function: Any = ReduceLROnPlateau if plateau else TYPE_TO_SCHEDULER_FUNCTION[kind]
    of_the_trainer = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "kwargs")
    takes = [name for name in signature(function).parameters if name not in of_the_trainer]
    if not takes:
        if kwargs:
            yield f"{given} takes none; leave the flag out"
    elif unknown := [name for name in kwargs if name not in takes]:
        yield f"{given} has no {unknown[0]!r}{did_you_mean(unknown[0], takes)}"
    else:
        try:
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=values["learning_rate"])
            schedule = get_scheduler(kind, optimizer, 1, 10, scheduler_specific_kwargs=dict(kwargs))
            for _ in range(0 if plateau or kind == SchedulerType.GREEDY else 10):  # which evaluations steer
                optimizer.step()
                schedule.step()
        except Exception as error:  # whatever numbers and texts lead to in there
            yield f"{given} refuses them ({' '.join(str(error).split())})"


def _of_mappings(values: Mapping[str, Any]) -> Iterator[str]:
    """A sentence on the first unknown name in each flag that is a mapping of a library's own names."""
    checkpointing = [name for name in signature(checkpoint).parameters if name not in ("function", "args", "kwargs")]
    for flag, known in (
        ("activation_checkpointing_kwargs", checkpointing),
        ("gradient_checkpointing_kwargs", checkpointing),
        ("accelerator_config", [one.name for one in fields(AcceleratorConfig)] + ["use_configured_state"]),
    ):
        if unknown := [name for name in _object(values.get(flag)) or {} if name not in known]:
            yield f"--{flag}: there is no {unknown[0]!r}{did_you_mean(unknown[0], known)}"


def _object(value: Any) -> dict[str, Any] | None:
    """A mapping, or the JSON of one; None for what is neither."""
    try:
        found = json.loads(value) if isinstance(value, str) else value or {}
    except ValueError:
        return None
    return dict(found) if isinstance(found, Mapping) else None


def _of_preferences(values: Mapping[str, Any]) -> Iterator[str]:
    """One sentence for each flag of ``DPOConfig`` that is of no effect, or that TRL would refuse in its own words."""
    losses = values["loss_type"] if isinstance(values["loss_type"], list) else [values["loss_type"]]
    named, weights, smoothing = ", ".join(losses), values["loss_weights"], values["label_smoothing"]
    divergence = str(getattr(values["f_divergence_type"], "value", values["f_divergence_type"]))
    if unknown := [loss for loss in losses if loss not in DPO_LOSSES]:
        yield f"--loss_type {unknown[0]}: is not known; there are {', '.join(sorted(DPO_LOSSES))}"
    if weights is not None and len(weights) != len(losses):
        yield f"--loss_weights: are {len(weights)}, for {len(losses)} of --loss_type ({named}); give one for each"
    if values["label_smoothing_factor"]:
        yield f"--label_smoothing_factor {values['label_smoothing_factor']}: give --label_smoothing, which is DPO's own"
    if smoothing and not SMOOTHED & set(losses):
        yield f"--label_smoothing {smoothing}: --loss_type {named} has none; these have: {', '.join(sorted(SMOOTHED))}"
    if "exo_pair" in losses and not smoothing:
        yield "--loss_type exo_pair: give --label_smoothing above 0 as well, such as 1e-3"
    if "robust" in losses and smoothing >= 0.5:
        yield f"--label_smoothing {smoothing}: must be below 0.5 with --loss_type robust"
    if divergence not in (*OTHER_DIVERGENCES, "reverse_kl"):
        yield f"--f_divergence_type {divergence}: give one of reverse_kl, {', '.join(sorted(OTHER_DIVERGENCES))}"
    if divergence in OTHER_DIVERGENCES and not set(losses) <= OF_DIVERGENCE:
        yield f"--f_divergence_type {divergence}: goes with --loss_type {', '.join(sorted(OF_DIVERGENCE))} alone"
    if values["use_weighting"] and {"aot", "aot_unpaired"} & set(losses):
        yield f"--use_weighting: --loss_type {named} sorts the examples, which then have no weights; leave it out"
    if values["sync_ref_model"] and values["use_peft"]:
        yield "--sync_ref_model: with --use_peft the reference is the model without adapter; leave one of the two out"
    for name, default, needed, there in (
        ("f_alpha_divergence_coef", 0.5, "--f_divergence_type alpha_divergence", divergence == "alpha_divergence"),
        ("discopop_tau", 0.05, "--loss_type discopop", "discopop" in losses),
        ("ref_model_mixup_alpha", 0.6, "--sync_ref_model", values["sync_ref_model"]),
        ("ref_model_sync_steps", 512, "--sync_ref_model", values["sync_ref_model"]),
    ):
        if values[name] != default and not there:
            yield f"--{name} {values[name]}: give {needed} as well"


def _malformed(values: Mapping[str, Any]) -> Iterator[str]:
    """One sentence for each value that would end training late, in words of other libraries, or train nothing."""
    for name, least in LEAST.items():
        if values.get(name) is not None and not least <= values[name] < inf:
            yield f"--{name} {values[name]}: must be at least {least}, and finite"
    for name, most in MOST.items():
        if values.get(name) is not None and values[name] > most:
            yield f"--{name} {values[name]}: must be at most {most}"
    for name in ("seed", "data_seed"):
        if (values[name] or 0) > LARGEST_SEED:
            yield f"--{name} {values[name]}: must be at most {LARGEST_SEED}"
    if values["max_steps"] == 0 or (values["max_steps"] < 0 and values["num_train_epochs"] <= 0):
        yield "--max_steps or --num_train_epochs: nothing would be trained; give a number above 0"
    for part in (values.get("optim_args") or "").split(","):
        if part and part.count("=") != 1:
            yield f"--optim_args {values['optim_args']}: give name=value pairs with commas between them"
            break
    if not str(values.get("item_noun", "item")).strip():
        yield "--item_noun: is empty; name what an item is called in the prompts, such as film"
    for name, value in values.items():
        if (name == "prompts" or name.endswith("_kwargs")) and isinstance(value, str) and _object(value) is None:
            yield f"--{name} {value}: give a JSON object"
    if str(values["resume_from_checkpoint"]).lower() in ("true", "false"):
        yield (
            f"--resume_from_checkpoint {values['resume_from_checkpoint']}: name a checkpoint's folder, or leave it "
            "out: training goes on from the last whole checkpoint by itself; to begin anew, give another --output_dir"
        )
    metric = (values["metric_for_best_model"] or "").removeprefix("eval_")
    if metric and metric not in FOUND and not metric.startswith(("rewards/", "logps/", "logits/")):  # DPO's
        yield (
            f"--metric_for_best_model {values['metric_for_best_model']}: no evaluation finds it; give one of "
            + ", ".join(f"eval_{name}" for name in ("loss", *METRICS))
        )


def supports_bfloat16(use_cpu: bool) -> bool:
    """Whether training on this machine is to use bfloat16 unless a flag says otherwise: on GPUs that compute in it."""
    if use_cpu or strtobool(os.environ.get("ACCELERATE_USE_CPU", "false")):
        return False
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return is_torch_bf16_gpu_available()


def check_machine(values: Mapping[str, Any]) -> None:
    """Raise ValueError if something is asked for that needs a GPU which this machine has not."""
    cpu = values["use_cpu"]
    if values["bf16"] and not cpu and not is_torch_bf16_gpu_available():
        raise ValueError(
            "--bf16: this machine has no GPU that computes in bfloat16; give --bf16 false (in a recipe `bf16: false`), "
            "or --use_cpu true for a slow training with it on the CPU"
        )
    if values["fp16"] and (cpu or not torch.cuda.is_available()):
        raise ValueError("--fp16: float16 needs a GPU; give --fp16 false (in a recipe `fp16: false`)")
    reported = values["report_to"] if isinstance(values["report_to"], list) else [values["report_to"]]
    if "trackio" in reported and find_spec("trackio") is None:
        raise ValueError(
            "--report_to trackio: trackio is not installed: `pip install 'mllm-msr[trackio]'`, or give --report_to none"
        )
    if values["activation_offloading"] and (cpu or torch.accelerator.current_accelerator() is None):
        raise ValueError("--activation_offloading: there is no GPU whose memory it would save; leave the flag out")
