"""SASRec and GRU4Rec, with and without item features, on the training sequences of a run.

Plain, they are sequence heads that know items by their identity alone. The loss goes over the items that have training
interactions, as no other could have a reason to be pushed down; those others keep an identity of zero. Epochs end when
the validation tasks say so.

With features (SASRecF, GRU4RecF) an item is ``W [delta_i ; F c_i + b] + d``: its learnt identity beside a linear
embedding of its item vector, projected to the width of the network, in histories and as a candidate alike. All else,
the loss and the training included, is as for the plain ones. So they differ from ``sequence_head`` in two things:
content enters linearly, without the network between (there ``MLP(c_i) + delta_i``), and an identity is never left out
in training, so content is not taught to stand alone. (RecBole's SASRecF and GRU4RecF score candidates by the identity
alone, by which no item without interactions can be ranked; its GRU4RecF reads identities and features by two networks.)
"""

from pathlib import Path

import polars as pl
import torch

from mllm_msr.evaluation.coded_tasks import Array, CodedLists, CodedTasks
from mllm_msr.evaluation.rankers import Ranker
from mllm_msr.evaluation.sequence_training import FitOptions, TrainingData, fit, score_candidates, score_catalogue
from mllm_msr.modeling.sequence_head import SequenceHead, SequenceHeadConfig


class SequenceRanker(Ranker):
    """A trained head as a ranker of coded tasks."""

    def __init__(self, head: SequenceHead, items: pl.DataFrame) -> None:
        super().__init__(items)
        self.head = head

    def score(self, histories: CodedLists, candidates: CodedLists) -> Array:
        return score_candidates(self.head, histories, candidates)

    def score_catalogue(self, histories: CodedLists, hidden: torch.Tensor | None = None) -> Array:
        """(U, I); ``hidden`` (I,) items are taken as if nobody had ever chosen them."""
        return score_catalogue(self.head, histories, hidden)


def sasrec(validation: pl.DataFrame, items: pl.DataFrame, training: pl.DataFrame, **settings) -> SequenceRanker:
    """Variant ``sasrec``: self-attention over a history of identities (Kang and McAuley, ICDM 2018).

    Arguments as for :func:`train_ranker`.
    """
    return train_ranker("sasrec", SequenceHeadConfig(n_items=len(items)), validation, items, training, **settings)


def gru4rec(validation: pl.DataFrame, items: pl.DataFrame, training: pl.DataFrame, **settings) -> SequenceRanker:
    """Variant ``gru4rec``: a recurrent network over a history of identities (Hidasi et al., ICLR 2016).

    Arguments as for :func:`train_ranker`.
    """
    config = SequenceHeadConfig(n_items=len(items), encoder="gru")
    return train_ranker("gru4rec", config, validation, items, training, **settings)


def sasrecf(
    validation: pl.DataFrame, items: pl.DataFrame, training: pl.DataFrame, vectors: Array, **settings
) -> SequenceRanker:
    """Variant ``sasrecf``: SASRec with features.

    ``vectors``: (I, F), in the order of ``items.sort("item_id")``; other arguments as for :func:`train_ranker`.
    """
    content = torch.from_numpy(vectors)
    return train_ranker("sasrecf", featured(content), validation, items, training, content, **settings)


def gru4recf(
    validation: pl.DataFrame, items: pl.DataFrame, training: pl.DataFrame, vectors: Array, **settings
) -> SequenceRanker:
    """Variant ``gru4recf``: GRU4Rec with features (Hidasi et al., RecSys 2016); arguments as for :func:`sasrecf`."""
    content = torch.from_numpy(vectors)
    config = featured(content, encoder="gru")
    return train_ranker("gru4recf", config, validation, items, training, content, **settings)


def featured(content: torch.Tensor, **options) -> SequenceHeadConfig:
    """A head whose items are a projection of an identity, never dropped, beside their (I, F) content."""
    n_items, size = content.shape
    return SequenceHeadConfig(n_items=n_items, content_size=size, join="concatenation", identity_dropout=0.0, **options)


def train_ranker(
    name: str,
    config: SequenceHeadConfig,
    validation: pl.DataFrame,
    items: pl.DataFrame,
    training: pl.DataFrame,
    content: torch.Tensor | None = None,
    options: FitOptions | None = None,
    seed: int = 0,
    folder: Path | None = None,
) -> SequenceRanker:
    """Train a head on each user's training interactions in their order.

    Args:
        name: of the progress bar and of what is saved.
        validation: tasks, see :class:`~mllm_msr.evaluation.coded_tasks.CodedTasks`; so are those that are ranked.
        items: ``item_id`` of the whole catalogue.
        training: ``user_id``, ``item_id`` of every training interaction, each user's oldest first.
        content: (I, F), in the order of ``items.sort("item_id")``, for a head with content.
        folder: where epochs are saved, so that a killed training goes on and a finished one is not repeated.
    """
    data = TrainingData(len(items), CodedLists.of_log(training, items), CodedTasks(validation, items), content)
    return SequenceRanker(fit(config, data, options or FitOptions(), seed, folder, name), items)
