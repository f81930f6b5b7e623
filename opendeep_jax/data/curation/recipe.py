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

# What may be an e-mail address, by the lengths that RFC 5321 allows. datatrove's own expression takes hours over a
# megabyte of base64; it is only shown these places.
AROUND_AT = re.compile(r"[^\s@]{1,64}@\S{1,255}")


def quiet_datatrove() -> None:
    """Leaves datatrove's log lines out: what it has to say arrives as counts, or as an exception."""
    from loguru import logger

    logger.disable("datatrove")


def filter_steps(curation: CurationConfig) -> dict[str, Step]:
    """The steps that judge each document alone, by name, in their order: quality filters, then language."""
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
    """Notes the language in `metadata`, and drops what is surely in none of curation.languages."""
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

    # One replacement for each: of several, datatrove takes the next each time, so order would change the text.
    block = PIIFormatter(email_replacement="email@example.com", ip_replacement="22.214.171.124")
    is_public = block.ip_replacer.validator
    block.emails_replacer.validator = lambda match: _count(masked, "email")
    block.ip_replacer.validator = lambda match: is_public(match) and _count(masked, "ip")

    def step(document) -> None:
        text = document.text
        if "@" in text:
            text = AROUND_AT.sub(lambda match: block.emails_replacer.replace(match[0]), text)
        document.text = block.ip_replacer.replace(text)

    return step


def _count(counter: Counter, name: str) -> bool:
    counter[name] += 1
    return True
