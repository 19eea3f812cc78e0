"""Answers of one user and a few candidates that are kept, by a compiled forward.

Such a forward is thousands of launches, for which a GPU waits longer than it computes. A CUDA graph launches them all
at once, but is made for one set of shapes: so pairs and tokens are padded to a few sizes, and there are few graphs.
"""

from typing import Any

import numpy as np
import torch

from .block_layout import KVCache
from .interfaces import RecommendationModel
from .packing import pack_late_answers

LEAST = 8
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # of torch.compile


class CompiledAnswers:
    """The scores of :meth:`MllmMsrForRecommendation.score`, compiled.

    Args:
        answer_ids: (A,) the processor's ``late_answer_ids``.
        how: a mode of ``torch.compile``, such as ``reduce-overhead``, or one of its backends, such as ``cudagraphs``.
    """

    most = 256  # pairs of a call; with more a GPU is busy anyway

    def __init__(self, model: RecommendationModel, answer_ids: torch.Tensor, how: str) -> None:
        self.model, self.answer_ids = model, answer_ids
        if how not in [*MODES, *torch._dynamo.list_backends(None)]:
            known = ", ".join([*MODES, *torch._dynamo.list_backends()])
            raise ValueError(f"compile={how!r} is no mode or backend of torch.compile; there are {known}")
        kind: Any = {"mode": how} if how in MODES else {"backend": how}
        self.score = torch.compile(model.score, fullgraph=True, dynamic=False, **kind)

    def __call__(self, user: KVCache, items: KVCache, rows: np.ndarray) -> torch.Tensor:
        """(N,) logits of a user and the N candidates in these rows of ``items``, up to ``most``.

        Raises:
            RowTooWide: padded so, prompts are longer than a sliding window.
        """
        count = padded_size(len(rows))
        items = items.select(np.pad(rows, (0, count - len(rows)), mode="edge"))
        if not self.model.config.item_memory:  # of which all candidates have the same number
            items = items.padded(padded_size(items.width))
        pairs = torch.stack([torch.zeros(count, dtype=torch.long), torch.arange(count)])
        user = user.padded(padded_size(user.width))
        packed = pack_late_answers(self.model, user, items, self.answer_ids, pairs)
        with torch._dynamo.config.patch(recompile_limit=1024):  # a graph a size is what is wanted
            return self.score(**packed).logits[: len(rows)]


def padded_size(count: int) -> int:
    """The next of 8, 12, 16, 24, 32, 48, 64 and so on, which is less than half as much again.

    >>> [padded_size(count) for count in (1, 8, 9, 13, 21, 100, 129, 1000)]
    [8, 8, 12, 16, 24, 128, 192, 1024]
    """
    power = max(LEAST, 1 << (count - 1).bit_length())
    return max(LEAST, power * 3 // 4) if count <= power * 3 // 4 else power
