"""Text to tokens and back for a model that talks, whatever its tokenizer came with: a directory, a GGUF, or our run.

`data/tokenizer.py` makes training data, where special tokens are never read from text; here chat templates write them.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.files import write_atomically
from opendeep_jax.data.chat_template import check_text, render_chat
from opendeep_jax.data.tokenizer import Tokenizer

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
LARGEST_ID = 1 << 24
SPACE = "▁"
"""How SentencePiece writes a space."""


@dataclasses.dataclass(frozen=True, eq=False)
class TextCodec:
    """A model's tokenizer and chat template.

    Instance: of SmolLM2, `codec.decode(codec.encode("Hello"))` is "Hello", and `codec.apply_chat([{"role": "user",
    "content": "Hi"}])` is the text that `codec.encode(..., special=True)` turns into the prompt.
    """

    library: tokenizers.Tokenizer
    """Of the `tokenizers` package; reads special tokens from text."""
    begin_id: int | None = None
    """Begins a text."""
    add_begin: bool = False
    """Whether the model expects begin_id before a prompt that is no chat."""
    end_ids: tuple[int, ...] = ()
    """Each of them ends the model's text."""
    chat_template: str | None = None
    """A Jinja program."""
    special: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """The template's names of special tokens: bos_token, eos_token, ..."""

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return len(self.pieces)

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        """UTF-8 that each id stands for, special tokens' names included; incomplete characters are possible."""
        return _pieces(self.library)

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens, which are no text."""
        return frozenset(i for i, token in self.library.get_added_tokens_decoder().items() if token.special)

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        self.pieces  # noqa: B018  refuses absurd ids, which the next line would count up to
        library = tokenizers.Tokenizer.from_str(self.library.to_str())
        library.encode_special_tokens = True
        return library

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text; begin_id is not added. Raises ConfigError for half surrogate pairs.

        Args:
            special: Read special tokens' names as those tokens, as a template writes them; else they are plain text.
        """
        check_text(text)
        return (self.library if special else self._plain).encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a plain text that the model shall go on with: begin_id first, where the model expects it."""
        begin = [self.begin_id] if self.add_begin and self.begin_id is not None else []
        return begin + self.encode(text)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Ids of a conversation, up to where the answer begins. Raises ConfigError as `apply_chat` does."""
        return self.encode(self.apply_chat(messages, **variables), special=True)

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of ids; incomplete UTF-8 gives U+FFFD, and ids outside of the vocabulary nothing.

        Args:
            special: Write special tokens' names; else they give nothing.
        """
        text = b"".join(self.piece(i, special) for i in ids).decode("utf-8", "replace")
        return text[1:] if self._strips_space and text.startswith(" ") else text

    def piece(self, i: int, special: bool = False) -> bytes:
        """UTF-8 of one id, as `decode` writes it."""
        hidden = not 0 <= i < len(self.pieces) or (i in self.special_ids and not special)
        return b"" if hidden else self.pieces[i]

    @functools.cached_property
    def _strips_space(self) -> bool:
        decoder = json.dumps(json.loads(self.library.to_str())["decoder"])
        return '"Strip"' in decoder or '"Metaspace"' in decoder

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


def byte_characters() -> dict[str, int]:
    """GPT-2's character for each byte, which byte-level tokens are written in: `Ġ` is 32, the space."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


def _pieces(library: tokenizers.Tokenizer) -> list[bytes]:
    vocabulary = library.get_vocab(with_added_tokens=True)
    largest = max(vocabulary.values(), default=-1)
    if largest > LARGEST_ID:  # the library would count up to it when it writes itself out
        raise ConfigError(f"The tokenizer has an id of {largest:,}: no vocabulary is that large. Fetch it again.")
    decoder = json.dumps(json.loads(library.to_str())["decoder"])
    if '"ByteLevel"' in decoder:
        characters = byte_characters()

        def text_of(token: str) -> bytes:
            numbers = [characters.get(character) for character in token]
            return token.encode("utf-8", "replace") if None in numbers else bytes(numbers)
    elif any(kind in decoder for kind in ('"ByteFallback"', '"Metaspace"', SPACE, json.dumps(SPACE)[1:-1])):

        def text_of(token: str) -> bytes:
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes.fromhex(token[3:5])
            return token.replace(SPACE, " ").encode("utf-8", "replace")
    else:
        raise ConfigError(
            f"The tokenizer's decoder is {decoder[:80]}: only byte-level and SentencePiece tokenizers can be read."
        )
    pieces = [b""] * (largest + 1)
    for token, i in vocabulary.items():
        pieces[i] = text_of(token)
    for i, token in library.get_added_tokens_decoder().items():
        pieces[i] = token.content.encode("utf-8", "replace")
    return pieces


def codec_from_hf(directory: str | Path) -> TextCodec:
    """The codec of a Hugging Face directory.

    It is made of tokenizer.json, and as far as they are there of tokenizer_config.json, special_tokens_map.json,
    chat_template.jinja and generation_config.json beside it.

    Raises:
        ConfigError: there is no tokenizer.json, or one of the files is damaged.
    """
    directory = Path(directory)
    path = directory / "tokenizer.json"
    if not path.is_file():
        others = [name for name in ("tokenizer.model", "tiktoken.model", "vocab.json") if (directory / name).exists()]
        has = f" It has {others[0]}: convert that to a tokenizer.json with transformers first." if others else ""
        raise ConfigError(f"{directory} has no tokenizer.json.{has} Copy the tokenizer's files into it.")
    return _codec(path)


def codec_from_tokenizer(tokenizer: Tokenizer) -> TextCodec:
    """The codec of a run's tokenizer. Our documents begin with its bos_id and end with its eos_id.

    Raises:
        ConfigError: a file beside it is damaged.
    """
    if tokenizer.path:
        codec = _codec(Path(tokenizer.path))
    else:
        names = {name: byte for name, byte in byte_characters().items()}
        library = tokenizers.Tokenizer(tokenizers.models.BPE(names, []))
        library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.decoder = tokenizers.decoders.ByteLevel()
        ordered = sorted(tokenizer.special_tokens, key=tokenizer.special_tokens.get)
        library.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in ordered])
        codec = TextCodec(library)
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    ends = {"bos_token": names.get(tokenizer.bos_id), "eos_token": names.get(tokenizer.eos_id)}
    return dataclasses.replace(
        codec,
        begin_id=tokenizer.bos_id,
        add_begin=True,
        end_ids=tuple(dict.fromkeys((tokenizer.eos_id, *codec.end_ids))),
        special={name: text for name, text in ends.items() if text} | dict(codec.special),
    )


def _codec(path: Path) -> TextCodec:
    try:
        library = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{path} is not a whole tokenizer.json ({error}). Fetch it again.") from error
    library.no_truncation()
    library.no_padding()
    settings = _read_json(path.with_name("special_tokens_map.json")) | _read_json(
        path.with_name("tokenizer_config.json")
    )
    special = {name: _content(settings[name]) for name in SPECIAL_NAMES if settings.get(name)}
    extra = settings.get("extra_special_tokens")
    special |= {name: _content(token) for name, token in extra.items()} if isinstance(extra, dict) else {}
    begin_id = library.token_to_id(special.get("bos_token", ""))
    first = library.encode("a", add_special_tokens=True).ids[:1]
    add_begin = settings.get("add_bos_token")
    return TextCodec(
        library,
        begin_id=begin_id,
        add_begin=bool(first == [begin_id] if add_begin is None else add_begin),
        end_ids=_end_ids(library, special, _read_json(path.with_name("generation_config.json"))),
        chat_template=_template(path, settings),
        special=special,
    )


def _content(token: Any) -> str:
    """A special token's name, which files give alone or with its properties."""
    return str(token.get("content", "") if isinstance(token, dict) else token)


def _end_ids(library: tokenizers.Tokenizer, special: Mapping[str, str], generation: Mapping) -> tuple[int, ...]:
    given = generation.get("eos_token_id")
    given = given if isinstance(given, list) else [given]
    found = [library.token_to_id(special.get("eos_token", "")), *given]
    return tuple(dict.fromkeys(i for i in found if isinstance(i, int) and not isinstance(i, bool) and i >= 0))


def _template(path: Path, settings: Mapping[str, Any]) -> str | None:
    """The template in its own file, or in the settings: alone, or the one named default of several."""
    own = path.with_name("chat_template.jinja")
    if own.is_file():
        try:
            return own.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{own} cannot be read ({error}). Fetch it again.") from error
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default") or next(iter(named.values()), None)
    return template if isinstance(template, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    """An object's fields; none where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}). Fetch it again.") from error
    return value if isinstance(value, dict) else {}


def save_codec(codec: TextCodec, directory: str | Path) -> Path:
    """Writes a codec as Hugging Face has it; `codec_from_hf` gives an equal one. Returns the tokenizer.json.

    Raises:
        OSError: the disk does not take it.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    names = {i: token for token, i in codec.library.get_vocab(with_added_tokens=True).items()}
    settings: dict[str, Any] = dict(codec.special) | {"add_bos_token": codec.add_begin}
    if codec.begin_id in names:
        settings["bos_token"] = names[codec.begin_id]
    if codec.end_ids:
        settings["eos_token"] = names[codec.end_ids[0]]
        generation = {"bos_token_id": codec.begin_id, "eos_token_id": list(codec.end_ids)}
        write_atomically(directory / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    if codec.chat_template is not None:
        write_atomically(directory / "chat_template.jinja", codec.chat_template)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    write_atomically(directory / "tokenizer_config.json", text)
    write_atomically(directory / "tokenizer.json", codec.library.to_str(pretty=True))
    return directory / "tokenizer.json"
