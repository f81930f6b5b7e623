"""The documents that a step trains on, the steps that see a document, and the differences of two runs' mixtures.

Nothing is recorded while training: a batch is a function of configuration and step, so both questions are arithmetic on
the packing plans, and are answered for steps to come as for those done. JAX is not needed, nor are the sources.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import load_run_config
from opendeep_jax.config.schedule import stage_at
from opendeep_jax.data.pipeline import Data
from opendeep_jax.data.plan import verify_plan
from opendeep_jax.data.recorded import check_root, read_description, recorded_directories
from opendeep_jax.data.sources import hash_id, held_out
from opendeep_jax.data.store import open_store
from opendeep_jax.data.storing.verify import verify_store
from opendeep_jax.text.tokenizer import Tokenizer

# Pieces whose text `where` reads together.
PIECES_AT_ONCE = 1024


def where(data: Data, step: int, row: int | None = None, text: bool = False) -> Iterator[dict]:
    """Yield the documents of the batch of `step` (from 0), or of one row of it, in order, for example

        {"row": 0, "phase": "main", "source": "web", "id": "<urn:uuid:…>", "url": "https://…", "license": "ODC-By-1.0",
         "shard": "00000012", "first_token": 512, "end_token": 1025, "fim": False}

    first_token and end_token are the piece's place in the document, begin mark included and, if `fim`, rearranged. A
    row's last token is only a target. With `text` come `bytes`, the spans of the document's UTF-8 text that the
    piece covers (one, or up to three if rearranged), and the text itself.

    Raises ConfigError for a step or row that is not there.
    """
    stage = stage_at(data.config, step)
    if step >= data.order.steps:
        raise ConfigError(f"--step={step}: the run has {data.order.steps:,} steps, counted from 0.")
    if row is not None and not 0 <= row < stage.batch_size:
        raise ConfigError(f"--row={row}: the batch of step {step} has rows 0 to {stage.batch_size - 1}.")
    phase = data.order.phases[stage.phase].phase.name
    located = data.order.rows_of_step(step, None if row is None else [row])
    places = sorted(
        (in_batch, source, kind, in_plan)
        for source, kind, in_batches, in_plans in located
        for in_batch, in_plan in zip(in_batches.tolist(), in_plans.tolist(), strict=True)
    )
    pieces = []
    for in_batch, source, kind, in_plan in places:
        plan = data.plans[source, kind]
        for piece in range(*plan.row_offsets[in_plan : in_plan + 2].tolist()):
            pieces.append(
                (in_batch, source, int(plan.documents[piece]), int(plan.begins[piece]), int(plan.ends[piece]))
            )
    for source, store in enumerate(data.stores):
        store.open_shards([document for _, owner, document, *_ in pieces if owner == source])
    for first in range(0, len(pieces), PIECES_AT_ONCE):
        yield from _describe(data, phase, pieces[first : first + PIECES_AT_ONCE], text)


def _describe(data: Data, phase: str, pieces: list[tuple[int, int, int, int, int]], text: bool) -> Iterator[dict]:
    """Entries of `where` for pieces (row, source, document, begin, end), whose text is read together."""
    plain = [_plain_spans(data, *piece[1:]) for piece in pieces]
    texts = [np.zeros(0, np.uint16)] * len(pieces)
    for source, store in enumerate(data.stores if text else ()):
        mine = [i for i, piece in enumerate(pieces) if piece[1] == source]
        wanted = [(pieces[i][2], 0, max((end for _, end in plain[i][1]), default=0)) for i in mine]
        for i, tokens in zip(mine, store.read(wanted), strict=True):
            texts[i] = tokens
    for piece, (rearranged, spans), tokens in zip(pieces, plain, texts, strict=True):
        row, source, document, begin, end = piece
        described = data.stores[source].describe(document)
        place = {"row": row, "phase": phase, "source": data.config.data.sources[source].name}
        place |= {key: described[key] for key in ("id", "url", "license", "shard")}
        place |= {"first_token": begin, "end_token": end, "fim": rearranged}
        yield place | (_text(tokens, spans, data.tokenizer) if text else {})


def _plain_spans(data: Data, source: int, document: int, begin: int, end: int) -> tuple[bool, list[tuple[int, int]]]:
    """Return whether a document is rearranged, and what of its plain tokens a piece of it covers."""
    store, fim = data.stores[source], data.fim
    if not fim.rate:
        return False, [(begin, end)]
    id_hash = store.id_hashes(document, document + 1)
    if not fim.chosen(id_hash)[0]:
        return False, [(begin, end)]
    tokens = int(store.lengths(document, document + 1)[0])
    return True, [part for part in fim.parts(id_hash[0], tokens, begin, end) if not isinstance(part, int)]


def _text(plain: np.ndarray, spans: list[tuple[int, int]], tokenizer: Tokenizer) -> dict:
    """Bytes and text of `spans` of the tokens `plain`, with which a document begins."""
    sizes = tokenizer.token_bytes[plain]
    sizes[1:2] = tokenizer.first_bytes[plain[1:2]]  # behind the begin mark
    ends = np.concatenate([[0], np.cumsum(sizes)])
    covered = [[int(ends[start]), int(ends[stop])] for start, stop in spans]
    whole = tokenizer.decode(plain).encode("utf-8")  # what a token says depends on those before it
    text = "".join(whole[start:stop].decode("utf-8", "replace") for start, stop in covered)
    return {"bytes": [span for span in covered if span[0] < span[1]], "text": text}


def when(data: Data, document_id: str) -> list[dict]:
    """Return the steps at which the run trains on a document: one entry for each document with this id, for example

        {"source": "web", "id": "…", "url": "…", "license": "…", "shard": "00000012", "tokens": 1311, "bytes": 5120,
         "held_out": False, "seen": [{"step": 812, "row": 5, "first_token": 0, "end_token": 1311}, …]}

    `seen` is in order of the step and goes on to the end of the run. Raises ConfigError where no source has the id.
    """
    found = []
    for source, store in enumerate(data.stores):
        for document in store.find(document_id):
            described = store.describe(document)
            seen = []
            for (owner, kind), plan in data.plans.items():
                for row in plan.rows_of(document).tolist() if owner == source else ():
                    pieces = slice(*plan.row_offsets[row : row + 2].tolist())
                    mine = np.flatnonzero(plan.documents[pieces] == document) + pieces.start
                    spans = [{"first_token": int(plan.begins[i]), "end_token": int(plan.ends[i])} for i in mine]
                    for step, in_batch in data.order.steps_of_row(source, kind, row):
                        seen += [{"step": step, "row": in_batch, **span} for span in spans]
            fraction = data.config.data.held_out_fraction
            found.append(
                {
                    "source": data.config.data.sources[source].name,
                    **described,
                    "held_out": bool(held_out(np.uint64(hash_id(document_id)), fraction)),
                    "seen": sorted(seen, key=lambda place: (place["step"], place["row"], place["first_token"])),
                }
            )
    if not found:
        names = ", ".join(source.name for source in data.config.data.sources)
        raise ConfigError(
            f"--doc={document_id}: no document of {names} has this id. It may have been left out or dropped in "
            "curation (see the data card), or be written differently; `opendeep data where` shows ids as they are."
        )
    return found


def diff(a: dict, b: dict, ids: tuple[list, list] | None = None) -> list[dict]:
    """Return how two mixtures, given as their data.json, differ: an entry for each source of either, for example

        {"source": "web", "in": "both", "same_tokens": False, "share": [0.5, 0.7], "documents": [9000, 9500],
         "tokens": [1.2e7, 1.3e7], "epochs": [0.4, 0.6], "left_out": [{}, {"empty text": 3}],
         "only_in_a": 10, "only_in_b": 510}

    `share` is that of all tokens of the run, over its phases. With `ids` (hashes of the documents' ids, an array for
    each source of `a` and of `b`) come the documents that only one has.
    """
    by_name = [{source["name"]: i for i, source in enumerate(side["sources"])} for side in (a, b)]
    entries = []
    for name in dict.fromkeys([*by_name[0], *by_name[1]]):
        places = [names.get(name) for names in by_name]
        sides = [side["sources"][i] if i is not None else None for side, i in zip((a, b), places, strict=True)]
        shares = [_share(side, i) if i is not None else 0.0 for side, i in zip((a, b), places, strict=True)]
        hashes = [side and side["content_hash"] for side in sides]
        entry = {
            "source": name,
            "in": "both" if None not in places else "a" if places[1] is None else "b",
            "same_tokens": hashes[0] == hashes[1],
            "share": shares,
        }
        for key in ("documents", "tokens"):
            entry[key] = [side[f"train_{key}"] + side[f"held_out_{key}"] if side else 0 for side in sides]
        entry["epochs"] = [side["epochs"] if side else 0.0 for side in sides]
        entry["left_out"] = [side["left_out"] if side else {} for side in sides]
        if ids is not None:
            none = np.zeros(0, np.uint64)
            mine, theirs = (side[i] if i is not None else none for side, i in zip(ids, places, strict=True))
            entry["only_in_a"] = len(np.setdiff1d(mine, theirs))
            entry["only_in_b"] = len(np.setdiff1d(theirs, mine))
        entries.append(entry)
    return entries


def _share(side: dict, source: int) -> float:
    total = sum(phase["tokens"] for phase in side["phases"])
    return sum(phase["tokens"] * phase["weights"][source] for phase in side["phases"]) / max(total, 1)


def source_ids(data: Data) -> list[np.ndarray]:
    """uint64: the hashes of all ids of each source, for `diff`."""
    return [store.id_hashes(0, store.documents) for store in data.stores]


def verify_all(root: Path, workdir: str | Path = "") -> tuple[int, list[str]]:
    """Recompute every hash of the stores and plans below `root`, or of those that a run is made of.

    Gives their number and a sentence for each damaged file. Raises ConfigError where there is nothing to verify.
    """
    if workdir:
        config, record = load_run_config(workdir), read_description(workdir)["record"]
        root = check_root(config)
        stores, plans = ([root / name for name in names] for names in recorded_directories(record))
    else:
        stores, plans = (sorted(path for path in root.glob(pattern)) for pattern in ("stores/[!.]*", "plans/[!.]*"))
    if not stores:
        raise ConfigError(f"{root} holds no prepared data to verify. Give the data.directory of a recipe.")
    damage = []
    for directory in stores:
        try:
            damage += verify_store(open_store(directory))
        except ConfigError as error:
            damage.append(str(error))
    return len(stores) + len(plans), damage + [sentence for plan in plans for sentence in verify_plan(plan)]
