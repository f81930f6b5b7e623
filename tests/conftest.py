"""Tests run on a CPU that JAX divides into 8 devices; what XLA compiles is kept for the next time."""

import gc
import importlib.util
import os
import signal

# A shell that runs the tests in the background has Ctrl-C ignored, and processes that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["JAX_PLATFORMS"] = "cpu"
# Nearly all the time of these tests is compiling, so XLA compiles without effort; also in processes that tests start.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()

from pathlib import Path  # noqa: E402

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# Shapes and dtypes in annotations are checked while tests trace.
SHAPE_CHECKED = ["opendeep_jax.ops", "opendeep_jax.models", "opendeep_jax.train.objective", "kernels_pallas"]
if importlib.util.find_spec("beartype"):  # tests/test_repository.py fails without it
    jaxtyping.install_import_hook(SHAPE_CHECKED, "shape_checks.checked")

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")


def pytest_configure(config):
    """Puts the compilation cache beside pytest's own, also for the processes that tests start."""
    if config.pluginmanager.has_plugin("cacheprovider"):
        directory = str(config.cache.mkdir("xla"))
        os.environ["JAX_COMPILATION_CACHE_DIR"] = directory
        jax.config.update("jax_compilation_cache_dir", directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(scope="session")
def text_corpus(tmp_path_factory) -> Path:
    """A directory of small Python files that look like the real thing."""
    from small_models import write_text

    return write_text(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def small_run(tmp_path_factory, text_corpus) -> Path:
    """The work directory of a small finished run over 8 devices, with every mechanism of V3 switched on."""
    from small_models import small_run_config

    from opendeep_jax.config.load import check_workdir
    from opendeep_jax.train.loop import train

    directory = tmp_path_factory.mktemp("small_run")
    config = small_run_config(text_corpus, directory / "data")
    check_workdir(config, directory / "run")
    train(config, directory / "run")
    return directory / "run"


MOST_MAPPINGS = 12_000
"""Mappings of memory, of which Linux gives a process 65,530: a compiled program takes a handful, and a test file of the
generator makes thousands of them."""


@pytest.fixture(scope="module", autouse=True)
def programs_are_given_up():
    """Compiled programs do not pile up over the test files until the process is out of mappings, and crashes."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()
