"""The steps of a recipe: datatrove's filters and formatter with their papers' thresholds, each as one function.

A step is given a datatrove `Document`, whose text and metadata it may change, and gives the reason to drop it, or none.
"""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opendeep_jax.config.schema import CurationConfig
from opendeep_jax.data.curation.words import PIECE, pieces, simplification, word_tokenizer

Step = Callable[[Any], str | None]

EVALUATION_OVERLAP = "evaluation overlap"

# Before and behind an @. datatrove's own expression takes hours over a megabyte of base64; here every character is
# looked at a fixed number of times. An address in Latin letters ends where another script begins, which may be the
# sentence around it, written without spaces; one in another script has all letters.
LATIN = "A-Za-z0-9_\u00c0-\u024f"
LOCAL_SIGNS = frozenset("!#$%&'*+-/=?^_`{|}~.")
DOMAINS = [re.compile(rf"[{letters}-]+(?:\.[{letters}-]+)+") for letters in (LATIN, r"\w")]
LITERAL = re.compile(r"\[[\w.:-]+\]")
QUOTED = re.compile(r'"[^"\n]{1,64}"\Z')


def quiet_datatrove() -> None:
    """Silence datatrove's log: its results arrive as counts, its errors as exceptions."""
    from loguru import logger

    logger.disable("datatrove")


def filter_steps(curation: CurationConfig) -> dict[str, Step]:
    """Return the steps that filter each document alone, by name, in their order: quality filters, then language."""
    steps = {name: _quality_step(name) for name in curation.quality}
    return steps | ({"language": _language_step(curation)} if curation.language_model else {})


def final_steps(curation: CurationConfig, evaluation_index: Path, masked: Counter) -> dict[str, Step]:
    """The steps that come after duplicates are gone: evaluation overlap, then personal data, counted in `masked`.

    `evaluation_index` is a directory that `evaluation.write_index` filled.
    """
    steps = {EVALUATION_OVERLAP: _evaluation_step(curation, evaluation_index)} if curation.evaluation_sets else {}
    return steps | ({"personal data": _masking_step(masked)} if curation.mask_personal_data else {})


def _quality_step(name: str) -> Step:
    from datatrove.pipeline import filters
    from datatrove.pipeline.filters.base_filter import get_filter_result

    kinds = {
        "gopher_repetition": filters.GopherRepetitionFilter,  # Rae et al. 2021
        "gopher_quality": filters.GopherQualityFilter,  # Rae et al. 2021
        "c4": filters.C4QualityFilter,  # Raffel et al. 2020; drops lines too
        "fineweb": filters.FineWebQualityFilter,  # Penedo et al. 2024
    }
    block = kinds[name](language=word_tokenizer())

    def step(document) -> str | None:
        whole = name == "c4"  # The others look at all n-grams at once, so of a huge document they see the beginning.
        kept, reason = get_filter_result(block.filter(document if whole else _beginning(document)))
        return None if kept else f"{name}: {reason}"

    return step


def _beginning(document):
    from datatrove.data import Document

    return document if len(document.text) <= PIECE else Document(document.text[:PIECE], document.id)


def _language_step(curation: CurationConfig) -> Step:
    """Note the language in `metadata`, and drop text that is surely in none of curation.languages."""
    from datatrove.pipeline.filters import LanguageFilter
    from fasttext.FastText import _FastText

    block = LanguageFilter(list(curation.languages) or None, curation.language_threshold)
    block.model._model = _FastText(curation.language_model)  # datatrove itself would fetch one from the network

    def step(document) -> str | None:
        seen = _beginning(document)
        kept = block.filter(seen)
        found = document.metadata["language"] = seen.metadata["language"]
        if kept or not curation.languages:
            return None
        return "language: uncertain" if found in curation.languages else f"language: {found}"

    return step


def _evaluation_step(curation: CurationConfig, index: Path) -> Step:
    from datatrove.data import Document
    from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter

    config = NGramsDecontConfig(n_grams=curation.evaluation_ngram)
    block = NGramsDecontFilter(str(index), config, language=word_tokenizer())
    overlap = 64 * curation.evaluation_ngram  # characters, so that a run over the cut is seen whole in one piece

    def step(document) -> str | None:
        for piece in pieces(document.text, overlap=overlap):
            seen = Document(piece, document.id)
            block.config.norm_config = simplification(piece)
            if block.filter(seen) is not True:
                document.metadata["evaluation_set"] = seen.metadata["contaminated_task"]
                document.metadata["shared"] = seen.metadata["contaminated_ngram"]
                return EVALUATION_OVERLAP
        return None

    return step


def _masking_step(masked: Counter) -> Step:
    from datatrove.pipeline.formatters import PIIFormatter

    # One replacement: of several, datatrove takes the next each time, so order would change the text.
    block = PIIFormatter(ip_replacement="22.214.171.124")
    is_public = block.ip_replacer.validator
    block.ip_replacer.validator = lambda match: is_public(match) and _count(masked, "ip")

    def step(document) -> None:
        text, addresses = mask_emails(document.text)
        masked.update({"email": addresses} if addresses else {})
        document.text = block.ip_replacer.replace(text)

    return step


def mask_emails(text: str, replacement: str = "email@example.com") -> tuple[str, int]:
    """Return the text with each e-mail address replaced, and how many there were.

    An address is the longest run of what RFC 5322 allows before an @ (of any length; or a quoted name), from its first
    letter or digit on, and a domain with a dot (or an address in brackets) behind it.
    """
    parts, done, count = [], 0, 0
    at = text.find("@")
    while at >= 0:
        end = _domain_end(text, at)
        begin = _local_begin(text, done, at) if end > at else at
        if begin < at:
            while (further := _domain_end(text, end)) > end:  # an address with a second domain behind it
                end = further
            parts += [text[done:begin], replacement]
            done, count = end, count + 1
        at = text.find("@", max(at + 1, done))
    return "".join([*parts, text[done:]]), count


def _domain_end(text: str, at: int) -> int:
    """Return where the domain behind the @ ends; `at` if there is no @, or no domain behind it."""
    if not text.startswith("@", at):
        return at
    domain = next(filter(None, (pattern.match(text, at + 1) for pattern in (*DOMAINS, LITERAL))), None)
    end = domain.end() if domain else at
    while end > at + 1 and text[end - 1] in "-_":  # no name ends so
        end -= 1
    return end if domain and (text[end - 1] == "]" or "." in text[at + 1 : end]) else at


def _local_begin(text: str, done: int, at: int) -> int:
    """Return where the name before the @ begins, not before `done`; `at` if there is none."""
    if at > done and text[at - 1] == '"':
        quoted = QUOTED.search(text, max(done, at - 66), at)
        return quoted.start() if quoted else at
    begin, latin = at, at > done and text[at - 1] < "\u0250"
    while begin > done and (
        text[begin - 1] in LOCAL_SIGNS or (text[begin - 1].isalnum() and (not latin or text[begin - 1] < "\u0250"))
    ):
        begin -= 1
    while begin < at and not (text[begin].isalnum() or text[begin] == "_"):
        begin += 1
    return begin


def _count(counter: Counter, name: str) -> bool:
    counter[name] += 1
    return True
