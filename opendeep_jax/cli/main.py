"""`opendeep COMMAND ...`: find the command, and turn every failure a user can fix into one paragraph."""

import contextlib
import errno
import importlib
import os
import sys
from collections.abc import Sequence

import opendeep_jax
from opendeep_jax.cli.early_stop import EarlyStop, early_stops
from opendeep_jax.cli.large_pages import restart_with_large_pages
from opendeep_jax.cli.process import choose_platform
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.exits import INTERRUPTED, MEND, OK, RESUME, STOPPED, PeerEnded, Resume, Stopped
from opendeep_jax.config.load import did_you_mean, recipe_names
from opendeep_jax.config.synonyms import COMMANDS as OTHER_NAMES
from opendeep_jax.config.synonyms import known_synonym

COMMANDS = {
    "train": "Train a recipe, or resume its run.",
    "data": "Make a tokenizer or a token store, and look up what a step trained on.",
    "eval": "Measure a run's held-out bits per byte, or any model on tasks and texts.",
    "generate": "Continue prompts with a model.",
    "chat": "Talk with a model in the terminal.",
    "serve": "Serve a model over HTTP, as OpenAI's API has it; with a chat page.",
    "import": "Make a run of somebody else's weights.",
    "export": "Write a model for transformers, vLLM or llama.cpp.",
    "report": "Write a run's report again.",
    "watch": "Look at runs while they go: curves, events, where the time went.",
    "checkpoints": "List, verify, compare, thin out or average a run's checkpoints.",
    "sweep": "Train many variants of a recipe, and compare them.",
    "launch": "Start a recipe on several processes here, or write the job for a cluster.",
    "describe": "Say what a run is and takes, without starting it: parameters, memory, work, text.",
    "plan": "Say what a run would take on a cluster, without one: memory, time, cost.",
}
MODULES = {"eval": "evaluate", "import": "import_"}  # names that mean something else in Python

_SPACE = "What was saved before is intact: free some space, then give the same command to go on from it."
_DISK = "The disk, or the network to it, failed. What was saved before is intact: mend it, then give the same command."
_ACCESS = "Choose a place that you may read and write, or change its permissions."
FIXABLE = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: "No file may be so large here. What was saved before is intact: raise the limit (`ulimit -f`), then "
    "give the same command.",
    errno.EIO: _DISK,
    errno.ESTALE: _DISK,
    errno.ETIMEDOUT: _DISK,
    errno.EACCES: _ACCESS,
    errno.EPERM: _ACCESS,
    errno.EROFS: _ACCESS,
}
"""Failures of the file system that the user can fix, and how."""

HELP = f"""\
opendeep: train, inspect and release DeepSeek-class models, fully in the open.

usage: opendeep COMMAND [--name=value ...]

{"".join(f"  {name:<13}{text}" + chr(10) for name, text in COMMANDS.items())}
`opendeep help COMMAND` shows the settings of a command (as does `opendeep COMMAND --help`), `opendeep --version` the
version.
A first run, in minutes on a laptop: opendeep train --config=quickstart
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name; `sys.argv` if None) and return the exit status.

    `config/exits.py` has the statuses. A failure that is none of the user's or the machine's is a bug and raises.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["help"] and len(argv) > 1 and not argv[1].startswith("-"):
        argv = [argv[1], "--help"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if argv[0] in ("--version", "-V", "version"):
        print(f"opendeep {opendeep_jax.__version__}")
        return 0
    command, *rest = argv
    try:
        if command not in COMMANDS:
            raise ConfigError(_no_command(command, rest))
        with early_stops() if command == "train" else contextlib.nullcontext():
            # Imported only now, so that `opendeep --help` and a wrong command answer at once.
            module = importlib.import_module(f"opendeep_jax.cli.{MODULES.get(command, command)}")
            return module.main(rest) or 0
    except (Exception, KeyboardInterrupt) as error:
        status = report_error(command, error)
        if status is None:
            raise
        return status


def _no_command(word: str, rest: Sequence[str]) -> str:
    """Return what is wrong with a first word that is no command, and what may have been meant."""
    commands = f" Commands: {', '.join(COMMANDS)}."
    if word.startswith("-"):
        return f"the command comes first, as in `opendeep train {' '.join([word, *rest])}`.{commands}"
    if word.partition(":")[0] in recipe_names():
        return f"{word} is a recipe. Did you mean `opendeep train --config={word}`?{commands}"
    elsewhere = known_synonym(word, OTHER_NAMES)
    hint = f" Did you mean {elsewhere}?" if elsewhere else did_you_mean(word, list(COMMANDS))
    return f"there is no command {word}.{hint}{commands}"


def report_error(command: str, error: BaseException) -> int | None:
    """Print what ended a command, in one paragraph, and return the exit status; None for a bug."""
    status, text = explanation(command, error)
    if text:
        print(text, file=sys.stderr)
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def explanation(command: str, error: BaseException) -> tuple[int | None, str]:
    """The exit status after what ended a command (None for a bug), and the paragraph, if one is to be printed."""
    if isinstance(error, ConfigError):
        return MEND, "" if getattr(error, "already_said", False) else f"opendeep: {error}"
    if isinstance(error, EarlyStop):
        return error.status, ""  # said already
    if isinstance(error, KeyboardInterrupt):
        fix = " Give the same command to go on." if command == "train" else ""
        return INTERRUPTED, f"\nopendeep {command}: interrupted.{fix}"
    if isinstance(error, Resume):
        fix = "" if "the same command" in str(error) else " Give the same command to go on"
        return RESUME, f"\nopendeep {command}: {error}{fix} (exit status {RESUME})."
    if isinstance(error, Stopped):
        return STOPPED, f"\nopendeep {command}: {error}"
    if isinstance(error, PeerEnded):
        return error.status, f"\nopendeep {command}: {error}"
    if isinstance(error, BrokenPipeError):  # `opendeep train --help | head`: the reader has seen enough
        return OK, ""
    if isinstance(error, OSError) and error.errno in FIXABLE:
        where = f" ({error.filename})" if error.filename else ""
        return MEND, f"opendeep: {error.strerror}{where}. {FIXABLE[error.errno]}"
    return None, ""


def script() -> int:
    """The `opendeep` command."""
    try:
        _prepare()
    except KeyboardInterrupt as error:  # before the command has begun
        return report_error(sys.argv[1] if len(sys.argv) > 1 else "", error) or INTERRUPTED
    return main()


def _prepare() -> None:
    # What only starts others leaves the choice to them: a job's environment would carry it to machines with GPUs.
    if sys.argv[1:2] not in (["launch"], ["sweep"]):
        choose_platform()
    if sys.argv[1:2] == ["train"]:
        restart_with_large_pages()


if __name__ == "__main__":
    sys.exit(script())
