"""The recurrence h_k = LLM(block_k, h_(k-1)) of a user's preference, and the rule of which preference is in force.

A history is cut into history blocks of equal size, oldest first; what is left at its end is no block yet. The
preference in force after n items is that after the last whole block, and the items since then are told as they are.
Training examples, rankings, the pipeline and the demo page all go by this file.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


def whole_blocks(n_items: Any, block_size: int) -> Any:
    """How many whole history blocks ``n_items`` make: the step of the preference in force (0: none yet).

    Takes an int, an array or a Polars expression.

    >>> whole_blocks(7, 3)
    2
    """
    return n_items // block_size


def split_history(history: Sequence[Item], block_size: int) -> tuple[list[Sequence[Item]], Sequence[Item]]:
    """The whole history blocks, and the recent items after the last of them.

    >>> split_history("abcdefg", 3)
    (['abc', 'def'], 'g')
    """
    end = whole_blocks(len(history), block_size) * block_size
    return [history[start : start + block_size] for start in range(0, end, block_size)], history[end:]


@dataclass(frozen=True)
class PreferenceStep(Generic[Item]):
    """What one text is written from.

    Args:
        user: place among the histories.
        step: from 1; the text is h_step.
        items: the block's; without recurrence all items up to its end.
        previous: h_(step-1); None at the first step, and without recurrence.
    """

    user: int
    step: int
    items: Sequence[Item]
    previous: str | None


def preference_waves(
    histories: Sequence[Sequence[Item]],
    block_size: int,
    write: Callable[[list[PreferenceStep[Item]]], Iterable[str]],
    recurrent: bool = True,
) -> Iterator[list[tuple[PreferenceStep[Item], str]]]:
    """Every user's preference after each whole block, with the step it was written at.

    Step k of all users is one wave, since it needs only their step k - 1. Without recurrence (the paper's ablation)
    h_k = LLM(block_1, ..., block_k), all in one wave. If a text is empty, the one before it stays in force.

    Args:
        histories: U histories, oldest item first.
        block_size: items of a block.
        write: texts for the steps of one wave, in their order.

    >>> def write(steps):
    ...     return [(one.previous or "") + "+".join(one.items) + ";" for one in steps]
    >>> [text for wave in preference_waves(["abcde"], 2, write) for _, text in wave]
    ['a+b;', 'a+b;c+d;']
    """
    in_force: dict[int, str] = {}
    blocks = [split_history(history, block_size)[0] for history in histories]

    def step(user: int, number: int) -> PreferenceStep[Item]:
        if recurrent:
            return PreferenceStep(user, number, blocks[user][number - 1], in_force.get(user))
        return PreferenceStep(user, number, histories[user][: number * block_size], None)

    steps = [(user, number) for user in range(len(blocks)) for number in range(1, len(blocks[user]) + 1)]
    last = max((number for _, number in steps), default=0)
    waves = [[one for one in steps if one[1] == number] for number in range(1, last + 1)] if recurrent else [steps]
    for wave in filter(None, waves):
        asked = [step(*one) for one in wave]
        written = []
        for one, text in zip(asked, write(asked), strict=True):
            in_force[one.user] = text or in_force.get(one.user, "")
            written.append((one, in_force[one.user]))
        yield written
