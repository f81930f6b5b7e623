"""Tokenizers from GGUF files and into them: tokens, merges or scores, and the name of a pre-tokenizer.

`gpt2` is byte-level BPE, whose splits llama.cpp knows by name; `llama` is SentencePiece's BPE with scores.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.text.files import generation_config
from opendeep_jax.text.gguf_names import BEGUN, COMPOSED, PROBE, SAME, SPLITS, WHOLE_WORDS, named_ends
from opendeep_jax.text.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
KEY = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
SPACE = "▁"
"""SentencePiece's way to write a space."""
OWN = "opendeep.tokenizer"
"""Key of what a tokenizer of ours has and GGUF has no key for, in JSON; llama.cpp does not read it."""
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
PARTS = ("normalizer", "pre_tokenizer", "decoder")
GGUF_NAMES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
GGUF_SAMPLING = {
    name: f"general.sampling.{key}"
    for name, key in {
        "temperature": "temp",
        "top_k": "top_k",
        "top_p": "top_p",
        "min_p": "min_p",
        "repetition_penalty": "penalty_repeat",
    }.items()
}
"""llama.cpp's keys of a generation_config.json's sampling, which its converter writes and its programs apply."""


def tokenizer_from_gguf_fields(fields: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer that a GGUF file's metadata describes.

    Raises:
        ConfigError: the file has no tokenizer, one of another kind, or one that is damaged.
    """
    kind, tokens = fields.get(KEY + "model"), fields.get(KEY + "tokens")
    if kind not in ("gpt2", "llama") or not isinstance(tokens, list) or not tokens:
        raise ConfigError(
            f"The file's tokenizer is of the kind {kind!r}: only gpt2 (byte-level BPE) and llama (SentencePiece) can "
            "be read. Use the model's Hugging Face directory."
        )
    types = fields.get(KEY + "token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ConfigError(f"The file has {len(tokens)} tokens and {len(types)} types of them. Download it again.")
    used = max((i for i, type_ in enumerate(types) if type_ != UNUSED), default=-1) + 1
    tokens, types = tokens[:used], types[:used]  # the rest only fills the model's embedding up
    try:
        own = _own(fields)
        if kind == "llama":  # whose user-defined tokens are written with spaces, and merged from SentencePiece's
            pairs = list(zip(tokens, types, strict=True))
            tokens = [t if t.strip(" ") or type_ != USER_DEFINED else t.replace(" ", SPACE) for t, type_ in pairs]
        library = (_byte_level if kind == "gpt2" else _sentencepiece)(fields, tokens)
        for want, special in ((CONTROL, True), (USER_DEFINED, False)):
            added = [(str(i), token) for i, token in enumerate(tokens) if types[i] == want and token]
            flags = own.get("flags", {})
            add = library.add_special_tokens if special else library.add_tokens
            plain = {"normalized": False}
            add([tokenizers.AddedToken(token, **plain | flags.get(i, {}), special=special) for i, token in added])
        if any(name in own for name in PARTS):
            description = json.loads(library.to_str()) | {name: own[name] for name in PARTS if name in own}
            library = tokenizers.Tokenizer.from_str(json.dumps(description))
    except ConfigError:
        raise
    except Exception as error:  # the library raises bare Exception, and a hostile file whatever it likes
        raise ConfigError(f"The file's tokenizer is damaged ({error}). Download it again.") from error
    return _with_ends(library, fields, tokens, kind, own)


def _own(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file of ours says beyond GGUF's keys. Raises ValueError or TypeError where it is none."""
    own = json.loads(fields.get(OWN) or "{}")
    kinds = {"end_ids": list, "after_begin": list, "special": dict, "generation": dict, "flags": dict}
    if not isinstance(own, dict) or not all(isinstance(own.get(name, kind()), kind) for name, kind in kinds.items()):
        raise TypeError(f"{OWN} is of another kind")
    ids = [*own.get("end_ids", ()), *own.get("after_begin", ())]
    if not all(type(i) is int for i in ids) or not all(isinstance(t, str) for t in own.get("special", {}).values()):
        raise TypeError(f"{OWN} has ids or names of another kind")
    return own


def _with_ends(
    library: tokenizers.Tokenizer, fields: Mapping[str, Any], tokens: Sequence[str], kind: str, own: Mapping[str, Any]
) -> Tokenizer:
    usual = {"bos": 1, "eos": 2} if kind == "llama" else {}  # llama.cpp's own, where the file names none

    def id_of(name: str) -> int | None:
        i = fields.get(f"{KEY}{name}_token_id", usual.get(name))
        return i if isinstance(i, int) and 0 <= i < len(tokens) else None

    begin_id = id_of("bos")
    ends = [i for i in (id_of("eos"), id_of("eot"), id_of("eom")) if i is not None]
    ends += own["end_ids"] if "end_ids" in own else named_ends(tokens)
    special = {name: tokens[i] for name, key in GGUF_NAMES.items() if (i := id_of(key)) is not None}
    sampled = {name: fields.get(key) for name, key in GGUF_SAMPLING.items()}
    sampled = {  # numbers of 32 bits, as people write them
        name: value if isinstance(value, int) else float(f"{value:.7g}")
        for name, value in sampled.items()
        if type(value) in (int, float)
    }
    # As llama.cpp: SentencePiece's models and Llama 3's want a beginning unless the file says otherwise.
    begun = kind == "llama" or fields.get(KEY + "pre") in BEGUN
    return Tokenizer(
        library,
        begin_id=begin_id,
        add_begin=bool(fields.get(KEY + "add_bos_token", begun)) and begin_id is not None,
        end_ids=tuple(dict.fromkeys(ends)),
        chat_template=fields.get(TEMPLATE),
        special=own.get("special", special),
        after_begin=tuple(own.get("after_begin", ())),
        generation=own.get("generation", sampled),
    )


def _byte_level(fields: Mapping[str, Any], tokens: Sequence[str]) -> tokenizers.Tokenizer:
    name = fields.get(KEY + "pre") or "default"
    cuts = SPLITS.get(SAME.get(name, name))
    if cuts is None:
        raise ConfigError(
            f"The file's tokenizer splits text as {name!r}, which is not known here; known: "
            f"{', '.join([*SPLITS, *SAME])}. Use the model's Hugging Face directory."
        )
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get(KEY + "merges") or ()]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [merge for merge in merges if len(merge) == 2]
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, ignore_merges=name in WHOLE_WORDS))
    if name in COMPOSED:
        library.normalizer = normalizers.NFC()
    library.pre_tokenizer = _splitter(cuts)
    library.decoder = decoders.ByteLevel()
    return library


def _splitter(cuts: Sequence[str]) -> pre_tokenizers.PreTokenizer:
    splits = [pre_tokenizers.Split(tokenizers.Regex(cut), "isolated") for cut in cuts]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentencepiece(fields: Mapping[str, Any], tokens: Sequence[str]) -> tokenizers.Tokenizer:
    scores = fields.get(KEY + "scores")
    if not isinstance(scores, list) or len(scores) < len(tokens):
        raise ConfigError("The file's SentencePiece tokenizer has no score for each token. Download it again.")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = fields.get(KEY + "unknown_token_id", 0)
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocabulary,
            _merges_of_scores(vocabulary, scores),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = fields.get(KEY + "add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    library.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return library


def _merges_of_scores(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Pairs of tokens that make a token, the best score of what they make first."""
    found = []
    for token, i in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-scores[i], vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def gguf_fields_of(tokenizer: Tokenizer, vocab_size: int, pre: str = "") -> dict[str, Any]:
    """Return the metadata that describes a tokenizer to llama.cpp; `tokenizer_from_gguf_fields` gives an equal one.

    Args:
        tokenizer: A byte-level or SentencePiece BPE.
        vocab_size: Rows of the model's embedding; ids beyond the tokenizer's are filled with unused ones.
        pre: llama.cpp's name for the way to split text; empty finds it.

    Raises:
        ConfigError: llama.cpp knows no such tokenizer.
    """
    description = tokenizer.description
    model = description["model"]
    if model.get("type") != "BPE" or tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"A {model.get('type')} tokenizer of {tokenizer.vocab_size} tokens for a model of {vocab_size}: GGUF takes "
            "a BPE that is no larger than the model's vocabulary."
        )
    added = {token["id"]: token for token in description["added_tokens"]}
    names = {i: token for token, i in tokenizer.library.get_vocab(with_added_tokens=True).items()}
    tokens = [names.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    types = [_type(i, names, added, model) for i in range(vocab_size)]
    if model.get("byte_fallback"):  # llama.cpp finds and prints user-defined tokens as they are
        tokens = [t.replace(SPACE, " ") if type_ == USER_DEFINED else t for t, type_ in zip(tokens, types, strict=True)]
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    fields: dict[str, Any] = {KEY + "tokens": tokens, KEY + "token_type": types}
    if model.get("byte_fallback"):
        made = {left + right: rank for rank, (left, right) in reversed(list(enumerate(merges)))}
        fields |= {
            KEY + "model": "llama",
            KEY + "pre": "default",
            KEY + "scores": [-float(made.get(names.get(i, ""), len(merges))) for i in range(vocab_size)],
            KEY + "add_space_prefix": _prefixes_space(description),
        }
    else:
        fields |= {
            KEY + "model": "gpt2",
            KEY + "pre": pre or _name_of_splits(tokenizer, merges),
            KEY + "merges": [f"{left} {right}" for left, right in merges],
        }
    own = {name: description[name] for name in PARTS} | {
        "end_ids": tokenizer.end_ids,
        "special": dict(tokenizer.special),
        "after_begin": tokenizer.after_begin,
        "generation": generation_config(tokenizer),
        "flags": {i: flags for i, token in added.items() if (flags := {k: True for k in FLAGS if token[k]})},
    }
    for name, key in GGUF_SAMPLING.items():
        value = tokenizer.generation.get(name)
        if type(value) in (int, float) and 0 <= value < 2**31:
            fields[key] = int(value) if name == "top_k" else float(value)
    return fields | _ends(tokenizer) | {OWN: json.dumps(own, ensure_ascii=False)}


def _prefixes_space(description: Mapping[str, Any]) -> bool:
    """Return whether a SentencePiece tokenizer begins each text with a space."""
    if '"Prepend"' in json.dumps(description["normalizer"]):
        return True
    parts = [description["pre_tokenizer"] or {}]
    parts += parts[0].get("pretokenizers", [])
    return any(part.get("type") == "Metaspace" and part.get("prepend_scheme") != "never" for part in parts)


def _type(i: int, names: Mapping[int, str], added: Mapping[int, dict], model: Mapping[str, Any]) -> int:
    if i not in names:
        return UNUSED
    if i in added:
        return CONTROL if added[i]["special"] else USER_DEFINED
    if model.get("byte_fallback") and len(names[i]) == 6 and names[i].startswith("<0x"):
        return BYTE
    return UNKNOWN if names[i] == model.get("unk_token") else NORMAL


def _ends(tokenizer: Tokenizer) -> dict[str, Any]:
    fields: dict[str, Any] = {KEY + "add_bos_token": tokenizer.add_begin}
    if tokenizer.begin_id is not None:
        fields[KEY + "bos_token_id"] = tokenizer.begin_id
    for name, i in zip(("eos", "eot", "eom"), tokenizer.end_ids, strict=False):
        fields[f"{KEY}{name}_token_id"] = i
    for name, key in GGUF_NAMES.items():
        if name in ("bos_token", "eos_token"):
            continue
        i = tokenizer.library.token_to_id(tokenizer.special.get(name, ""))
        if i is not None:
            fields[f"{KEY}{key}_token_id"] = i
    return fields | ({TEMPLATE: tokenizer.chat_template} if tokenizer.chat_template else {})


def _name_of_splits(tokenizer: Tokenizer, merges: Sequence) -> str:
    """llama.cpp's name for how a tokenizer splits text, found by encoding a probe."""
    if not merges:
        return "gpt-2"  # nothing is merged, however the text is split
    own = tokenizer.library.pre_tokenizer
    pieces = [] if own is None else [piece for piece, _ in own.pre_tokenize_str(PROBE)]
    ways = {name: [piece for piece, _ in _splitter(cuts).pre_tokenize_str(PROBE)] for name, cuts in SPLITS.items()}
    for name, way in ways.items():
        if way == pieces:
            return name
    closest = max(ways, key=lambda name: len(set(ways[name]) & set(pieces)))
    raise ConfigError(
        "llama.cpp knows no way to split text as this tokenizer does, so a GGUF would read some texts as other tokens "
        f"than the model was trained on. The closest way is {closest}: accept it with --pre={closest}."
    )
