"""Tokenizing a source into its store: in parallel, and after a kill at any moment from where it stopped.

Parts are put together into shards by their sizes alone, each shard is made by one process and appears whole, and what
is common to all is written last. So the store's bytes depend on the source and the tokenizer, never on the number of
processes, nor on how often the work was interrupted.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from opendeep_jax import __version__
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.files import replacing
from opendeep_jax.config.schema import SourceConfig
from opendeep_jax.config.storage import LOCK, OWNER, alone_in, sha256_of, writing
from opendeep_jax.data.sources import Part
from opendeep_jax.data.store import VERSION, Store, check_files, index_facts, open_store, read_manifest
from opendeep_jax.data.storing.shards import shard_facts, token_dtype, write_arrow, write_json, write_shard
from opendeep_jax.data.storing.workers import available_cores, run_jobs
from opendeep_jax.text.tokenizer import Tokenizer

# Text in a shard, about. Up to 16 GB of text there are some 64 shards, so that many cores find work, and end together;
# above, shards stay at a minute of one core's work: little to lose in a kill, and few enough to keep open for reading.
SHARDS = 64
SHARD_BYTES = range(2 << 20, 256 << 20)
# So few shards are made by this process, with the tokenizer library's own threads.
FEW_SHARDS = 2
COUNTS = ("documents", "tokens", "bytes")

logger = logging.getLogger(__name__)


def prepare_store(
    directory: Path,
    source: SourceConfig,
    parts: Sequence[Part],
    tokenizer: Tokenizer,
    facts: dict,
    workers: int = 0,
    advance: Callable[[int], None] = lambda size: None,
    shard_bytes: int = 0,
) -> Store:
    """Return the store at `directory`, made of `parts` first, or what is missing of it.

    Whole shards are kept, missing and cut off ones are made (again). Another process that makes the same store is
    waited for.

    Args:
        facts: entries of store.json beside ours; `curation` is the recipe as a dictionary, or None.
        workers: processes; 0 takes one for each core.
        advance: called with bytes of the parts, which add up to the sum of their sizes.
        shard_bytes: text in a shard; 0 decides by the sum of the parts.

    Raises:
        ConfigError: for sources that cannot be read, a place that cannot be written, and a store that cannot be
            completed because its source has changed.
    """
    directory = Path(directory)
    with contextlib.suppress(ConfigError):
        store = open_store(directory, tokenizer.content_hash)
        check_files(store)
        advance(sum(part.size for part in parts))
        return store
    groups = {f"{number:08d}": group for number, group in enumerate(group_parts(parts, shard_bytes))}
    with writing(directory):
        (directory / "shards").mkdir(parents=True, exist_ok=True)
    with alone_in(directory, "preparing") as lock:
        _sweep(directory)
        before, known = _previous_store(directory, tokenizer)
        jobs = []
        for name, group in groups.items():
            shard, expected = directory / "shards" / name, shard_facts(source, tokenizer, facts, name, group)
            if _is_complete(shard, expected, known.get(name)):
                advance(sum(part.size for part in group))
            else:
                _remove(shard)
                jobs.append((name, group, known[name]["content_hash"] if name in known else None))
        jobs.sort(key=lambda job: -sum(part.size for part in job[1]))  # so that all workers end at about one time
        count = (workers or available_cores()) if len(jobs) > FEW_SHARDS else 1
        run_jobs(write_shard, (directory, source, tokenizer, facts), jobs, count, advance, keep_open=(lock,))
        with writing(directory):
            _write_index(directory, source, tokenizer, facts, list(groups), before)
    return open_store(directory, tokenizer.content_hash)


def group_parts(parts: Sequence[Part], shard_bytes: int = 0) -> list[list[Part]]:
    """Consecutive parts, put together until they hold the bytes of a shard: a function of the parts alone."""
    wanted = sum(part.size for part in parts) // SHARDS
    shard_bytes = shard_bytes or min(max(wanted, SHARD_BYTES.start), SHARD_BYTES.stop)
    groups: list[list[Part]] = []
    size = shard_bytes
    for part in parts:
        if size >= shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += part.size
    return groups


def _sweep(directory: Path) -> None:
    """Remove what processes that were killed have left under temporary names. Only for who holds the lock."""
    with writing(directory):
        for path in [*directory.glob(".*"), *(directory / "shards").glob(".*")]:
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (LOCK, OWNER):
                path.unlink()


def _previous_store(directory: Path, tokenizer: Tokenizer) -> tuple[dict, dict[str, dict]]:
    """Return what store.json says, and the rows of shards.arrow by shard, if the store was whole once; else nothing."""
    try:
        before = read_manifest(directory)
    except ConfigError as error:
        if (directory / "store.json").exists():
            logger.warning("Making store.json anew: %s", error)
        return {}, {}
    if before["tokenizer_hash"] != tokenizer.content_hash:
        open_store(directory, tokenizer.content_hash)  # says so
    try:
        index = open_store(directory).index
    except ConfigError as error:
        logger.warning("Making shards.arrow anew: %s", error)
        return before, {}
    return before, {row["name"]: row for row in index.to_pylist()}


def _is_complete(shard: Path, facts: dict, known: dict | None) -> bool:
    """Return whether a shard is there, all its files in their sizes, as it was known or as it would be made now."""
    try:
        manifest = json.loads((shard / "shard.json").read_text("utf-8"))
        as_known = known and known["content_hash"] == manifest["content_hash"]
        files = json.loads(known["files"]) if as_known else manifest["files"]
        whole = all((shard / name).stat().st_size == file["size"] for name, file in files.items())
        if whole and (as_known or (not known and facts.items() <= manifest.items())):
            return True
    except FileNotFoundError:
        if not shard.exists():
            return False
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        pass
    logger.warning("%s is damaged, or of another make; it is made anew.", shard)
    return False


def _remove(shard: Path) -> None:
    """Remove a shard, in a way that leaves no half of it under its name."""
    with writing(shard):
        if shard.exists():
            unwanted = shard.with_name(f".{shard.name}.{uuid.uuid4().hex}")
            shard.rename(unwanted)
            shutil.rmtree(unwanted)


def _write_index(
    directory: Path, source: SourceConfig, tokenizer: Tokenizer, facts: dict, names: list[str], before: dict
) -> None:
    """Write shards.arrow from the shards' manifests, and then store.json. `before` is an earlier store.json."""
    import pyarrow

    rows: list[dict] = []
    totals = dict.fromkeys((*COUNTS, "file_bytes"), 0)
    licenses: dict[str, dict[str, int]] = {}
    left_out: dict[str, int] = {}
    lost_bytes = 0
    digest = hashlib.sha256()
    for name in names:
        path = directory / "shards" / name / "shard.json"
        manifest = json.loads(path.read_text("utf-8"))
        files = manifest["files"] | {path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)}}
        rows.append(
            {
                "name": name,
                "first_document": totals["documents"],
                "first_token": totals["tokens"],
                **{key: manifest[key] for key in (*COUNTS, "content_hash")},
                "files": json.dumps(files, sort_keys=True),
            }
        )
        for key in COUNTS:
            totals[key] += manifest[key]
        totals["file_bytes"] += sum(file["size"] for file in files.values())
        for license, counts in manifest["licenses"].items():
            entry = licenses.setdefault(license, dict.fromkeys(COUNTS, 0))
            for key in COUNTS:
                entry[key] += counts[key]
        for reason, entry in manifest["left_out"].items():
            left_out[reason] = left_out.get(reason, 0) + entry["documents"]
        lost_bytes += manifest.get("lost_bytes", 0)  # shards of earlier versions do not say
        digest.update(bytes.fromhex(manifest["content_hash"]))

    if before and before["content_hash"] != digest.hexdigest():
        raise ConfigError(
            f"The text of source {source.name!r} ({source.path}) has changed since {directory} was made. Bring back "
            f"the text as it was, or delete {directory} and prepare all of it anew."
        )

    # Texts and numbers only: Arrow checks one row of them without a look at the others, which it does not of lists.
    types = dict.fromkeys(("name", "content_hash", "files"), pyarrow.large_string())
    types |= dict.fromkeys(("first_document", "first_token", *COUNTS), pyarrow.int64())
    index = directory / "shards.arrow"
    with replacing(index) as temporary:
        write_arrow(temporary, {key: pyarrow.array([row[key] for row in rows], types[key]) for key in types}, {})
    described = dataclasses.asdict(source)
    del described["weight"], described["epochs"]  # They decide what is trained on, not what is in the store.
    manifest = {
        **facts,
        "version": VERSION,
        "source": described,
        "tokenizer": tokenizer.name,
        "tokenizer_hash": tokenizer.content_hash,
        "tool_version": __version__,
        "dtype": token_dtype(tokenizer),
        "shards": len(rows),
        **totals,
        "licenses": licenses,
        "left_out": left_out,
        "lost_bytes": lost_bytes,
        "content_hash": digest.hexdigest(),
        "index": index_facts(index),
    }
    with replacing(directory / "store.json") as temporary:
        write_json(temporary, manifest)
