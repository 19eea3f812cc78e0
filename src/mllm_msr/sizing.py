"""What fits this machine and this backbone: the sections of a recipe that nobody should have to guess."""

import os
from dataclasses import dataclass, field
from typing import Any

from mllm_msr.records.recipe import backbone_path, demo_recipe, load_content

DEMO_LENGTH = 256  # tokens of a prompt for the demo's backbone, which reads 1,024 and was never shown more than a few
LONGEST_PROMPT = 4096  # tokens; what a history and an item with one image take, with room to spare
TASKS_A_STEP = 32  # examples of one optimiser step
USED = 0.5  # of the memory that is left beside the weights
SHORT_PROMPT = (  # for the demo's backbone
    "{% if preference %}{{ preference }}\n{% endif %}{% for item in recent %}Then {{ item.summary }}\n{% endfor %}"
    "{{ title }}\n{% if text %}{{ text }}\n{% endif %}{% if image %}{{ image }}\n{% endif %}Would they choose it?"
)


@dataclass(frozen=True)
class Machine:
    """Where a run would compute: ``device`` is cpu or the kind of accelerator; ``memory_gb`` is that device's."""

    device: str
    name: str
    cores: int
    memory_gb: float
    bfloat16: bool

    def __str__(self) -> str:
        what = f"{self.name}, " if self.name else ""
        return f"{self.device} ({what}{self.memory_gb:.0f} GB of memory), {self.cores} cores"


@dataclass(frozen=True)
class Backbone:
    """A backbone as far as its configuration tells.

    Args:
        parameters: how many, None if its configuration cannot be read here.
        context: the most tokens that it reads; None if it does not say.
        hidden, layers: of its language model.
    """

    name: str
    parameters: float | None = None
    context: int | None = None
    hidden: int = 4096
    layers: int = 32

    def __str__(self) -> str:
        size = f"{self.parameters / 1e6:,.1f} million parameters" if self.parameters else "of a size not known here"
        return f"{self.name} ({size}{f', reads {self.context:,} tokens' if self.context else ''})"


@dataclass(frozen=True)
class Sized:
    """Sections of a recipe, and why some of their values are what they are, by ``section.name``."""

    sections: dict[str, dict[str, Any]]
    why: dict[str, str] = field(default_factory=dict)


def this_machine() -> Machine:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return Machine("cuda", facts.name, cores, facts.total_memory / 1e9, bfloat16)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9 if hasattr(os, "sysconf") else 8.0
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return Machine(accelerator.type if accelerator else "cpu", "", cores, memory, False)


def look_at(name: str, revision: str | None = None) -> Backbone:
    """A backbone by its configuration alone; no weights are fetched or loaded."""
    import torch
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(backbone_path(name), revision=revision or "main")
        with torch.device("meta"):
            parameters = AutoModel.from_config(config).num_parameters()
    except Exception:  # not fetched yet and no network, or gated: `check` will say it
        return Backbone(name)
    text = config.get_text_config()
    context = getattr(text, "max_position_embeddings", None)
    return Backbone(name, parameters, context, text.hidden_size, text.num_hidden_layers)


def sized_for(backbone: Backbone, machine: Machine) -> Sized:
    """Summaries, prompts, vectors, training, head and evaluation for a backbone on a machine."""
    return _for_the_demo_s(machine) if backbone.name == "demo" else _for_a_real_one(backbone, machine)


def _for_the_demo_s(machine: Machine) -> Sized:
    demo = load_content(demo_recipe())
    training = {**demo["training"], "prompt_max_length": DEMO_LENGTH}
    sections: dict[str, dict[str, Any]] = {
        "summaries": {"engine": "extractive", "block_size": 3},
        "prompts": {"recommendation": SHORT_PROMPT},
        "training": training,
        "head": demo["head"],
    }
    why = {
        "summaries.engine": "keywords and colours: the demo's backbone describes its own drawn world only",
        "prompts.recommendation": "short, as the backbone is small; leave it out with a real one",
        "training.model_name_or_path": "the model of two million weights inside the package: shows that all works; for "
        "figures that count name a real one, such as HuggingFaceTB/SmolVLM-256M-Instruct",
        "training.prompt_max_length": "tokens; longer prompts lose text of the history first",
        "training.dtype": f"this machine computes on {machine.device}, and so small a model is quick in it",
    }
    return Sized(sections, why)


def _for_a_real_one(backbone: Backbone, machine: Machine) -> Sized:
    bfloat16 = machine.device == "cuda" and machine.bfloat16
    dtype, width = ("bfloat16", 2) if bfloat16 else ("float32", 4)
    length = min(LONGEST_PROMPT, backbone.context or LONGEST_PROMPT)
    batch, why_batch = _batch(backbone, machine, length, width)
    sections: dict[str, dict[str, Any]] = {
        "summaries": {
            "engine": "transformers",
            "model": backbone.name,
            "block_size": 3,
            "dtype": dtype,
            "batch_size": 16 if machine.device == "cuda" else 4,
        },
        "training": {
            "model_name_or_path": backbone.name,
            "prompt_max_length": length,
            "dtype": dtype,
            "use_peft": True,
            "lora_r": 8,
            "learning_rate": 2.0e-5,
            "num_train_epochs": 2,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": max(1, TASKS_A_STEP // batch),
            "gradient_checkpointing": True,
            "bf16": bfloat16,
            "eval_strategy": "no",
            "save_strategy": "steps",
            "save_steps": 100,
            "save_total_limit": 2,
            "logging_steps": 10,
            "report_to": "none",
            "seed": 0,
        },
    }
    reads = f"the backbone reads {backbone.context:,}" if backbone.context else "not known of this backbone"
    why = {
        "summaries.model": "the backbone itself; a larger one, or a server (engine: openai), may write them",
        "summaries.batch_size": f"for {machine.device}; what does not fit in memory is halved",
        "training.prompt_max_length": f"tokens; {reads}; longer prompts lose text of the history first, no image",
        "training.dtype": f"this machine computes on {machine.device}",
        "training.learning_rate": "the paper's, as is lora_r",
        "training.num_train_epochs": "the paper trains ten",
        "training.per_device_train_batch_size": why_batch,
        "training.gradient_accumulation_steps": f"{TASKS_A_STEP} examples a step",
        "training.bf16": "on GPUs that compute in it",
    }
    return Sized(sections, why)


def _batch(backbone: Backbone, machine: Machine, length: int, width: int) -> tuple[int, str]:
    """Examples of a training batch, by what is left of memory beside the weights, under gradient checkpointing."""
    if backbone.parameters is None:
        return 1, "one, as the backbone could not be looked at here"
    left = machine.memory_gb * 1e9 * USED - backbone.parameters * width
    example = length * backbone.hidden * width * (backbone.layers + 24)  # a state a layer, and one layer in full
    if left < example:
        return 1, f"{backbone.parameters * width / 1e9:.0f} GB of weights leave little room: one may be too many"
    batch = 1
    while batch < TASKS_A_STEP and 2 * batch * example <= left:
        batch *= 2
    return batch, f"computed: {left / 1e9:.0f} GB are left beside the weights, and an example takes {example / 1e9:.1f}"
