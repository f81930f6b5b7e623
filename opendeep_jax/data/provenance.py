"""Which documents a step trains on, at which steps a document is seen, and how two runs' mixtures differ.

Nothing is recorded while training: a batch is a function of configuration and step, so both questions are arithmetic on
the packing plans, and are answered for steps to come as for those done. JAX is not needed, nor are the sources.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import IMPORTED_RECIPE, load_recipe, load_run_config
from opendeep_jax.config.schedule import stage_at
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.data.describe import describe
from opendeep_jax.data.plan import verify_plan
from opendeep_jax.data.prepared import Prepared, check_plans, check_root, prepare, reopen, repair
from opendeep_jax.data.sources import hash_id, held_out
from opendeep_jax.data.store import check_files, open_store
from opendeep_jax.data.storing.verify import verify_store
from opendeep_jax.text.files import byte_tokenizer, load_tokenizer, tokenizer_from_hf
from opendeep_jax.text.tokenizer import Tokenizer

# Pieces whose text `where` reads together.
PIECES_AT_ONCE = 1024
DATA_FILE, METRICS_FILE = "data.json", "metrics.jsonl"
TOKENIZER_FILE = "tokenizer.json"


def open_run(workdir: str | Path) -> tuple[Tokenizer, Prepared]:
    """The tokenizer of the run in `workdir`, and what its batches are made of, as its data.json says.

    Where a run has no data.json yet, its data is prepared from its configuration. Raises ConfigError where there is no
    run, or its stores or plans are gone or damaged.
    """
    config = load_run_config(workdir)
    if not Path(workdir, DATA_FILE).exists():
        return prepare(config)
    record = read_description(workdir)["record"]
    return run_tokenizer(workdir, wanted=record["tokenizer_hash"]), reopen(config, record)


def repair_run(workdir: str | Path) -> tuple[Tokenizer, Prepared]:
    """As `open_run`, after what is missing of the run's stores and plans is made again from its sources.

    Raises ConfigError where there is no run, or its sources give other text than it was trained on.
    """
    config = load_run_config(workdir)
    if not Path(workdir, DATA_FILE).exists():
        return prepare(config)
    record = read_description(workdir)["record"]
    tokenizer = run_tokenizer(workdir, config.data.tokenizer, record["tokenizer_hash"])
    return tokenizer, repair(config, record, tokenizer)


def read_description(workdir: str | Path) -> dict:
    """data.json of the run in `workdir`. Raises ConfigError where there is none that can be read."""
    path = Path(workdir, DATA_FILE)
    try:
        described = json.loads(path.read_text("utf-8"))
        if "record" not in described:
            raise ValueError("it is of an older version, which kept no record of stores and plans")
        return described
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--workdir={workdir}: {path.name} cannot be read ({error}). It is written when `opendeep train` has its "
            "data ready: delete it and give the same command again."
        ) from error


def open_recorded(config: RunConfig, workdir: str | Path) -> tuple[Tokenizer, Prepared] | None:
    """As `open_run`, for training on: all files are looked at. None where the run has not recorded its data yet, or
    its stores and plans are gone, so that they must be prepared anew.

    The sources are not looked at: a run goes on when a remote host is down, or its text has changed since.
    """
    if not Path(workdir, DATA_FILE).exists():
        return None
    record, root = read_description(workdir)["record"], Path(config.data.directory)
    directories = [*record["stores"], *record["held_out_plans"], *(plan["directory"] for plan in record["plans"])]
    if not all((root / directory).exists() for directory in directories):
        return None
    prepared = reopen(config, record)
    for store in prepared.stores:
        check_files(store)
    check_plans(prepared)
    return run_tokenizer(workdir, config.data.tokenizer, record["tokenizer_hash"]), prepared


def recorded_mixture(workdir: str | Path) -> bool:
    """Whether the run in `workdir`, begun or not, mixes by exact weights: all do that did not begin before it."""
    if not Path(workdir, DATA_FILE).exists():
        return True
    return read_description(workdir)["record"].get("exact_mixture", False)


def run_tokenizer(workdir: str | Path, name: str = "", wanted: str = "") -> Tokenizer:
    """The tokenizer of the run in `workdir`: its copy there, called `name`, or bytes.

    Raises ConfigError where it is gone or altered: where its content hash is not `wanted`, that of data.json.
    """
    path = Path(workdir, TOKENIZER_FILE)
    if not wanted and Path(workdir, DATA_FILE).exists():
        wanted = read_description(workdir)["record"]["tokenizer_hash"]
    state = "missing: it held the tokenizer"
    try:
        tokenizer = load_tokenizer(path, name) if path.exists() else byte_tokenizer()
        if tokenizer.content_hash == wanted or not wanted:
            return tokenizer
        state = "not the tokenizer" if path.exists() else state
    except ConfigError:
        state = "damaged: it held the tokenizer"
    raise ConfigError(
        f"{path} is {state} that this run's tokens were made with (SHA-256 {wanted[:16]}...). Copy it back, with the "
        "tokenizer_config.json beside it if there was one: from data.directory/tokenizers, or from where "
        "data.tokenizer was read."
    )


def model_tokenizer(workdir: str | Path) -> Tokenizer:
    """The text codec of the run in `workdir`. Prompts begin as the run's documents do; for somebody else's weights, as
    their own tokenizer says, whatever the run separates documents with. Raises ConfigError as `run_tokenizer` does."""
    tokenizer = run_tokenizer(workdir)
    return tokenizer_from_hf(workdir) if _imported(Path(workdir)) else tokenizer


def _imported(workdir: Path) -> bool:
    """Whether a run, or the one that it is a branch of, began with somebody else's weights."""
    seen: set[Path] = set()
    while workdir not in seen:
        seen.add(workdir)
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if Path(workdir, IMPORTED_RECIPE).read_text("utf-8").startswith('"""The recipe of this imported run'):
                return True
        try:
            origin = json.loads(Path(workdir, "origin.json").read_text("utf-8"))
            if origin["kind"] == "import":
                return True
            workdir = Path(origin["parent"])
        except (OSError, ValueError, KeyError, TypeError):
            return False
    return False


def open_side(name: str) -> tuple[dict, Prepared]:
    """Description and batches of one side of a comparison: a work directory, or a recipe. Raises ConfigError."""
    if Path(name, DATA_FILE).exists():
        return read_description(name), open_run(name)[1]
    tokenizer, prepared = prepare(load_recipe(name))
    return describe(prepared, tokenizer), prepared


def steps_done(workdir: str | Path) -> int:
    """Steps that the run in `workdir` has logged so far."""
    try:
        *_, last = Path(workdir, METRICS_FILE).read_text("utf-8").splitlines()
        return int(json.loads(last)["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def where(prepared: Prepared, step: int, row: int | None = None, tokenizer: Tokenizer | None = None) -> Iterator[dict]:
    """The documents of the batch of `step` (from 0), or of one row of it, in order, for example

        {"row": 0, "phase": "main", "source": "web", "id": "<urn:uuid:…>", "url": "https://…", "license": "ODC-By-1.0",
         "shard": "00000012", "first_token": 512, "end_token": 1025, "fim": False}

    first_token and end_token are the piece's place in the document, begin mark included and, if `fim`, rearranged. A
    row's last token is only a target. With a tokenizer come `bytes`, the spans of the document's UTF-8 text that the
    piece covers (one, or up to three if rearranged), and `text`.

    Raises ConfigError for a step or row that is not there.
    """
    stage = stage_at(prepared.config, step)
    if step >= prepared.order.steps:
        raise ConfigError(f"--step={step}: the run has {prepared.order.steps:,} steps, counted from 0.")
    if row is not None and not 0 <= row < stage.batch_size:
        raise ConfigError(f"--row={row}: the batch of step {step} has rows 0 to {stage.batch_size - 1}.")
    phase = prepared.order.phases[stage.phase].phase.name
    located = prepared.order.rows_of_step(step, None if row is None else [row])
    places = sorted(
        (in_batch, source, kind, in_plan)
        for source, kind, in_batches, in_plans in located
        for in_batch, in_plan in zip(in_batches.tolist(), in_plans.tolist(), strict=True)
    )
    pieces = []
    for in_batch, source, kind, in_plan in places:
        plan = prepared.plans[source, kind]
        for piece in range(*plan.row_offsets[in_plan : in_plan + 2].tolist()):
            pieces.append(
                (in_batch, source, int(plan.documents[piece]), int(plan.begins[piece]), int(plan.ends[piece]))
            )
    for source, store in enumerate(prepared.stores):
        store.open_shards([document for _, owner, document, *_ in pieces if owner == source])
    for first in range(0, len(pieces), PIECES_AT_ONCE):
        yield from _describe(prepared, phase, pieces[first : first + PIECES_AT_ONCE], tokenizer)


def _describe(
    prepared: Prepared, phase: str, pieces: list[tuple[int, int, int, int, int]], tokenizer: Tokenizer | None
) -> Iterator[dict]:
    """Entries of `where` for pieces (row, source, document, begin, end), whose text is read together."""
    plain = [_plain_spans(prepared, *piece[1:]) for piece in pieces]
    texts = [np.zeros(0, np.uint16)] * len(pieces)
    for source, store in enumerate(prepared.stores if tokenizer else ()):
        mine = [i for i, piece in enumerate(pieces) if piece[1] == source]
        wanted = [(pieces[i][2], 0, max((end for _, end in plain[i][1]), default=0)) for i in mine]
        for i, tokens in zip(mine, store.read(wanted), strict=True):
            texts[i] = tokens
    for piece, (rearranged, spans), tokens in zip(pieces, plain, texts, strict=True):
        row, source, document, begin, end = piece
        described = prepared.stores[source].describe(document)
        place = {"row": row, "phase": phase, "source": prepared.config.data.sources[source].name}
        place |= {key: described[key] for key in ("id", "url", "license", "shard")}
        place |= {"first_token": begin, "end_token": end, "fim": rearranged}
        yield place | (_text(tokens, spans, tokenizer) if tokenizer else {})


def _plain_spans(
    prepared: Prepared, source: int, document: int, begin: int, end: int
) -> tuple[bool, list[tuple[int, int]]]:
    """Whether a document is rearranged, and what of its plain tokens a piece of it covers."""
    store, fim = prepared.stores[source], prepared.fim
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


def when(prepared: Prepared, document_id: str) -> list[dict]:
    """At which steps the run trains on a document: one entry for each document with this id, for example

        {"source": "web", "id": "…", "url": "…", "license": "…", "shard": "00000012", "tokens": 1311, "bytes": 5120,
         "held_out": False, "seen": [{"step": 812, "row": 5, "first_token": 0, "end_token": 1311}, …]}

    `seen` is in order of the step and goes on to the end of the run. Raises ConfigError where no source has the id.
    """
    found = []
    for source, store in enumerate(prepared.stores):
        for document in store.find(document_id):
            described = store.describe(document)
            seen = []
            for (owner, kind), plan in prepared.plans.items():
                for row in plan.rows_of(document).tolist() if owner == source else ():
                    pieces = slice(*plan.row_offsets[row : row + 2].tolist())
                    mine = np.flatnonzero(plan.documents[pieces] == document) + pieces.start
                    spans = [{"first_token": int(plan.begins[i]), "end_token": int(plan.ends[i])} for i in mine]
                    for step, in_batch in prepared.order.steps_of_row(source, kind, row):
                        seen += [{"step": step, "row": in_batch, **span} for span in spans]
            fraction = prepared.config.data.held_out_fraction
            found.append(
                {
                    "source": prepared.config.data.sources[source].name,
                    **described,
                    "held_out": bool(held_out(np.uint64(hash_id(document_id)), fraction)),
                    "seen": sorted(seen, key=lambda place: (place["step"], place["row"], place["first_token"])),
                }
            )
    if not found:
        names = ", ".join(source.name for source in prepared.config.data.sources)
        raise ConfigError(
            f"--doc={document_id}: no document of {names} has this id. It may have been left out or dropped in "
            "curation (see the data card), or be written differently; `opendeep data where` shows ids as they are."
        )
    return found


def diff(a: dict, b: dict, ids: tuple[list, list] | None = None) -> list[dict]:
    """How two mixtures, given as their data.json, differ: an entry for each source of either, for example

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


def source_ids(prepared: Prepared) -> list[np.ndarray]:
    """uint64: the hashes of all ids of each source, for `diff`."""
    return [store.id_hashes(0, store.documents) for store in prepared.stores]


def verify_all(root: Path, workdir: str | Path = "") -> tuple[int, list[str]]:
    """Recomputes every hash of the stores and plans below `root`, or of those that a run is made of.

    Gives their number and a sentence for each damaged file. Raises ConfigError where there is nothing to verify.
    """
    if workdir:
        config, record = load_run_config(workdir), read_description(workdir)["record"]
        root = check_root(config)
        stores = [root / name for name in record["stores"]]
        plans = [root / name for name in (*record["held_out_plans"], *(plan["directory"] for plan in record["plans"]))]
    else:
        stores, plans = (sorted(path for path in root.glob(pattern)) for pattern in ("stores/[!.]*", "plans/[!.]*"))
    if not stores:
        raise ConfigError(f"{root} holds no prepared data to verify. Give the data.directory of a recipe.")
    damage = []
    for directory in stores:
        try:
            damage += verify_store(open_store(directory), lambda size: None)
        except ConfigError as error:
            damage.append(str(error))
    return len(stores) + len(plans), damage + [sentence for plan in plans for sentence in verify_plan(plan)]
