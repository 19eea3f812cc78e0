"""The arguments of ``sft.py`` and ``dpo.py``: ours beside TRL's, and the one parser of command lines and recipes."""

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from enum import Enum
from math import inf
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from accelerate.utils import parse_flag_from_env
from transformers.integrations import INTEGRATION_TO_CALLBACK
from trl import ModelConfig, SFTConfig, TrlParser

from mllm_msr.records.mistakes import in_words
from mllm_msr.records.recipe import load_recipe
from mllm_msr.records.sections import LARGEST_SEED
from mllm_msr.records.typed import as_number, check_names, check_type, did_you_mean
from mllm_msr.training.unsupported import (
    LEAST,
    LORA,
    MOST,
    UNSUPPORTED,
    check_machine,
    obstacles,
    supports_bfloat16,
)

# what a recipe or a run says outside the training section, by the default of the flag
OF_THE_RUN: dict[str, Any] = {"dataset_name": None, "output_dir": None, "item_noun": "item", "prompts": None}
REPORTERS = ("none", "all", *INTEGRATION_TO_CALLBACK)


def flag(default: Any, text: str) -> Any:
    """A field of an argument dataclass: its default and the help that the command line prints."""
    return field(default=default, metadata={"help": text})


@dataclass
class ExampleArguments:
    """What is learnt from."""

    dataset_name: str | None = flag(
        None, "A run's folder, a folder laid out as the published data set, or its name on the Hub, with @revision."
    )
    dataset_train_split: str = flag("train", "Split of the examples that are trained on.")
    dataset_test_split: str = flag("validation", "Split evaluated during training.")
    max_eval_samples: int | None = flag(
        None, "Evaluate on the first so many examples only, and on the others of the last one's task."
    )
    negatives_per_positive: int | None = flag(
        None, "Negatives drawn for each positive anew each epoch, in place of the table's."
    )
    popular_negatives: bool = flag(
        False, "Draw negatives, and pools of hard ones, in proportion to training interactions, not uniformly."
    )
    hard_negatives: int = flag(
        0, "Negatives added for each positive: those that the model ranks highest as an epoch begins ..."
    )
    hard_negatives_pool: int = flag(50, "... among so many items that the user has never chosen.")
    early_stopping_patience: int | None = flag(
        None, "Evaluations without a better metric_for_best_model before training stops."
    )

    def __post_init__(self) -> None:
        least = {"max_eval_samples": 1, "negatives_per_positive": 0, "hard_negatives": 0, "early_stopping_patience": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"--{name} {value}: must be at least {smallest}")
        if not self.hard_negatives and self.hard_negatives_pool != 50:
            raise ValueError(f"--hard_negatives_pool {self.hard_negatives_pool}: give --hard_negatives as well")
        if self.hard_negatives > self.hard_negatives_pool:
            raise ValueError(
                f"--hard_negatives {self.hard_negatives}: so many cannot be chosen from a pool of "
                f"{self.hard_negatives_pool}; raise --hard_negatives_pool"
            )
        if self.popular_negatives and not self.samples_negatives:
            raise ValueError("--popular_negatives: give --negatives_per_positive or --hard_negatives as well")

    @property
    def samples_negatives(self) -> bool:
        """Whether each epoch has negatives of its own."""
        return self.negatives_per_positive is not None or self.hard_negatives > 0


@dataclass
class PairArguments:
    """How users and candidates meet, and what is learnt from their pairs."""

    interaction: Literal["joint", "late"] = flag(
        "joint", "How user and candidate meet, see MllmMsrConfig; becomes part of the checkpoint."
    )
    packed: bool = flag(
        False, "With joint: batches of tasks, in which what prompts begin with is computed once; always so with late."
    )
    user_limit: int | None = flag(
        None, "With late: most tokens of a user; by default a little more than the longest one has."
    )
    item_limit: int | None = flag(None, "With late: most tokens of a candidate, likewise.")
    item_memory: int | None = flag(
        None,
        "With late: let the answer see of a candidate only so many memory tokens after it, see MllmMsrConfig; by "
        "default as the model has it, which is 0 for a new one.",
    )
    item_memory_from: float | None = flag(
        None,
        "With item_memory: the share of the steps after which this is so; before, the answer sees all of the candidate "
        "as well, from half of that share on every second time. By default 2/3 for new memory tokens and 0 for a model "
        "that has them.",
    )
    pair_loss: Literal["answer", "listwise"] = flag(
        "answer", "The cross-entropy of the answer (the paper's), or a softmax over each user's candidates."
    )
    in_batch_negatives: bool = flag(True, "With late: pair each user with the items of all others, too.")
    pairs_per_user: int | None = flag(None, "With late: most pairs of a user in a batch.")
    log_q_correction: bool = flag(
        False, "With late: correct for frequent items being in-batch negatives more often (Yi et al., RecSys 2019)."
    )
    cache_image_features: bool = flag(
        False, "With late or packed: encode each image once and keep what the decoder sees of it in memory."
    )

    def __post_init__(self) -> None:
        late = self.interaction == "late"
        if self.item_memory is not None and self.item_memory < 0:
            raise ValueError(f"--item_memory {self.item_memory}: must be at least 0")
        if self.item_memory_from is not None and not 0 <= self.item_memory_from < 1:
            raise ValueError(f"--item_memory_from {self.item_memory_from}: must be at least 0 and below 1")
        limits = ("user_limit", "item_limit", "pairs_per_user")
        for name in (*limits, "log_q_correction", "item_memory", "item_memory_from"):
            if getattr(self, name) and not late:
                raise ValueError(f"--{name} needs --interaction late")
        if self.cache_image_features and not self.whole_tasks:
            raise ValueError("--cache_image_features needs --packed or --interaction late")
        if self.pair_loss == "listwise" and not self.whole_tasks:
            raise ValueError("--pair_loss listwise needs all candidates of a task: add --packed")

    @property
    def whole_tasks(self) -> bool:
        """Whether a batch holds tasks, and not single examples."""
        return self.packed or self.interaction == "late"


@dataclass
class RecommenderArguments(PairArguments, ExampleArguments):
    """What the recommender is to be, and all the above."""

    item_noun: str = flag("item", "What an item is called in the prompts: film, product.")
    prompts: str | None = flag(None, "JSON object of prompt templates that replace the default ones.")
    prompt_max_length: int | None = flag(None, "Longest prompt in tokens; texts are shortened to fit, images are not.")
    positive_weight: float | str | None = flag(
        None,
        "How much a Yes counts in the loss for each No, or 'balanced': as much as all Nos together, which is the "
        "default with in-batch negatives; else it is 1.",
    )
    merge_adapter: bool = flag(
        False, "Save whole weights in place of the adapter; always so if the backbone is a folder."
    )

    def __post_init__(self) -> None:
        PairArguments.__post_init__(self)
        ExampleArguments.__post_init__(self)
        if self.positive_weight in (None, "balanced"):
            return
        try:
            weight = float(self.positive_weight)
        except ValueError:
            weight = 0.0
        if not 0 < weight < math.inf:
            raise ValueError(f"--positive_weight {self.positive_weight}: give a number above 0, or 'balanced'")

    @property
    def yes_weight(self) -> float | Literal["balanced"]:
        """``positive_weight``, its default resolved."""
        if self.positive_weight is None:
            return "balanced" if self.interaction == "late" and self.in_batch_negatives else 1.0
        return "balanced" if self.positive_weight == "balanced" else float(self.positive_weight)


SFT_KINDS = (RecommenderArguments, SFTConfig, ModelConfig)


def run_script(main: Callable[..., Any], kinds: Sequence[Any]) -> None:
    """``main`` under this process's command line; a mistake ends the process with one sentence.

    Where a sentence does not say enough, ``PYTHONDEVMODE=1`` shows the traceback.
    """
    with mistakes_in_words(status=2):
        parsed = parse(kinds, sys.argv[1:], {})
    with mistakes_in_words(status=1):
        main(*parsed)


@contextmanager
def mistakes_in_words(status: int) -> Iterator[None]:
    """End the process with one sentence, and a status, for an error within the block."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        words = in_words(error, "run again under PYTHONDEVMODE=1")
        print(f"{Path(sys.argv[0]).name}: {words}", file=sys.stderr)
        raise SystemExit(status) from None


def parse(kinds: Sequence[Any], arguments: Sequence[str], flags: Mapping[str, Any]) -> tuple[Any, ...]:
    """The instances of ``kinds`` that a command line asks for.

    Args:
        kinds: argument dataclasses, such as ``(RecommenderArguments, SFTConfig, ModelConfig)``.
        arguments: the command line. It overrides ``flags``, and these the training section of ``--config recipe.yaml``.
        flags: values by name.

    Raises:
        ValueError: a flag that is unknown or missing, a value of a wrong type, or a flag that this training or this
            machine cannot honour.
    """
    recipes = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    recipes.add_argument("--config", type=Path)
    recipes.add_argument("--do_train", "--do-train", nargs="?", const="true")
    recipe, rest = recipes.parse_known_args(arguments)
    if str(recipe.do_train).lower() in ("false", "no", "f", "n", "0"):
        raise ValueError(
            "--do_train false: training is all that this script does; `mllm-msr evaluate` measures a model"
        )
    if recipe.config is not None:
        flags = load_recipe(recipe.config).training_flags() | dict(flags)
    values = _values(kinds, rest, flags)
    if not values["dataset_name"]:
        raise ValueError("--dataset_name is missing: give a run's folder, or a published data set")
    _refuse(values)
    # `accelerate launch --cpu` says so by this alone, and transformers then has inputs on an accelerator, the model not
    values["use_cpu"] |= parse_flag_from_env("ACCELERATE_USE_CPU")
    if values["bf16"] is None:
        values["bf16"] = not values["fp16"] and supports_bfloat16(values["use_cpu"])
    for suffix in ("", "_kwargs"):  # TRL still gives its default by the old name, of which transformers warns
        if values[f"activation_checkpointing{suffix}"] is None:
            values[f"activation_checkpointing{suffix}"] = values[f"gradient_checkpointing{suffix}"]
    values["dataloader_pin_memory"] &= torch.accelerator.is_available()
    return TrlParser(kinds).parse_dict(values)


def effective_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's training section with the defaults of all flags of ``sft.py``, ours and TRL's, in place.

    Defaults that depend on the machine stay None, such as that of ``bf16``. Flags that training cannot honour are not
    among them; one that the section has stays there with a warning, and stops ``train``.

    Raises:
        ValueError: an unknown flag, with the nearest known one, or a value of a wrong type.
    """
    values = _values(SFT_KINDS, [], flags)
    RecommenderArguments(**{one.name: values[one.name] for one in fields(RecommenderArguments)})  # checks combinations
    for obstacle in obstacles(values):
        warnings.warn(f"training will stop: {obstacle}", stacklevel=2)
    left_out = {name: unsupported.neutral for name, unsupported in UNSUPPORTED.items()}
    left_out |= {name: (default,) for name, default in OF_THE_RUN.items()}
    left_out["debug"] = (None,)  # what TRL's parser makes of its default, and does not take
    kept = {name: value for name, value in values.items() if name in flags or value not in left_out.get(name, ())}
    known = dict(_fields(SFT_KINDS))  # a default may be 0 where 0.0 is declared, as which it will be read again
    return {name: as_number(value, known[name][0]) for name, value in kept.items()}


def check_flags(flags: Mapping[str, Any]) -> None:
    """Raise for what a training under these flags of ``sft.py`` would refuse on this machine, its libraries included.

    Raises:
        ValueError: a flag, or two that do not go together.
        OSError, ImportError: a file or a package that a flag needs.
    """
    parse(SFT_KINDS, [], {**flags, "dataset_name": "a run", "output_dir": "checkpoints"})


def _refuse(values: Mapping[str, Any]) -> None:
    if not values["model_name_or_path"]:
        raise ValueError("--model_name_or_path is missing: name a backbone (in a recipe, in its section training)")
    for obstacle in obstacles(values):
        raise ValueError(obstacle)
    check_machine(values)


def _values(kinds: Sequence[Any], arguments: Sequence[str], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The value of every flag under a command line, over ``flags``, over the defaults."""
    parser = TrlParser(kinds, exit_on_error=False)
    known = dict(_fields(kinds))
    defaults = {name: unsupported.neutral[0] for name, unsupported in UNSUPPORTED.items() if name in known}
    parser.set_defaults(**defaults | {"use_peft": None} | _checked(known, flags))
    try:
        values, unknown = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    if unknown:
        name = unknown[0].removeprefix("--").split("=")[0]
        raise ValueError(f"unknown argument {unknown[0]!r}{did_you_mean(name, known)}")
    found = vars(values)
    if found["use_peft"] is None and all(found[name] == default for name, default in LORA.items()):
        found["use_peft"] = False
    return found


def _checked(known: Mapping[str, tuple[Any, Sequence[Any]]], flags: Mapping[str, Any]) -> dict[str, Any]:
    """``flags`` as their declared types have them; ValueError for an unknown name or a value of another type.

    None stands for the default.
    """
    check_names(flags, known, "training")
    checked = {}
    for name, given in flags.items():
        hint, choices = known[name]
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if given is None and type(None) not in kinds:
            continue
        value = as_number(given, hint)
        if isinstance(given, str) and list[str] in kinds and str not in kinds:
            value = [given]
        if given is False and "no" in choices:  # as YAML reads it
            value = "no"
        if value is not None:
            if choices and value not in choices:
                raise ValueError(f"training.{name}={given!r}: must be one of {', '.join(map(str, choices))}")
            check_type(value, hint, f"training.{name}")
            if name in LEAST and not LEAST[name] <= value < inf:
                raise ValueError(f"training.{name}={given!r}: must be at least {LEAST[name]}, and finite")
            if name in MOST and value > MOST[name]:
                raise ValueError(f"training.{name}={given!r}: must be at most {MOST[name]}")
            if name in ("seed", "data_seed") and value > LARGEST_SEED:
                raise ValueError(f"training.{name}={given!r}: must be at most {LARGEST_SEED}")
            if name == "report_to":
                for reporter in value if isinstance(value, list) else [value]:
                    if reporter not in REPORTERS:
                        raise ValueError(f"training.report_to: unknown {reporter!r}{did_you_mean(reporter, REPORTERS)}")
        checked[name] = value
    return checked


def _fields(kinds: Sequence[Any]) -> Iterator[tuple[str, tuple[Any, Sequence[Any]]]]:
    """Every flag with its declared type and the values that it may have, if these are listed."""
    for kind in kinds:
        hints = get_type_hints(kind)
        for one in fields(kind):
            enums = [part for part in get_args(hints[one.name]) if isinstance(part, type) and issubclass(part, Enum)]
            listed = [member.value for member in enums[0]] if enums else one.metadata.get("choices") or ()
            yield one.name, (hints[one.name], tuple(listed))
