"""The trained model's answer as a member of the fused score.

An answer costs a forward, so it is not asked about a whole catalogue: the fusion of what ranks by item vectors (see
``evaluation.heads``) puts all items in order, and the answer joins it for the best of each user. What the answer weighs
there is fitted on validation tasks, on lists of just these items and some others. In the end the fused score of such an
item is one weighted sum of five members.
Letters: T tasks, C candidates, U users, I items, N items that are ranked anew.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from mllm_msr.evaluation.coded_tasks import Array, CodedLists, CodedTasks
from mllm_msr.evaluation.full_catalogue import rerank_depth
from mllm_msr.evaluation.fusion import FusionTasks, draw_lists, fit_fusion
from mllm_msr.evaluation.heads import Heads, load_heads
from mllm_msr.evaluation.kept_scores import answer_scores, kept_scores
from mllm_msr.evaluation.scorers import PAIRS_A_TASK, PART, PROGRESS, ModelScorer, ModelView, Scorer
from mllm_msr.evaluation.scoring import pairs, score_with_values
from mllm_msr.modeling.score_fusion import BUCKETS, ScoreFusion
from mllm_msr.processing.examples import run_contexts, users_of
from mllm_msr.records.results import FusionWeights
from mllm_msr.records.run import RunFolder
from mllm_msr.records.sections import OURS
from mllm_msr.records.storage import digest, read_json

MEMBERS = (OURS, "others")
TOP, DRAWN = 20, 20  # items of a list from the top of the other members, and from the rest of the catalogue
BLOCK = 25  # tasks whose answers are saved at a time


@dataclass(frozen=True)
class AnswerLists:
    """Lists of candidates on which the answer's weight is fitted; the positive comes first.

    Args:
        tasks: (T,) places of the validation tasks.
        codes: (T, C) item codes.
        log_q: (T, C), see :class:`~mllm_msr.evaluation.fusion.FusionTasks`.
        scores: (T, C), of the other members fused.
    """

    tasks: Array
    codes: Tensor
    log_q: Tensor
    scores: Tensor


def fit_answer(run: RunFolder, heads: Heads, folder: Path) -> None:
    """Fit what the answer weighs beside the other members, and save it with the heads in ``folder``."""
    tasks = run.tasks("validation")
    coded = CodedTasks(tasks, heads.items)
    if len(coded):
        lists = answer_lists(heads, coded, run.recipe.head.answer_tasks, run.recipe.head.seed)
        answers = answers_of(run, heads, tasks["task_id"], lists)
        scores, buckets = torch.stack([answers, lists.scores], dim=-1), heads.item_ranker.buckets()
        fusion = fit_fusion(FusionTasks(scores, buckets[lists.codes], lists.log_q), MEMBERS, by_likelihood=True)
    else:  # nothing to fit by: the others alone
        weights = torch.tensor([[0.0, 1.0]]).expand(len(BUCKETS), -1)
        fusion = ScoreFusion(MEMBERS, torch.zeros(2), torch.ones(2), weights, torch.zeros(len(BUCKETS)))
    heads.item_ranker.answer_fusion = fusion
    heads.item_ranker.save_pretrained(folder)


def fusion_weights(run: RunFolder) -> tuple[FusionWeights, FusionWeights | None]:
    """What the run's fused score weighs; and what it weighs where the answer is not asked, if it is a member."""

    def weights(fusion: ScoreFusion) -> FusionWeights:
        content = fusion.to_dict()
        return FusionWeights(content["members"], content["weights"], content["bias"])

    config = read_json(run.head / "config.json")["sequence_head"]
    others = ScoreFusion.from_dict(config["fusion"])
    if not run.recipe.fuses_answer:
        return weights(others), None
    return weights(ScoreFusion.from_dict(config["answer_fusion"]).spread(others)), weights(others)


def answer_lists(heads: Heads, tasks: CodedTasks, n_tasks: int, seed: int) -> AnswerLists:
    """Lists of ``n_tasks`` tasks, drawn by ``seed``: what the other members put first, and some of the rest."""
    rng, ranker = np.random.default_rng(seed), heads.ranker("fused")
    chosen = np.sort(rng.permutation(len(tasks))[:n_tasks])
    targets = torch.from_numpy(tasks.candidates.codes[np.flatnonzero(tasks.labels)][chosen])
    parts = []
    for begin in range(0, len(chosen), 128):
        part = slice(begin, begin + 128)
        histories = tasks.histories.pick(chosen[part])
        scores = torch.from_numpy(ranker.score_catalogue(histories))
        codes, log_q = draw_lists(scores[..., None], histories, targets[part], (TOP, DRAWN), rng)
        parts.append((codes, log_q, scores.gather(1, codes)))
    return AnswerLists(chosen, *(torch.cat(column) for column in zip(*parts, strict=True)))


def answers_of(run: RunFolder, heads: Heads, task_ids: pl.Series, lists: AnswerLists) -> Tensor:
    """(T, C): the trained model's logits of the lists' candidates, 0 for what is none; each is scored once.

    What is scored is saved by the model and the candidates it was scored with, so that a killed fit goes on.

    Args:
        task_ids: of all validation tasks, in their order.
    """
    ids = heads.items["item_id"].sort()
    real = ~lists.log_q.isinf()
    candidates = [
        ids.gather(codes[mask]).to_list() for codes, mask in zip(lists.codes.numpy(), real.numpy(), strict=True)
    ]
    asked = pl.DataFrame(
        {
            "task_id": task_ids.gather(lists.tasks),
            "candidates": candidates,
            "labels": [[1] + [0] * (len(row) - 1) for row in candidates],
        }
    )
    contexts = run_contexts(run, "validation").drop("candidates", "labels")
    contexts = asked.join(contexts, on="task_id", how="left", maintain_order="left")

    def scorer() -> ModelScorer:
        model = ModelScorer(ModelView(), replace(run, cluster=None))  # so few tasks are scored in this process
        model.part_size = BLOCK
        return model

    folder = run.answers / digest(run.key("train"), asked["task_id"].to_list(), candidates)
    scored = kept_scores(folder, OURS, scorer, contexts)
    for stale in set(run.answers.iterdir()) - {folder}:
        shutil.rmtree(stale)
    answers = torch.zeros(real.shape)
    answers[real] = torch.tensor(scored["logit"].to_numpy())
    return answers


class FusedScorer(Scorer):
    """The fused score with the answer among its members; over the whole catalogue the answer is asked for the best."""

    def __init__(self, run: RunFolder) -> None:
        self.run, heads = run, load_heads(run)
        if heads.item_ranker.answer_fusion is None:
            raise ValueError(f"{run.head} has no weight of the answer: remove it and run `{run.command('head')}` again")
        self.ranker, self.fusion = heads.ranker("fused"), heads.item_ranker.answer_fusion
        self.buckets, self.depth = heads.item_ranker.buckets(), rerank_depth(run)

    @cached_property
    def model(self) -> ModelScorer:
        return self.held.enter_context(ModelScorer(ModelView(), self.run))

    @cached_property
    def contexts(self) -> pl.DataFrame:
        return run_contexts(self.run, self.run.recipe.evaluation.split)

    def score(self, tasks: pl.DataFrame) -> pl.DataFrame:
        answers, coded = answer_scores(self.run), CodedTasks(tasks, self.ranker.items)
        if not answers.select("user_id", "item_id").equals(pairs(tasks).select("user_id", "item_id")):
            raise ValueError(
                f"the answers were scored on other candidates: remove {self.run.scores} and evaluate again"
            )
        others = self.ranker.score(coded.histories, coded.candidates)
        logits, buckets = torch.tensor(answers["logit"].to_numpy()), self.buckets[coded.candidates.codes]
        values = self.fusion.join(logits, torch.from_numpy(others), buckets)
        return score_with_values(tasks, values.numpy())

    def catalogue_part(self, n_items: int) -> int:
        return max(1, PART * PAIRS_A_TASK // max(1, self.depth))

    def score_catalogue(self, tasks: pl.DataFrame, items: Sequence[str]) -> Array:
        histories = CodedLists.of(tasks["history"], self.ranker.items)
        scores = torch.from_numpy(self.ranker.score_catalogue(histories))
        chosen = torch.zeros(scores.shape, dtype=torch.bool)
        chosen[histories.owner, histories.codes] = True
        contexts = tasks.select("task_id").join(self.contexts, on="task_id", how="left", maintain_order="left")
        users = users_of(contexts)

        def answer(best: Tensor) -> Tensor:
            names = [[items[code] for code in row] for row in best.tolist()]
            logits = self.model.recommender.score(users, names, self.model.catalogue, progress=PROGRESS)
            return torch.from_numpy(np.stack(logits))

        return self.fusion.rerank(scores, self.buckets, chosen, self.depth, answer).numpy()
