import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opendeep_jax.data.plan import best_fit, first_fit, pack

PACKINGS = ("concatenate", "first_fit", "best_fit")
document_lengths = st.lists(st.integers(2, 30), min_size=1, max_size=30)
packings = st.sampled_from(PACKINGS)


def rows_of(pieces):
    """Each row as its pieces: (document, begin, end)."""
    columns = zip(pieces.documents.tolist(), pieces.begins.tolist(), pieces.ends.tolist(), strict=True)
    listed = list(columns)
    bounds = pieces.row_offsets.tolist()
    return [listed[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def test_documents_in_order_are_cut_as_the_docstring_says():
    assert rows_of(pack(np.array([4, 5]), 6, "concatenate", None)) == [[(0, 0, 4), (1, 0, 3)], [(1, 2, 5)]]


@given(document_lengths, st.integers(1, 40), packings, st.integers(0, 2**32 - 1))
def test_every_token_but_a_documents_first_is_predicted_exactly_once(lengths, length, packing, seed):
    predicted = [
        (document, token)
        for row in rows_of(pack(np.array(lengths), length, packing, (seed,)))
        for document, begin, end in row
        for token in range(begin + 1, end)
    ]
    assert sorted(predicted) == [(d, token) for d, size in enumerate(lengths) for token in range(1, size)]


@given(document_lengths, st.integers(1, 40), packings)
def test_no_row_is_longer_than_its_positions_and_their_last_target(lengths, length, packing):
    for row in rows_of(pack(np.array(lengths), length, packing, (1,))):
        assert 2 <= sum(end - begin for _, begin, end in row) <= length + 1


@given(document_lengths, st.integers(1, 40), st.sampled_from(["first_fit", "best_fit"]))
def test_documents_that_fit_a_row_are_never_cut(lengths, length, packing):
    rows = rows_of(pack(np.array(lengths), length, packing, (1,)))
    whole = [piece for row in rows for piece in row if lengths[piece[0]] <= length + 1]
    assert sorted(whole) == [(d, 0, size) for d, size in enumerate(lengths) if size <= length + 1]


@given(document_lengths, st.integers(1, 40))
def test_concatenated_rows_are_full_but_the_last(lengths, length):
    rows = rows_of(pack(np.array(lengths), length, "concatenate", (3,)))
    sizes = [sum(end - begin for _, begin, end in row) for row in rows]
    assert all(size == length + 1 for size in sizes[:-1]) and len(rows) == -(-(sum(lengths) - 1) // length)


def naive(sizes, capacity, choose):
    """Places items one by one into the bin that `choose` picks among those with room; gives the rooms left."""
    rooms = []
    for size in sizes:
        fitting = [i for i, room in enumerate(rooms) if room >= size]
        chosen = choose(fitting, rooms) if fitting else None
        if chosen is None:
            rooms.append(capacity - size)
        else:
            rooms[chosen] -= size
    return rooms


def rooms_left(sizes, bins, capacity):
    return (capacity - np.bincount(bins, sizes)).astype(int).tolist()


@settings(deadline=None)
@given(st.lists(st.integers(2, 25), min_size=1, max_size=80), st.integers(25, 60))
def test_best_fit_leaves_the_room_that_placing_one_by_one_leaves(sizes, capacity):
    expected = naive(sorted(sizes, reverse=True), capacity, lambda fitting, rooms: min(fitting, key=rooms.__getitem__))
    found = rooms_left(sizes, best_fit(np.array(sizes), capacity), capacity)
    assert min(found) >= 0 and sorted(found) == sorted(expected)


@settings(deadline=None)
@given(st.lists(st.integers(2, 25), min_size=1, max_size=80), st.integers(25, 60), st.integers(1, 90))
def test_first_fit_fills_the_first_bin_with_room_in_each_window(sizes, capacity, window):
    expected = []
    for start in range(0, len(sizes), window):
        expected += naive(sizes[start : start + window], capacity, lambda fitting, rooms: fitting[0])
    assert rooms_left(sizes, first_fit(np.array(sizes), capacity, window), capacity) == expected


@pytest.mark.parametrize("packing", PACKINGS)
def test_keys_decide_the_order(packing):
    lengths = np.array([5 + i for i in range(20)])
    some = [rows_of(pack(lengths, 8, packing, key)) for key in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert some[0] == some[3] and some[0] != some[1] and some[0] != some[2]


@pytest.mark.parametrize("packing", PACKINGS)
def test_no_documents_make_no_rows(packing):
    pieces = pack(np.zeros(0, np.int64), 8, packing, (0,))
    assert pieces.row_offsets.tolist() == [0] and len(pieces.documents) == 0


@pytest.mark.parametrize("length", [2048, 8192])
def test_best_fit_wastes_less_than_a_hundredth_on_documents_as_they_are_in_the_wild(length):
    lengths = np.clip(np.random.default_rng(0).lognormal(6.2, 1.4, 50_000), 1, 200_000).astype(np.int64) + 2
    pieces = pack(lengths, length, "best_fit", (0,))
    rows = len(pieces.row_offsets) - 1
    used = (pieces.ends - pieces.begins).sum() - rows
    cut = np.bincount(pieces.documents)[lengths <= length + 1] > 1
    assert 1 - used / (rows * length) < 0.01 and cut.mean() < 0.01
