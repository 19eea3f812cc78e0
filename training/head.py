"""Train the sequence head on a prepared run: item vectors, identities that may be missing, a user as a history.

    python training/head.py \\
        --dataset_name runs/movielens-100k \\
        --vectors runs/movielens-100k/vectors/items.parquet \\
        --output_dir runs/head-movielens

``--vectors`` is a file with ``item_id`` and ``vector`` of every item, such as ``RUN/vectors/items.parquet``. Without
it the head knows items by their identity alone, which is SASRec; with ``--no_identity``, by their vectors alone. Every
epoch is saved: run again after an interruption with the same ``--output_dir``, it goes on to the same result.

``ItemRanker.from_pretrained`` reads the folder. With ``--model``, a trained recommender's folder or id, the folder is
that recommender with the head as its ``item_ranker``, and ``AutoModel.from_pretrained`` reads it.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import TrlParser

from mllm_msr.data.vector_files import read_vectors, vector_matrix
from mllm_msr.evaluation.coded_tasks import CodedLists, CodedTasks
from mllm_msr.evaluation.rankers import training_log
from mllm_msr.evaluation.sequence_training import FitOptions, TrainingData, fit
from mllm_msr.modeling.configuration_mllm_msr import MllmMsrConfig
from mllm_msr.modeling.item_ranking import ItemRanker
from mllm_msr.modeling.naming import naming, pinned
from mllm_msr.modeling.score_fusion import ScoreFusion
from mllm_msr.modeling.sequence_head_options import SequenceHeadConfig, SequenceHeadOptions
from mllm_msr.processing.auto import MllmMsrForRecommendation, MllmMsrProcessor
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import ITEMS
from mllm_msr.records.sections import at_least
from mllm_msr.training.arguments import flag, mistakes_in_words


@dataclass
class HeadArguments:
    """What is learnt from, and where to."""

    dataset_name: str = flag("", "A prepared run's folder.")
    vectors: str | None = flag(None, "A file with item_id and vector of every item; none: identity alone.")
    output_dir: str = flag("", "Folder of the trained head and of its epochs.")
    model: str | None = flag(None, "A trained recommender that the head becomes a part of, in --output_dir.")
    seed: int = flag(0, "Of weights, batches and dropout.")

    def __post_init__(self) -> None:
        if not self.dataset_name or not self.output_dir:
            raise ValueError("give --dataset_name, a prepared run, and --output_dir")
        at_least(self, seed=0)


def main(arguments: HeadArguments, options: SequenceHeadOptions, fit_options: FitOptions) -> ItemRanker:
    run = RunFolder.open(Path(arguments.dataset_name))
    run.require("prepare")
    check(arguments, options, fit_options)
    items, folder = run.read(ITEMS, ["item_id"]), Path(arguments.output_dir)

    # Data
    content = None
    if arguments.vectors is not None:
        content = torch.from_numpy(vector_matrix(read_vectors(Path(arguments.vectors), items)))
    data = load_data(run, content)

    # Training
    content_size = 0 if content is None else content.shape[1]
    config = SequenceHeadConfig(n_items=len(items), content_size=content_size, **asdict(options))
    head = fit(config, data, fit_options, arguments.seed, folder / "epochs")
    name = "content_only" if not options.identity else "sequence_head" if content_size else "identity_only"
    ranker = ItemRanker.of(items["item_id"].sort().to_list(), {name: head}, ScoreFusion.alone(name))

    # Saving
    if arguments.model is None:
        ranker.save_pretrained(folder)
    else:
        revision = pinned(arguments.model) or "main"
        model = MllmMsrForRecommendation.from_pretrained(arguments.model, revision=revision, dtype="auto")
        model.attach(ranker)
        model.save_pretrained(folder)
        MllmMsrProcessor.from_pretrained(arguments.model, revision=revision).save_pretrained(folder)
    return ranker


def check(arguments: HeadArguments, options: SequenceHeadOptions, fit_options: FitOptions) -> None:
    """Raise ValueError, or OSError, for what would be passed over or be an error only after the training."""
    if arguments.vectors is None and (options.gate or options.join != "sum"):
        raise ValueError(f"--{'gate' if options.gate else 'join'} is about content: give --vectors as well")
    if not fit_options.max_epochs:
        raise ValueError("--max_epochs 0: nothing would be trained; give a number above 0")
    if arguments.model is not None:
        with naming(arguments.model):
            config = MllmMsrConfig.from_pretrained(arguments.model)
        config.require_backbone(f"--model {arguments.model}")


def load_data(run: RunFolder, content: Tensor | None) -> TrainingData:
    """The training histories and the validation tasks of a prepared run, and (I, F) content of its items."""
    items = run.read(ITEMS, ["item_id"])
    validation = CodedTasks(run.tasks("validation"), items)
    return TrainingData(len(items), CodedLists.of_log(training_log(run), items), validation, content)


if __name__ == "__main__":
    kinds: Any = (HeadArguments, SequenceHeadOptions, FitOptions)
    with mistakes_in_words(status=2):
        parsed = TrlParser(kinds).parse_args_and_config(sys.argv[1:])
    with mistakes_in_words(status=1):
        main(*parsed)
