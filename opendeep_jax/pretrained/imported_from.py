"""Source of an imported run's weights: imported.json in its work directory, for the cards of derived models.

{"source": "Qwen/Qwen3-0.6B", "license": "apache-2.0", "base_model": "Qwen/Qwen3-0.6B-Base", "languages": ["en"]}
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opendeep_jax.interop.hf_front import HUB_NAME, read_front_matter


def facts_of_hf(directory: str | Path, source: str = "") -> dict[str, Any]:
    """Return what a Hugging Face directory's card says of license, languages and what it was made from.

    Args:
        source: as the user named it, where that is a name of the Hub.
    """
    card = read_front_matter(Path(directory, "README.md"))

    def text(name: str) -> str:
        value = card.get(name, "")
        return value if isinstance(value, str) else next(iter(value), "")

    languages = card.get("language", [])
    license = text("license")
    return {
        "source": source if HUB_NAME.fullmatch(source) else Path(directory).resolve().name,
        "license": text("license_name") if license == "other" and text("license_name") else license,
        "base_model": text("base_model"),
        "languages": [languages] if isinstance(languages, str) else list(languages),
    }


def facts_of_gguf(path: str | Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same of a GGUF file's metadata."""
    url = str(fields.get("general.base_model.0.repo_url") or fields.get("general.source.huggingface.repository") or "")
    languages = fields.get("general.languages")
    return {
        "source": str(fields.get("general.name") or Path(path).stem),
        "license": str(fields.get("general.license.name") or fields.get("general.license") or ""),
        "base_model": url.removeprefix("https://huggingface.co/"),
        "languages": [str(language) for language in languages] if isinstance(languages, list | tuple) else [],
    }
