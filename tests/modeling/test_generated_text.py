"""What a language model has generated, made fit to be stored and shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_msr.modeling.generated_text import tidy


@pytest.mark.parametrize(
    "generated",
    [
        " A blue mug\n",
        "<think>\nThey want a summary.\n</think>\n\nA blue mug",
        "They want a summary.\n</think>\n\nA blue mug",  # the chat template has opened the block
        "<think>So <think>again</think> and again</think> A blue mug",
        "<Thinking>Hm.</Thinking>A blue<reasoning>Or red?</reasoning> mug",
        "A blue mug\n<think>Is that",
        "[THINK]Hm.[/THINK]A blue mug",
        "<seed:think>Hm.</seed:think>A blue mug",
        "◁think▷Hm.◁/think▷A blue mug",
        "<|START_THINKING|>Hm.<|END_THINKING|>A blue mug",
        "<think>Hm.</think><answer>A blue mug</answer>",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>A blue mug<|return|>",
        "analysisThey want a summary.assistantfinalA blue mug",
    ],
)
def test_reasoning_is_no_part_of_a_text(generated):
    assert tidy(generated) == "A blue mug"


@pytest.mark.parametrize("generated", ["<think>They want", "<|channel|>analysis<|message|>They want", " </think> "])
def test_reasoning_that_was_cut_off_leaves_nothing(generated):
    assert tidy(generated) == ""


@pytest.mark.parametrize(
    "text", ["a < b > c", "I think, therefore [thinking about] mugs", "an analysis of\n\tmugs", "☕ 你好"]
)
def test_other_texts_stay_as_they_are(text):
    assert tidy(text) == text


def test_what_no_file_or_terminal_should_hold_goes():
    assert (
        tidy("half \ud83d, whole \ud83d\ude00, NUL \0, escape \x1b[31m") == "half \ufffd, whole 😀, NUL , escape [31m"
    )


@pytest.mark.parametrize("hostile", ["<think>x" * 20_000, "<|channel|>" * 20_000, "analysis " * 20_000, "<" * 100_000])
def test_a_hostile_text_takes_no_longer_than_others(hostile):
    tidy(hostile)


@given(st.text(st.one_of(st.characters(), st.sampled_from("\ud83d\ude00<>[]|/\x1b"))))
def test_whatever_was_generated_can_be_written_to_a_file(generated):
    tidy(generated).encode()
