"""Writes a small corpus of text that looks like code, with signs of several bytes and all line ends."""

from pathlib import Path

WORDS = "def return self import for in value data number of the and naïve 数据 émigré \t\n\r\n    ()[]{}:;=+".split(" ")


def write_corpus(root: Path, documents: int, salt: int = 0) -> Path:
    """`documents` text files of 0.1 to 2 kB in two directories below `root`, different for each `salt`."""
    for i in range(documents):
        words = [WORDS[(7 * j * j + 3 * i + salt) % len(WORDS)] + str(i * j % 50) for j in range(20 + 13 * i % 200)]
        path = root / f"part{i % 2}" / f"{salt}-{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(" ".join(words).encode("utf-8"))
    return root
