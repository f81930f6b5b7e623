"""Log-probabilities and tool calls of answers as OpenAI's API spells them."""

import codecs
from collections.abc import Sequence
from typing import Any

from opendeep_jax.generation.requests import TokenLogprob
from opendeep_jax.text.tokenizer import Tokenizer


def joined_calls(pieces: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return whole tool calls of their pieces."""
    found: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        call = found.setdefault(piece["index"], {"id": piece.get("id"), "type": "function"})
        function = call.setdefault("function", {"name": piece["function"].get("name"), "arguments": ""})
        function["arguments"] += piece["function"]["arguments"]
    return list(found.values())


class TextOffsets:
    """Offsets of tokens in a streamed text, in characters; part of a character has that character's offset.

    Args:
        start: Characters before the first token; below 0 where the text lacks so many of the tokens' first characters.
        special: Whether special tokens are text.
    """

    def __init__(self, tokenizer: Tokenizer, start: int = 0, special: bool = True):
        self._tokenizer, self._next, self.special = tokenizer, start, special
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, token: int) -> int:
        """Return the next token's place."""
        place = max(self._next, 0)
        self._next += len(self._characters.decode(self._tokenizer.piece(token, self.special)))
        return place


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """Return a token's text; of a part of a character its bytes, as in OpenAI's `bytes:\\xf0\\x9f`; else its id."""
    piece = tokenizer.piece(token, special=True)
    try:
        return piece.decode() or f"token_id:{token}"
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def alternatives(entry: TokenLogprob, asked: int) -> list[tuple[int, float]]:
    """Return the most likely tokens and theirs; the chosen one is among them, as one more if it must be."""
    found = list(entry.top[:asked])
    return found if any(token == entry.token for token, _ in found) else [*found, (entry.token, entry.logprob)]


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Log-probabilities as chat completions give them."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        piece = tokenizer.piece(token, special=True)
        return {"token": token_name(tokenizer, token), "logprob": finite(logprob), "bytes": list(piece)}

    def top(entry: TokenLogprob) -> list[dict[str, Any]]:
        return [one(*pair) for pair in alternatives(entry, len(entry.top))] if entry.top else []

    content = [one(entry.token, entry.logprob) | {"top_logprobs": top(entry)} for entry in entries]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprob | int], offset: int | TextOffsets = 0
) -> dict[str, Any]:
    """Log-probabilities as completions give them.

    Args:
        entries: Tokens with theirs; a bare id is a token without, such as a prompt's first.
        offset: Characters of the text before them, or their places as they go on.
    """
    places = TextOffsets(tokenizer, offset) if isinstance(offset, int) else offset
    tokens, values, top, offsets = [], [], [], []
    for entry in entries:
        bare = isinstance(entry, int)
        token = entry if bare else entry.token
        tokens.append(token_name(tokenizer, token))
        values.append(None if bare else finite(entry.logprob))
        top.append(None if bare else _by_name(tokenizer, entry))
        offsets.append(places.take(token))
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}


def _by_name(tokenizer: Tokenizer, entry: TokenLogprob) -> dict[str, float]:
    """Alternatives by name; of two tokens with the same text the less likely one goes by its id."""
    found: dict[str, float] = {}
    for token, value in alternatives(entry, len(entry.top)):
        name = token_name(tokenizer, token)
        found[f"token_id:{token}" if name in found else name] = finite(value)
    return found


def finite(logprob: float) -> float:
    """Replace -inf, which JSON lacks, by -9999 as OpenAI's API does."""
    return max(float(logprob), -9999.0)
