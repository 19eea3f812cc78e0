"""The queue in front of the model: fair, bounded, and finished when it is closed. The model is a slow sum."""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for

import numpy as np
import pytest

from mllm_msr.modeling.inputs import Candidate, User
from mllm_msr.serving.batching import ModelQueue, QueueClosed, QueueFull, Scoring

CATALOGUE = {str(number): Candidate(str(number), title=str(number)) for number in range(2000)}


class Slow:
    """Scores a candidate by the number in its title, a millisecond a forward and a little for each."""

    def __init__(self) -> None:
        self.forwards: list[list[int]] = []
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()

    def __call__(
        self, users: Sequence[User], names: Sequence[Sequence[str]], catalogue: Mapping[str, Candidate]
    ) -> list[np.ndarray]:
        self.entered.set()
        self.gate.wait()
        self.forwards.append(list(map(len, names)))
        time.sleep(0.001 + 0.00002 * sum(map(len, names)))
        if any(user.preference == "wrong" for user in users):
            raise ValueError("this user cannot be scored")
        return [np.array([float(catalogue[name].title) for name in row], np.float32) for row in names]


@pytest.fixture
def model() -> Slow:
    return Slow()


@pytest.fixture
def queue(model: Slow) -> Iterator[ModelQueue]:
    made = ModelQueue(model, token_budget=100, max_tokens=5000)
    yield made
    model.gate.set()
    made.close()


def ask(queue: ModelQueue, count: int, preference: str = "", seconds: float = 120.0) -> "Future[np.ndarray]":
    names = [str(number) for number in range(count)]
    return queue.submit(User(preference), names, CATALOGUE, [1] * count, 2, time.monotonic() + seconds)


def test_requests_share_forwards_and_keep_their_own_scores(model: Slow, queue: ModelQueue) -> None:
    model.gate.clear()
    waiting = [ask(queue, count) for count in (30, 20, 10, 0)]
    model.gate.set()
    for future, count in zip(waiting, (30, 20, 10, 0), strict=True):
        assert future.result(60).tolist() == list(range(count))
    assert max(map(len, model.forwards)) >= 2 and max(map(sum, model.forwards)) <= 100


def test_an_item_that_is_gone_by_its_turn_fails_its_request_alone(model: Slow, queue: ModelQueue) -> None:
    model.gate.clear()
    ask(queue, 1)
    sound, gone = ask(queue, 5), queue.submit(User(), ["gone"], CATALOGUE, [1], 2, time.monotonic() + 120)
    model.gate.set()
    with pytest.raises(KeyError):
        gone.result(60)
    assert len(sound.result(60)) == 5 and len(ask(queue, 3).result(60)) == 3


def test_a_request_that_is_given_up_just_as_it_is_dropped_harms_no_other(queue: ModelQueue) -> None:
    class GivenUp(Future):
        def cancelled(self) -> bool:
            before = super().cancelled()
            self.cancel()
            return before

    queue._put(Scoring(User(), ["1"], CATALOGUE, [1], 2, time.monotonic() - 1, GivenUp()))
    assert len(ask(queue, 3).result(60)) == 3


def test_a_huge_request_does_not_starve_small_ones(model: Slow, queue: ModelQueue) -> None:
    model.gate.clear()
    asked = [ask(queue, 1900), *(ask(queue, 5) for _ in range(10))]
    done: list[Future] = []
    for future in asked:
        future.add_done_callback(done.append)
    model.gate.set()
    queue.close()
    assert set(done) == set(asked) and done[-1] is asked[0]
    assert asked[0].result().tolist() == list(range(1900))


def test_more_than_may_wait_is_refused_with_the_time_to_wait(model: Slow, queue: ModelQueue) -> None:
    model.gate.clear()
    ask(queue, 1)
    assert model.entered.wait(60)
    waiting = [ask(queue, 1900), ask(queue, 1900)]
    with pytest.raises(QueueFull) as refused:
        ask(queue, 1900)
    assert 1 <= refused.value.retry_after <= 60
    model.gate.set()
    assert not wait_for(waiting, 60).not_done
    assert len(ask(queue, 1900).result(60)) == 1900  # there is room again


def test_what_could_not_be_done_in_its_time_is_refused_at_once(model: Slow, queue: ModelQueue) -> None:
    model.gate.clear()
    ask(queue, 1)
    time.sleep(0.05)  # it is under way
    queue.tokens_per_second = 100.0
    waiting = [ask(queue, 1900), ask(queue, 50, seconds=1)]  # of the large one no more comes first than of itself
    with pytest.raises(QueueFull):
        ask(queue, 400, seconds=1)
    model.gate.set()
    assert not wait_for(waiting[:1], 10).not_done


def test_small_requests_are_done_one_after_another_not_all_by_halves(model: Slow, queue: ModelQueue) -> None:
    model.gate.clear()
    ask(queue, 1)
    time.sleep(0.05)
    waiting = [ask(queue, 20, str(number)) for number in range(12)]
    model.gate.set()
    assert not wait_for(waiting, 10).not_done
    assert model.forwards[1][:4] == [20, 20, 20, 20] and sum(map(len, model.forwards)) <= 1 + 12 + 3


def test_what_is_too_late_or_given_up_is_dropped(model: Slow, queue: ModelQueue) -> None:
    model.gate.clear()
    first = ask(queue, 1)
    assert model.entered.wait(60)
    late, given_up, fine = ask(queue, 50, seconds=0.01), ask(queue, 60), ask(queue, 70)
    given_up.cancel()
    time.sleep(0.02)
    model.gate.set()
    assert len(first.result(60)) == 1 and len(fine.result(60)) == 70
    with pytest.raises(TimeoutError):
        late.result(60)
    assert not {50, 60} & {size for forward in model.forwards for size in forward}


def test_one_wrong_request_fails_alone(model: Slow, queue: ModelQueue) -> None:
    model.gate.clear()
    ask(queue, 1)
    assert model.entered.wait(60)
    right, wrong = ask(queue, 3), ask(queue, 3, "wrong")
    model.gate.set()
    assert right.result(60).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="cannot be scored"):
        wrong.result(60)


def test_calls_run_on_the_same_thread_in_their_turn(queue: ModelQueue) -> None:
    names = {queue.call(lambda: threading.current_thread().name).result(60) for _ in range(3)}
    assert names == {"model"}


def test_a_closed_queue_finishes_and_takes_nothing_more(model: Slow) -> None:
    queue = ModelQueue(model, token_budget=100)
    waiting = [ask(queue, 400) for _ in range(4)]
    queue.close()
    assert all(len(future.result(0)) == 400 for future in waiting)
    with pytest.raises(QueueClosed):
        ask(queue, 1)
