"""`opendeep generate --workdir=DIRECTORY --prompt=TEXT`"""

from collections.abc import Sequence

from opendeep_jax.cli.flags import parse, run_flags
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import load_run_config


def main(argv: Sequence[str]) -> None:
    """Prints a prompt and its continuation by a run's model, piece by piece as it is sampled."""
    flags = run_flags(
        prompt=("", "Text to continue."),
        max_tokens=(200, "Longest continuation, in tokens."),
        temperature=(0.8, "0 takes the most likely token every time."),
        top_k=(50, "Sample among this many most likely tokens; 0 among all."),
        seed=(0, "Seed of the sampling."),
        step=(-1, "Step of the checkpoint; -1 takes the newest."),
    )
    values = parse(flags, argv, "opendeep generate", "Continues a prompt with a run's model.")
    for name, least in {"max_tokens": 1, "temperature": 0, "top_k": 0, "seed": 0, "step": -1}.items():
        if not values[name].value >= least:
            raise ConfigError(f"--{name}={values[name].value}: must be at least {least}.")
    load_run_config(values.workdir)

    from opendeep_jax.train.generate import generate_from_workdir

    pieces = generate_from_workdir(
        values.workdir,
        values.prompt,
        max_tokens=values.max_tokens,
        temperature=values.temperature,
        top_k=values.top_k,
        seed=values.seed,
        step=None if values.step < 0 else values.step,
    )
    first = next(pieces, "")  # a missing checkpoint is the whole answer, so nothing is printed before this
    print(f"{values.prompt}{first}", end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
