"""The front matter of a model card: the YAML between its first two lines of dashes, which the Hub reads."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

HUB_LICENSES = frozenset(
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 "
    "bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 "
    "cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 "
    "cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 "
    "cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl "
    "gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr "
    "mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr "
    "deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 "
    "grok2-community gemma unknown other".split()
)
"""Licenses that the Hub knows by name; any other is `other`, with a name of its own."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PLAIN = re.compile(r"[A-Za-z][\w+-]*(\.[\w+-]+)*(/[\w.+-]+)?")
_KEYWORDS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n", "nan", "inf"}


def license_fields(license: str) -> dict[str, str]:
    """Return the front matter's fields for a license; none for an empty one."""
    name = license.strip().lower().replace(" ", "-")
    if not name:
        return {}
    return {"license": name} if name in HUB_LICENSES else {"license": "other", "license_name": name}


def front_matter(fields: Mapping[str, str | list[str] | tuple[str, ...]]) -> str:
    """Return the fields as YAML between dashes; those without a value are left out.

    Texts that YAML would read as something else (`no`, `1.0`, what holds a colon) are quoted.
    """
    lines = []
    for name, value in fields.items():
        if isinstance(value, str):
            lines += [f"{name}: {_scalar(value)}"] if value else []
        elif value:
            lines += [f"{name}:", *(f"- {_scalar(item)}" for item in value)]
    return "---\n" + "".join(f"{line}\n" for line in lines) + "---\n"


def read_front_matter(path: str | Path) -> dict[str, str | list[str]]:
    """Return the texts and lists of texts in a card's front matter; empty where there is no card, or none in it."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    found: dict[str, str | list[str]] = {}
    if not lines or lines[0].strip() != "---":
        return found
    name = ""
    for line in lines[1:]:
        if line.strip() == "---":
            return found
        if match := re.fullmatch(r"([A-Za-z_][\w-]*):\s*(.*)", line):
            name, value = match[1], match[2].strip()
            inside = re.fullmatch(r"\[(.*)\]", value)
            found[name] = [_text(part) for part in inside[1].split(",") if part.strip()] if inside else _text(value)
        elif (match := re.fullmatch(r"\s*-\s+(\S.*)", line)) and name and not re.match(r"\s*-\s+\w+:\s", line):
            before = found.get(name)
            found[name] = [*(before if isinstance(before, list) else []), _text(match[1])]
    return {}  # it never ends: no front matter


def _scalar(text: str) -> str:
    text = "".join(c if c.isprintable() else " " for c in text)  # YAML takes no control characters
    plain = _PLAIN.fullmatch(text) and text.lower() not in _KEYWORDS
    return text if plain else json.dumps(text, ensure_ascii=False)


def _text(value: str) -> str:
    value = value.strip()
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1]
    return value.partition(" #")[0].strip()
