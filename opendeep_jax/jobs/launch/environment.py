"""Environment variables of a job's processes, and options that go to Slurm as they are.

A variable is given as NAME=value, which is written into the job's file, or as NAME: then the value comes from where the
job is submitted (Slurm, SkyPilot) or from a secret that the place keeps (Kubernetes, Cloud TPU), and is in no file.
"""

import re
import shlex
from collections.abc import Sequence

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import RunConfig

NAME = r"[A-Za-z_][A-Za-z0-9_]*"
SECRET = r"(?i).*(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL).*"
"""Names of variables whose values belong into no file."""
KEYS = {"wandb": "WANDB_API_KEY"}
"""Environment variables that a tracker requires."""
OURS = set(
    "job-name nodes ntasks-per-node gpus-per-node exclusive mem time account partition qos reservation output "
    "open-mode requeue no-requeue signal".split()
)
"""sbatch's options that the template sets."""


def check_environment(target: str, env: Sequence[str], secret: str, config: RunConfig) -> None:
    """Raise ConfigError for variables that cannot be handed over so, and where a tracker's key is missing."""
    for entry in env:
        name, equals, value = entry.partition("=")
        if not re.fullmatch(NAME, name) or not value.isprintable():
            raise ConfigError(f"--env={entry}: must be NAME or NAME=value, in one line.")
        if equals and re.fullmatch(SECRET, name):
            raise ConfigError(
                f"--env={name}=…: its value would be written into the job's file. Give --env={name} alone, and "
                f"{_source(target)}."
            )
    by_name = [entry for entry in env if "=" not in entry]
    if target in ("gke-tpu", "gke-gpu", "tpu-vm"):
        if by_name and not secret:
            raise ConfigError(f"--env={by_name[0]}: to be handed over by its name, {_source(target)}.")
        has = bool(secret)
    else:
        has = target == "slurm"  # which hands over what is exported where sbatch is typed
    given = {entry.partition("=")[0] for entry in env}
    for tracker in config.tracking.trackers:
        key = KEYS.get(tracker)
        if key and not has and not given & {key, "WANDB_MODE"}:
            raise ConfigError(
                f"--tracking.trackers={tracker}: the machines need {key}. Give --env={key}, and {_source(target)}; or "
                "--env=WANDB_MODE=offline."
            )


def check_sbatch(options: Sequence[str]) -> None:
    """Raise ConfigError for what is no option of sbatch, or one that the template sets."""
    for option in options:
        name, _, value = option.partition("=")
        if not re.fullmatch(r"[a-z][a-z0-9-]*", name) or not re.fullmatch(r"[^\s'\"\\`$]*", value):
            raise ConfigError(f"--sbatch={option}: must be an option of sbatch as name or name=value, without spaces.")
        if name in OURS:
            fix = f"Give --{name}" if name in ("time", "account", "partition", "qos", "reservation") else "Leave it out"
            raise ConfigError(f"--sbatch={option}: the file has that option already. {fix}.")


def environment_values(target: str, env: Sequence[str], secret: str) -> dict[str, str]:
    """Return the variables as a target's template has them; `env` is checked."""
    pairs = [tuple(entry.split("=", 1)) for entry in env if "=" in entry]
    by_name = [entry for entry in env if "=" not in entry]
    names = [name for name, _ in pairs] + by_name
    if target == "slurm":
        exports = [f"export {name}={shlex.quote(value)}" for name, value in pairs]
        exports += [f': "${{{name}:?export it where sbatch is typed}}"' for name in by_name]
        return {"exports": "\n".join(exports), "env_names": ",".join(names)}
    if target == "skypilot":
        return {
            "envs": "\n".join(f"  {name}: {_yaml(value)}" for name, value in pairs),
            "secrets": "\n".join(["secrets:", *(f"  {name}: null" for name in by_name)]) if by_name else "",
            "sky_secrets": " ".join(f"--secret {name}" for name in by_name),
        }
    if target == "tpu-vm":
        words = [shlex.quote(f"--env={name}={value}") for name, value in pairs]
        return {"docker_env": " ".join([*words, *([f"--env-file={secret}"] if secret else [])])}
    # Kubernetes would put a variable's value where it reads $(NAME).
    line = " " * 20 + "- {name: %s, value: %s}"
    return {"env": "\n".join(line % (name, _yaml(value.replace("$", "$$"))) for name, value in pairs)}


def _source(target: str) -> str:
    return {
        "slurm": "export it where sbatch is typed",
        "skypilot": "export it where sky is typed",
        "tpu-vm": "name a file under --shared with lines NAME=value by --secret",
    }.get(target, "name a Secret of Kubernetes that has that key by --secret")


def _yaml(text: str) -> str:
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{quoted}"'
