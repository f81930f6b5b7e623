import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from memory_store import MemoryStore

from opendeep_jax.data.fim import EXTRA_TOKENS, NO_FIM, FimRule
from opendeep_jax.data.pipeline import read_pieces

ALL = FimRule(seed=3, rate=1.0, ids=(-1, -2, -3))
lengths = st.lists(st.integers(2, 40), min_size=1, max_size=8)


def whole(store, fim, document):
    size = int(store.lengths(document, document + 1)[0] + fim.extra_tokens(store.id_hashes(document, document + 1))[0])
    return read_pieces(store, fim, *(np.array([value]) for value in (document, 0, size))).tolist()


@given(lengths, st.integers(0, 2**32 - 1))
def test_a_rearranged_document_is_begin_prefix_suffix_middle_end(sizes, seed):
    fim = ALL._replace(seed=seed)
    store = MemoryStore(sizes)
    for document, size in enumerate(sizes):
        tokens = whole(store, fim, document)
        plain = (1000 * document + np.arange(size)).tolist()
        assert len(tokens) == size + EXTRA_TOKENS
        assert (tokens[0], tokens[1], tokens[-1]) == (plain[0], -1, plain[-1])
        hole, stop = tokens.index(-2), tokens.index(-3)
        prefix, suffix, middle = tokens[2:hole], tokens[hole + 1 : stop], tokens[stop + 1 : -1]
        assert [plain[0], *prefix, *middle, *suffix, plain[-1]] == plain


@given(lengths, st.data())
def test_pieces_of_a_rearranged_document_are_cut_out_of_the_whole(sizes, data):
    store = MemoryStore(sizes)
    document = data.draw(st.integers(0, len(sizes) - 1))
    tokens = whole(store, ALL, document)
    begin = data.draw(st.integers(0, len(tokens) - 1))
    end = data.draw(st.integers(begin + 1, len(tokens)))
    assert read_pieces(store, ALL, *(np.array([n]) for n in (document, begin, end))).tolist() == tokens[begin:end]


def test_pieces_of_plain_and_rearranged_documents_follow_each_other():
    store, half = MemoryStore([9] * 40), ALL._replace(rate=0.5)
    chosen = half.chosen(store.id_hashes(0, 40))
    assert 8 < chosen.sum() < 32
    ends = 9 + half.extra_tokens(store.id_hashes(0, 40))
    tokens = read_pieces(store, half, np.arange(40), np.zeros(40, int), ends)
    assert tokens.tolist() == [token for document in range(40) for token in whole(store, half, document)]
    assert read_pieces(store, NO_FIM, np.arange(3), np.zeros(3, int), np.full(3, 2)).tolist() == [
        0, 1, 1000, 1001, 2000, 2001
    ]  # fmt: skip


def test_the_share_of_documents_is_the_rate_and_the_seed_decides_which():
    hashes = MemoryStore([3] * 4000).hashes
    one, other = (FimRule(seed, 0.1, (1, 2, 3)).chosen(hashes) for seed in (0, 1))
    assert 0.08 < one.mean() < 0.12 and 0.08 < other.mean() < 0.12
    assert (one & other).mean() < 0.03
    assert (FimRule(0, 0.1, (1, 2, 3)).chosen(hashes) == one).all()
