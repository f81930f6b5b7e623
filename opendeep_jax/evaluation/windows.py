"""A long text as pieces that a model can read, each of its tokens to be foretold once."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Window(NamedTuple):
    """A piece of a text."""

    tokens: list[int]
    first: int
    """Place of the first token to be scored: those before it are context, and the scored ones of an earlier window."""


def windows(tokens: Sequence[int], length: int, stride: int) -> Iterator[Window]:
    """Pieces of at most `length` tokens whose scored parts are all tokens but the first, each once.

    `windows([7, 8, 9, 10], 3, 1)` gives ([7, 8, 9], 1) and ([8, 9, 10], 2).

    Args:
        tokens: The text; its first token stands for what comes before it.
        length: At least 2.
        stride: Tokens that a window after the first one scores, from 1 to length - 1. The smaller, the more context
            they have, and the longer it takes.
    """
    end = min(length, len(tokens))
    if end > 1:
        yield Window(list(tokens[:end]), 1)
    while end < len(tokens):
        scored_to, end = end, min(end + stride, len(tokens))
        begin = end - length
        yield Window(list(tokens[begin:end]), scored_to - begin)
