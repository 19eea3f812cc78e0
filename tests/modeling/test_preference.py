"""The recurrence of preferences, and which one is in force."""

import pytest

from mllm_msr.modeling.preference import PreferenceStep, preference_waves, split_history, whole_blocks

HISTORIES = ["abcde", "f", "ghij", ""]


def write(steps: list[PreferenceStep[str]]) -> list[str]:
    return [f"({step.previous or ''}{''.join(step.items)})" for step in steps]


def test_every_whole_block_updates_the_preference_before_it() -> None:
    waves = list(preference_waves(HISTORIES, 2, write))
    assert [[(step.user, step.step, text) for step, text in wave] for wave in waves] == [
        [(0, 1, "(ab)"), (2, 1, "(gh)")],
        [(0, 2, "((ab)cd)"), (2, 2, "((gh)ij)")],
    ]


def test_without_recurrence_all_items_up_to_a_block_are_read_in_one_wave() -> None:
    (wave,) = preference_waves(HISTORIES, 2, write, recurrent=False)
    assert [(step.user, step.step, text) for step, text in wave] == [
        (0, 1, "(ab)"),
        (0, 2, "(abcd)"),
        (2, 1, "(gh)"),
        (2, 2, "(ghij)"),
    ]


def test_an_empty_text_leaves_the_one_before_it_in_force() -> None:
    texts = iter(["first", "", "third"])
    waves = preference_waves(["abcdef"], 2, lambda steps: [next(texts) for _ in steps])
    steps = [pair for wave in waves for pair in wave]
    assert [text for _, text in steps] == ["first", "first", "third"]
    assert [step.previous for step, _ in steps] == [None, "first", "first"]


def test_a_text_too_few_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        list(preference_waves(["abcd"], 2, lambda steps: []))


def test_the_items_after_the_last_whole_block_are_recent() -> None:
    for count in range(8):
        blocks, recent = split_history(list(range(count)), 3)
        assert len(blocks) == whole_blocks(count, 3) and all(len(block) == 3 for block in blocks)
        assert [item for block in blocks for item in block] + list(recent) == list(range(count))
