"""Optuna as the one who chooses the next combinations. An extra: pip install 'opendeep-jax[optuna]'.

What Optuna knows is told to it anew each time from the runs' own results, so there is no second record that a kill
could leave in contradiction to them. Each group of combinations depends on the results before it alone, not on the
order in which runs end.
"""

import importlib.util
import warnings
from collections.abc import Sequence

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.jobs.sweep.axes import Axis, Combination
from opendeep_jax.jobs.sweep.plan import Sweep
from opendeep_jax.jobs.sweep.results import Row

ASKS = 200
"""Times in a row that Optuna may propose what was tried already, or cannot work, before the search ends."""


def check_optuna(sweep: Sweep) -> None:
    """Raises ConfigError where Optuna is not installed, or a value of a list, or the end of a range, cannot work."""
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(
            "--method=optuna needs a package that is not installed: pip install 'opendeep-jax[optuna]'. "
            "--method=random needs none."
        )
    first = {axis.field: _ends(axis)[0] for axis in sweep.axes}
    for axis in sweep.axes:
        for value in _ends(axis):
            sweep.runs_of(0, first | {axis.field: value})


def next_combinations(sweep: Sweep, table: Sequence[Row], count: int) -> list[Combination]:
    """Up to `count` combinations that were not tried yet; fewer, or none, where Optuna finds no more.

    Args:
        table: a row for each combination that was tried, all of whose runs have ended.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # With constant_liar, the combinations of one group keep apart from each other.
        sampler = optuna.samplers.TPESampler(seed=len(table), constant_liar=True)
    study = optuna.create_study(direction="minimize", sampler=sampler)
    space = {axis.field: _distribution(axis) for axis in sweep.axes}
    for row in table:
        state = optuna.trial.TrialState.COMPLETE if row.complete else optuna.trial.TrialState.FAIL
        given = row.results[0].run.combination
        params = {axis.field: _parameter(axis, given[axis.field]) for axis in sweep.axes}
        value = row.mean if row.complete else None
        study.add_trial(optuna.trial.create_trial(state=state, params=params, distributions=space, value=value))
    names = {row.results[0].run.name for row in table}
    found: list[Combination] = []
    for _ in range(ASKS):
        asked = study.ask(space).params
        combination = {axis.field: _text(axis, asked[axis.field]) for axis in sweep.axes}
        try:
            name = sweep.runs_of(0, combination)[0].name
        except ConfigError:
            continue  # settings that contradict each other; each by itself was checked
        if name not in names:
            names.add(name)
            found.append(combination)
        if len(found) == count:
            break
    return found


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
