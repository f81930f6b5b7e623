"""Copies: MinHash joins the planted clusters and nothing else, and the first document of each stays."""

import numpy as np
import pytest
from curation_corpus import NOUNS, prose
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("datatrove")
pytest.importorskip("rensa")

from opendeep_jax.config.schema import CurationConfig  # noqa: E402
from opendeep_jax.data.curation import duplicates  # noqa: E402
from opendeep_jax.data.curation.words import shingles  # noqa: E402

NOTHING = np.zeros(0, np.int64), np.zeros(0, np.int64)


def found(texts: list[str], recipe: CurationConfig, dropped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    hashes = np.array([duplicates.band_hashes(text, recipe) for text in texts])
    half = len(texts) // 2  # as if of two tasks
    return duplicates.near_copies(([band[:half], band[half:]] for band in hashes.T), dropped)


def edited(text: str, changes: int, salt: int) -> str:
    """`changes` words in a row are others, which leaves all but changes + 4 shingles."""
    words = text.split(" ")
    begin = 7 * salt % (len(words) - changes)
    words[begin : begin + changes] = [NOUNS[(salt * 31 + i) % len(NOUNS)] for i in range(changes)]
    return " ".join(words)


def similarity(one: str, other: str, ngram: int) -> float:
    a, b = set(shingles(one, ngram).tolist()), set(shingles(other, ngram).tolist())
    return len(a & b) / len(a | b)


@pytest.fixture(scope="module")
def planted() -> tuple[list[str], dict[int, int]]:
    """Texts, and for each copy its original: near-copies, copies of copies, unlike texts that share a paragraph."""
    texts = [prose(i) for i in range(20)]
    originals = {}
    for i in range(8):
        originals[len(texts)] = i
        texts.append(edited(texts[i], 1 + i % 4, salt=i))
    for i in range(3):  # a copy of a copy belongs to the first
        originals[len(texts)] = i
        texts.append(edited(texts[20 + i], 2, salt=50 + i))
    for i in range(8, 14):  # similar, far from enough
        texts.append(texts[i][: len(texts[i]) // 3] + "\n" + prose(f"other {i}"))
    texts += ["too few words", "too few words", ""]
    texts += ["91 34 8 6 7", "12 34 5 6 7", "12, 34; 5 6 7"]  # only the last two are equal
    originals[len(texts) - 1] = len(texts) - 2
    return texts, originals


@pytest.mark.parametrize("ngram, buckets, per_bucket", [(5, 14, 8), (3, 20, 5), (1, 9, 13)])
def test_the_planted_clusters_are_joined_and_nothing_else(planted, ngram, buckets, per_bucket):
    texts, originals = planted
    recipe = CurationConfig(minhash_ngram=ngram, minhash_buckets=buckets, minhash_hashes_per_bucket=per_bucket)
    if ngram <= 3:  # the text that is there twice then has a shingle
        originals = originals | {texts.index("too few words") + 1: texts.index("too few words")}
    dropped = np.zeros(len(texts), bool)
    copies, kept = found(texts, recipe, dropped)
    assert dict(zip(copies.tolist(), kept.tolist(), strict=True)) == originals


def test_what_is_planted_is_clear_of_the_region_where_chance_decides(planted):
    texts, originals = planted
    for copy, original in originals.items():
        assert similarity(texts[copy], texts[original], 5) > 0.85
    for i in range(31, 37):
        assert 0.1 < similarity(texts[i], texts[i - 23], 5) < 0.4


def test_an_exact_copy_is_no_near_copy_too(planted):
    texts, originals = planted
    texts, dropped = [*texts, texts[0]], np.zeros(len(texts) + 1, bool)
    dropped[-1] = True
    recipe = CurationConfig()
    copies, kept = found(texts, recipe, dropped)
    assert dict(zip(copies.tolist(), kept.tolist(), strict=True)) == originals


@pytest.mark.slow
@pytest.mark.parametrize("similar", [0.6, 0.7, 0.8, 0.9])
def test_pairs_are_found_as_often_as_the_papers_formula_says(similar):
    recipe, pairs, size = CurationConfig(), 300, 200
    chance = np.random.default_rng(0)
    common = round(2 * size * similar / (1 + similar))
    texts = []
    for _ in range(pairs):  # of single-word shingles, so that the similarity can be chosen
        shared, *rest = np.split(chance.choice(10**9, 2 * size - common, replace=False), [common, size])
        for own in rest:
            texts.append(
                " ".join(f"w{chr(97 + n % 26)}{np.base_repr(n, 26).translate(LETTERS)}" for n in [*shared, *own])
            )
    recipe = CurationConfig(minhash_ngram=1)
    dropped = np.zeros(len(texts), bool)
    expected = 1 - (1 - (common / (2 * size - common)) ** 8) ** 14
    error = 4 * np.sqrt(expected * (1 - expected) / pairs) + 0.005
    copies, _ = found(texts, recipe, dropped)
    assert abs(len(copies) / pairs - expected) < error


LETTERS = str.maketrans("0123456789", "qrstuvwxyz")  # numbers in a text would all become 0


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=30))
def test_of_equal_texts_all_but_the_first_are_copies(hashes):
    copies, originals = duplicates.exact_copies(np.array(hashes, np.uint64).reshape(-1, 2))
    first = {value: i for i, value in reversed(list(enumerate(hashes)))}
    expected = {i: first[value] for i, value in enumerate(hashes) if first[value] != i}
    assert dict(zip(copies.tolist(), originals.tolist(), strict=True)) == expected


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.booleans()), min_size=1, max_size=25),
    st.integers(0, 25),
)
def test_near_copies_are_the_connected_components_of_equal_bands(documents, cut):
    bands = np.array([document[:2] for document in documents], np.uint64).T
    dropped = np.array([document[2] for document in documents])
    copies, originals = duplicates.near_copies(([band[:cut], band[cut:]] for band in bands), dropped)
    root = list(range(len(documents)))
    for _ in documents:  # the lowest number spreads
        for i, one in enumerate(documents):
            for j, other in enumerate(documents):
                same = any(a == b != 0 for a, b in zip(one[:2], other[:2], strict=True))
                if same and not one[2] and not other[2]:
                    root[i] = root[j] = min(root[i], root[j])
    expected = {i: found for i, found in enumerate(root) if found != i}
    assert dict(zip(copies.tolist(), originals.tolist(), strict=True)) == expected


def test_sizes_of_clusters_count_exact_and_near_copies_together():
    exact = np.array([5, 6, 9]), np.array([1, 1, 4])  # 5 and 6 are copies of 1, 9 of 4
    near = np.array([1, 3]), np.array([0, 2])  # 1 of 0, 3 of 2
    assert duplicates.cluster_sizes(exact, near) == {"2": 2, "4": 1}
    assert duplicates.cluster_sizes(exact, NOTHING) == {"2": 1, "3": 1}
    assert duplicates.cluster_sizes(NOTHING, NOTHING) == {}
