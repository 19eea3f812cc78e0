"""What preferences, fine-tuning and images are worth to the sequence head, on a finished run of at most 2,048 items.

    mllm-msr demo --output runs/demo && cp -r runs/demo runs/tuned
    mllm-msr vectors runs/tuned --set vectors.model=runs/demo/model
    python benchmarks/language_model_inside.py preference runs/demo
    python benchmarks/language_model_inside.py vectors runs/demo runs/tuned
    cp -r runs/demo runs/none && mllm-msr vectors runs/none --set vectors.images=false
    cp -r runs/demo runs/grey && python benchmarks/language_model_inside.py grey runs/demo grey.parquet
    mllm-msr vectors runs/grey --vectors grey.parquet
    python benchmarks/language_model_inside.py vectors runs/demo runs/none runs/grey

``preference``: after every whole history block the head reads the vector of the preference written there, as one more
token: the user's own, or, to see whether what it says matters, that of another user. ``vectors``: the heads of a run
beside those of copies with other vectors. ``grey``: writes vectors of items whose images show nothing.

The table has validation NDCG@5 and the test's figures, each a mean over seeds and the deviation between them, and the
difference from the first line, paired by user after the mean over seeds.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import polars as pl
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from mllm_msr.data.images import decode
from mllm_msr.evaluation import sequence_training
from mllm_msr.evaluation.coded_tasks import PADDING, Array, CodedLists, CodedTasks
from mllm_msr.evaluation.epochs import load_weights
from mllm_msr.evaluation.heads import Heads, train_heads
from mllm_msr.evaluation.metrics import paired, user_columns
from mllm_msr.evaluation.rankers import item_vectors, training_log
from mllm_msr.evaluation.scoring import GREY
from mllm_msr.evaluation.sequence_training import (
    FitOptions,
    Training,
    TrainingData,
    fit,
    score_candidates,
)
from mllm_msr.evaluation.sequential_baselines import shared
from mllm_msr.modeling.inputs import Candidate
from mllm_msr.modeling.sequence_head import SequenceHead
from mllm_msr.modeling.sequence_head_options import SequenceHeadConfig, SequenceHeadOptions
from mllm_msr.processing.vectors import item_encoder, recipe_encoder, vector_table
from mllm_msr.records.recipe import backbone_path
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import ITEM_SUMMARIES, ITEMS, PREFERENCES
from mllm_msr.training.head import load_data

METRICS = ("auc", "hr@5", "ndcg@5", "mrr@5")
Scores = tuple[Array, Array]  # of all candidates of validation, and of test


class Tasks(CodedTasks):
    """Tasks in numbers, and whose they are."""

    def __init__(self, run: RunFolder, split: str) -> None:
        self.frame = run.tasks(split)
        super().__init__(self.frame, run.read(ITEMS, ["item_id"]))


class Trial:
    """A finished run and its table; the first line of it is what others are held against, until ``first`` is empty."""

    def __init__(self, run: RunFolder, seeds: Sequence[int]) -> None:
        self.run, self.seeds, self.first = run, seeds, dict[str, Array]()
        self.data = load_data(run, torch.from_numpy(item_vectors(run)))
        network = {**shared(run.recipe.head, SequenceHeadOptions), "content_size": self.data.content.shape[1]}
        self.config = SequenceHeadConfig(**network, n_items=self.data.n_items)
        self.options = FitOptions(**shared(run.recipe.head, FitOptions))
        self.validation, self.test = Tasks(run, "validation"), Tasks(run, "test")
        figures = " | ".join(f"{metric} | difference" for metric in METRICS)
        print(f"| | validation ndcg@5 | {figures} | CPU s |\n|:--|{'--:|' * (2 * len(METRICS) + 2)}", flush=True)

    def line(self, name: str, score: Callable[[int], Scores]) -> None:
        start = time.process_time()
        scores = [score(seed) for seed in self.seeds]
        cells = [name, spread([self.validation.quality(validation) for validation, _ in scores])]
        users = self.test.frame["user_id"].to_numpy()[self.test.candidates.owner]
        seeds = [user_columns(users, self.test.labels, test, METRICS) for _, test in scores]
        columns = {metric: np.mean([each[metric] for each in seeds], axis=0) for metric in METRICS}
        self.first = self.first or columns
        for metric, against in paired(columns, self.first).items():
            low, high = against["ci95"]
            cells.append(spread([float(np.nanmean(each[metric])) for each in seeds]))
            cells.append(
                f"{against['difference']:+.4f} ({low:+.4f} to {high:+.4f})" if columns is not self.first else ""
            )
        print("|", " | ".join([*cells, f"{time.process_time() - start:.0f}"]), "|", flush=True)

    def scores(self, score: Callable[[Tasks], Array]) -> Scores:
        return score(self.validation), score(self.test)

    def head_scores(self, seed: int) -> Scores:
        head = fit(self.config, self.data, self.options, seed)
        return self.scores(lambda tasks: score_candidates(head, tasks.histories, tasks.candidates))


def spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.4f} ± {np.std(values):.4f}"


# ---- the preference as one more token of the history -----------------------------------------------------------------


class PreferenceHead(SequenceHead):
    """A head whose codes from I on are the (P, F) ``preferences``, which a network of their own reads."""

    preferences: Tensor

    def __init__(self, config: SequenceHeadConfig, preferences: Tensor) -> None:
        super().__init__(config)
        self.register_buffer("preferences", (preferences - preferences.mean(0)) / preferences.std(0).clamp(1e-6))
        inner, outer = nn.Linear(preferences.shape[1], 2 * config.hidden), nn.Linear(2 * config.hidden, config.hidden)
        nn.init.normal_(outer.weight, std=0.02)
        nn.init.zeros_(outer.bias)
        self.preference_reader = nn.Sequential(inner, nn.GELU(), nn.Dropout(config.dropout), outer)

    def item_vectors(self, codes: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        return torch.cat([super().item_vectors(codes, hidden), self.preference_reader(self.preferences)])


def next_item_loss(head: SequenceHead, batch: Tensor, classes: Any, rng: np.random.Generator) -> Tensor:
    """That of ``sequence_training`` with the whole softmax, without the places where a preference comes next."""
    vectors, targets = head.item_vectors(), batch[:, 1:]
    states = head(batch[:, :-1].masked_fill(targets == PADDING, PADDING), vectors).states
    wanted = (targets != PADDING) & (targets < head.config.n_items)
    return F.cross_entropy(states[wanted] @ vectors[classes.trained].T, classes.place[targets[wanted]])


def preference(trial: Trial) -> None:
    run, n_items, size = trial.run, trial.data.n_items, trial.run.block_size
    options, flags = run.recipe.vectors, run.recipe.training
    model = (backbone_path(options.model), options.revision) if options.model else None
    model = model or (backbone_path(flags["model_name_or_path"]), flags.get("model_revision"))
    encode = item_encoder(*model, options.dtype or flags.get("dtype"), {}, run.recipe.item_noun, options.token_budget)
    frame = run.read(PREFERENCES).filter(pl.col("preference") != "").select("user_id", "step", "preference")
    vectors = torch.from_numpy(encode([Candidate("", "", text) for text in frame["preference"]])).float()
    own = {key: n_items + code for code, key in enumerate(frame.select("user_id", "step").iter_rows())}
    shuffled = pl.int_range(n_items, n_items + pl.len()).shuffle(seed=0).over("step").alias("code")
    others = {(user, step): code for user, step, code in frame.select("user_id", "step", shuffled).iter_rows()}

    def with_preferences(users: pl.Series, lists: CodedLists, codes: dict[Any, int]) -> CodedLists:
        rows = list[list[int]]()
        for number, user in enumerate(users):
            rows.append([])
            for count, item in enumerate(lists.codes[lists.bounds[number] : lists.bounds[number + 1]].tolist(), 1):
                token = codes.get((user, count // size)) if count % size == 0 else None
                rows[-1] += [item] if token is None else [item, token]
        return CodedLists(np.concatenate(rows).astype(np.int64), np.cumsum([0, *map(len, rows)]))

    def score(seed: int, codes: dict[Any, int]) -> Scores:
        validation, test = Tasks(run, "validation"), Tasks(run, "test")
        for tasks in (validation, test):
            tasks.histories = with_preferences(tasks.frame["user_id"], tasks.histories, codes)
        users = training_log(run)["user_id"].unique(maintain_order=True)
        learnt = TrainingData(n_items, with_preferences(users, trial.data.histories, codes), validation)
        config = replace(trial.config, max_length=trial.config.max_length * (size + 1) // size + 1)
        with torch.random.fork_rng(devices=[]), patch.object(sequence_training, "next_item_loss", next_item_loss):
            torch.manual_seed(seed)
            head = PreferenceHead(config, vectors)
            head.set_items(trial.data.counts(), trial.data.content)
            training = Training(head, learnt, trial.options, seed)
            while not training.finished:
                training.epoch("with preferences")
        load_weights(head, training.best_weights)
        scored = [score_candidates(head, tasks.histories, tasks.candidates) for tasks in (validation, test)]
        return scored[0], scored[1]

    trial.line("sequence head", trial.head_scores)
    trial.line("with the preference", lambda seed: score(seed, own))
    trial.line("with another user's preference", lambda seed: score(seed, others))


# ---- other item vectors ----------------------------------------------------------------------------------------------


@cache
def trained(path: Path, seed: int) -> Heads:
    recipe = RunFolder.open(path).recipe
    with tempfile.TemporaryDirectory() as folder:
        return train_heads(RunFolder(path, replace(recipe, head=replace(recipe.head, seed=seed))), Path(folder))


def vectors(trial: Trial, others: Sequence[Path]) -> None:
    def score(path: Path, member: str, seed: int) -> Scores:
        ranker = trained(path, seed).ranker(member)
        return trial.scores(lambda tasks: ranker.score(tasks.histories, tasks.candidates))

    for member in ("sequence_head", "content_only", "likeness", "fused"):
        trial.first = {}
        for path in (trial.run.path, *others):
            trial.line(f"{member}, {path.name}", partial(score, path, member))


def grey(run: RunFolder, file: Path) -> None:
    """Write the item vectors of a run as they are where every image is one grey of its own size."""

    def blank(image: dict[str, bytes] | None) -> dict[str, bytes] | None:
        if image is None:
            return None
        buffer = io.BytesIO()
        Image.new("RGB", decode(image["bytes"]).size, GREY).save(buffer, "PNG")
        return image | {"bytes": buffer.getvalue()}

    items, summaries = run.read(ITEMS), dict[str, str]()
    items = items.with_columns(pl.Series("image", map(blank, items["image"]), ITEMS.columns["image"]))
    if run.recipe.vectors_read_summaries:
        summaries = dict(run.read(ITEM_SUMMARIES, ["item_id", "summary"]).iter_rows())
    with tempfile.TemporaryDirectory() as folder:
        vectors = vector_table(items, summaries, lambda: recipe_encoder(run.recipe), ["grey"], Path(folder))
    vectors.select("item_id", "vector").write_parquet(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", choices=("preference", "vectors", "grey"))
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("others", type=Path, nargs="*", help="copies of the run with other vectors; of grey: the file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    if options.trial == "grey":
        return grey(RunFolder.open(options.run), *options.others)
    trial = Trial(RunFolder.open(options.run), options.seeds)
    if options.trial == "vectors":
        vectors(trial, options.others)
    else:
        preference(trial)


if __name__ == "__main__":
    main()
