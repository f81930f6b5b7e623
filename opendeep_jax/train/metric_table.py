"""The metrics of a training step, and how shares of each become one number: the one table of them.

A layer puts its share of a metric into the report that it returns (`models/decoder.py:Block`), the loss its own into
the dictionary of `train/losses.py:losses`. Everything between there and metrics.jsonl follows from the kind: devices,
micro-batches, pipeline stages and layers. `docs/metrics.md` has a row for each; the tests of layouts and pipelines
compare all that are here.
"""

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.parallel.shares import Shares, Sum, all_entries

METRICS: dict[str, type] = {
    "loss": Sum,
    "lm_loss": Sum,
    "z_loss": Sum,
    "mtp_loss": Sum,
    "balance_loss": Sum,
}
"""How shares meet: as a `Sum`, a `Mean` or the `Max` of `parallel/shares.py`. A loss is the sum of what is divided by
the global batch's targets already; what averages over tokens, heads or layers is a `Mean`."""


def declared(shares: Shares) -> Shares:
    """The shares as scalars, those of all their entries (as of stacked layers).

    Raises:
        ConfigError: for a metric that the table doesn't have, or that is of another kind there.
    """
    for name, share in shares.items():
        if name not in METRICS:
            raise ConfigError(
                f"The metric {name!r} is not in train/metric_table.py:METRICS, so how its shares become one number is "
                f'not said. Add the row "{name}": Sum, Mean or Max; there are {", ".join(METRICS)}.'
            )
        if type(share) is not METRICS[name]:
            raise ConfigError(
                f"The metric {name!r} is given as {type(share).__name__}, and train/metric_table.py:METRICS has it as "
                f"{METRICS[name].__name__}. Make it that, of parallel/shares.py, or change the row."
            )
    return all_entries(shares)
