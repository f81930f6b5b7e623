"""Tokenizer, from text to ids and back, for training and serving: one class for every file format.

A special token's name in a text is plain text, and a special token is placed by its id; only chat templates write
names that are read as special tokens (`special=True`).
"""

import dataclasses
import functools
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.text.chat_template import check_text, render_chat
from opendeep_jax.text.pieces import PRE_TOKENIZER, EncodeBatch, cache_words, in_pieces, splits_words_at_cuts
from opendeep_jax.text.spelling import ByteDecoder, read_byte_decoder

SPECIAL_TOKENS = (
    "<｜▁pad▁｜>",
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁hole｜>",
    "<｜fim▁end｜>",
)
"""Those of our own tokenizers, with their DeepSeek-V3 names. Ids 1 and 2 begin and end a document."""
FILL_IN_THE_MIDDLE = (
    SPECIAL_TOKENS[3:],
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)
"""Names of the tokens before the prefix, the suffix and the middle."""
WHITE = b" \t\n\r\v\f"
# Remembering words takes a third of the library's processor time, but one core, and the library uses all.
FEW_CORES = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer and a chat template. It is pickled as its path and read again in the other process.

    Instance: of SmolLM2, `tokenizer.decode(tokenizer.encode("Hello"))` is "Hello", and `tokenizer.apply_chat([{"role":
    "user", "content": "Hi"}])` is the text that `tokenizer.encode(..., special=True)` turns into the prompt.
    """

    library: tokenizers.Tokenizer
    """The tokenizer of the `tokenizers` package; set here to read special tokens' names as plain text."""
    begin_id: int | None = None
    """Begins a text."""
    add_begin: bool = False
    """True if the model expects begin_id before a plain prompt."""
    end_ids: tuple[int, ...] = ()
    """Each of them ends the model's text; the first ends a document."""
    chat_template: str | None = None
    """A Jinja program."""
    special: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """The template's names of special tokens: bos_token, eos_token, ..."""
    after_begin: tuple[int, ...] = ()
    """Ids that a text begins with behind begin_id, where it takes more than one (GLM: `[gMASK]<sop>`)."""
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The model's generation_config.json, if it has one."""
    name: str = ""
    """Its origin, for people: `bytes`, `bpe:8192` or a path."""
    path: str = ""
    """Its tokenizer.json, if it has one."""
    content_hash: str = ""
    """SHA-256 of all that decides what it does in training data; empty where it was not loaded for that."""
    encoder: EncodeBatch | None = None
    """Encodes batches in place of the library."""

    def __post_init__(self):
        self.library.encode_special_tokens = True

    def __reduce__(self):
        from opendeep_jax.text.files import reopen

        return reopen, (self.name, self.path, self.content_hash)

    @property
    def bos_id(self) -> int:
        """Id of the token that begins a document."""
        return self.begin_id

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a document."""
        return self.end_ids[0]

    @functools.cached_property
    def byte_decoder(self) -> ByteDecoder:
        """The bytes of each id by the library's decoder. Raises ConfigError for decoders without bytes of their own."""
        return read_byte_decoder(self.library)

    @property
    def pieces(self) -> list[bytes]:
        """UTF-8 that each id stands for, special tokens' names included; incomplete characters are possible."""
        return self.byte_decoder.pieces

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return len(self.pieces)

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        """Name and ids of all special tokens, which are no text."""
        added = sorted(self.library.get_added_tokens_decoder().items())
        return {token.content: i for i, token in added if token.special}

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens."""
        return frozenset(self.special_tokens.values())

    @functools.cached_property
    def fim_ids(self) -> tuple[int, int, int] | None:
        """Special tokens of fill-in-the-middle, if it has them: before the prefix, the suffix and the middle."""
        found = (tuple(map(self.library.token_to_id, names)) for names in FILL_IN_THE_MIDDLE)
        return next((ids for ids in found if None not in ids), None)

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """Its tokenizer.json as a dictionary."""
        self.pieces  # noqa: B018  refuses absurd ids, which the next line would count up to
        return json.loads(self.library.to_str())

    @functools.cached_property
    def unknown_id(self) -> int | None:
        """Id of the token for text that has no token."""
        model = self.description["model"]
        return model["unk_id"] if "unk_id" in model else self.library.token_to_id(model.get("unk_token") or "")

    @functools.cached_property
    def encode_batch(self) -> EncodeBatch:
        """Function from training texts to int32 arrays of ids; special tokens' names are plain text."""
        if self.encoder:
            return self.encoder

        def encode_batch(texts: list[str]) -> list[np.ndarray]:
            try:
                encoded = self.library.encode_batch_fast(texts, add_special_tokens=False)
            except Exception as error:  # The library raises bare Exception, as for words without an unknown token.
                raise ConfigError(
                    f"The tokenizer {self.name} cannot write a text ({error}). Take one that has all bytes, such as "
                    "--data.tokenizer=bpe:8192."
                ) from error
            return [np.array(encoding.ids, np.int32) for encoding in encoded]

        encode = cache_words(encode_batch) if self._splits_into_our_words() and _threads() <= FEW_CORES else None
        return (in_pieces if splits_words_at_cuts(self.library) else lambda same: same)(encode or encode_batch)

    def _splits_into_our_words(self) -> bool:
        pre = self.library.pre_tokenizer
        ours = json.loads(PRE_TOKENIZER.__getstate__())
        return self.library.normalizer is None and pre is not None and json.loads(pre.__getstate__()) == ours

    @functools.cached_property
    def _reading_special(self) -> tokenizers.Tokenizer:
        self.pieces  # noqa: B018  as in `description`
        library = tokenizers.Tokenizer.from_str(self.library.to_str())
        library.encode_special_tokens = False
        return library

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Return the ids of a text, without begin_id. Raises ConfigError for half surrogate pairs.

        Args:
            special: Read special tokens' names as those tokens, as a template writes them; else they are plain text.
        """
        check_text(text)
        return (self._reading_special if special else self.library).encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a plain-text prompt, with the tokenizer's prefix."""
        ids = self.encode(text)
        self._warn(text, ids)
        return self.with_prefix(ids)

    def with_prefix(self, ids: Sequence[int]) -> list[int]:
        """Return the ids after the prefix that the model expects, which is not added twice."""
        begin = list(self.prefix)
        return list(ids) if list(ids[: len(begin)]) == begin else begin + list(ids)

    @property
    def prefix(self) -> tuple[int, ...]:
        """Ids that the model expects before a plain prompt."""
        return (self.begin_id, *self.after_begin) if self.add_begin and self.begin_id is not None else ()

    def stop_ids(self, stop: Iterable[str]) -> dict[int, str]:
        """Return the ids of special tokens among stop strings: they end a text without appearing in it."""
        found = ((self.library.token_to_id(text), text) for text in stop)
        return {i: text for i, text in found if i in self.special_ids}

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Return the ids of a conversation, up to where the answer begins. Raises ConfigError as `apply_chat` does."""
        text = self.apply_chat(messages, **variables)
        ids = self.encode(text, special=True)
        self._warn(text, ids)
        return ids

    def _warn(self, text: str, ids: Sequence[int]) -> None:
        """Warn of characters of a prompt that the tokenizer has no token for."""
        if sum(self.byte_decoder.lengths(ids)) == len(text.encode("utf-8")):
            return
        lost = set(text) - set(self.decode(ids, special=True))
        normalize = self.library.normalizer.normalize_str if self.library.normalizer else str
        lost = {letter for letter in lost if letter.strip() and normalize(letter) == letter}
        if lost:
            shown = "".join(sorted(lost))[:20]
            logging.getLogger(__name__).warning("The tokenizer has no token for %r: the model does not see it.", shown)

    def decode(self, ids: Iterable[int] | np.ndarray, special: bool = False) -> str:
        """The text of ids, as the library's own decoder has it; ids outside of the vocabulary give nothing, incomplete
        UTF-8 gives U+FFFD.

        Args:
            special: Write special tokens' names; else they give nothing.
        """
        ids = ids.tolist() if isinstance(ids, np.ndarray) else ids
        return self.byte_decoder.text(ids, () if special else self.special_ids)

    def piece(self, i: int, special: bool = False) -> bytes:
        """UTF-8 of one id, as `decode` writes it behind others."""
        hidden = not 0 <= i < len(self.pieces) or (i in self.special_ids and not special)
        return b"" if hidden else self.pieces[i]

    def apply_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text of a conversation. Raises ConfigError where there is no template, or it refuses the messages."""
        if self.chat_template is None:
            raise ConfigError(
                "This model has no chat template, so it cannot chat. Give it text to continue (opendeep generate, or "
                "/v1/completions), or put a chat_template.jinja beside its tokenizer.json."
            )
        return render_chat(self.chat_template, messages, self.special, add_generation_prompt, **variables)

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 [V]: UTF-8 bytes each token stands for behind others; 0 for special tokens."""
        return self._sizes(lambda i, piece: len(piece))

    @functools.cached_property
    def first_bytes(self) -> np.ndarray:
        """int32 [V]: those of a document's first token, whose leading space SentencePiece's decoders cut off."""
        if not self.byte_decoder.first and not self.byte_decoder.strip[1]:
            return self.token_bytes
        return self._sizes(lambda i, piece: self.byte_decoder.lengths([i])[0])

    @functools.cached_property
    def solid_bytes(self) -> np.ndarray:
        """int32 [V]: those of a token that are no white space."""
        return self._sizes(lambda i, piece: len(piece.translate(None, WHITE)))

    def _sizes(self, size: Callable[[int, bytes], int]) -> np.ndarray:
        return np.array([0 if i in self.special_ids else size(i, p) for i, p in enumerate(self.pieces)], np.int32)

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


def _threads() -> int:
    """Threads that the library encodes with."""
    return 1 if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("0", "false") else os.cpu_count() or 1
