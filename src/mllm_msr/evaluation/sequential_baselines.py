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

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import polars as pl
import torch

from mllm_msr.evaluation.coded_tasks import Array, CodedLists, CodedTasks
from mllm_msr.evaluation.rankers import Ranker
from mllm_msr.evaluation.sequence_training import FitOptions, TrainingData, fit, score_candidates, score_catalogue
from mllm_msr.modeling.sequence_head import SequenceHead
from mllm_msr.modeling.sequence_head_options import SequenceHeadConfig, SequenceHeadOptions
from mllm_msr.records.sections import HeadOptions

# whatever the sequence head is like
SASREC: dict[str, Any] = {"encoder": "transformer"}
GRU4REC: dict[str, Any] = {"encoder": "gru"}
# items are a projection of an identity, never dropped, beside their content
FEATURED: dict[str, Any] = {"join": "concatenation", "identity_dropout": 0.0}


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
    return train_ranker("sasrec", SASREC, validation, items, training, **settings)


def gru4rec(validation: pl.DataFrame, items: pl.DataFrame, training: pl.DataFrame, **settings) -> SequenceRanker:
    """Variant ``gru4rec``: a recurrent network over a history of identities (Hidasi et al., ICLR 2016).

    Arguments as for :func:`train_ranker`.
    """
    return train_ranker("gru4rec", GRU4REC, validation, items, training, **settings)


def sasrecf(
    validation: pl.DataFrame, items: pl.DataFrame, training: pl.DataFrame, vectors: Array, **settings
) -> SequenceRanker:
    """Variant ``sasrecf``: SASRec with features.

    ``vectors``: (I, F), in the order of ``items.sort("item_id")``; other arguments as for :func:`train_ranker`.
    """
    own, content = SASREC | FEATURED, torch.from_numpy(vectors)
    return train_ranker("sasrecf", own, validation, items, training, content, **settings)


def gru4recf(
    validation: pl.DataFrame, items: pl.DataFrame, training: pl.DataFrame, vectors: Array, **settings
) -> SequenceRanker:
    """Variant ``gru4recf``: GRU4Rec with features (Hidasi et al., RecSys 2016); arguments as for :func:`sasrecf`."""
    own, content = GRU4REC | FEATURED, torch.from_numpy(vectors)
    return train_ranker("gru4recf", own, validation, items, training, content, **settings)


def train_ranker(
    name: str,
    own: Mapping[str, Any],
    validation: pl.DataFrame,
    items: pl.DataFrame,
    training: pl.DataFrame,
    content: torch.Tensor | None = None,
    head: HeadOptions | None = None,
    options: FitOptions | None = None,
    seed: int = 0,
    folder: Path | None = None,
) -> SequenceRanker:
    """Train a head on each user's training interactions in their order.

    Args:
        name: of the progress bar and of what is saved.
        own: fields of ``SequenceHeadOptions`` that are not as in ``head``.
        validation: tasks, see :class:`~mllm_msr.evaluation.coded_tasks.CodedTasks`; so are those that are ranked.
        items: ``item_id`` of the whole catalogue.
        training: ``user_id``, ``item_id`` of every training interaction, each user's oldest first.
        content: (I, F), in the order of ``items.sort("item_id")``, for a head with content.
        head: settings of network and training, None: the defaults. What is compared has the same, as far as they
            concern it.
        options: other settings of the training.
        folder: where epochs are saved, so that a killed training goes on and a finished one is not repeated.
    """
    head, size = head or HeadOptions(), 0 if content is None else content.shape[1]
    network = {**shared(head, SequenceHeadOptions), **own}
    config = SequenceHeadConfig(**network, n_items=len(items), content_size=size)
    options = options or FitOptions(**shared(head, FitOptions))
    data = TrainingData(len(items), CodedLists.of_log(training, items), CodedTasks(validation, items), content)
    return SequenceRanker(fit(config, data, options, seed, folder, name), items)


def shared(head: HeadOptions, kind: type[Any]) -> dict[str, Any]:
    """The fields of a kind of options that the section ``head`` has."""
    return {each.name: getattr(head, each.name) for each in fields(kind) if hasattr(head, each.name)}
