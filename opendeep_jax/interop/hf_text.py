"""Files beside the weights in a Hugging Face directory: tokenizer, chat template, generation config, license."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.files import replacing, write_atomically
from opendeep_jax.interop.hf_config import read_json

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tiktoken.model")
MAX_TOKENIZER_BYTES = 256 * 2**20
GGUF_LICENSE = "opendeep.license"
LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
FILES = (
    *TOKENIZERS,
    "tokenizer_config.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    *LICENSES,
)
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Names that tokenizers give to what begins, ends and pads a text, for a tokenizer.json that comes alone.
USUAL_NAMES = (
    ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"),
    ("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"),
    ("<|startoftext|>", "<|endoftext|>", "<|endoftext|>"),
    ("<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
    ("<bos>", "<eos>", "<pad>"),
    ("<s>", "</s>", "<pad>"),
)


class TextFiles(NamedTuple):
    """Files to write beside a model's weights."""

    copied: dict[str, Path]
    """Files to copy, by their names in the model's directory."""
    written: dict[str, str]
    """Contents of files to write."""
    ids: dict[str, Any]
    """config.json's keys for what begins, ends and pads a text; None where nothing says so. They are always written:
    transformers would take its own, which are another tokenizer's."""


def text_files(source: str | Path | None) -> TextFiles:
    """Return the files to write beside a model's weights.

    Args:
        source: A directory with a tokenizer, or a tokenizer.json, which gets a tokenizer_config.json; or None.

    Raises:
        ConfigError: there is no tokenizer at `source`, or a file beside it cannot be read.
    """
    ids: dict[str, Any] = dict.fromkeys(IDS)
    if source is None:
        return TextFiles({}, {}, ids)
    source = Path(source)
    if source.is_dir():
        copied = {name: source / name for name in FILES if (source / name).is_file()}
    else:
        copied = {"tokenizer.json": source} if source.is_file() else {}
    if not any(name in copied for name in TOKENIZERS):
        raise ConfigError(f"{source} has no tokenizer.json. Name a directory with a tokenizer, or its file.")
    written = {}
    if "tokenizer_config.json" not in copied and "tokenizer.json" in copied:
        settings, ids = _settings(copied["tokenizer.json"])
        written["tokenizer_config.json"] = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    elif "tokenizer.json" in copied:
        ids |= _named(copied["tokenizer.json"], read_json(copied["tokenizer_config.json"]))
    ends: dict[int, None] = {}
    for path in (source / "config.json", source / "generation_config.json"):
        if path.is_file():
            found = {key: value for key, value in read_json(path).items() if key in IDS and value is not None}
            end = found.pop("eos_token_id", None)
            ends |= dict.fromkeys(end if isinstance(end, list) else [] if end is None else [end])
            ids |= found
    if ends:
        ids["eos_token_id"] = next(iter(ends)) if len(ends) == 1 else list(ends)
    return TextFiles(copied, written, ids)


def text_paths(directory: Path) -> list[Path]:
    """Return the files of a model's directory that say something about its text, config.json among them."""
    return [directory / name for name in ("config.json", *FILES) if (directory / name).is_file()]


def licenses(directory: Path) -> dict[str, str]:
    """Return the texts of the license files in a model's directory."""
    paths = [directory / name for name in LICENSES if (directory / name).is_file()]
    return {path.name: path.read_text("utf-8", "replace") for path in paths}


def licenses_of_gguf(fields: Mapping[str, Any]) -> dict[str, str]:
    """Return the license file whose text a GGUF of ours carries."""
    text = fields.get(GGUF_LICENSE)
    return {"LICENSE": text} if isinstance(text, str) and text else {}


def _named(tokenizer: Path, settings: dict[str, Any]) -> dict[str, int]:
    """Ids of the tokens that a tokenizer_config.json names."""
    names = {f"{key}_id": settings.get(key) for key in ("bos_token", "eos_token", "pad_token")}
    names = {key: name.get("content") if isinstance(name, dict) else name for key, name in names.items()}
    if not any(names.values()):
        return {}
    added = read_json(tokenizer, MAX_TOKENIZER_BYTES).get("added_tokens")
    entries = [entry for entry in added if isinstance(entry, dict)] if isinstance(added, list) else []
    known = {entry.get("content"): entry.get("id") for entry in entries}
    return {key: known[name] for key, name in names.items() if isinstance(name, str) and name in known}


def _settings(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A tokenizer_config.json for a tokenizer.json that has none, and the ids of what begins, ends and pads a text."""
    added = read_json(path, MAX_TOKENIZER_BYTES).get("added_tokens")
    known: dict[str, int] = {}
    if isinstance(added, list):
        known = {t["content"]: t["id"] for t in added if isinstance(t, dict) and t.keys() >= {"content", "id"}}
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    ids: dict[str, Any] = dict.fromkeys(IDS)
    names = next((names for names in USUAL_NAMES if names[0] in known and names[1] in known), ())
    for key, name in zip(IDS, names, strict=False):
        if name in known:
            settings[key.removesuffix("_id")] = name
            ids[key] = known[name]
    return settings, ids


def write_text_files(files: TextFiles, directory: Path) -> None:
    """Copy and write the files, each in one step."""
    for name, path in files.copied.items():
        with replacing(directory / name) as temporary:
            shutil.copyfile(path, temporary)
    for name, text in files.written.items():
        write_atomically(directory / name, text)
