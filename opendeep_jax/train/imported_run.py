"""A run that begins with somebody else's weights: a work directory whose checkpoint is of step 0."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp

from opendeep_jax.checkpoint.checkpoints import Checkpoints
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.files import write_atomically
from opendeep_jax.config.load import CONFIG_FILE, IMPORTED_RECIPE, save_run_config
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.faults.health import new_health
from opendeep_jax.models.decoder import Decoder
from opendeep_jax.models.parameters import split
from opendeep_jax.record.files import CHECKPOINTS, checkpoint_steps
from opendeep_jax.record.origin import IMPORTED, write_origin
from opendeep_jax.record.workdir import only_writer
from opendeep_jax.text.files import load_tokenizer, save_tokenizer
from opendeep_jax.text.tokenizer import Tokenizer
from opendeep_jax.train.optimizer import make_optimizer
from opendeep_jax.train.state import TrainState

RECIPE = f'''\
"""{IMPORTED}, as its config.json has it: `opendeep train --config={{path}} --workdir={{workdir}}`"""

from pathlib import Path

from opendeep_jax.config.load import from_json


def get_config():
    """The run's configuration."""
    return from_json(Path(__file__).with_name("config.json").read_text("utf-8"))
'''


def check_importable(workdir: str | Path) -> None:
    """Raise ConfigError if the work directory already has a run."""
    if checkpoint_steps(Path(workdir) / CHECKPOINTS) and not (Path(workdir) / CONFIG_FILE).exists():
        raise ConfigError(
            f"--out={workdir}: holds a checkpoint of an import that was cut short. Delete it, or choose another."
        )
    if (Path(workdir) / CONFIG_FILE).exists():
        raise ConfigError(f"--out={workdir}: holds a run or a model already. Choose another directory.")


def import_run(
    model: Decoder,
    tokenizer: Tokenizer,
    config: RunConfig,
    workdir: str | Path,
    beside: Mapping[str, str] | None = None,
) -> RunConfig:
    """Write a work directory whose step 0 has a model's weights, and which `opendeep train` goes on from.

    Args:
        model: In float32, the dtype of master weights.
        tokenizer: Its tokenizer, which becomes the run's.
        config: The run's; `model` is that of the weights, `data.tokenizer` is set here.
        beside: Names and texts of other files to write into it, such as the license.

    Returns:
        The configuration as it was written.

    Raises:
        ConfigError: the directory holds a run, or the tokenizer's files name no token that ends a document.
        OSError: the disk does not take it.
    """
    workdir = Path(workdir)
    check_importable(workdir)
    with only_writer(workdir):
        path = save_tokenizer(tokenizer, workdir)
        for name, text in (beside or {}).items():
            write_atomically(workdir / name, text)
        load_tokenizer(path)  # refuses what no run could train with
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(path.resolve())))
        definition, params, router_bias = split(model)
        optimizer = make_optimizer(config, definition.axes())
        state = TrainState(jnp.int32(0), params, optimizer.init(params), router_bias, new_health())
        write_origin(workdir, "import")  # before the weights: without them, nothing is ever trained here
        with Checkpoints(workdir, config.checkpoint) as checkpoints:
            checkpoints.save(state)
        recipe = workdir / IMPORTED_RECIPE
        write_atomically(recipe, RECIPE.format(path=recipe, workdir=workdir))
        save_run_config(config, config, workdir)  # last: what has a config.json is a whole run
    return config
