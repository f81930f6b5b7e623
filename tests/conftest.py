"""Tests run on a CPU that JAX divides into 8 devices; what XLA compiles is kept for the next time."""

import fcntl
import gc
import importlib.util
import os
import signal

# A shell that runs the tests in the background has Ctrl-C ignored, and processes that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["JAX_PLATFORMS"] = "cpu"

from xla_flags import xla_flags  # noqa: E402

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(devices=8)}".strip()

from pathlib import Path  # noqa: E402

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# Shapes and dtypes in annotations are checked while tests trace.
SHAPE_CHECKED = ["opendeep_jax.ops", "opendeep_jax.models", "opendeep_jax.train.objective", "kernels_pallas"]
if importlib.util.find_spec("beartype"):  # tests/test_repository.py fails without it
    jaxtyping.install_import_hook(SHAPE_CHECKED, "shape_checks.checked")

# How long an example takes says more about the machine than about the code. `make test-all` looks at more of them.
hypothesis.settings.register_profile("tests", deadline=None, max_examples=30)
hypothesis.settings.register_profile("all", deadline=None, max_examples=200)
hypothesis.settings.load_profile("tests")

MAY_BE_SKIPPED = (
    "sbatch is not installed",
    "gcloud is not installed",
    "SkyPilot is not installed",
    "hadolint is not installed",
    "ray is not installed",
    "no curl here",
    "only Linux",
    "elsewhere",
    "this machine has an accelerator",
    "cores can't be given here",
    "one core cannot be divided",
    "the interpreter of jax 0.10",
    "could not import 'mlflow'",
    "could not import 'wandb'",
    "could not import 'trackio",
)
"""Beginnings of reasons to skip a test where everything that the extra `test` names is installed: programs and services
that are no Python packages of ours, and machines of another kind. With --strict-skips, any other skip is a failure."""


def pytest_addoption(parser):
    parser.addoption("--strict-skips", action="store_true", help="a test that is skipped unexpectedly fails")


def pytest_configure(config):
    """Put the compilation cache beside pytest's own, also for the processes that tests start."""
    if config.pluginmanager.has_plugin("cacheprovider"):
        directory = str(config.cache.mkdir("xla"))
        os.environ["JAX_COMPILATION_CACHE_DIR"] = directory
        jax.config.update("jax_compilation_cache_dir", directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def refuse_skip(report, config):
    """Turn a skip for a reason that is not listed into a failure, if --strict-skips asks for that."""
    if config.getoption("--strict-skips") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not reason.removeprefix("Skipped: ").startswith(MAY_BE_SKIPPED):
            report.outcome, report.longrepr = "failed", f"unexpected skip: {reason} (tests/conftest.py:MAY_BE_SKIPPED)"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    return refuse_skip((yield), item.config)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return refuse_skip((yield), collector.config)


@pytest.fixture(scope="session")
def text_corpus(tmp_path_factory) -> Path:
    """A directory of small Python files that look like the real thing."""
    from small_models import write_text

    return write_text(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def small_run(tmp_path_factory) -> Path:
    """The work directory of a small finished run over 8 devices, with every mechanism of V3 switched on.

    Tests read it, or change a copy: the workers of pytest-xdist have it in common.
    """
    from small_models import small_run_config, write_text

    from opendeep_jax.config.load import check_workdir
    from opendeep_jax.train.loop import train

    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "small_run"
    directory.mkdir(exist_ok=True)
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / "done").exists():
            (directory / "corpus").mkdir()
            config = small_run_config(write_text(directory / "corpus"), directory / "data")
            check_workdir(config, directory / "run")
            train(config, directory / "run")
            (directory / "done").touch()
    return directory / "run"


MOST_MAPPINGS = 12_000
"""Mappings of memory, of which Linux gives a process 65,530: a compiled program takes a handful, and a test file of the
generator makes thousands of them."""


@pytest.fixture(scope="module", autouse=True)
def programs_are_given_up():
    """Free compiled programs before the process is out of mappings, and crashes; keep the rest out of gc's sight.

    What JAX remembers of a test file is walked by every full collection of those after it, so it is frozen.
    """
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.unfreeze()
    gc.collect()
    gc.freeze()
