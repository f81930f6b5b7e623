"""Tokenizers from files and into them: for a run, for prompts to somebody's model, and as Hugging Face has them.

load_tokenizer(path)            for a run: documents begin with its bos_id and end with its eos_id
tokenizer_from_hf(directory)    for somebody's model: texts begin and end as its files say
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.files import write_atomically
from opendeep_jax.config.rules import BYTE_VOCABULARY
from opendeep_jax.text.pieces import PRE_TOKENIZER
from opendeep_jax.text.spelling import byte_characters
from opendeep_jax.text.tokenizer import SPECIAL_TOKENS, Tokenizer

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
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
PROBE = "The quick brown fox jumps over the lazy dog."

logger = logging.getLogger(__name__)


def byte_tokenizer() -> Tokenizer:
    """Return the tokenizer whose first 256 ids are the bytes; the special tokens follow them."""

    def encode_batch(texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) for text in texts]

    library = tokenizers.Tokenizer(tokenizers.models.BPE(byte_characters(), []))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens([tokenizers.AddedToken(n, special=True, normalized=False) for n in SPECIAL_TOKENS])
    content_hash = hashlib.sha256(repr(("bytes", SPECIAL_TOKENS)).encode()).hexdigest()
    tokenizer = Tokenizer(library, name="bytes", content_hash=content_hash, encoder=encode_batch)
    return _for_documents(tokenizer, *map(library.token_to_id, SPECIAL_TOKENS[1:3]))


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
    """Return the tokenizer of a `tokenizer.json`, for a run. Raises ConfigError if it is missing, damaged, or names no
    boundaries of documents."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"Cannot read the tokenizer {path}: {getattr(error, 'strerror', None) or error}. data.tokenizer is "
            "`bytes`, `bpe:SIZE`, or the path of a tokenizer.json."
        ) from error
    tokenizer = _read(path)
    begin, end = _boundaries(tokenizer.library, path)
    content_hash = hashlib.sha256(repr((text, begin, end)).encode()).hexdigest()
    tokenizer = dataclasses.replace(tokenizer, name=name or str(path), path=str(path), content_hash=content_hash)
    tokenizer = _for_documents(tokenizer, begin, end)
    sizes = tokenizer.token_bytes
    with contextlib.suppress(ConfigError):  # which the text may not meet
        ids = tokenizer.encode_batch([PROBE])[0]
        if sizes[ids].sum() > len(PROBE) + 1:
            logger.warning(
                "%s: its decoder makes %r of %r, so bytes of tokens, and with them bits per byte, are not the text's.",
                path, tokenizer.decode(ids), PROBE,
            )  # fmt: skip
    return tokenizer


def tokenizer_from_hf(directory: str | Path) -> Tokenizer:
    """Return the tokenizer of a Hugging Face directory.

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
    return _read(path)


@functools.lru_cache(maxsize=4)
def reopen(name: str, path: str, content_hash: str) -> Tokenizer:
    """Return the tokenizer that another process has sent. Raises ConfigError if its file has changed since."""
    tokenizer = load_tokenizer(Path(path), name) if path else byte_tokenizer()
    if tokenizer.content_hash != content_hash:
        raise ConfigError(f"The tokenizer {path or name} has changed while it was in use. Start again.")
    return tokenizer


def _for_documents(tokenizer: Tokenizer, begin: int, end: int) -> Tokenizer:
    """The tokenizer of a run, whose documents begin and end with these ids, and its prompts as the documents do."""
    ends = {name: tokenizer.library.id_to_token(i) for name, i in (("bos_token", begin), ("eos_token", end))}
    return dataclasses.replace(
        tokenizer,
        begin_id=begin,
        add_begin=True,
        after_begin=(),
        end_ids=tuple(dict.fromkeys((end, *tokenizer.end_ids))),
        special={name: text for name, text in ends.items() if text} | dict(tokenizer.special),
    )


def _read(path: Path) -> Tokenizer:
    try:
        library = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(
            f"{path} is not a whole tokenizer.json ({error}). It may have been cut off while it was copied: fetch it "
            "again, or, for a run, set --data.tokenizer=bpe:8192 to train one."
        ) from error
    library.no_truncation()
    library.no_padding()
    if dropout := getattr(library.model, "dropout", None):  # Unigram's sampling is never read from a file
        library.model.dropout = None
        said = "its BPE leaves out merges at random (dropout %g), which is switched off here."
        logger.warning(f"%s: {said}", path, dropout)
    settings = _read_json(path.with_name("special_tokens_map.json"))
    settings |= _read_json(path.with_name("tokenizer_config.json"))
    special = {name: _content(settings[name]) for name in SPECIAL_NAMES if settings.get(name)}
    extra = settings.get("extra_special_tokens")
    special |= {name: _content(token) for name, token in extra.items()} if isinstance(extra, dict) else {}
    begin_id = library.token_to_id(special.get("bos_token", ""))
    first = leading_ids(library)
    generation = _read_json(path.with_name("generation_config.json"))
    return Tokenizer(
        library,
        begin_id=first[0] if first else begin_id,
        add_begin=bool(first or (settings.get("add_bos_token") and begin_id is not None)),
        after_begin=first[1:],
        end_ids=_end_ids(library, special, generation, _read_json(path.with_name("config.json"))),
        chat_template=_template(path, settings),
        special=special,
        generation=generation,
    )


def _boundaries(library: tokenizers.Tokenizer, path: Path) -> tuple[int, int]:
    """Ids that begin and end a document: as the tokenizer_config.json beside it says, or by their usual names."""
    settings = _read_json(path.with_name("tokenizer_config.json"))
    bos, eos = (_content(settings.get(key) or "") for key in ("bos_token", "eos_token"))
    # GPT-2's family has one token for both.
    for names in ((bos or eos, eos or bos), *BOUNDARIES):
        ids = [library.token_to_id(name) if name else None for name in names]
        if None not in ids:
            return ids[0], ids[1]
    raise ConfigError(
        f"{path} has no token that begins or ends a document: none of {', '.join(eos for _, eos in BOUNDARIES)}. Put a "
        "tokenizer_config.json beside it that names its bos_token and eos_token."
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
    """Return a special token's name, which files give alone or with its properties."""
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
    """Return the template in its own file, or in the settings: alone, or the one named default of several."""
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


def save_tokenizer(tokenizer: Tokenizer, directory: str | Path) -> Path:
    """Write a tokenizer as Hugging Face has it; `tokenizer_from_hf` gives an equal one. Return its tokenizer.json.

    Raises:
        OSError: the disk does not take it.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    named = tokenizer.library.id_to_token
    settings: dict[str, Any] = dict(tokenizer.special) | {"add_bos_token": tokenizer.add_begin}
    if tokenizer.begin_id is not None and named(tokenizer.begin_id) is not None:
        settings.setdefault("bos_token", named(tokenizer.begin_id))
    if tokenizer.end_ids and named(tokenizer.end_ids[0]) is not None:
        settings["eos_token"] = named(tokenizer.end_ids[0])
    if generation := generation_config(tokenizer):
        write_atomically(directory / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    if tokenizer.chat_template is not None:
        write_atomically(directory / "chat_template.jinja", tokenizer.chat_template)
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    write_atomically(directory / "tokenizer_config.json", text)
    write_atomically(directory / "tokenizer.json", tokenizer_json(tokenizer))
    return directory / "tokenizer.json"


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the model's generation_config.json, with all ids that end a text."""
    generation = dict(tokenizer.generation)
    given = generation.get("eos_token_id")
    known = [*(given if isinstance(given, list) else [given]), *tokenizer.end_ids[:1]]
    if not set(tokenizer.end_ids) <= set(known) or (tokenizer.end_ids and given is None):
        generation["eos_token_id"] = list(tokenizer.end_ids)
    pad = tokenizer.library.token_to_id(tokenizer.special.get("pad_token", ""))
    for name, i in (("bos_token_id", tokenizer.begin_id), ("pad_token_id", pad)):
        if not tokenizer.generation and i is not None:
            generation[name] = i
    return generation


def begins_as_written(tokenizer: Tokenizer) -> bool:
    """Return whether the tokenizer's own post-processor begins texts as `Tokenizer.with_prefix` does."""
    return leading_ids(tokenizer.library) == tokenizer.prefix


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """Return a tokenizer.json whose post-processor adds `Tokenizer.prefix`, which transformers, vLLM and the
    harness take from there alone."""
    if begins_as_written(tokenizer):
        return tokenizer.library.to_str(pretty=True)
    description = dict(tokenizer.description)
    names = {i: tokenizer.library.id_to_token(i) for i in tokenizer.prefix}
    special = {name: {"id": name, "ids": [i], "tokens": [name]} for i, name in names.items()}

    def opened(text: str, kind: int) -> list[dict[str, Any]]:
        marks = [{"SpecialToken": {"id": names[i], "type_id": kind}} for i in tokenizer.prefix]
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
