"""The search for documents that are copies of an earlier one: equal texts, and near-duplicates by MinHash.

Two documents are near-duplicates if their MinHash signatures (Broder 1997) agree in all hashes of at least one band;
clusters are what such pairs join. Of a cluster the first document stays, in order of source and file.

The signatures are rensa's, folded to 64 bits a band and joined here, band by band, because its own index would hold all
bands of all documents in memory at one time: this way some 40 bytes a document suffice.
"""

from collections.abc import Sequence

import numpy as np

from opendeep_jax.config.schema import CurationConfig
from opendeep_jax.data.curation.words import shingles

KEPT, EXACT, NEAR = 0, 1, 2
SEED = 1


def text_hash(content: bytes) -> tuple[int, int]:
    """128 bits that stand for a text."""
    import xxhash

    return divmod(xxhash.xxh3_128_intdigest(content), 1 << 64)


def band_hashes(text: str, curation: CurationConfig) -> np.ndarray:
    """uint64 [buckets]: the bands of rensa's MinHash signature; 0 throughout for a text with no shingle."""
    from rensa import RMinHash

    tokens = shingles(text, curation.minhash_ngram)
    if not len(tokens):
        return np.zeros(curation.minhash_buckets, np.uint64)
    number = curation.minhash_buckets * curation.minhash_hashes_per_bucket
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(tokens, np.array([0, len(tokens)]), number, SEED)
    rows = np.array(matrix.to_rows()[0], np.uint32).reshape(curation.minhash_buckets, -1)
    return np.array([_fold(row.tobytes()) for row in rows], np.uint64)


def _fold(band: bytes) -> int:
    import xxhash

    return xxhash.xxh3_64_intdigest(band) or 1


def exact_copies(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(copies, originals): documents whose hash, a row of uint64 [documents, 2], an earlier one has, and the first."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal ones stay in their order
    ordered = hashes[order]
    new = np.ones(len(order), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
    return order[~new], first[~new]


def near_copies(bands: Sequence[Sequence[np.ndarray]], dropped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(copies, originals) by the bands, leaving out documents that are `dropped` already.

    Args:
        bands: for each band the hashes of all documents, uint64, in several arrays one after the other.
        dropped: bool [documents].
    """
    pairs = []
    for band in bands:
        hashes = np.concatenate(band)
        order = np.argsort(hashes, kind="stable")
        order = order[~dropped[order] & (hashes[order] != 0)]
        same = hashes[order[1:]] == hashes[order[:-1]]
        pairs.append(np.stack([order[:-1][same], order[1:][same]], axis=1))
    return _join(np.concatenate(pairs) if pairs else np.zeros((0, 2), np.int64))


def _join(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    documents, places = np.unique(pairs, return_inverse=True)
    places = places.reshape(pairs.shape)
    edges = coo_array((np.ones(len(pairs), bool), (places[:, 0], places[:, 1])), shape=(len(documents),) * 2)
    _, clusters = connected_components(edges, directed=False)
    _, first, place = np.unique(clusters, return_index=True, return_inverse=True)
    originals = documents[first][place]
    copies = documents != originals
    return documents[copies], originals[copies]


def cluster_sizes(exact: tuple[np.ndarray, np.ndarray], near: tuple[np.ndarray, np.ndarray]) -> dict[str, int]:
    """Return how many clusters of each size there are, near and exact copies together: `{"2": 31, "3": 4}`."""
    copies, originals = near
    order = np.argsort(copies)
    roots = exact[1].copy()
    if len(copies):  # The original of an exact copy may itself be a near-duplicate of another.
        place = np.minimum(np.searchsorted(copies, roots, sorter=order), len(copies) - 1)
        found = order[place]
        roots = np.where(copies[found] == roots, originals[found], roots)
    _, counts = np.unique(np.concatenate([roots, originals]), return_counts=True)
    sizes, numbers = np.unique(counts + 1, return_counts=True)
    return {str(size): int(number) for size, number in zip(sizes, numbers, strict=True)}
