"""`opendeep data where|when|verify|diff`: for people on a terminal, as JSON (a line each) when the output is piped.

What is looked into is a run (`--workdir`), or, before there is one, a recipe (`--config` and settings).
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl.flags import Error, FlagValues

from opendeep_jax.cli.flags import make_flags, parse, run_flags
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import load_recipe
from opendeep_jax.config.schema import RunConfig

if TYPE_CHECKING:
    from opendeep_jax.data.pipeline import Data

FORMAT = ("auto", "text, json, or auto: text on a terminal, JSON lines in a pipe.")
SHOWN_CHARACTERS = 300
USAGE = "--workdir=DIRECTORY | --config=RECIPE [--name=value ...]"


def _parse(flags: FlagValues, argv: Sequence[str], program: str, purpose: str, usage: str = USAGE) -> RunConfig | None:
    """Parse `argv` into `flags`; gives the recipe's configuration where `--config` names one. Raises ConfigError."""
    if not any(argument.partition("=")[0] == "--config" for argument in argv):
        parse(flags, argv, program, purpose, usage)
        return None
    from opendeep_jax.config.overrides import resolve  # tyro takes a while, and a run needs none of it

    try:
        config = resolve(flags([program, *argv], known_only=True)[1:], program)[0]
    except Error as error:
        raise ConfigError(f"{error}. See {program} --help.") from error
    if flags.workdir:
        raise ConfigError(f"--config and --workdir={flags.workdir}: look into a recipe or a run, not both.")
    return config


def _open(flags: FlagValues, config: RunConfig | None) -> "Data":
    """Return what the batches of the run or recipe are made of."""
    from opendeep_jax.data.opening import open_data, open_run

    return open_run(flags.workdir) if config is None else open_data(config)


def where(argv: Sequence[str]) -> None:
    """Name the documents of a step's batch."""
    flags = run_flags(
        step=(0, "Step to look up, from 0: what the log calls step N is --step=N-1."),
        row=(-1, "Row of its batch; -1 shows all."),
        format=FORMAT,
    )
    purpose = "Names the documents that a step of a run trains on."
    config = _parse(flags, argv, "opendeep data where", purpose)
    if flags.step < 0:
        raise ConfigError(f"--step={flags.step}: steps are counted from 0.")
    if flags.row < -1:
        raise ConfigError(f"--row={flags.row}: rows are counted from 0.")
    data = _open(flags, config)
    from opendeep_jax.data import provenance
    from opendeep_jax.record.skipped_batches import is_skipped, read_skipped_batches

    if flags.workdir and is_skipped(read_skipped_batches(flags.workdir), flags.step + 1):
        note = "the run was rolled back before this step and skips its batch: it does not train on these documents."
        print(f"opendeep data where: {note}", file=sys.stderr)
    pieces = provenance.where(data, flags.step, None if flags.row < 0 else flags.row, text=True)
    _print(pieces, flags.format, _piece_text)


def _piece_text(piece: dict) -> str:
    text = piece["text"] if len(piece["text"]) <= SHOWN_CHARACTERS else piece["text"][:SHOWN_CHARACTERS] + " […]"
    spans = ", ".join(f"{begin:,}–{end:,}" for begin, end in piece["bytes"]) or "none"
    lines = [
        f"row {piece['row']}  {piece['source']}  {piece['id']}",
        f"  {'fill-in-the-middle, ' * piece['fim']}tokens {piece['first_token']:,}–{piece['end_token']:,}, "
        f"bytes {spans}, shard {piece['shard']}, license {piece['license'] or 'unknown'}",
        *([f"  {piece['url']}"] if piece["url"] else []),
        *(f"  | {line}" for line in text.splitlines()),
    ]
    return "\n".join(map(_harmless, lines)) + "\n"


def _harmless(line: str) -> str:
    """Return a line without the control characters with which a document could write over the terminal."""
    return "".join(sign if sign.isprintable() or sign == "\t" else "\ufffd" for sign in line)


def when(argv: Sequence[str]) -> None:
    """Name the steps that train on a document."""
    flags = run_flags(doc=("", "Id of the document, as `opendeep data where` shows it."), format=FORMAT)
    purpose = "Names the steps at which a run trains on a document."
    config = _parse(flags, argv, "opendeep data when", purpose)
    if not flags.doc:
        raise ConfigError("--doc is missing: give a document's id, as `opendeep data where` shows it.")
    data = _open(flags, config)
    from opendeep_jax.data import provenance
    from opendeep_jax.record.files import steps_done

    done = steps_done(flags.workdir) if config is None else 0
    found = provenance.when(data, flags.doc)
    _print(({**one, "steps_done": done} for one in found), flags.format, _document_text)


def _document_text(found: dict) -> str:
    if found["held_out"]:
        fate = "is held out: no step trains on it"
    elif not found["seen"]:
        fate = "is in no row that this run trains on"
    else:
        fate = f"is read in {len(found['seen']):,} row{'s' * (len(found['seen']) != 1)}"
    size = f"({found['tokens']:,} tokens, license {found['license'] or 'unknown'})"
    lines = [f"{found['source']}  {found['id']}  {size} {fate}"]
    for place in found["seen"]:
        tense = "was seen" if place["step"] < found["steps_done"] else "will be seen"
        span = f"tokens {place['first_token']:,}–{place['end_token']:,}"
        lines.append(f"  step {place['step']:>8,}  row {place['row']:>5}  {span}  {tense}")
    return "\n".join(lines)


def verify(argv: Sequence[str]) -> int:
    """Recompute the hashes of stores and plans; exit status 1 where something is damaged."""
    flags = make_flags(
        directory=("", "data.directory: all stores and plans in it (default: runs/data)."),
        workdir=("", "Directory of a run: only what that run is made of."),
    )
    program, usage = "opendeep data verify", "--directory=DIRECTORY | --workdir=DIRECTORY | --config=RECIPE"
    config = _parse(flags, argv, program, "Recomputes every hash of prepared data.", usage)
    if flags.directory and flags.workdir:
        raise ConfigError("--directory and --workdir: verify all of a directory, or what one run is made of, not both.")
    directory = flags.directory or (config.data.directory if config else "runs/data")
    from opendeep_jax.data.provenance import verify_all

    number, damage = verify_all(Path(directory), flags.workdir)
    print("\n".join(damage) or f"All {number:,} stores and plans are whole: every hash is the one in its manifest.")
    return 1 if damage else 0


def diff(argv: Sequence[str]) -> None:
    """Compare the mixtures of two runs."""
    flags = make_flags(documents=("yes", "yes or no: count the documents that only one has."), format=FORMAT)
    sides = [argument for argument in argv if not argument.startswith("--")]
    rest = [argument for argument in argv if argument.startswith("--")]
    purpose = "Compares the mixtures of two runs."
    values = parse(flags, rest, "opendeep data diff", purpose, "A B [--name=value ...]   (work directories or recipes)")
    if len(sides) != 2:
        raise ConfigError(f"opendeep data diff compares two runs or recipes, and {len(sides)} are given.")
    from opendeep_jax.data import provenance
    from opendeep_jax.data.opening import open_data, open_run
    from opendeep_jax.record.files import DATA

    a, b = (open_run(s) if Path(s, DATA).exists() else open_data(load_recipe(s)) for s in sides)
    ids = (provenance.source_ids(a), provenance.source_ids(b)) if values.documents == "yes" else None
    entries = provenance.diff(a.describe(), b.describe(), ids)
    _print(entries, values.format, _difference_text)


def _difference_text(entry: dict) -> str:
    lines = [f"{entry['source']}: {_presence(entry)}", f"  {'':<10} {'A':>20} {'B':>20}"]
    for key, form in (("share", ".2%"), ("documents", ",d"), ("tokens", ",d"), ("epochs", ".3f")):
        a, b = entry[key]
        lines.append(f"  {key:<10} {a:>20{form}} {b:>20{form}}{'' if a == b else '  differs'}")
    if "only_in_a" in entry:
        lines.append(f"  {'only in':<10} {entry['only_in_a']:>20,} {entry['only_in_b']:>20,}")
    return "\n".join(lines) + "\n"


def _presence(entry: dict) -> str:
    if entry["in"] != "both":
        return f"only in {entry['in'].upper()}"
    return "the same tokens in both" if entry["same_tokens"] else "in both, with other tokens"


def _print(entries: Iterable[dict], form: str, text) -> None:
    if form not in ("auto", "text", "json"):
        raise ConfigError(f"--format={form}: must be text, json or auto.")
    for entry in entries:
        as_text = form == "text" or (form == "auto" and sys.stdout.isatty())
        print(text(entry) if as_text else json.dumps(entry, ensure_ascii=False))
