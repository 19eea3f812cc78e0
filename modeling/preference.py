"""The recurrence h_k = LLM(block_k, h_(k-1)) of a user's preference, and the rule of which preference is in force.

A history is cut into history blocks of equal size, oldest first; what is left at its end is no block yet. The
preference in force after n items is that after the last whole block; the items since then are shown as they are.
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


def preference_step(
    user: int,
    step: int,
    history: Sequence[Item],
    block_size: int,
    previous: str | None,
    recurrent: bool = True,
) -> PreferenceStep[Item]:
    """What h_step of a history is written from, if ``previous`` is the preference before it.

    >>> preference_step(0, 2, "abcde", 2, "a+b").items
    'cd'
    """
    end = step * block_size
    if recurrent:
        return PreferenceStep(user, step, history[end - block_size : end], previous)
    return PreferenceStep(user, step, history[:end], None)


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
    ...     return [(step.previous or "") + "+".join(step.items) + ";" for step in steps]
    >>> [text for wave in preference_waves(["abcde"], 2, write) for _, text in wave]
    ['a+b;', 'a+b;c+d;']
    """
    in_force: dict[int, str] = {}
    blocks = [whole_blocks(len(history), block_size) for history in histories]
    numbers = range(1, max(blocks, default=0) + 1)
    waves = [[number] for number in numbers] if recurrent else [list(numbers)]
    for wave in waves:
        steps = [
            preference_step(user, number, history, block_size, in_force.get(user), recurrent)
            for user, history in enumerate(histories)
            for number in wave
            if number <= blocks[user]
        ]
        written = []
        for current, text in zip(steps, write(steps) if steps else (), strict=True):
            in_force[current.user] = text or in_force.get(current.user, "")
            written.append((current, in_force[current.user]))
        if written:
            yield written
