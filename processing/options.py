"""What can be chosen when data is prepared; plain fields, so that a recipe or a flag can set each."""

from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from mllm_msr.processing.images import MAX_EDGE, MAX_PIXELS
from mllm_msr.processing.raw import OnBadRows


@dataclass(frozen=True)
class PrepareOptions:
    """Options of cleaning, splitting and sampling. ``None`` means no limit."""

    on_bad_rows: OnBadRows = "error"
    # cleaning
    repeats: Literal["first", "last", "all"] = "first"  # which of a user's interactions with one item counts
    k_core_users: int = 5  # every user has at least so many interactions ...
    k_core_items: int = 5  # ... and every item
    missing_images: Literal["keep", "drop"] = "keep"  # items without title or image
    limit_users: int | None = None  # a seeded sample of users
    max_history: int | None = None  # a user's most recent interactions that count
    # protocol
    protocol: Literal["strict", "paper", "global-cutoff"] = "strict"
    negatives: Literal["uniform", "popularity", "all"] = "uniform"
    n_negatives: int = 20  # a validation or test target
    n_train_negatives: int = 1  # a training target
    max_train_targets: int | None = 5  # a user's most recent; "paper" has one a user
    min_history: int = 1  # items before a target; 0 asks users of whom nothing is known as well
    folds: int = 10  # protocol "paper": 1/folds of the users are tested
    fold: int = 0  # which of them
    seed: int = 0
    # images
    max_image_pixels: int = MAX_PIXELS
    max_image_edge: int = MAX_EDGE

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value: Any = getattr(self, name)
            choices = [choice for choice in get_args(kind) if isinstance(choice, str)]
            if choices and value not in choices:
                raise ValueError(f"{name}={value!r}: must be one of {', '.join(choices)}")
            if not choices and not (value is None and type(None) in get_args(kind)):
                may_be_zero = ("fold", "min_history", "k_core_users", "k_core_items")
                least = {"seed": None, "folds": 3, **dict.fromkeys(may_be_zero, 0)}.get(name, 1)
                if not isinstance(value, int) or isinstance(value, bool):
                    raise ValueError(f"{name}={value!r}: must be a whole number")
                if least is not None and value < least:
                    raise ValueError(f"{name}={value}: must be at least {least}")
        if self.fold >= self.folds:
            raise ValueError(f"fold={self.fold}: there are {self.folds} folds, counted from 0")
        if (self.folds, self.fold) != (10, 0) and self.protocol != "paper":
            raise ValueError(f"folds={self.folds}, fold={self.fold}: only protocol='paper' splits by user")
