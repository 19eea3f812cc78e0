"""What a server keeps of its answers."""

from mllm_msr.modeling.inputs import HistoryItem, User
from mllm_msr.serving.answers import KeptAnswers

RED, BLUE = User("red"), User("", [HistoryItem(summary="blue")])


def test_answers_are_kept_by_user_in_words_and_item_as_it_is() -> None:
    kept = KeptAnswers()
    kept.add(RED, {("a", 0): 1.0})
    kept.add(RED, {("a", 7): 2.0, ("b", 0): 3.0})
    assert kept.of(User("red", ())) == {("a", 0): 1.0, ("a", 7): 2.0, ("b", 0): 3.0}
    assert kept.of(BLUE) == {} and kept.of(User("red", [HistoryItem(summary="blue")])) == {}


def test_the_users_nobody_asked_about_for_longest_go() -> None:
    kept = KeptAnswers(most=4)
    kept.add(RED, {("a", 0): 1.0, ("b", 0): 1.0})
    kept.add(BLUE, {("a", 0): 1.0, ("b", 0): 1.0})
    kept.of(RED)
    kept.add(User("green"), {("a", 0): 1.0})
    assert kept.of(BLUE) == {} and len(kept.of(RED)) == 2 and len(kept) == 3
    kept.add(RED, {("b", 0): 2.0})
    assert len(kept) == 3 and kept.of(RED)["b", 0] == 2.0
