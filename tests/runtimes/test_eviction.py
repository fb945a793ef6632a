import numpy as np
import pytest

from edgeprune.runtimes.eviction import Eviction, tokens_left

# text, three visual tokens of ranks 2, 0, 1, text
RANKS = np.array([-1, 2, 0, 1, -1])


@pytest.mark.parametrize("num_rates", [2, 10, 7])
def test_tokens_left_is_the_share_that_is_not_removed(num_rates):
    assert tokens_left(576, 0, num_rates) == 576
    left = [tokens_left(576, k, num_rates) for k in range(num_rates)]
    assert left == [576 - int(np.floor(576 * k / num_rates + 1e-9)) for k in range(num_rates)]
    assert min(left) >= 1


def test_the_least_important_go_first():
    eviction = Eviction(RANKS, num_visual=3, num_rates=3)
    assert eviction.rows_to_keep(0, 6, 1) is None
    assert eviction.rows_to_keep(1, 7, 2).tolist() == [0, 2, 3, 4, 5, 6]
    assert eviction.rows_to_keep(2, 7, 3).tolist() == [0, 1, 3, 4, 5, 6]
    assert (eviction.left, eviction.events) == (1, [(2, 2), (3, 1)])


def test_the_rate_never_falls():
    eviction = Eviction(RANKS, num_visual=3, num_rates=3)
    assert eviction.rows_to_keep(2, 5, 1).tolist() == [0, 2, 4]
    assert eviction.rows_to_keep(1, 4, 2) is None
    assert eviction.rows_to_keep(2, 5, 3) is None


def test_what_prefill_dropped_counts():
    # Four tokens entered, the rate dropped one: the same rate drops nothing more.
    eviction = Eviction(RANKS, num_visual=4, num_rates=4)
    assert eviction.rows_to_keep(1, 5, 1) is None
    assert eviction.rows_to_keep(2, 5, 2).tolist() == [0, 2, 3, 4]
