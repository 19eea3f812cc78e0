from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mllm_msr.data.negatives import NegativeSampler, noise, sample_ranks


def test_sampled_ranks_give_every_subset_alike() -> None:
    size = 30_000
    ranks = sample_ranks(np.full(size, 5), 2, 0, np.arange(size), np.zeros(size, dtype=int))
    subsets = Counter(tuple(sorted(row)) for row in ranks.tolist())
    assert len(subsets) == 10
    assert max(abs(count / size - 0.1) for count in subsets.values()) < 0.01


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=1))
def test_unseen_ranks_enumerate_what_is_unseen(pairs: list[tuple[int, int]]) -> None:
    sampler = NegativeSampler(np.array([user * 10 + item for user, item in pairs]), 5, 10)
    for user in range(5):
        expected = [item for item in range(10) if (user, item) not in pairs]
        assert sampler.available[user] == len(expected)
        assert sampler.item(np.array([user]), np.arange(len(expected))[None])[0].tolist() == expected
        seen = sampler.seen(np.array([user]), np.arange(10)[None])[0]
        assert [item for item in range(10) if not seen[item]] == expected


def test_noise_depends_on_every_part() -> None:
    keys = [(0, "a", 1, 2), (1, "a", 1, 2), (0, "b", 1, 2), (0, "a", 2, 1), (0, "a", 1, 3)]
    assert len({int(noise(*key)) for key in keys}) == 5
