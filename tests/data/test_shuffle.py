import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from opendeep_jax.data.shuffle import permutation, scramble, shuffled, unshuffled

keys = st.lists(st.integers(0, 2**63), max_size=4)


@given(st.integers(0, 300), keys)
def test_permutation_holds_each_index_once(size, key):
    assert sorted(permutation(size, *key).tolist()) == list(range(size))


@given(st.integers(1, 300), keys)
def test_shuffled_places_are_a_permutation_and_unshuffled_is_the_way_back(size, key):
    places = shuffled(np.arange(size), size, *key)
    assert sorted(places.tolist()) == list(range(size))
    assert unshuffled(places, size, *key).tolist() == list(range(size))


@given(st.integers(1, 2**50), st.integers(0, 2**63), keys)
def test_places_of_a_huge_shuffle_are_found_alone_and_led_back(size, place, key):
    place %= size
    sent = shuffled(np.array([place]), size, *key)
    assert 0 <= sent[0] < size and unshuffled(sent, size, *key)[0] == place


def test_shuffles_are_the_same_on_every_machine():
    assert permutation(8, 1, 2).tolist() == [1, 3, 7, 2, 6, 4, 5, 0]
    assert scramble(np.zeros(1, np.uint64)) == 0xE220A8397B1DCDAF  # the first number of SplitMix64 with seed 0
    assert shuffled(np.arange(8), 8, 1, 2).tolist() == [4, 2, 0, 1, 6, 3, 7, 5]


def test_shuffles_have_no_pattern():
    first = [permutation(100, seed)[0] for seed in range(2000)]
    counts = np.bincount(first, minlength=100)
    assert counts.min() > 3 and counts.max() < 45
    places = np.array([shuffled(np.arange(100), 100, seed) for seed in range(2000)])
    counts = np.stack([np.bincount(column, minlength=100) for column in places.T])
    assert counts.min() > 2 and counts.max() < 50
    steps = np.diff(places.astype(int), axis=1)  # neighbors fall apart: each distance is rare
    assert np.bincount((steps + 100).ravel()).max() < 0.02 * steps.size


def test_keys_and_their_order_make_another_shuffle():
    some = [shuffled(np.arange(1000), 1000, *key).tolist() for key in ((), (0,), (1,), (0, 1), (1, 0))]
    assert all(a != b for i, a in enumerate(some) for b in some[:i])
