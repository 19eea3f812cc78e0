"""From a trainer to a ``from_pretrained`` folder and to the Hub, whatever number of processes holds the weights."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments
from trl import DPOTrainer

from mllm_msr.modeling.model_files import model_files, without_paths
from mllm_msr.records.storage import read_json

CARD = """---
library_name: transformers
pipeline_tag: text-ranking
tags: [mllm-msr, recommendation, sequential-recommendation, multimodal]
{base}---

# {title}

A recommender that answers whether a user will choose an item ([MLLM-MSR](https://arxiv.org/abs/2408.09698), AAAI-25),
{of}as `{script}` saved it after {steps} steps. It was not evaluated here, and its data is not named:
`mllm-msr publish` releases a run with both.

```python
from transformers import pipeline

rank = pipeline("sequential-recommendation", model="{repository}", trust_remote_code=True)
print(rank({{"preference": "what the user likes, in words", "candidates": [{{"title": "..."}}, {{"title": "..."}}]}}))
```
"""


def finish(trainer: Trainer, push: bool, merge: bool = False) -> None:
    """Save the recommender in the trainer's folder, send it to the Hub if ``push``, and end the process group.

    To be called on every process, as the last of a script.
    """
    folder = Path(trainer.args.output_dir or ".")
    save_recommender(trainer, folder, merge)
    if push and trainer.accelerator.is_main_process:
        push_recommender(trainer.args, folder)
    end_processes(trainer)


def end_processes(trainer: Trainer) -> None:
    """Wait for all processes of the training and end their group: one that ends before would abort the others."""
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def save_recommender(trainer: Trainer, folder: Path, merge: bool = False) -> None:
    """Write what was trained and its processor as one ``from_pretrained`` folder.

    A LoRA adapter of a backbone on the Hub is saved as such, with the backbone's name and revision. If ``merge``, or if
    the backbone is a folder, to which others could not be referred, it is merged into whole weights.

    To be called on every process: all wait until the main one has written.
    """
    trainer.accelerator.wait_for_everyone()
    model = whole_model(trainer)
    if trainer.accelerator.is_main_process:
        _write(model, trainer.processing_class, folder, merge)
        (folder / "README.md").write_text(_card(trainer, folder), encoding="utf-8")
    trainer.accelerator.wait_for_everyone()


def _write(model: Any, processor: Any, folder: Path, merge: bool) -> None:
    name = model.config.backbone_name_or_path
    on_hub = name is not None and not Path(name).exists()
    if isinstance(model, PeftModel):
        model = model.get_base_model()
        if merge or not on_hub:
            model.merge()
    model.config.use_cache = True  # the trainer switched it off for its own sake
    if not on_hub:
        model.config.backbone_name_or_path = None  # a path of this machine says nothing to others
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for settings in [*folder.glob("*config.json"), *folder.glob("adapter/*config.json")]:
        settings.write_text(without_paths(settings.read_text(encoding="utf-8")), encoding="utf-8")


def _card(trainer: Trainer, folder: Path) -> str:
    """What can be said of the model in ``folder``, in place of TRL's card of a chat model."""
    config = read_json(folder / "config.json")
    backbone = config.get("backbone_name_or_path")
    repository = trainer.args.hub_model_id or folder.resolve().name
    return CARD.format(
        base=f"base_model: {backbone}\n" if backbone else "",
        of=f"fine-tuned from [{backbone}](https://huggingface.co/{backbone}), " if backbone else "",
        title=repository.split("/")[-1],
        script="dpo.py" if isinstance(trainer, DPOTrainer) else "sft.py",
        steps=trainer.state.global_step,
        repository=repository,
    )


def whole_model(trainer: Trainer) -> Any:
    """The model in training; where processes hold parts of it, a copy of all its weights on the main process."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if not sharded(trainer):
        return model
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.accelerator.is_main_process:
        return model
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.device("meta"):  # the weights come from the state
        whole: Any = type(plain)(plain.config)
        whole.generation_config = plain.generation_config
        whole.attach(plain.item_ranker)
        if isinstance(model, PeftModel):
            whole = get_peft_model(whole, model.peft_config["default"])
    whole.load_state_dict(state, assign=True)
    for name, buffer in model.named_buffers():  # of which the state has but some
        parent, _, leaf = name.rpartition(".")
        setattr(whole.get_submodule(parent), leaf, buffer.clone())
    base: Any = whole.get_base_model() if isinstance(whole, PeftModel) else whole
    base.tie_weights()
    return whole


def sharded(trainer: Trainer) -> bool:
    """Whether each process holds only a part of the weights: FSDP, or DeepSpeed ZeRO-3."""
    plugin = trainer.accelerator.state.deepspeed_plugin
    return trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)


def push_recommender(arguments: TrainingArguments, folder: Path) -> None:
    """Send the saved model, nothing that lies beside it, to ``--hub_model_id`` as one commit; private by default."""
    api = HfApi(token=arguments.hub_token)
    private = arguments.hub_private_repo is not False
    files = [*model_files(folder), "README.md"]
    repo = api.create_repo(arguments.hub_model_id or folder.resolve().name, private=private, exist_ok=True)
    additions = [CommitOperationAdd(name, folder / name) for name in files]
    api.create_commit(
        repo.repo_id, additions, revision=arguments.hub_revision, commit_message="Model as it was trained"
    )
