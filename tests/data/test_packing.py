import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from opendeep_jax.data.packing import PackedRows, _scramble, empty_batch, permutation

document_lengths = st.lists(st.integers(2, 30), min_size=1, max_size=12)


def packed(lengths, length, key=(0, 0), segment_mask=True) -> PackedRows:
    """Rows over documents whose tokens all differ: token t of the store is the number t + 1."""
    return PackedRows(
        np.arange(1, sum(lengths) + 1), np.cumsum([0, *lengths]), length, key=key, segment_mask=segment_mask
    )


def rows(plan: PackedRows, indices):
    indices = list(indices)
    batch = empty_batch(len(indices), plan.length)
    for b, index in enumerate(indices):
        plan.write(index, batch, b)
    return batch


def test_rows_of_documents_in_order_look_as_the_contract_says():
    batch = rows(packed([4, 5], 6, key=None), range(2))
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 6], [7, 8, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [[2, 3, 4, 5, 6, 7], [8, 9, 0, 0, 0, 0]]
    assert batch.loss_mask.tolist() == [[True, True, True, False, True, True], [True, True] + [False] * 4]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 2, 2], [1, 1, 0, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 0, 0, 0, 0]]


@given(document_lengths, st.integers(1, 40), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_each_token_but_a_documents_first_is_predicted_exactly_once_an_epoch(lengths, length, epoch, seed):
    plan = packed(lengths, length, (seed, 0))
    n = plan.rows_per_epoch
    batch = rows(plan, range(epoch * n, (epoch + 1) * n))
    firsts = np.cumsum([0, *lengths])[:-1] + 1
    expected = np.setdiff1d(np.arange(1, sum(lengths) + 1), firsts)
    assert sorted(batch.targets[batch.loss_mask].tolist()) == expected.tolist()
    # What predicts it is the token before it in its document.
    np.testing.assert_array_equal(batch.tokens[batch.loss_mask] + 1, batch.targets[batch.loss_mask])


@given(document_lengths, st.integers(1, 40), st.integers(0, 50))
def test_segments_are_pieces_of_one_document_with_their_own_positions(lengths, length, index):
    plan = packed(lengths, length)
    batch = rows(plan, [index])
    tokens, segments, positions = batch.tokens[0], batch.segment_ids[0], batch.positions[0]
    document = np.searchsorted(np.cumsum(lengths), tokens)  # token t is number t + 1
    used = np.count_nonzero(segments)
    assert (segments[:used] > 0).all() and not segments[used:].any() and not tokens[used:].any()
    assert not batch.loss_mask[0, used:].any() and not positions[used:].any()
    for segment in range(1, segments.max() + 1):
        members = np.flatnonzero(segments == segment)
        assert len(set(document[members].tolist())) == 1
        np.testing.assert_array_equal(members, np.arange(members[0], members[-1] + 1))
        np.testing.assert_array_equal(positions[members], np.arange(len(members)))
        np.testing.assert_array_equal(np.diff(tokens[members]), 1)


@given(document_lengths, st.integers(1, 40), st.integers(0, 50))
def test_without_segment_mask_a_row_is_one_text_with_the_same_tokens(lengths, length, index):
    masked = rows(packed(lengths, length), [index])
    plain = rows(packed(lengths, length, segment_mask=False), [index])
    used = np.count_nonzero(masked.segment_ids)
    np.testing.assert_array_equal(plain.tokens, masked.tokens)
    np.testing.assert_array_equal(plain.targets, masked.targets)
    np.testing.assert_array_equal(plain.segment_ids[0], np.arange(length) < used)
    np.testing.assert_array_equal(plain.loss_mask[0], np.arange(length) < used)
    np.testing.assert_array_equal(plain.positions[0, :used], np.arange(used))


@given(document_lengths, st.integers(1, 40), st.integers(0, 50))
def test_pieces_name_the_tokens_of_a_row(lengths, length, index):
    plan = packed(lengths, length)
    batch = rows(plan, [index])
    pieces = [np.arange(plan.offsets[d] + first, plan.offsets[d] + end) + 1 for d, first, end in plan.pieces(index)]
    used = np.count_nonzero(batch.segment_ids)
    np.testing.assert_array_equal(np.concatenate(pieces), [*batch.tokens[0, :used], batch.targets[0, used - 1]])


def test_document_longer_than_the_context_goes_on_in_later_rows():
    batch = rows(packed([20], 8, key=None), range(3))
    assert batch.tokens[:, 0].tolist() == [1, 9, 17] and batch.loss_mask.sum() == 19
    assert batch.segment_ids.max() == 1


def test_epochs_and_seeds_differ_in_order():
    lengths = [5 + i for i in range(20)]
    first = rows(packed(lengths, 8), range(5)).tokens
    n = packed(lengths, 8).rows_per_epoch
    assert not np.array_equal(first, rows(packed(lengths, 8), range(n, n + 5)).tokens)
    assert not np.array_equal(first, rows(packed(lengths, 8, (1, 0)), range(5)).tokens)
    assert not np.array_equal(first, rows(packed(lengths, 8, (0, 1)), range(5)).tokens)


@given(st.integers(0, 300), st.lists(st.integers(0, 2**63), max_size=4))
def test_permutation_holds_each_index_once(size, key):
    assert sorted(permutation(size, *key).tolist()) == list(range(size))


def test_permutation_is_the_same_on_every_machine_and_has_no_pattern():
    assert permutation(8, 1, 2).tolist() == [1, 3, 7, 2, 6, 4, 5, 0]
    assert _scramble(np.zeros(1, np.uint64)) == 0xE220A8397B1DCDAF  # the first number of SplitMix64 with seed 0
    first = [permutation(100, seed)[0] for seed in range(2000)]
    counts = np.bincount(first, minlength=100)
    assert counts.min() > 3 and counts.max() < 45
