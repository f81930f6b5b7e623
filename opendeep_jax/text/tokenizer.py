"""Text to token ids and back: raw bytes, a byte-level BPE trained on the sources, or any `tokenizer.json`."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.rules import BYTE_VOCABULARY
from opendeep_jax.config.storage import write_file
from opendeep_jax.text.cuts import EncodeBatch, begins_words_at_cuts, in_pieces
from opendeep_jax.text.spelling import spell

# The special tokens of our own tokenizers, with their DeepSeek-V3 names. Ids 1 and 2 begin and end a document.
SPECIAL_TOKENS = (
    "<｜▁pad▁｜>",
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁hole｜>",
    "<｜fim▁end｜>",
)
# Names that tokenizers in the field give to the beginning and the end of a text.
BOUNDARIES = (
    (SPECIAL_TOKENS[1], SPECIAL_TOKENS[2]),
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<|startoftext|>", "<|endoftext|>"),
    ("<|endoftext|>", "<|endoftext|>"),
    ("<bos>", "<eos>"),
    ("<s>", "</s>"),
    ("[BOS]", "[EOS]"),
    ("[CLS]", "[SEP]"),
)
# And to the marks of fill-in-the-middle: before the prefix, before the suffix, before the middle.
FILL_IN_THE_MIDDLE = (
    SPECIAL_TOKENS[3:],
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)
# Merges stay inside: a word with the one sign or space before it, up to three digits, signs with the white space
# after them (so `):` and the next line's indentation can be one token), or white space.
WORDS = r"[^\s\p{L}\p{N}]?[\p{L}]+| [\p{L}]+|[\p{N}]{1,3}| ?[^\s\p{L}\p{N}]+\s*| ?\s+"
PRE_TOKENIZER = tokenizers.pre_tokenizers.Sequence(
    [
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
# The same words in ASCII text, which Python's expressions find in a tenth of the library's time.
ASCII_WORDS = re.compile(WORDS.replace(r"\p{L}", "A-Za-z").replace(r"\p{N}", "0-9"), re.ASCII)
REMEMBERED_WORDS = 1 << 20
PROBE = "The quick brown fox jumps over the lazy dog."
WHITE = b" \t\n\r\v\f"
# Remembering words takes a third of the library's processor time, but one core, and the library uses all.
FEW_CORES = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer as the rest of OpenDeep sees it. Special tokens are never read from text, only placed by id.

    It travels to another process as its path, and is read anew there.
    """

    name: str
    """What made it, for people: `bytes`, `bpe:8192` or a path."""
    encode_batch: EncodeBatch
    """Texts to int32 arrays of ids, without special tokens."""
    decode: Callable[[Sequence[int]], str]
    """Ids to text; special tokens give nothing, incomplete UTF-8 gives U+FFFD."""
    bos_id: int
    """Begins a document."""
    eos_id: int
    """Ends a document."""
    special_tokens: dict[str, int]
    """All special tokens' ids."""
    token_bytes: np.ndarray
    """int32 [V]: UTF-8 bytes each token stands for behind others; 0 for special tokens."""
    first_bytes: np.ndarray
    """int32 [V]: those of a document's first token, whose leading space SentencePiece's decoders cut off."""
    solid_bytes: np.ndarray
    """int32 [V]: those of a token that are no white space."""
    content_hash: str
    """SHA-256 of all that decides what it does."""
    path: str = ""
    """Its tokenizer.json, if it has one."""
    fim_ids: tuple[int, int, int] | None = None
    """Special tokens of fill-in-the-middle, if it has them: they stand before the prefix, the suffix and the middle."""
    unknown_id: int | None = None
    """Stands for what it has no token for."""

    def __reduce__(self):
        return _reopen, (self.name, self.path, self.content_hash)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return len(self.token_bytes)

    def encode(self, text: str) -> np.ndarray:
        """int32 ids of one text, without special tokens."""
        return self.encode_batch([text])[0]

    def lost_bytes(self, text: bytes, ids: np.ndarray) -> int:
        """Return how many bytes of a UTF-8 text its ids do not say, unknown tokens saying nothing.

        White space that a decoder puts between words counts where the text has some, and makes up for nothing else.
        """
        said = int(self.token_bytes[ids].sum())
        if len(ids):
            said += int(self.first_bytes[ids[0]]) - int(self.token_bytes[ids[0]])
        unknown = self.unknown_id is not None and (ids == self.unknown_id)
        if said == len(text) and not np.any(unknown):
            return 0
        if self.unknown_id is not None:
            ids, said = ids[~unknown], said - int(unknown.sum()) * int(self.token_bytes[self.unknown_id])
        solid = len(text.translate(None, WHITE)) - int(self.solid_bytes[ids].sum())
        return max(len(text) - said, solid, 0)


@functools.lru_cache(maxsize=4)
def _reopen(name: str, path: str, content_hash: str) -> Tokenizer:
    """The tokenizer that another process has sent. Raises ConfigError if its file has changed since."""
    tokenizer = load_tokenizer(Path(path), name) if path else byte_tokenizer()
    if tokenizer.content_hash != content_hash:
        raise ConfigError(f"The tokenizer {path or name} has changed while it was in use. Start again.")
    return tokenizer


def byte_tokenizer() -> Tokenizer:
    """The tokenizer whose first 256 ids are the bytes; the special tokens follow them."""
    special = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}

    def encode_batch(texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) for text in texts]

    def decode(ids: Sequence[int]) -> str:
        return bytes(i for i in np.asarray(ids, np.int64).tolist() if i < 256).decode("utf-8", "replace")

    return Tokenizer(
        name="bytes",
        encode_batch=encode_batch,
        decode=decode,
        bos_id=special[SPECIAL_TOKENS[1]],
        eos_id=special[SPECIAL_TOKENS[2]],
        special_tokens=special,
        token_bytes=np.array([1] * 256 + [0] * len(special), np.int32),
        first_bytes=np.array([1] * 256 + [0] * len(special), np.int32),
        solid_bytes=np.array([byte not in WHITE for byte in range(256)] + [0] * len(special), np.int32),
        content_hash=hashlib.sha256(repr(("bytes", SPECIAL_TOKENS)).encode()).hexdigest(),
        fim_ids=tuple(special[name] for name in FILL_IN_THE_MIDDLE[0]),
    )


def train_bpe(texts: Iterable[str], size: int) -> str:
    """The `tokenizer.json` of a byte-level BPE trained on `texts`, with at most `size` tokens, special ones included.

    Raises ConfigError if `size` does not even hold the bytes and the special tokens.
    """
    if size < BYTE_VOCABULARY:
        raise ConfigError(
            f"data.tokenizer is bpe:{size}, but a byte-level BPE needs at least {BYTE_VOCABULARY} tokens: 256 bytes "
            f"and {len(SPECIAL_TOKENS)} special tokens. Ask for more, or set --data.tokenizer=bytes."
        )
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = PRE_TOKENIZER
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return library.to_str()


def load_tokenizer(path: Path, name: str = "") -> Tokenizer:
    """The tokenizer of a `tokenizer.json`. Raises ConfigError if it is missing, damaged, or names no boundaries."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"Cannot read the tokenizer {path}: {getattr(error, 'strerror', None) or error}. data.tokenizer is "
            "`bytes`, `bpe:SIZE`, or the path of a tokenizer.json."
        ) from error
    try:
        description = json.loads(text)
        library = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # The library raises bare Exception.
        raise ConfigError(
            f"{path} is not a whole tokenizer.json ({error}). It may have been cut off while it was copied; fetch it "
            "again, or set --data.tokenizer=bpe:8192 to train one."
        ) from error
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True  # Text that spells a special token stays text.
    for said in not_random(library):
        logging.getLogger(__name__).warning("%s: %s", path, said)

    special = {t["content"]: t["id"] for t in description.get("added_tokens") or () if t["special"]}
    token_bytes, first_bytes, solid_bytes = _token_bytes(library)
    model = description["model"]
    unknown_id = model["unk_id"] if "unk_id" in model else library.token_to_id(model.get("unk_token") or "")
    bos_id, eos_id = _boundaries(library, path)

    def encode_batch(texts: list[str]) -> list[np.ndarray]:
        try:
            encoded = library.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # The library raises bare Exception, as for words without an unknown token.
            raise ConfigError(
                f"The tokenizer {path} cannot write a text ({error}). Take one that has all bytes, such as "
                "--data.tokenizer=bpe:8192."
            ) from error
        return [np.array(encoding.ids, np.int32) for encoding in encoded]

    if _splits_into_our_words(description) and _threads() <= FEW_CORES:
        encode_batch = remember_words(encode_batch)
    if begins_words_at_cuts(library):
        encode_batch = in_pieces(encode_batch)

    def decode(ids: Sequence[int]) -> str:
        return library.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=True)

    found = Tokenizer(
        name=name or str(path),
        encode_batch=encode_batch,
        decode=decode,
        bos_id=bos_id,
        eos_id=eos_id,
        special_tokens=special,
        token_bytes=token_bytes,
        first_bytes=first_bytes,
        solid_bytes=solid_bytes,
        unknown_id=unknown_id,
        content_hash=hashlib.sha256(repr((text, bos_id, eos_id)).encode()).hexdigest(),
        path=str(path),
        fim_ids=_fim_ids(library),
    )
    with contextlib.suppress(ConfigError):  # which the text may not meet
        ids = found.encode(PROBE)
        if found.token_bytes[ids].sum() > len(PROBE) + 1:
            logging.getLogger(__name__).warning(
                "%s: its decoder makes %r of %r, so bytes of tokens, and with them bits per byte, are not the text's.",
                path, decode(ids), PROBE,
            )  # fmt: skip
    return found


def _threads() -> int:
    """Threads that the library encodes with."""
    return 1 if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("0", "false") else os.cpu_count() or 1


def _fim_ids(library: tokenizers.Tokenizer) -> tuple[int, int, int] | None:
    for names in FILL_IN_THE_MIDDLE:
        ids = tuple(map(library.token_to_id, names))
        if None not in ids:
            return ids
    return None


def _splits_into_our_words(description: dict) -> bool:
    ours = tokenizers.Tokenizer(tokenizers.models.BPE())
    ours.pre_tokenizer = PRE_TOKENIZER
    return (
        description["normalizer"] is None and description["pre_tokenizer"] == json.loads(ours.to_str())["pre_tokenizer"]
    )


def remember_words(encode_batch: EncodeBatch) -> EncodeBatch:
    """An `encode_batch` with the same results that encodes each word of ASCII text once, which is much faster."""
    remembered: dict[str, bytes] = {}

    def encode(text: str) -> np.ndarray:
        words = ASCII_WORDS.findall(text)
        if new := list(set(words).difference(remembered)):
            if len(remembered) > REMEMBERED_WORDS:
                remembered.clear()
                new = list(set(words))
            remembered.update(zip(new, (ids.tobytes() for ids in encode_batch(new)), strict=True))
        return np.frombuffer(bytearray().join(map(remembered.__getitem__, words)), np.int32)

    def encode_all(texts: list[str]) -> list[np.ndarray]:
        others = iter(encode_batch([text for text in texts if not text.isascii()]))
        return [encode(text) if text.isascii() else next(others) for text in texts]

    return encode_all


def _boundaries(library: tokenizers.Tokenizer, path: Path) -> tuple[int, int]:
    """Ids that begin and end a document: as the tokenizer_config.json beside it says, or by their usual names."""
    candidates = list(BOUNDARIES)
    try:
        settings = json.loads((path.parent / "tokenizer_config.json").read_text("utf-8"))
        names = [settings.get(key) for key in ("bos_token", "eos_token")]
        bos, eos = [name["content"] if isinstance(name, dict) else name for name in names]
        candidates.insert(0, (bos or eos, eos or bos))  # GPT-2's family has one token for both.
    except (OSError, ValueError, AttributeError, KeyError):
        pass
    for bos, eos in candidates:
        ids = [library.token_to_id(name) if name else None for name in (bos, eos)]
        if None not in ids:
            return ids[0], ids[1]
    raise ConfigError(
        f"{path} has no token that begins or ends a document: none of {', '.join(eos for _, eos in BOUNDARIES)}. Put a "
        "tokenizer_config.json beside it that names its bos_token and eos_token."
    )


def _token_bytes(library: tokenizers.Tokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int32 [V] each: bytes of a token behind others, where it begins a text, and without white space."""
    spelling = spell(library)
    special = {i for i, token in library.get_added_tokens_decoder().items() if token.special}
    said = [b"" if i in special else piece for i, piece in enumerate(spelling.pieces)]
    sizes = np.array([len(piece) for piece in said], np.int32)
    solid = np.array([len(piece.translate(None, WHITE)) for piece in said], np.int32)
    if not spelling.first and not spelling.strip[1]:
        return sizes, sizes, solid
    return sizes, np.array([spelling.lengths([i], special)[0] for i in range(len(sizes))], np.int32), solid


def not_random(library: tokenizers.Tokenizer) -> list[str]:
    """Switch off what makes a tokenizer encode a text differently each time; return what was switched off."""
    dropout = getattr(library.model, "dropout", None)  # Unigram's sampling is never read from a file
    if not dropout:
        return []
    library.model.dropout = None
    return [f"its BPE leaves out merges at random (dropout {dropout:g}), which is switched off here."]


def open_tokenizer(
    specification: str, corpus_hash: str, sample: Callable[[], Iterable[str]], directory: Path
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
            logging.getLogger(__name__).warning("Training the tokenizer again, because %s", error)
    write_file(path, train_bpe(sample(), int(size)))
    return load_tokenizer(path, specification)
