"""From a configuration to what its batches are made of: tokenizer, stores, packing plans and the order of rows.

    text --curate--> text --tokenize--> stores --pack--> plans;   (configuration, rows of each plan) --> order

Everything is kept in data.directory, named by a hash of all that it was made from, and made only once.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import RunConfig, SourceConfig
from opendeep_jax.config.storage import file_name, write_file
from opendeep_jax.data.fim import NO_FIM, FimRule
from opendeep_jax.data.order import Order, PlanKey
from opendeep_jax.data.plan import Plan, PlanKind, make_plan, open_plan, verify_plan
from opendeep_jax.data.reading.formats import SourceFile
from opendeep_jax.data.reading.listing import FIELDS_OF_RECORDS, is_store, list_files, list_source
from opendeep_jax.data.sources import (
    LATER_FIELDS,
    fingerprint,
    fraction_of,
    hash_id,
    held_out,
    list_parts,
    read_in_order,
    read_part,
)
from opendeep_jax.data.store import VERSION, Store, check_files, open_store, read_manifest
from opendeep_jax.data.storing.prepare import prepare_store
from opendeep_jax.text.files import byte_tokenizer, load_tokenizer, train_bpe
from opendeep_jax.text.pieces import WORDS
from opendeep_jax.text.tokenizer import SPECIAL_TOKENS, Tokenizer

logger = logging.getLogger(__name__)

# Text that a BPE is trained on: more costs start-up time and gains little. It is drawn from at most so many times as
# much, so that a trillion tokens need not be read for it, and from no document more than a megabyte.
SAMPLE_BYTES = 4_000_000
SAMPLED_FROM = 16
SAMPLED_CHARACTERS = 1_000_000
# Where text is less of a source than this, the rest is not counted as text that could be sampled.
WIDE = 0.5
# Fewer are packed in the blink of an eye.
SHOWN_DOCUMENTS = 1_000_000


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """All that decides a run's batches, open."""

    config: RunConfig
    stores: list[Store]
    """In the order of data.sources."""
    plans: dict[PlanKey, Plan]
    """The training split's."""
    held_out: list[Plan]
    """The held-out split's, in the order of data.sources."""
    order: Order
    fim: FimRule
    tokenizer_hash: str
    left_out_files: list[dict[str, int]] = dataclasses.field(default_factory=list)
    """Files of each source that hold no document, by reason, in the order of data.sources."""

    @property
    def content_hash(self) -> str:
        """SHA-256 over tokenizer, tokens and plans: equal when, and only when, the same batches can be made."""
        parts = [self.tokenizer_hash, *(store.content_hash for store in self.stores)]
        parts += [plan.content_hash for plan in (*self.plans.values(), *self.held_out)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def record(self) -> dict:
        """Where everything is below data.directory, for `reopen`."""
        root = Path(self.config.data.directory).absolute()

        def place(directory: Path) -> str:
            directory = directory.absolute()
            return str(directory.relative_to(root) if directory.is_relative_to(root) else directory)

        return {
            "stores": [place(store.directory) for store in self.stores],
            "plans": [
                {"source": source, "kind": kind._asdict(), "directory": place(plan.directory)}
                for (source, kind), plan in self.plans.items()
            ],
            "held_out_plans": [place(plan.directory) for plan in self.held_out],
            "fim": self.fim._asdict(),
            "tokenizer_hash": self.tokenizer_hash,
            "left_out_files": self.left_out_files,
            "exact_mixture": self.order.exact,
        }


def reopen(config: RunConfig, record: dict) -> Prepared:
    """What `Prepared.record` described, without a look at the sources. Raises ConfigError if it is gone or damaged."""
    root = check_root(config)
    stores = [open_store(root / name, record["tokenizer_hash"]) for name in record["stores"]]
    plans = {}
    for plan in record["plans"]:
        kind = PlanKind(**plan["kind"] | {"share": tuple(plan["kind"]["share"])})
        plans[plan["source"], kind] = open_plan(root / plan["directory"])
    fim = FimRule(**record["fim"] | {"ids": tuple(record["fim"]["ids"])})
    order = Order(config, exact=record.get("exact_mixture", False))
    order.supply({key: plan.rows for key, plan in plans.items()})
    held_out_plans = [open_plan(root / name) for name in record["held_out_plans"]]
    left_out = record.get("left_out_files", [])
    return Prepared(config, stores, plans, held_out_plans, order, fim, record["tokenizer_hash"], left_out)


def check_root(config: RunConfig) -> Path:
    """data.directory of a run that has been prepared. Raises ConfigError where it is not there."""
    root = Path(config.data.directory)
    if not root.exists():
        raise ConfigError(
            f"data.directory = {config.data.directory}, where this run's tokens and plans were kept, is not here (in "
            f"{Path.cwd()}). Give the command where the run was started, or bring the directory back."
        )
    return root


def check_plans(prepared: Prepared) -> None:
    """Raises ConfigError for the first packing plan that is not as it was written. Reads all of them."""
    for plan in (*prepared.plans.values(), *prepared.held_out):
        if wrong := verify_plan(plan.directory):
            raise ConfigError(wrong[0])


def check_data(config: RunConfig) -> None:
    """Raises ConfigError for what `prepare` would refuse, as far as it shows without reading the text."""
    for source in config.data.sources:
        if not is_store(source):
            list_files(source)
        else:
            _check_store_fields(source)
    if config.data.curation.active:
        from opendeep_jax.data.curation import check_curation

        check_curation(config.data)
    if not config.data.tokenizer.startswith("bpe:"):
        _check_tokenizer(open_tokenizer(config.data.tokenizer, "", list, Path()), config)


def prepare(config: RunConfig, progress: bool = True, exact_mixture: bool = True) -> tuple[Tokenizer, Prepared]:
    """Opens what a run's batches are made of; curates, tokenizes and packs first what is not there yet.

    `exact_mixture` is False for a run that began when weights with long patterns were rounded.

    Raises ConfigError for sources, tokenizers and directories that cannot serve.
    """
    data = config.data
    left_out = say_what_is_unread(config)
    sources = curated_sources(config, progress)
    for source in sources:
        check_can_hold_out(source, data.held_out_fraction)
    tokenizer = prepare_tokenizer(config, progress, sources)
    _check_tokenizer(tokenizer, config)
    fim = FimRule(config.seed, data.fim_rate, tokenizer.fim_ids) if data.fim_rate else NO_FIM
    stores = [_prepare_store(config, source, tokenizer, progress) for source in sources]
    order = Order(config, exact_mixture)
    plans = {
        (source, kind): _plan(config, stores[source], kind, source, fim, progress) for source, kind in order.demand
    }
    held = _held_out_kind(config)
    held_out_plans = [_plan(config, store, held, source, fim, progress) for source, store in enumerate(stores)]
    for store, plan in zip(stores, held_out_plans, strict=True):
        _check_splits(store, plan, config)
    order.supply({key: plan.rows for key, plan in plans.items()})
    prepared = Prepared(config, stores, plans, held_out_plans, order, fim, tokenizer.content_hash, left_out)
    check_plans(prepared)
    return tokenizer, prepared


def say_what_is_unread(config: RunConfig) -> list[dict[str, int]]:
    """Files of each source that hold no document, by reason. Warns of them, and of licences that nobody knows."""
    found = []
    for number, source in enumerate(config.data.sources):
        left_out = {} if is_store(source) else list_source(source).left_out
        found.append({reason: len(names) for reason, names in left_out.items()})
        if left_out:
            told = "; ".join(f"{len(names)} × {reason}, as {names[0]}" for reason, names in left_out.items())
            logger.warning("Source %r (%s): not all that is there is read: %s.", source.name, source.path, told)
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
    """Raises ConfigError for fields of a finished store that say how its text would be read."""
    for name in (*FIELDS_OF_RECORDS, *LATER_FIELDS):
        if getattr(source, name) != getattr(SourceConfig(), name):
            raise ConfigError(
                f"Source {source.name!r} ({source.path}) has {name}={getattr(source, name)!r}, which would have no "
                "effect: its path is a finished token store. Leave it out, or prepare the text anew with it."
            )


def check_can_hold_out(source: SourceConfig, fraction: float) -> None:
    """Raises ConfigError if a source's documents cannot be divided into some to train on and some to hold out.

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


def repair(config: RunConfig, record: dict, tokenizer: Tokenizer, progress: bool = True) -> Prepared:
    """Makes again what is missing of the stores and plans that a run recorded, and opens them.

    A source's files may have been moved or touched since, as long as its text is the same. Raises ConfigError where it
    is not, and for damage that nobody has deleted yet.
    """
    root = Path(config.data.directory)
    for source, name in zip(curated_sources(config, progress), record["stores"], strict=True):
        if not is_store(source):
            _make_store(config, source, list_files(source), root / name, tokenizer, progress)
    stores = [open_store(root / name, record["tokenizer_hash"]) for name in record["stores"]]
    fim = FimRule(**record["fim"] | {"ids": tuple(record["fim"]["ids"])})
    for source, kind in Order(config, exact=record.get("exact_mixture", False)).demand:
        _plan(config, stores[source], kind, source, fim, progress)
    for source, store in enumerate(stores):
        _plan(config, store, _held_out_kind(config), source, fim, progress)
    prepared = reopen(config, record)
    check_plans(prepared)
    return prepared


def _held_out_kind(config: RunConfig) -> PlanKind:
    return PlanKind("held_out", config.data.sequence_length, "concatenate")


def curated_sources(
    config: RunConfig, progress: bool = True, executor: str = "local", options: dict[str, str] | None = None
) -> list[SourceConfig]:
    """The sources to tokenize: curated ones in the place of the original where data.curation asks for it.

    executor: `local`, `slurm` or `ray`, with its `options`; see `curation.curate`.
    """
    if not config.data.curation.active:
        return list(config.data.sources)
    from opendeep_jax.data.curation import curate

    return curate(config.data, executor=executor, progress=progress, options=options)


def prepare_tokenizer(config: RunConfig, progress: bool = True, sources: list[SourceConfig] | None = None) -> Tokenizer:
    """The tokenizer alone, trained first if it is a BPE that is not in data.directory yet. Raises ConfigError."""
    data = config.data
    if not data.tokenizer.startswith("bpe:"):
        return open_tokenizer(data.tokenizer, "", list, Path(data.directory, "tokenizers"))
    sources = curated_sources(config, progress) if sources is None else sources
    for source in filter(is_store, sources):
        raise ConfigError(
            f"data.tokenizer is {data.tokenizer}, which is trained on text, but source {source.name!r} ({source.path}) "
            "is tokenized already. Set --data.tokenizer to the tokenizer.json that it was made with."
        )
    files = [list_files(source) for source in sources]
    weights = [source.weight or 1.0 for source in sources]
    shares = [weight / sum(weights) for weight in weights]
    hashes = [fingerprint(source, listed) for source, listed in zip(sources, files, strict=True)]
    content = [list(zip(hashes, shares, strict=True)), data.held_out_fraction, SAMPLE_BYTES]

    def sample() -> Iterator[str]:
        with _bar("Training the tokenizer", SAMPLE_BYTES, progress) as advance:
            for source, listed, share in zip(sources, files, shares, strict=True):
                parts = list_parts(source, listed)
                for text in _sample(source, parts, SAMPLE_BYTES * share, data.held_out_fraction):
                    yield text
                    advance(len(text))

    corpus_hash = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return open_tokenizer(data.tokenizer, corpus_hash, sample, Path(data.directory, "tokenizers"))


def open_tokenizer(
    specification: str, corpus_hash: str, sample: Callable[[], Iterator[str]], directory: Path
) -> Tokenizer:
    """The Tokenizer of `data.tokenizer`: `bytes`, `bpe:SIZE` or a path.

    A BPE is trained on `sample()` the first time and kept in `directory` under `corpus_hash`, which must stand for
    the sample's content. Raises ConfigError.
    """
    if specification == "bytes":
        return byte_tokenizer()
    kind, colon, size = specification.partition(":")
    if kind != "bpe" or not colon:
        return load_tokenizer(Path(specification).expanduser())
    if not size.isdecimal():
        raise ConfigError(
            f"data.tokenizer is {specification!r}, but after `bpe:` comes the number of tokens, as in bpe:8192."
        )
    key = hashlib.sha256(json.dumps([corpus_hash, int(size), WORDS, SPECIAL_TOKENS]).encode()).hexdigest()
    path = directory / f"bpe-{int(size)}-{key[:16]}.json"
    if path.exists():
        try:
            return load_tokenizer(path, specification)
        except ConfigError as error:
            logger.warning("Training the tokenizer again, because %s", error)
    write_file(path, train_bpe(sample(), int(size)))
    return load_tokenizer(path, specification)


def _sample(source: SourceConfig, parts: list, budget: float, held_out_fraction: float) -> Iterator[str]:
    """Training documents of about `budget` bytes, from parts and documents that a hash of their names chooses."""
    parts = sorted(parts, key=lambda part: hash_id(f"{part.file.name} {part.begin}"))
    share = _text_share(source, parts)
    size = kept = 0
    while parts and kept < len(parts) and size < SAMPLED_FROM * budget:
        size += parts[kept].size * share
        kept += 1
    found, first = False, None
    for part in parts[:kept]:
        for document in read_part(source, part, lambda reason, name: None):
            id_hash = hash_id(document.id)
            if held_out(id_hash, held_out_fraction):
                continue
            first = document.text if first is None else first
            if fraction_of(id_hash, "tokenizer") < budget / (size * (1 - held_out_fraction)):
                found = True
                yield document.text[:SAMPLED_CHARACTERS]
    if not found and first is not None:
        yield first[:SAMPLED_CHARACTERS]


def _text_share(source: SourceConfig, parts: list) -> float:
    """Bytes of text in a byte of the parts, by the first: 1 unless it is below a half, as beside embeddings."""
    if not parts or source.text_url or not parts[0].size:
        return 1.0
    texts = (document.text for document in read_part(source, parts[0], lambda reason, name: None))
    share = sum(len(text) if text.isascii() else len(text.encode("utf-8")) for text in texts) / parts[0].size
    return share if 0 < share < WIDE else 1.0


def _check_tokenizer(tokenizer: Tokenizer, config: RunConfig) -> None:
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"The tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, more than model.vocab_size="
            f"{config.model.vocab_size} rows of the embedding. Set --model.vocab_size={tokenizer.vocab_size} or more."
        )
    if config.data.fim_rate and tokenizer.fim_ids is None:
        raise ConfigError(
            f"data.fim_rate = {config.data.fim_rate}, but the tokenizer {tokenizer.name} has no special tokens for "
            "fill-in-the-middle. Set --data.fim_rate=0, or use a tokenizer that has them, such as DeepSeek's or a "
            "bpe:SIZE of ours."
        )


def _prepare_store(config: RunConfig, source: SourceConfig, tokenizer: Tokenizer, progress: bool) -> Store:
    """Opens the store of a source; tokenizes the source first if that was not done, or not to its end."""
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
    """Opens the store at `directory`; what is missing of it, or cut off, is made first."""
    with contextlib.suppress(ConfigError):
        store = open_store(directory, tokenizer.content_hash)
        check_files(store)
        return store
    parts = list_parts(source, files)
    curation = config.data.curation
    facts = {"curation": dataclasses.asdict(curation) if curation.active else None}
    with _bar(f"Tokenizing {source.name}", sum(part.size for part in parts), progress) as advance:
        return prepare_store(directory, source, parts, tokenizer, facts, config.data.workers, advance)


def _plan(config: RunConfig, store: Store, kind: PlanKind, source: int, fim: FimRule, progress: bool) -> Plan:
    arguments = (Path(config.data.directory), store, kind, (config.seed, source), config.data.held_out_fraction, fim)
    show = progress and store.documents > SHOWN_DOCUMENTS
    title = f"Packing {store.manifest['source']['name']} ({kind.split.replace('_', ' ')}, rows of {kind.length})"
    with _bar(title, store.documents, show, bytes_=False) as advance:
        return make_plan(*arguments, advance)


def _check_splits(store: Store, held_out_plan: Plan, config: RunConfig) -> None:
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


@contextlib.contextmanager
def _bar(title: str, total: int, show: bool, bytes_: bool = True) -> Iterator[Callable[[int], None]]:
    """A progress bar on the error stream, shown from the first advance on; gives the function that moves it."""
    if not show:
        yield lambda size: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    count = DownloadColumn() if bytes_ else MofNCompleteColumn()
    columns = TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn()
    bar = Progress(*columns, console=Console(stderr=True, force_jupyter=False))
    task = bar.add_task(title, total=total)

    def advance(size: int) -> None:
        bar.start()
        bar.advance(task, size)

    try:
        yield advance
        if bar.live.is_started:
            bar.update(task, completed=total)
    finally:
        if bar.live.is_started:
            bar.stop()
