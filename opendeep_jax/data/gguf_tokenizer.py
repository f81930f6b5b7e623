"""Tokenizers as GGUF files have them, and back: tokens, merges or scores, and the name of a way to split text.

`gpt2` is byte-level BPE, whose splits llama.cpp knows by name; `llama` is SentencePiece's BPE with scores.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.data.text_codec import SPACE, TextCodec

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
KEY = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _words(numbers: str) -> str:
    """cl100k's words, with so many digits together."""
    rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|" + numbers + rest


UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# Cased letters as of Unicode 11; escaped, as some of them look like others and editors replace them.
DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-"
    "\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-"
    "\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf"
    "\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-"
    "\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc"
    "\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115"
    "\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e"
    "\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-"
    "\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-"
    "\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{DEEPSEEK_LETTERS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    r"\p{N}+",
)
# llama.cpp's names, the commonest of several for one way first: the expressions that cut, one after the other.
SPLITS: dict[str, tuple[str, ...]] = {
    "llama-bpe": (_words(r"\p{N}{1,3}"),),
    "qwen2": (_words(r"\p{N}"),),
    "smollm": (r"\p{N}", GPT2),
    "deepseek-v3": DEEPSEEK_V3,
    "deepseek-llm": DEEPSEEK_LLM,
    "gpt-4o": (O200K,),
    "gpt-2": (GPT2,),
}
SAME = {
    **dict.fromkeys(("llama3", "llama-v3", "smaug-bpe", "dbrx", "glm4", "chatglm-bpe"), "llama-bpe"),
    **dict.fromkeys(("stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan", "grok-2"), "qwen2"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), "smollm"),
    **dict.fromkeys(("hunyuan-dense", "joyai-llm"), "deepseek-v3"),
    **dict.fromkeys(("olmo", "phi-2", "mpt", "jais", "trillion", "mellum", "granite-docling"), "gpt-2"),
    **dict.fromkeys(("llama4", "kanana2", "minimax-m2"), "gpt-4o"),
}
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "glm4")
"""Tokens that are a whole word are taken without asking the merges."""
COMPOSED = ("qwen2", "deepseek-r1-qwen")
"""Whose tokenizer.json composes characters (NFC) first."""
PROBE = (
    "\n \n\n\t \t\t  \n   \n Hello, World! I've been 'told he's there, 'RE you sure?  don't 3 33 333 3333 33333 3.14 "
    "x_1=foo(bar)[12]; //ok\r\n    return `a`;\n\n  été naïve ÅNGSTRÖM 我想在apple工作1314151天～ こんにちは "
    "नमस्ते 🚀 (normal) 😶‍🌫️ ----======== ''''``` нещо на Български. http://a.b/c?d=e camelCaseHTML "
)
"""Text on which no two ways of `SPLITS` agree."""


def codec_from_gguf_fields(fields: Mapping[str, Any]) -> TextCodec:
    """The codec that a GGUF file's metadata describes.

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
        library = (_byte_level if kind == "gpt2" else _sentencepiece)(fields, tokens)
        for want, special in ((CONTROL, True), (USER_DEFINED, False)):
            added = [token for token, type_ in zip(tokens, types, strict=True) if type_ == want and token]
            add = library.add_special_tokens if special else library.add_tokens
            add([tokenizers.AddedToken(token, special=special, normalized=False) for token in added])
    except ConfigError:
        raise
    except Exception as error:  # the library raises bare Exception, and a hostile file whatever it likes
        raise ConfigError(f"The file's tokenizer is damaged ({error}). Download it again.") from error
    return _with_ends(library, fields, tokens, kind)


def _with_ends(library: tokenizers.Tokenizer, fields: Mapping[str, Any], tokens: Sequence[str], kind: str) -> TextCodec:
    def id_of(name: str) -> int | None:
        i = fields.get(f"{KEY}{name}_token_id")
        return i if isinstance(i, int) and 0 <= i < len(tokens) else None

    begin_id = id_of("bos")
    ends = [i for i in (id_of("eos"), id_of("eot"), id_of("eom")) if i is not None]
    special = {f"{name}_token": id_of(key) for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    # As llama.cpp: SentencePiece's models and Llama 3's want a beginning unless the file says otherwise.
    usual = kind == "llama" or SAME.get(fields.get(KEY + "pre"), fields.get(KEY + "pre")) == "llama-bpe"
    return TextCodec(
        library,
        begin_id=begin_id,
        add_begin=bool(fields.get(KEY + "add_bos_token", usual)) and begin_id is not None,
        end_ids=tuple(dict.fromkeys(ends)),
        chat_template=fields.get(TEMPLATE),
        special={name: tokens[i] for name, i in special.items() if i is not None},
    )


def _byte_level(fields: Mapping[str, Any], tokens: Sequence[str]) -> tokenizers.Tokenizer:
    name = fields.get(KEY + "pre", "gpt-2")
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


def gguf_fields_from_codec(codec: TextCodec, vocab_size: int, pre: str = "") -> dict[str, Any]:
    """The metadata that describes a codec to llama.cpp; `codec_from_gguf_fields` gives an equal one.

    Args:
        codec: A byte-level or SentencePiece BPE.
        vocab_size: Rows of the model's embedding; ids beyond the tokenizer's are filled with unused ones.
        pre: llama.cpp's name for the way to split text; empty finds it.

    Raises:
        ConfigError: llama.cpp knows no such tokenizer.
    """
    description = json.loads(codec.library.to_str())
    model = description["model"]
    if model.get("type") != "BPE" or codec.vocab_size > vocab_size:
        raise ConfigError(
            f"A {model.get('type')} tokenizer of {codec.vocab_size} tokens for a model of {vocab_size}: GGUF takes a "
            "BPE that is no larger than the model's vocabulary."
        )
    added = {token["id"]: token for token in description["added_tokens"]}
    names = {i: token for token, i in codec.library.get_vocab(with_added_tokens=True).items()}
    tokens = [names.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    types = [_type(i, names, added, model) for i in range(vocab_size)]
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    fields: dict[str, Any] = {KEY + "tokens": tokens, KEY + "token_type": types}
    if model.get("byte_fallback"):
        made = {left + right: rank for rank, (left, right) in reversed(list(enumerate(merges)))}
        fields |= {
            KEY + "model": "llama",
            KEY + "pre": "default",
            KEY + "scores": [-float(made.get(token, len(merges))) for token in tokens],
            KEY + "add_space_prefix": "Prepend" in json.dumps(description["normalizer"]),
        }
    else:
        fields |= {
            KEY + "model": "gpt2",
            KEY + "pre": pre or _name_of_splits(codec, merges),
            KEY + "merges": [f"{left} {right}" for left, right in merges],
        }
    return fields | _ends(codec)


def _type(i: int, names: Mapping[int, str], added: Mapping[int, dict], model: Mapping[str, Any]) -> int:
    if i not in names:
        return UNUSED
    if i in added:
        return CONTROL if added[i]["special"] else USER_DEFINED
    if model.get("byte_fallback") and len(names[i]) == 6 and names[i].startswith("<0x"):
        return BYTE
    return UNKNOWN if names[i] == model.get("unk_token") else NORMAL


def _ends(codec: TextCodec) -> dict[str, Any]:
    fields: dict[str, Any] = {KEY + "add_bos_token": codec.add_begin}
    if codec.begin_id is not None:
        fields[KEY + "bos_token_id"] = codec.begin_id
    for name, i in zip(("eos", "eot", "eom"), codec.end_ids, strict=False):
        fields[f"{KEY}{name}_token_id"] = i
    for name, key in (("pad_token", "padding"), ("unk_token", "unknown")):
        i = codec.library.token_to_id(codec.special.get(name, ""))
        if i is not None:
            fields[f"{KEY}{key}_token_id"] = i
    return fields | ({TEMPLATE: codec.chat_template} if codec.chat_template else {})


def _name_of_splits(codec: TextCodec, merges: Sequence) -> str:
    """llama.cpp's name for how a tokenizer splits text, told by what it does to a probe."""
    if not merges:
        return "gpt-2"  # nothing is merged, however the text is split
    own = codec.library.pre_tokenizer
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
