"""What a sequence head is like."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SequenceHeadOptions:
    """What a head is like, whatever the catalogue.

    Args:
        identity: whether items have a learnt vector of their own.
        encoder: the network over a history; ``both``: their states are added.
        hidden: D; layers, heads: of the transformer. A GRU has one layer, twice as wide, and a projection.
        dropout: of inputs, attention and feed-forward layers.
        identity_dropout: the share of items whose identity is left out in a training step, if they have content.
        gate: whether content is weighted, for each order of magnitude of an item's training interactions, by a learnt
            number; those without have their own.
        max_length: places of a history that are read, from its end.
        join: how content and identity make a vector: the sum of ``MLP(c_i)`` and the identity, or, as in baselines with
            item features, one projection of a linear embedding of content beside the identity.
        neighbours: k: to each item's vector the mean identity is added of the k items nearest to it by content that
            somebody has chosen; 0: nothing is.
        unit_items: whether all item vectors have one length, which is learnt: a score is then a cosine by a factor, and
            how popular an item is shows in its direction only.
    """

    identity: bool = True
    encoder: Literal["transformer", "gru", "both"] = "transformer"
    hidden: int = 64
    layers: int = 2
    heads: int = 2
    dropout: float = 0.3
    identity_dropout: float = 0.3
    gate: bool = False
    max_length: int = 100
    join: Literal["sum", "concatenation"] = "sum"
    neighbours: int = 0
    unit_items: bool = False

    def __post_init__(self) -> None:
        if self.encoder not in ("transformer", "gru", "both"):
            raise ValueError(f"encoder={self.encoder!r} is not known; there are 'transformer', 'gru' and 'both'")
        for name in ("hidden", "layers", "heads", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("dropout", "identity_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 0 and below 1")
        if self.neighbours < 0:
            raise ValueError(f"neighbours={self.neighbours}: must be at least 0")
        if self.hidden % self.heads:
            raise ValueError(f"hidden={self.hidden} is no multiple of heads={self.heads}")


@dataclass(frozen=True)
class SequenceHeadConfig(SequenceHeadOptions):
    """Everything that decides what a head's weights mean.

    Args:
        n_items: I, items with a code 0 ... I - 1.
        content_size: F; 0 for a head without content.
    """

    n_items: int = 0
    content_size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.identity and not self.content_size:
            raise ValueError("an item needs an identity, content, or both: give content_size or identity=True")
        if self.neighbours and not (self.identity and self.content_size):
            raise ValueError(f"neighbours={self.neighbours}: they are found by content, and lend their identity")

    @property
    def joined(self) -> bool:
        """Whether items are a projection of identity and content beside each other."""
        return self.join == "concatenation" and self.identity and self.content_size > 0
