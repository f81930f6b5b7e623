"""Text to tokens and back for a model that talks, whatever its tokenizer came with: a directory, a GGUF, or our run.

`text/tokenizer.py` makes training data, where special tokens are never read from text; here chat templates write them.
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.files import write_atomically
from opendeep_jax.text.chat_template import check_text, render_chat
from opendeep_jax.text.spelling import Spelling, byte_characters, say, spell
from opendeep_jax.text.tokenizer import Tokenizer, not_random

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
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
    after_begin: tuple[int, ...] = ()
    """Ids that a text begins with behind begin_id, where it takes more than one (GLM: `[gMASK]<sop>`)."""
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The model's generation_config.json, if it has one."""

    @functools.cached_property
    def spelling(self) -> Spelling:
        """What each id says, by the tokenizer's own decoder. Raises ConfigError for decoders without such a thing."""
        return spell(self.library)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return len(self.pieces)

    @property
    def pieces(self) -> list[bytes]:
        """UTF-8 that each id stands for, special tokens' names included; incomplete characters are possible."""
        return self.spelling.pieces

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
        """Ids of a plain text that the model shall go on with, begun as its tokenizer begins a text."""
        ids = self.encode(text)
        self._warn(text, ids)
        return self.begun(ids)

    def begun(self, ids: Sequence[int]) -> list[int]:
        """Ids behind what a text begins with, where the model expects that and they do not begin so already."""
        begin = [self.begin_id, *self.after_begin] if self.add_begin and self.begin_id is not None else []
        return list(ids) if list(ids[: len(begin)]) == begin else begin + list(ids)

    def stop_ids(self, stop: Iterable[str]) -> dict[int, str]:
        """Special tokens among stop strings, by their ids: they are never seen in the text, and end it all the same."""
        found = ((self.library.token_to_id(text), text) for text in stop)
        return {i: text for i, text in found if i in self.special_ids}

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Ids of a conversation, up to where the answer begins. Raises ConfigError as `apply_chat` does."""
        text = self.apply_chat(messages, **variables)
        ids = self.encode(text, special=True)
        self._warn(text, ids)
        return ids

    def _warn(self, text: str, ids: Sequence[int]) -> None:
        """Says which letters of a prompt the tokenizer has no token for."""
        if sum(self.spelling.lengths(ids)) == len(text.encode("utf-8")):
            return
        lost = set(text) - set(self.decode(ids, special=True))
        normalize = self.library.normalizer.normalize_str if self.library.normalizer else str
        lost = {letter for letter in lost if letter.strip() and normalize(letter) == letter}
        if lost:
            shown = "".join(sorted(lost))[:20]
            logging.getLogger(__name__).warning("The tokenizer has no token for %r: the model does not see it.", shown)

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of ids, as the library's own decoder has it; ids outside of the vocabulary give nothing.

        Args:
            special: Write special tokens' names; else they give nothing.
        """
        return say(self.spelling, ids, () if special else self.special_ids)

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
    ends = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    ends = {name: codec.library.id_to_token(i) for name, i in ends.items()}
    return dataclasses.replace(
        codec,
        begin_id=tokenizer.bos_id,
        add_begin=True,
        after_begin=(),
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
    for said in not_random(library):
        logging.getLogger(__name__).warning("%s: %s", path, said)
    settings = _read_json(path.with_name("special_tokens_map.json")) | _read_json(
        path.with_name("tokenizer_config.json")
    )
    special = {name: _content(settings[name]) for name in SPECIAL_NAMES if settings.get(name)}
    extra = settings.get("extra_special_tokens")
    special |= {name: _content(token) for name, token in extra.items()} if isinstance(extra, dict) else {}
    begin_id = library.token_to_id(special.get("bos_token", ""))
    first = leading_ids(library)
    generation = _read_json(path.with_name("generation_config.json"))
    return TextCodec(
        library,
        begin_id=first[0] if first else begin_id,
        add_begin=bool(first or (settings.get("add_bos_token") and begin_id is not None)),
        after_begin=first[1:],
        end_ids=_end_ids(library, special, generation, _read_json(path.with_name("config.json"))),
        chat_template=_template(path, settings),
        special=special,
        generation=generation,
    )


def leading_ids(library: tokenizers.Tokenizer) -> tuple[int, ...]:
    """Ids that the tokenizer's post-processor puts before a text."""
    found: list[int] = []
    pending = [] if library.post_processor is None else [json.loads(library.post_processor.__getstate__())]
    while pending:
        step = pending.pop(0)
        if step["type"] == "Sequence":
            pending = step["processors"] + pending
        elif step["type"] == "TemplateProcessing":
            for part in step["single"]:
                if "SpecialToken" not in part:
                    break
                found += step["special_tokens"][part["SpecialToken"]["id"]]["ids"]
        elif step["type"] in ("BertProcessing", "RobertaProcessing"):
            found.append(step["cls"][1])
    return tuple(found)


def _content(token: Any) -> str:
    """A special token's name, which files give alone or with its properties."""
    return str(token.get("content", "") if isinstance(token, dict) else token)


def _end_ids(
    library: tokenizers.Tokenizer, special: Mapping[str, str], generation: Mapping, config: Mapping
) -> tuple[int, ...]:
    """Ids that end a text by any of a model's files: the tokenizer's first."""
    inner = config.get("text_config")
    inner = inner if isinstance(inner, dict) else {}
    found: list[Any] = [library.token_to_id(special.get("eos_token", ""))]
    for given in (generation.get("eos_token_id"), config.get("eos_token_id"), inner.get("eos_token_id")):
        found += given if isinstance(given, list) else [given]
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
    named = codec.library.id_to_token
    settings: dict[str, Any] = dict(codec.special) | {"add_bos_token": codec.add_begin}
    if codec.begin_id is not None and named(codec.begin_id) is not None:
        settings.setdefault("bos_token", named(codec.begin_id))
    if codec.end_ids and named(codec.end_ids[0]) is not None:
        settings["eos_token"] = named(codec.end_ids[0])
    if generation := generation_config(codec):
        write_atomically(directory / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    if codec.chat_template is not None:
        write_atomically(directory / "chat_template.jinja", codec.chat_template)
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    write_atomically(directory / "tokenizer_config.json", text)
    write_atomically(directory / "tokenizer.json", tokenizer_json(codec))
    return directory / "tokenizer.json"


def generation_config(codec: TextCodec) -> dict[str, Any]:
    """The model's generation_config.json, with all ids that end a text."""
    generation = dict(codec.generation)
    given = generation.get("eos_token_id")
    known = [*(given if isinstance(given, list) else [given]), *codec.end_ids[:1]]
    if not set(codec.end_ids) <= set(known) or (codec.end_ids and given is None):
        generation["eos_token_id"] = list(codec.end_ids)
    pad = codec.library.token_to_id(codec.special.get("pad_token", ""))
    for name, i in (("bos_token_id", codec.begin_id), ("pad_token_id", pad)):
        if not codec.generation and i is not None:
            generation[name] = i
    return generation


def begins_as_written(codec: TextCodec) -> bool:
    """Whether the tokenizer's own post-processor begins texts as the codec does."""
    begin = (codec.begin_id, *codec.after_begin) if codec.add_begin and codec.begin_id is not None else ()
    return leading_ids(codec.library) == begin


def tokenizer_json(codec: TextCodec) -> str:
    """The tokenizer.json of a codec, whose post-processor begins a text as `TextCodec.begun` does: transformers, vLLM
    and the harness go by that alone."""
    if begins_as_written(codec):
        return codec.library.to_str(pretty=True)
    description = json.loads(codec.library.to_str())
    begin = [codec.begin_id, *codec.after_begin] if codec.add_begin and codec.begin_id is not None else []
    names = {i: codec.library.id_to_token(i) for i in begin}
    special = {name: {"id": name, "ids": [i], "tokens": [name]} for i, name in names.items()}

    def opened(text: str, kind: int) -> list[dict[str, Any]]:
        marks = [{"SpecialToken": {"id": names[i], "type_id": kind}} for i in begin]
        return [*marks, {"Sequence": {"id": text, "type_id": kind}}]

    template = {
        "type": "TemplateProcessing",
        "single": opened("A", 0),
        "pair": opened("A", 0) + opened("B", 1),
        "special_tokens": special,
    }
    before = description["post_processor"] or {}
    parts = before.get("processors", [before] if before else [])
    parts = [part for part in parts if part["type"] == "ByteLevel"]
    description["post_processor"] = {"type": "Sequence", "processors": [*parts, template]} if parts else template
    return json.dumps(description, indent=2, ensure_ascii=False)
