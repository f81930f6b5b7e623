"""llama.cpp's names: ways to split text into words, as the tokenizers that they are named for have them, and tokens
that end a text."""

from collections.abc import Sequence

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
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# As O200K, with Chinese characters apart from other letters, and no slash behind signs; `&&` cuts two classes.
NOT_HAN = r"&&[^\p{Han}]"
KIMI_UPPER, KIMI_LOWER = UPPER[:-1] + NOT_HAN + "]", LOWER[:-1] + NOT_HAN + "]"
KIMI_K2 = (
    rf"\p{{Han}}+|[^\r\n\p{{L}}\p{{N}}]?{KIMI_UPPER}*{KIMI_LOWER}+{CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{KIMI_UPPER}+{KIMI_LOWER}*{CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35 = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SEED_CODER = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
NOT_SENTENCE = " ?[^(\\s|.,!?…。，、।۔،)]+"
# llama.cpp's names, the commonest of several for one way first: the expressions that cut, one after the other.
SPLITS: dict[str, tuple[str, ...]] = {
    "llama-bpe": (_words(r"\p{N}{1,3}"),),
    "qwen2": (_words(r"\p{N}"),),
    "smollm": (r"\p{N}", GPT2),
    "deepseek-v3": DEEPSEEK_V3,
    "deepseek-llm": DEEPSEEK_LLM,
    "gpt-4o": (O200K,),
    "gpt-2": (GPT2,),
    "kimi-k2": (KIMI_K2,),
    "tekken": (TEKKEN,),
    "qwen35": (QWEN35,),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}"),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "seed-coder": (SEED_CODER,),
    "bloom": (NOT_SENTENCE,),
    "viking": (NOT_SENTENCE, r"\p{N}"),
}
SAME = {
    **dict.fromkeys(("llama3", "llama-v3", "smaug-bpe", "dbrx", "glm4", "glm5", "chatglm-bpe"), "llama-bpe"),
    **dict.fromkeys(("falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"), "llama-bpe"),
    **dict.fromkeys(("stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan", "grok-2", "kormo", "f2llmv2"), "qwen2"),
    **dict.fromkeys(("solar-open", "bailingmoe", "bailingmoe2", "llada-moe"), "qwen2"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"), "smollm"),
    **dict.fromkeys(("hunyuan-dense", "joyai-llm", "hy_v4"), "deepseek-v3"),
    **dict.fromkeys(("olmo", "phi-2", "mpt", "jais", "trillion", "mellum", "granite-docling", "exaone4"), "gpt-2"),
    **dict.fromkeys(("gigachat", "a.x-4.0", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "modern-bert"), "gpt-2"),
    **dict.fromkeys(("llama4", "kanana2", "minimax-m2", "talkie"), "gpt-4o"),
    **dict.fromkeys(("poro-chat", "gpt3-finnish"), "bloom"),
}
OF_LLAMA_3 = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano")
WHOLE_WORDS = (*OF_LLAMA_3, "glm4", "glm5", "tekken")
"""Tokens that are a whole word are taken without asking the merges."""
BEGUN = (*OF_LLAMA_3, "tekken")
"""Pre-tokenizers whose texts begin with a begin token where the file says nothing."""
COMPOSED = ("qwen2", "qwen35", "deepseek-r1-qwen")
"""Pre-tokenizers whose tokenizer.json composes characters (NFC) first."""
ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
    "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>",
    "<reponame>", "<|file_sep|>",
)  # fmt: skip
"""Names of tokens at which llama.cpp ends a text, whatever the file says."""
PROBE = (
    "\n \n\n\t \t\t  \n   \n Hello, World! I've been 'told he's there, 'RE you sure?  don't 3 33 333 3333 33333 3.14 "
    "x_1=foo(bar)[12]; //ok\r\n    return `a`;\n\n  été naïve ÅNGSTRÖM 我想在apple工作1314151天～ こんにちは "
    "नमस्ते 🚀 (normal) 😶‍🌫️ ----======== ''''``` нещо на Български. http://a.b/c?d=e camelCaseHTML "
)
"""Text on which no two ways of `SPLITS` agree."""


def named_ends(tokens: Sequence[str]) -> list[int]:
    """Return the ids at which llama.cpp ends a text by the tokens' names alone."""
    ids = {name: i for i, name in enumerate(tokens)}
    found = [name for name in ENDS if name in ids]
    if {"<|return|>", "<|call|>"} <= set(found) or {"<|flush|>", "<|calls|>"} <= set(found):
        found = [name for name in found if name != "<|end|>"]  # which ends a message there, and not the turn
    if "<|tool_response>" in found:
        found = [name for name in found if name != "</s>"]
    return [ids[name] for name in found]
