"""`opendeep eval --model=SOURCE|--workdir=RUN [--tasks=NAMES|--text=FILE]`"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opendeep_jax.cli.engine_flags import read_flags
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.files import write_atomically
from opendeep_jax.pretrained.engines import ONE_DEVICE, Choice
from opendeep_jax.pretrained.sources import source_kind

PURPOSE = """Measures a model: a run's, a Hugging Face directory, or a .gguf file.

With --tasks by the tasks of lm-evaluation-harness, with --text by its perplexity on a file. With neither, a run is
measured on the text that it held out."""
USAGE = "--model=SOURCE|--workdir=RUN [--tasks=NAME,NAME|--text=FILE] [--out=FILE.json] [--name=value ...]"
WIDTH = 120
"""Columns of the table where there is no terminal to ask."""
PROMPTS = ("plain", "chat")
FLAGS = {
    "tasks": ("", "Tasks, groups or patterns of lm-evaluation-harness, with commas between."),
    "text": ("", "File whose perplexity is measured: .txt, .md, .py, .jsonl or .parquet."),
    "out": ("", "File that all results are written to, as JSON."),
    "include_path": ("", "Directory with .yaml files of tasks of your own."),
    "limit": (0, "Examples of each task; 0 takes all."),
    "num_fewshot": (-1, "Solved examples in each prompt; -1 as the task says."),
    "prompts": ("plain", "chat puts every prompt into the model's chat template."),
    "max_tokens": (0, "Longest answer; 0 as the task says."),
    "max_length": (0, "Longest prompt and answer, or window of a text; 0 takes the model's context, at most 4096."),
    "stride": (0, "Tokens of a text that each window scores; 0 takes half a window."),
    "slots": (8, "Answers that are written at a time."),
    "seed": (0, "Seed of examples, sampled answers and intervals."),
}
LEAST = {
    "limit": 0,
    "num_fewshot": -1,
    "max_tokens": 0,
    "max_length": 0,
    "slots": 1,
    "stride": 0,
    "seed": 0,
}


def main(argv: Sequence[str]) -> None:
    """Print measures, and write them with --out. Raises ConfigError for an invalid model, task or text."""
    values, choice = read_flags(FLAGS, argv, "opendeep eval", PURPOSE, USAGE, LEAST)
    _check(values)
    if values.tasks:
        found = _on_tasks(values, choice)
    elif values.text:
        found = _on_text(values, choice)
    else:
        found = _held_out(choice)
    text = json.dumps(found, indent=2, ensure_ascii=False)
    if not values.tasks:
        print(text)
    if values.out:
        try:
            write_atomically(values.out, text + "\n")
        except OSError:
            if values.tasks:
                print(text)  # hours of work, perhaps, that the disk does not take
            raise


def _check(values: Any) -> None:
    """Raise ConfigError where the settings cannot work together."""
    if values.tasks and values.text:
        raise ConfigError("--tasks and --text are both given. Leave one out.")
    if values.seed >= 2**32:
        raise ConfigError(f"--seed={values.seed}: must be less than 2**32.")
    if values.prompts not in PROMPTS:
        raise ConfigError(f"--prompts={values.prompts}: must be plain or chat.")
    if values.out and not Path(values.out).absolute().parent.is_dir():
        raise ConfigError(f"--out={values.out}: its directory is not there. Make it, or choose another place.")


def _held_out(choice: Choice) -> dict[str, Any]:
    """Return a run's own measure, on the text that it held out."""
    source = choice.source
    if source_kind(source) != "run":
        raise ConfigError(f"{source} is no run, so it held out no text. Say what to measure: --tasks=... or --text=...")
    if choice.parallel != ONE_DEVICE:
        raise ConfigError("--parallel: a run's held-out text is measured on all devices anyway. Leave it out.")

    from opendeep_jax.train.evaluate import evaluate_workdir

    return evaluate_workdir(source, step=choice.step)


def _on_tasks(values: Any, choice: Choice) -> dict[str, Any]:
    """Run tasks, print their table, and return all results."""
    names = [name.strip() for name in values.tasks.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"--tasks={values.tasks}: names no task. Give one, such as --tasks=hellaswag.")

    from opendeep_jax.evaluation.harness import HarnessModel, find_tasks, run_tasks

    known, names = find_tasks(names, values.include_path)  # before the weights are loaded, which takes longer

    from rich.console import Console

    from opendeep_jax.evaluation.results import table, task_results

    engine, tokenizer, about = _open(values, choice)
    if values.prompts == "chat":
        tokenizer.apply_chat([{"role": "user", "content": "."}])  # a model without a template cannot chat at all
    model = HarnessModel(engine, tokenizer, about["model"]["name"], values.prompts == "chat", values.seed)
    raw = run_tasks(model, known, names, values.limit, values.num_fewshot, values.max_tokens)
    tasks = task_results(raw)
    Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH).print(table(tasks))
    if model.cut_prompts:
        print(f"{model.cut_prompts} prompts were longer than {engine.max_length} tokens and lost their beginning.")
    asked = {name: values[name].value for name in ("limit", "num_fewshot", "prompts", "max_tokens", "seed")}
    settings = asked | {"max_length": engine.max_length, "cut_prompts": model.cut_prompts}
    return about | {"settings": settings, "tasks": tasks}


def _on_text(values: Any, choice: Choice) -> dict[str, Any]:
    from opendeep_jax.evaluation.perplexity import perplexity, read_documents

    documents = read_documents(values.text)
    engine, tokenizer, about = _open(values, choice)
    return about | {"text": values.text} | perplexity(engine, tokenizer, documents, values.stride, values.seed)


def _open(values: Any, choice: Choice) -> tuple[Any, Any, dict[str, Any]]:
    """Return the engine and the tokenizer of a source, and what they are."""
    from opendeep_jax.evaluation.results import describe_model, versions
    from opendeep_jax.generation.requests import DEFAULT_LENGTH, EngineConfig
    from opendeep_jax.pretrained.engines import open_engine
    from opendeep_jax.pretrained.sources import open_tokenizer

    tokenizer, name = open_tokenizer(choice.source)
    engine = open_engine(
        choice, tokenizer, EngineConfig(slots=values.slots, max_length=values.max_length), DEFAULT_LENGTH
    )
    about = {"model": describe_model(engine.model, name, choice.source, choice.step), "versions": versions()}
    return engine, tokenizer, about
