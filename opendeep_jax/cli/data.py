"""`opendeep data ACTION ...`: from open text to auditable batches. Actions that look things up are in `audit.py`."""

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from opendeep_jax.cli.audit import diff, verify, when, where
from opendeep_jax.cli.flags import run_action
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import load_run_config
from opendeep_jax.config.schema import RunConfig

if TYPE_CHECKING:
    from opendeep_jax.config.overrides import Launch

EXECUTORS = ("local", "slurm", "ray")
HELP = """\
From open text to auditable batches.

usage: opendeep data tokenizer --config=RECIPE [--name=value ...]   train or open the tokenizer, and describe it
       opendeep data curate    --config=RECIPE [--name=value ...]   filter, deduplicate, decontaminate and mask, with
                               [--executor=local|slurm|ray]         this machine or others
                               [--executor_options=partition=cpu,time=8:00:00]
       opendeep data prepare   --config=RECIPE [--name=value ...]   curate, tokenize and pack all that is not there yet
       opendeep data prepare   --workdir=DIRECTORY                  make again what is missing of a run's data
       opendeep data card      --config=RECIPE [--out=DIRECTORY]    write the data card: Markdown, HTML and JSON
       opendeep data where     --workdir=DIRECTORY --step=N         name the documents that a step trains on
       opendeep data when      --workdir=DIRECTORY --doc=ID         name the steps that train on a document
       opendeep data verify    --directory=DIRECTORY                recompute all hashes, and name what is damaged
       opendeep data diff      A B                                  compare the mixtures of two runs
"""


def main(argv: Sequence[str]) -> int:
    """Run one of the data commands; returns the exit status. Raises ConfigError for input that cannot work."""
    actions = {
        "tokenizer": _tokenizer,
        "curate": _curate,
        "prepare": _prepare,
        "card": _card,
        "where": where,
        "when": when,
        "verify": verify,
        "diff": diff,
    }
    return run_action(actions, ["data", *argv], HELP)


def _tokenizer(argv: Sequence[str]) -> None:
    config, _ = _resolve(argv, "tokenizer")
    from opendeep_jax.data.tokenizers import prepare_tokenizer

    tokenizer = prepare_tokenizer(config)
    names = ("name", "path", "vocab_size", "bos_id", "eos_id", "fim_ids", "special_tokens", "content_hash")
    print(json.dumps({name: getattr(tokenizer, name) for name in names}, indent=2, ensure_ascii=False))


def _curate(argv: Sequence[str]) -> None:
    argv, executor = _take(argv, "executor", "local")
    argv, options = _take(argv, "executor_options", "")
    if executor not in EXECUTORS:
        raise ConfigError(f"--executor={executor}: must be one of {', '.join(EXECUTORS)}.")
    config, _ = _resolve(argv, "curate")
    if not config.data.curation.active:
        raise ConfigError(
            "data.curation asks for nothing, so there is nothing to do. Say what, as in --data.curation.quality "
            "gopher_quality c4 --data.curation.minhash_deduplication=True."
        )
    from opendeep_jax.data.curation import curate, parse_options, read_accounting
    from opendeep_jax.data.opening import skipped_files

    unread = skipped_files(config)
    sources = curate(config.data, executor, options=parse_options(options))
    accounting = read_accounting(sources)
    for source, files in zip(config.data.sources, unread, strict=True):
        accounting["sources"][source.name]["left_out_files"] = files
    print(json.dumps(accounting, indent=2, ensure_ascii=False))


def _prepare(argv: Sequence[str]) -> None:
    rest, workdir = _take(argv, "workdir", "")
    of_run = workdir and not rest  # whose recipe is in its directory
    config = load_run_config(workdir) if of_run else _resolve(argv, "prepare")[0]
    from opendeep_jax.data.describe import table
    from opendeep_jax.data.opening import open_data

    data = open_data(config, workdir=workdir if of_run else None, repair=True)
    described = data.describe() | data.compression()
    print(table(described) if sys.stdout.isatty() else json.dumps(described, indent=2))


def _card(argv: Sequence[str]) -> None:
    argv, out = _take(argv, "out", "")
    config, launch = _resolve(argv, "card")
    from opendeep_jax.data.card import build_card, write_card
    from opendeep_jax.data.curation import curate, read_accounting
    from opendeep_jax.data.opening import open_data

    data = open_data(config)
    curation = read_accounting(curate(config.data)) if config.data.curation.active else None
    card = build_card(config, curation, data.stores, data.tokenizer)
    print(write_card(out or f"{launch.workdir}/data_card", card))


def _resolve(argv: Sequence[str], action: str) -> "tuple[RunConfig, Launch]":
    """The recipe's configuration with the settings of the command line. tyro takes a while, and not all need it."""
    from opendeep_jax.config.overrides import resolve

    return resolve(argv, f"opendeep data {action}")


def _take(argv: Sequence[str], name: str, default: str) -> tuple[list[str], str]:
    """Return the arguments without the flag `--name=value` (or `--name value`), and its value."""
    rest, value, arguments = [], default, iter(argv)
    for argument in arguments:
        if argument == f"--{name}":
            value = next(arguments, "")
        elif argument.startswith(f"--{name}="):
            value = argument.partition("=")[2]
        else:
            rest.append(argument)
    return rest, value
