"""Files of text: a document each, or several with a separator between them."""

import io
from collections.abc import Iterator
from typing import BinaryIO

from opendeep_jax.data.reading.compression import damaged, open_content
from opendeep_jax.data.reading.formats import SourceFile

BLOCK = 2**20
"""Characters that are read at one time where documents are divided by a separator."""


def read_texts(file: SourceFile, separator: str, encoding: str) -> Iterator[tuple[str, bytes]]:
    """(id, UTF-8 bytes, or what else is there) of each document in a file of text; blank ones between separators not.

    The id is the file's name, or `name#number` where `separator` parts documents, from 1. Raises ConfigError for a file
    that is damaged, or that is not in an encoding of several bytes a sign.
    """
    with open_content(file.path, file.name) as content:
        if not separator:
            yield file.name, _utf8(content.read(), file, encoding)
            return
        for number, text in enumerate(_pieces(content, file, separator, encoding), start=1):
            if text.strip():
                yield f"{file.name}#{number}", text.encode("utf-8", "surrogateescape")


def _utf8(content: bytes, file: SourceFile, encoding: str) -> bytes:
    """The content as UTF-8. What is not in `encoding` stays as it is, with a byte that no UTF-8 has before it."""
    if not encoding:
        return content
    try:
        return content.decode(encoding).encode("utf-8")
    except UnicodeError:
        return b"\xff" + content


def _pieces(content: BinaryIO, file: SourceFile, separator: str, encoding: str) -> Iterator[str]:
    lines = "\n" in separator
    rest = carry = ""
    try:
        with io.TextIOWrapper(content, encoding or "utf-8-sig", "surrogateescape", newline="") as stream:
            while block := stream.read(BLOCK):
                block = carry + block
                carry = "\r" if lines and block.endswith("\r") else ""  # its line end may be cut in two
                block = block.removesuffix(carry)
                *whole, rest = (rest + (block.replace("\r\n", "\n") if lines else block)).split(separator)
                yield from whole
    except UnicodeError as error:
        raise damaged(file.path, f"it is not {encoding}: {error}") from error
    yield rest + carry


def separator_of(text: str) -> str:
    r"""A separator as it is written in a recipe or on a command line, where `\n` and `\t` may be two signs."""
    return text.replace("\\n", "\n").replace("\\t", "\t")
