"""`opendeep data tokenizer|prepare --config=RECIPE ...` and `opendeep data where --workdir=DIRECTORY --step=N`"""

import json
from collections.abc import Sequence

from opendeep_jax.cli.flags import parse, run_flags
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import did_you_mean, load_run_config
from opendeep_jax.config.overrides import resolve

HELP = """\
Text to tokens.

usage: opendeep data tokenizer --config=RECIPE [--name=value ...]   train or open the tokenizer, and describe it
       opendeep data prepare   --config=RECIPE [--name=value ...]   tokenize all sources, and count what is there
       opendeep data where     --workdir=DIRECTORY --step=N         list the documents that a step trains on
"""


def main(argv: Sequence[str]) -> None:
    """Runs one of the data commands. Prints JSON; raises ConfigError for input that cannot work."""
    actions = {"tokenizer": _tokenizer, "prepare": _prepare, "where": _where}
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
    elif argv[0] not in actions:
        hint = did_you_mean(argv[0], list(actions))
        raise ConfigError(f"opendeep data {argv[0]}: no such command.{hint} Commands: {', '.join(actions)}.")
    else:
        actions[argv[0]](argv[1:])


def _tokenizer(argv: Sequence[str]) -> None:
    config, _ = resolve(argv, "opendeep data tokenizer")
    from opendeep_jax.data.pipeline import prepare_tokenizer

    tokenizer = prepare_tokenizer(config.data)
    names = ("name", "path", "vocab_size", "bos_id", "eos_id", "special_tokens", "content_hash")
    print(json.dumps({name: getattr(tokenizer, name) for name in names}, indent=2, ensure_ascii=False))


def _prepare(argv: Sequence[str]) -> None:
    config, _ = resolve(argv, "opendeep data prepare")
    from opendeep_jax.data.pipeline import open_data

    print(json.dumps(open_data(config).describe(), indent=2))


def _where(argv: Sequence[str]) -> None:
    flags = run_flags(step=(0, "Step to look up, from 0."))
    values = parse(flags, argv, "opendeep data where", "Lists the documents that a step of a run trains on.")
    if values.step < 0:
        raise ConfigError(f"--step={values.step}: steps are counted from 0.")
    config = load_run_config(values.workdir)
    from opendeep_jax.data.pipeline import open_data
    from opendeep_jax.train.run_directory import check_same_data

    data = open_data(config)
    check_same_data(data, values.workdir)
    for piece in data.where(values.step):
        print(json.dumps(piece))
