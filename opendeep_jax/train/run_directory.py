"""What a work directory keeps of its run besides numbers and weights, and who may write there."""

import contextlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import jax

import opendeep_jax
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.files import write_atomically
from opendeep_jax.config.load import save_run_config
from opendeep_jax.config.locks import Held, locked
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.data.pipeline import Data
from opendeep_jax.data.recorded import DATA_FILE, TOKENIZER_FILE

SUMMARY, ENVIRONMENT = "summary.json", "environment.json"
TOKENIZER_SETTINGS = ("tokenizer_config.json", "generation_config.json", "chat_template.jinja")
"""A copy of the file beside the run's tokenizer that names its boundaries; `bytes` has neither."""


@contextlib.contextmanager
def only_writer(workdir: str | Path) -> Iterator[None]:
    """Keeps other processes from training in `workdir`, which is made if it is missing, until the block ends.

    Raises:
        ConfigError: where another process trains there; or in place of what the block raises, where its directory has
            gone meanwhile.
    """
    Path(workdir).mkdir(parents=True, exist_ok=True)
    directory = os.open(workdir, os.O_RDONLY)
    try:
        try:
            with locked(directory, Path(workdir, ".owner"), None):
                yield
        except Held as error:
            raise ConfigError(
                f"--workdir={workdir}: another process is training there, and two would overwrite each other's files. "
                "Wait for its end or stop it, or give another --workdir."
            ) from error
        except Exception as error:
            if _is_there(workdir, directory):
                raise
            raise ConfigError(
                f"--workdir={workdir}: is gone: it was deleted or moved, or its disk was taken away, while it was in "
                "use. Bring it back and give the same command, which goes on from the newest checkpoint in it."
            ) from error
    finally:
        os.close(directory)  # which gives the lock back, as does the process's death


def _is_there(workdir: str | Path, directory: int) -> bool:
    """Whether a path still leads to an open directory, and not to nothing, or to one that was made in its place."""
    try:
        return os.path.samestat(os.stat(workdir), os.fstat(directory))
    except OSError:
        return False


def finished_summary(workdir: str | Path, steps: int) -> dict | None:
    """summary.json of a run that has done all its `steps`; None while there are some left."""
    try:
        summary = json.loads((Path(workdir) / SUMMARY).read_text(encoding="utf-8"))
        return summary if summary["steps"] >= steps else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_same_data(data: Data, workdir: str | Path) -> None:
    """Raises ConfigError where the run in `workdir` was trained on other tokens than `data` has.

    Its batches could not be made again, and its weights would meet ids that mean something else.
    """
    try:
        there = json.loads((Path(workdir) / DATA_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    if there["content_hash"] != data.content_hash:
        here = data.describe()
        raise ConfigError(
            f"--workdir={workdir}: its run was trained on {there['train_tokens']:,} tokens (hash "
            f"{there['content_hash'][:12]}), and its sources and tokenizer now give {here['train_tokens']:,} others "
            f"(hash {here['content_hash'][:12]}). Bring the sources back as they were (the embedded source changes "
            "with Python's version), or give another --workdir."
        )


def save_run(config: RunConfig, recipe: RunConfig | None, data: Data, workdir: Path) -> None:
    """Writes what the run is made of: configuration, data, tokenizer and environment.

    Raises:
        ConfigError: where the directory's run was trained on other tokens.
    """
    check_same_data(data, workdir)
    write_atomically(workdir / DATA_FILE, json.dumps(data.describe(), indent=2) + "\n")
    if data.tokenizer.path:
        original = Path(data.tokenizer.path)
        write_atomically(workdir / TOKENIZER_FILE, original.read_text(encoding="utf-8"))
        for name in TOKENIZER_SETTINGS:
            settings = original.with_name(name)
            if settings.exists():
                write_atomically(workdir / name, settings.read_text(encoding="utf-8"))
    write_atomically(workdir / ENVIRONMENT, json.dumps(environment(), indent=2) + "\n")
    save_run_config(config, recipe, workdir)


def environment() -> dict[str, str | int]:
    """Versions and hardware of this start, as far as they can change its numbers; no names of machines, users, paths.

    For example `{"python": "3.11.7", "jax": "0.10.2", …, "devices": 8, "device_kind": "NVIDIA H100", …}`.
    """
    device = jax.devices()[0]
    xla_flags = (flag for flag in os.environ.get("XLA_FLAGS", "").split() if "/" not in flag)
    return {
        "opendeep": opendeep_jax.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count() or 0,
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "xla_flags": " ".join(xla_flags),
    }
