"""Random misfortunes end as a plain model of a run says; benchmarks/scenarios.py has the long form, and the model."""

import collections
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import scenarios  # noqa: E402

SEEDS = (7, 25, 27, 37, 39, 41, 43)
"""Among them are all that can befall a run, as the last test checks."""
QUICK = 25, 39, 43


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> scenarios.Bench:
    made = scenarios.Bench(tmp_path_factory.mktemp("scenarios") / "bench")
    made.happened = collections.Counter()
    return made


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=() if seed in QUICK else pytest.mark.slow) for seed in SEEDS]
)
def test_a_run_that_meets_trouble_stays_the_run_it_was(seed, bench):
    bench.happened += scenarios.play(scenarios.draw(seed), bench).happened


@pytest.mark.slow
def test_these_scenarios_have_everything_in_them(bench):
    kinds = {
        "done",
        "stopped",
        "killed",
        "refused",
        "rollbacks",
        "checkpoints quarantined",
        "skipped updates",
        "spikes",
    }
    assert len(bench.happened) == 0 or kinds <= bench.happened.keys()
    drawn = [scenarios.draw(seed) for seed in SEEDS]
    assert {s.origin for s in drawn} == {"random", "import", "branch"}
    assert {s.policy for s in drawn} == {"record", "skip", "rollback", "ignore"}
    assert {bool(s.checkpoint.local_every) for s in drawn} == {False, True}
