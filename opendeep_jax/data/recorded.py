"""The record that a run keeps of its data: data.json and its copy of the tokenizer, in its work directory."""

import json
from pathlib import Path

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.data.fim import FimRule
from opendeep_jax.data.order import Order
from opendeep_jax.data.pipeline import Data
from opendeep_jax.data.plan import PlanKind, open_plan
from opendeep_jax.data.store import open_store
from opendeep_jax.record.files import DATA, TOKENIZER, read_object
from opendeep_jax.record.origin import began_imported
from opendeep_jax.text.files import byte_tokenizer, load_tokenizer, tokenizer_from_hf
from opendeep_jax.text.tokenizer import Tokenizer


def read_description(workdir: str | Path) -> dict:
    """data.json of the run in `workdir`. Raises ConfigError where there is none that can be read."""
    path = Path(workdir, DATA)
    try:
        described = json.loads(path.read_text("utf-8"))
        if "record" not in described:
            raise ValueError("it is of an older version, which kept no record of stores and plans")
        return described
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--workdir={workdir}: {path.name} cannot be read ({error}). It is written when `opendeep train` has its "
            "data ready: delete it and give the same command again."
        ) from error


def check_same_data(described: dict, workdir: str | Path) -> None:
    """Raise ConfigError where the run in `workdir` was trained on other tokens than those `described` (Data.describe).

    Its batches could not be made again, and its weights would meet ids that mean something else.
    """
    there = read_object(Path(workdir) / DATA)
    if there and there["content_hash"] != described["content_hash"]:
        raise ConfigError(
            f"--workdir={workdir}: its run was trained on {there['train_tokens']:,} tokens (hash "
            f"{there['content_hash'][:12]}), and its sources and tokenizer now give {described['train_tokens']:,} "
            f"others (hash {described['content_hash'][:12]}). Bring the sources back as they were (the embedded source "
            "changes with Python's version), or give another --workdir."
        )


def record_of(workdir: str | Path | None) -> dict | None:
    """Return where the run in `workdir` has its stores and plans; None before it has recorded them."""
    return read_description(workdir)["record"] if workdir and Path(workdir, DATA).exists() else None


def recorded_directories(record: dict) -> tuple[list[str], list[str]]:
    """Name of the stores and of the plans of a record, below data.directory."""
    return record["stores"], [*record["held_out_plans"], *(plan["directory"] for plan in record["plans"])]


def check_root(config: RunConfig) -> Path:
    """data.directory of a run that has been prepared. Raises ConfigError where it is not there."""
    root = Path(config.data.directory)
    if not root.exists():
        raise ConfigError(
            f"data.directory = {config.data.directory}, where this run's tokens and plans were kept, is not here (in "
            f"{Path.cwd()}). Give the command where the run was started, or bring the directory back."
        )
    return root


def reopen(config: RunConfig, record: dict, tokenizer: Tokenizer) -> Data:
    """Return what a record names, without a look at the sources. Raises ConfigError if it is gone or damaged."""
    root = check_root(config)
    stores = [open_store(root / name, record["tokenizer_hash"]) for name in record["stores"]]
    plans = {}
    for plan in record["plans"]:
        kind = PlanKind(**plan["kind"] | {"share": tuple(plan["kind"]["share"])})
        plans[plan["source"], kind] = open_plan(root / plan["directory"])
    order = Order(config, exact=record.get("exact_mixture", False))
    order.supply({key: plan.rows for key, plan in plans.items()})
    held_out_plans = [open_plan(root / name) for name in record["held_out_plans"]]
    left_out = record.get("left_out_files", [])
    return Data(config, tokenizer, stores, plans, held_out_plans, order, fim_rule(record), left_out)


def fim_rule(record: dict) -> FimRule:
    """Return the rule of fill-in-the-middle that a run has recorded."""
    return FimRule(**record["fim"] | {"ids": tuple(record["fim"]["ids"])})


def run_tokenizer(workdir: str | Path, name: str = "", wanted: str = "") -> Tokenizer:
    """Return the tokenizer of the run in `workdir`: its copy there, called `name`, or bytes.

    Raises ConfigError where it is gone or altered: where its content hash is not `wanted`, that of data.json.
    """
    path = Path(workdir, TOKENIZER)
    wanted = wanted or (record_of(workdir) or {}).get("tokenizer_hash", "")
    state = "missing: it held the tokenizer"
    try:
        tokenizer = load_tokenizer(path, name) if path.exists() else byte_tokenizer()
        if tokenizer.content_hash == wanted or not wanted:
            return tokenizer
        state = "not the tokenizer" if path.exists() else state
    except ConfigError:
        state = "damaged: it held the tokenizer"
    raise ConfigError(
        f"{path} is {state} that this run's tokens were made with (SHA-256 {wanted[:16]}...). Copy it back, with the "
        "tokenizer_config.json beside it if there was one: from data.directory/tokenizers, or from where "
        "data.tokenizer was read."
    )


def model_tokenizer(workdir: str | Path) -> Tokenizer:
    """The tokenizer to prompt a run's model with. Prompts begin as the run's documents do; for somebody else's weights,
    as their own tokenizer says, whatever separates the run's documents. Raises ConfigError as `run_tokenizer` does."""
    tokenizer = run_tokenizer(workdir)
    return tokenizer_from_hf(workdir) if began_imported(workdir) else tokenizer
