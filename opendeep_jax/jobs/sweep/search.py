"""Combinations that Optuna draws: at random, or by what the results so far say (`--method=random`, `optuna`).

What Optuna knows is read again each time from the runs' own results, so there is no second record that a kill
could leave in contradiction to them. Each group of combinations depends on the results before it alone, not on the
order in which runs end.
"""

import warnings
from collections.abc import Iterator, Sequence

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.jobs.sweep.axes import Axis, Combination
from opendeep_jax.jobs.sweep.plan import Sweep
from opendeep_jax.jobs.sweep.results import Row

ASKS = 200
"""Times in a row that Optuna may propose what was tried already, or cannot work, before the search ends."""


def check_ends(sweep: Sweep) -> None:
    """Raise ConfigError where a value of a list, or the end of a range, cannot work: what will be drawn is not known.

    Each is checked beside the first values of the other axes.
    """
    first = {axis.field: _ends(axis)[0] for axis in sweep.axes}
    for axis in sweep.axes:
        for value in _ends(axis):
            sweep.runs_of(0, first | {axis.field: value})


def next_combinations(sweep: Sweep, table: Sequence[Row], count: int) -> list[Combination]:
    """Return up to `count` combinations that were not tried yet; fewer, or none, where Optuna finds no more.

    Args:
        table: a row for each combination that was tried, all of whose runs have ended.
    """
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # With constant_liar, the combinations of one group keep apart from each other.
        sampler = optuna.samplers.TPESampler(seed=len(table), constant_liar=True)
    study = _study(sampler)
    space = {axis.field: _distribution(axis) for axis in sweep.axes}
    for row in table:
        state = optuna.trial.TrialState.COMPLETE if row.complete else optuna.trial.TrialState.FAIL
        given = row.results[0].run.combination
        params = {axis.field: _parameter(axis, given[axis.field]) for axis in sweep.axes}
        value = row.mean if row.complete else None
        study.add_trial(optuna.trial.create_trial(state=state, params=params, distributions=space, value=value))
    tried = {row.results[0].run.name for row in table}
    found: list[Combination] = []
    for combination, _ in zip(_asked(study, sweep.axes), range(ASKS), strict=False):
        try:
            name = sweep.runs_of(0, combination)[0].name
        except ConfigError:
            continue  # settings that contradict each other; each by itself was checked
        if name not in tried:
            tried.add(name)
            found.append(combination)
        if len(found) == count:
            break
    return found


def drawn(axes: Sequence[Axis], trials: int, seed: int, before: Sequence[Combination] = ()) -> list[Combination]:
    """Return `trials` combinations at random: those of `before`, and new ones. A larger search begins with a smaller.

    Raises ConfigError for more trials than there are combinations.
    """
    import optuna

    found, repeats = list(before[:trials]), 0
    for combination in _asked(_study(optuna.samplers.RandomSampler(seed)), axes):
        if len(found) == trials:
            break
        repeats = repeats + 1 if combination in found else 0
        if not repeats:
            found.append(combination)
        elif repeats == ASKS + trials:
            raise ConfigError(
                f"--trials={trials}: there are hardly more than {len(found)} combinations to draw from. Ask for "
                f"{len(found)} or fewer, or take --method=grid, which runs them all."
            )
    return found


def _study(sampler):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(direction="minimize", sampler=sampler)


def _asked(study, axes: Sequence[Axis]) -> Iterator[Combination]:
    space = {axis.field: _distribution(axis) for axis in axes}
    while True:
        asked = study.ask(space).params
        yield {axis.field: _text(axis, asked[axis.field]) for axis in axes}


def _ends(axis: Axis) -> tuple[str, ...]:
    return (axis.range.text(axis.range.low), axis.range.text(axis.range.high)) if axis.range else axis.values


def _distribution(axis: Axis):
    import optuna

    span = axis.range
    if span is None:
        return optuna.distributions.CategoricalDistribution(axis.values)
    if span.whole:
        return optuna.distributions.IntDistribution(int(span.low), int(span.high), log=span.log)
    return optuna.distributions.FloatDistribution(span.low, span.high, log=span.log)


def _parameter(axis: Axis, text: str):
    if axis.range is None:
        return text
    return int(text) if axis.range.whole else float(text)


def _text(axis: Axis, parameter) -> str:
    return parameter if axis.range is None else axis.range.text(parameter)
