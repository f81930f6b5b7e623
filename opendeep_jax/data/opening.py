"""Two ways to open what a run trains on.

    open_data(config, workdir=workdir)    for training: what was prepared is opened, and made first where it is missing
    open_run(workdir)                     to look into a run: only what its data.json names

    text --curate--> text --tokenize--> stores --pack--> plans;   (configuration, rows of each plan) --> order

Everything is kept in data.directory, named by a hash of all that it was made from, and made only once.
"""

import contextlib
import hashlib
import json
import logging
import threading
from pathlib import Path

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import load_run_config
from opendeep_jax.config.schema import RunConfig, SourceConfig
from opendeep_jax.config.storage import file_name
from opendeep_jax.data.curation import check_curation, curate
from opendeep_jax.data.curation.plan import recipe_of
from opendeep_jax.data.fim import NO_FIM, FimRule
from opendeep_jax.data.order import Order, PlanKey
from opendeep_jax.data.pipeline import Data
from opendeep_jax.data.plan import PackingPlan, PlanKind, make_plan, plan_directory, verify_plan
from opendeep_jax.data.reading.formats import SourceFile
from opendeep_jax.data.reading.listing import FIELDS_OF_RECORDS, is_store, list_files, list_source
from opendeep_jax.data.recorded import fim_rule, record_of, recorded_directories, reopen, run_tokenizer
from opendeep_jax.data.sources import LATER_FIELDS, fingerprint, hash_id, held_out, list_parts, read_in_order
from opendeep_jax.data.store import VERSION, Store, check_files, open_store, read_manifest
from opendeep_jax.data.storing.prepare import prepare_store
from opendeep_jax.data.tokenizers import check_tokenizer, open_tokenizer, prepare_tokenizer
from opendeep_jax.display.progress import progress_bar
from opendeep_jax.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Fewer are packed in the blink of an eye.
SHOWN_DOCUMENTS = 1_000_000


def open_data(
    config: RunConfig, progress: bool = True, workdir: str | Path | None = None, repair: bool = False
) -> Data:
    """Open the data of a run; curate, tokenize and pack first what is not in data.directory yet.

    What the run in `workdir` has recorded is opened as it is, without a look at the sources: a run goes on when a
    remote host is down, or its text has changed since.

    Args:
        progress: show progress bars.
        workdir: of a run, begun or not.
        repair: make again what is missing of the recorded stores and plans, from sources whose files may have been
            moved or touched since as long as their text is the same; without it, all is prepared anew.

    Raises:
        ConfigError: for sources, tokenizers and directories that cannot serve, and for damage.
    """
    record = record_of(workdir)
    if record:
        stores, plans = recorded_directories(record)
        there = all(Path(config.data.directory, name).exists() for name in (*stores, *plans))
        if there or repair:
            tokenizer = run_tokenizer(workdir, config.data.tokenizer, record["tokenizer_hash"])
            if repair:
                _repair(config, record, tokenizer, progress)
            data = reopen(config, record, tokenizer)
            for store in data.stores:
                check_files(store)
            _check_plans(data)
            return data
    return _prepare(config, progress, record.get("exact_mixture", False) if record else True, bool(workdir))


def open_run(workdir: str | Path) -> Data:
    """Open what the run in `workdir` has recorded, to look into its batches; before it has, as `open_data` does.

    Raises ConfigError where there is no run, or its stores or plans are gone or damaged.
    """
    config, record = load_run_config(workdir), record_of(workdir)
    if not record:
        return open_data(config)
    return reopen(config, record, run_tokenizer(workdir, wanted=record["tokenizer_hash"]))


def check_data(config: RunConfig) -> None:
    """Raise ConfigError for what `open_data` would refuse, as far as it shows without reading the text."""
    for source in config.data.sources:
        _check_store_fields(source) if is_store(source) else list_files(source)
    if config.data.curation.active:
        check_curation(config.data)
    if not config.data.tokenizer.startswith("bpe:"):
        check_tokenizer(open_tokenizer(config.data.tokenizer, "", list, Path()), config)


def _prepare(config: RunConfig, progress: bool, exact_mixture: bool, for_run: bool) -> Data:
    """Open everything, made first where it is not there. `exact_mixture` is False for a run that began when weights
    with long patterns were rounded."""
    data = config.data
    skipped = skipped_files(config)
    sources = curate(data, progress=progress)
    for source in sources:
        _check_can_hold_out(source, data.held_out_fraction)
    tokenizer = prepare_tokenizer(config, progress, sources)
    check_tokenizer(tokenizer, config)
    fim = FimRule(config.seed, data.fim_rate, tokenizer.fim_ids) if data.fim_rate else NO_FIM
    stores = [_prepare_store(config, source, tokenizer, progress) for source in sources]
    order = Order(config, exact_mixture)
    held_out_there = all(plan_directory(*_held_out(config, store, i, fim)).exists() for i, store in enumerate(stores))
    plans, held_out_plans = _plans(config, stores, order, fim, progress)
    for store, plan in zip(stores, held_out_plans, strict=True):
        _check_splits(store, plan, config)
    order.supply({key: plan.rows for key, plan in plans.items()})
    opened = Data(config, tokenizer, stores, plans, held_out_plans, order, fim, skipped)
    _check_plans(opened)
    if for_run and not held_out_there:  # while the run compiles and trains
        threading.Thread(target=opened.compression, daemon=True).start()
    return opened


def _repair(config: RunConfig, record: dict, tokenizer: Tokenizer, progress: bool) -> None:
    """Make again what is missing of recorded stores and plans. Raises ConfigError where a source's text has changed,
    and for damage that nobody has deleted yet."""
    root = Path(config.data.directory)
    for source, name in zip(curate(config.data, progress=progress), record["stores"], strict=True):
        if not is_store(source):
            _make_store(config, source, list_files(source), root / name, tokenizer, progress)
    stores = [open_store(root / name, record["tokenizer_hash"]) for name in record["stores"]]
    order = Order(config, exact=record.get("exact_mixture", False))
    _plans(config, stores, order, fim_rule(record), progress)


def _check_plans(data: Data) -> None:
    """Raise ConfigError for the first packing plan that is not as it was written. Reads all of them."""
    for plan in (*data.plans.values(), *data.held_out_plans):
        if wrong := verify_plan(plan.directory):
            raise ConfigError(wrong[0])


def skipped_files(config: RunConfig) -> list[dict[str, int]]:
    """Count each source's files without documents, by reason. Warns of these, and of unknown licenses."""
    found = []
    for number, source in enumerate(config.data.sources):
        skipped = {} if is_store(source) else list_source(source).skipped
        found.append({reason: len(names) for reason, names in skipped.items()})
        if skipped:
            summary = "; ".join(f"{len(names)} × {reason}, as {names[0]}" for reason, names in skipped.items())
            logger.warning("Source %r (%s): not all that is there is read: %s.", source.name, source.path, summary)
        known = source.license or source.license_field
        if is_store(source):
            known = known or "" not in read_manifest(Path(source.path))["licenses"]
        if not known:
            logger.warning(
                "Source %r (%s): its license is unknown. Say what it is with --data.sources.%d.license=NAME.",
                *(source.name, source.path, number),
            )
    return found


def _check_store_fields(source: SourceConfig) -> None:
    """Raise ConfigError for fields of a finished store that say how its text would be read."""
    for name in (*FIELDS_OF_RECORDS, *LATER_FIELDS):
        if getattr(source, name) != getattr(SourceConfig(), name):
            raise ConfigError(
                f"Source {source.name!r} ({source.path}) has {name}={getattr(source, name)!r}, which would have no "
                "effect: its path is a finished token store. Leave it out, or prepare the text anew with it."
            )


def _check_can_hold_out(source: SourceConfig, fraction: float) -> None:
    """Raise ConfigError if a source's documents cannot be divided into some to train on and some to hold out.

    It reads documents until it has seen both, which is soon in a large source.
    """
    if not fraction or is_store(source) or source.text_url:
        return
    found: set[bool] = set()
    documents = 0
    for document in read_in_order(source, list_files(source)):
        documents += 1
        found.add(bool(held_out(hash_id(document.id), fraction)))
        if len(found) == 2:
            return
    if documents:
        raise ConfigError(_cannot_hold_out(source.name, source.path, documents, fraction, found == {True}))


def _cannot_hold_out(name: str, path: str, documents: int, fraction: float, all_held_out: bool) -> str:
    return (
        f"Source {name!r} ({path or 'the embedded source'}) has no documents "
        f"{'for training' if all_held_out else 'held out'}: a hash of each id divides its {documents:,} documents with "
        f"data.held_out_fraction={fraction}. Hold out the end of each document with "
        f"--data.sources.N.held_out_end={min(max(fraction, 0.001), 0.5):g} (N is the source's number, from 0), divide "
        "its texts with --data.sources.N.separator, give it more documents (one a file, or one a record), or change "
        "data.held_out_fraction (0 holds nothing out)."
    )


def _prepare_store(config: RunConfig, source: SourceConfig, tokenizer: Tokenizer, progress: bool) -> Store:
    """Open the store of a source; tokenizes the source first if that was not done, or not to its end."""
    if is_store(source):
        _check_store_fields(source)
        store = open_store(Path(source.path), tokenizer.content_hash)
        check_files(store)
        return store
    files = list_files(source)
    key = hashlib.sha256(json.dumps([fingerprint(source, files), tokenizer.content_hash, VERSION]).encode()).hexdigest()
    directory = Path(config.data.directory, "stores", file_name(source.name, key[:16]))
    return _make_store(config, source, files, directory, tokenizer, progress)


def _make_store(
    config: RunConfig,
    source: SourceConfig,
    files: list[SourceFile],
    directory: Path,
    tokenizer: Tokenizer,
    progress: bool,
) -> Store:
    """Open the store at `directory`; what is missing of it, or cut off, is made first."""
    with contextlib.suppress(ConfigError):
        store = open_store(directory, tokenizer.content_hash)
        check_files(store)
        return store
    parts = list_parts(source, files)
    curation = config.data.curation
    facts = {"curation": recipe_of(curation) if curation.active else None}
    with progress_bar(f"Tokenizing {source.name}", sum(part.size for part in parts), progress) as advance:
        return prepare_store(directory, source, parts, tokenizer, facts, config.data.workers, advance)


def _plans(
    config: RunConfig, stores: list[Store], order: Order, fim: FimRule, progress: bool
) -> tuple[dict[PlanKey, PackingPlan], list[PackingPlan]]:
    """Return the plans of the training split by what `order` demands, and those of the held-out split by source."""

    def plan(root: Path, store: Store, kind: PlanKind, *arguments) -> PackingPlan:
        show = progress and store.documents > SHOWN_DOCUMENTS
        title = f"Packing {store.manifest['source']['name']} ({kind.split.replace('_', ' ')}, rows of {kind.length})"
        with progress_bar(title, store.documents, show, unit="pieces") as advance:
            return make_plan(root, store, kind, *arguments, advance)

    train = {(i, kind): plan(*_arguments(config, stores[i], kind, i, fim)) for i, kind in order.demand}
    return train, [plan(*_held_out(config, store, i, fim)) for i, store in enumerate(stores)]


def _arguments(config: RunConfig, store: Store, kind: PlanKind, source: int, fim: FimRule) -> tuple:
    return Path(config.data.directory), store, kind, (config.seed, source), config.data.held_out_fraction, fim


def _held_out(config: RunConfig, store: Store, source: int, fim: FimRule) -> tuple:
    kind = PlanKind("held_out", config.data.sequence_length, "concatenate")
    return _arguments(config, store, kind, source, fim)


def _check_splits(store: Store, held_out_plan: PackingPlan, config: RunConfig) -> None:
    source, fraction = store.manifest["source"], config.data.held_out_fraction
    where = f"Source {source['name']!r} ({source['path'] or 'the embedded source'})"
    if not store.documents:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in store.manifest["left_out"].items())
        raise ConfigError(
            f"{where} holds no text: {f'all its documents are left out ({reasons})' if reasons else 'it is empty'}. "
            "Point its path to text, or name its encoding, if it is not UTF-8: --data.sources.N.encoding=latin-1."
        )
    documents = held_out_plan.manifest["documents"]
    if documents == store.documents or (fraction and not documents):
        raise ConfigError(_cannot_hold_out(source["name"], source["path"], store.documents, fraction, bool(documents)))
