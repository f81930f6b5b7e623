"""Records of a run's configuration, versions and hardware in its directory."""

import importlib.metadata
import os
import platform

import jax

import opendeep_jax
from opendeep_jax.config.load import save_run_config
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.record.files import ENVIRONMENT
from opendeep_jax.record.record import Record


def save_run(config: RunConfig, recipe: RunConfig | None, record: Record) -> None:
    """Write what a run is made of besides its data: environment.json, config.json, config_diff.txt."""
    record.write(ENVIRONMENT, environment())
    save_run_config(config, recipe, record.workdir)


def environment() -> dict[str, str | int]:
    """Return versions and hardware of this start, as far as they can change its numbers; no names of machines, users.

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
