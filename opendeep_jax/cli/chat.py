"""`opendeep chat --model=SOURCE [--prompt=TEXT]`"""

import secrets
import sys
from collections.abc import Sequence

from opendeep_jax.cli.flags import make_flags, parse
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.serving.sources import source_kind

PURPOSE = """Talks with a model in the terminal: a run's, a Hugging Face directory, or a .gguf file.

With --prompt, or with text piped to it, it answers once and ends; standard output then has the answer alone."""
DEFAULT_LENGTH = 8192
USAGE = "--model=SOURCE|--workdir=RUN [--system=TEXT] [--prompt=TEXT] [--name=value ...]"


def main(argv: Sequence[str]) -> None:
    """Talks until /quit, or answers once. Raises ConfigError for a source that is none and settings that can't be."""
    flags = make_flags(
        model=("", "A run's work directory, a Hugging Face directory, or a .gguf file."),
        workdir=("", "The same as --model, for a run."),
        step=(-1, "Step of a run's checkpoint; -1 takes the newest."),
        system=("", "Instruction that the conversation begins with."),
        prompt=("", "One question; its answer is printed, and the program ends."),
        max_tokens=(0, "Longest answer in tokens; 0 takes what the context leaves."),
        temperature=(0.7, "0 takes the likeliest token every time."),
        top_k=(0, "Sample among this many likeliest tokens; 0 among all."),
        top_p=(0.95, "Sample among the likeliest tokens that together have this probability."),
        min_p=(0.0, "Sample among tokens at least this likely, relative to the likeliest."),
        seed=(-1, "Seed of the sampling; -1 draws one."),
        max_length=(0, "Longest conversation in tokens; 0 takes the model's context, at most 8192."),
        dtype=("", "float32 or bfloat16; by default what suits the machine."),
    )
    values = parse(flags, argv, "opendeep chat", PURPOSE, USAGE)
    if values.model and values.workdir:
        raise ConfigError("--model and --workdir are both given, and mean the same. Leave one out.")
    source = values.model or values.workdir
    if values.step < -1 or values.max_tokens < 0 or values.max_length < 0 or not -1 <= values.seed < 2**32:
        raise ConfigError("--step and --seed must be at least -1, --max_tokens and --max_length at least 0.")
    source_kind(source)

    from opendeep_jax.serving.terminal import answer, chat, piped_input

    piped = piped_input()
    question = "\n\n".join(filter(None, (values.prompt, (piped or "").strip())))
    if piped is not None and not question:
        raise ConfigError("standard input is empty, and --prompt is not given. Ask something with either.")
    if not question and (sys.stdin is None or not sys.stdin.isatty()):
        raise ConfigError("there is no terminal to talk in. Give --prompt=TEXT, or pipe the question.")

    from rich.console import Console

    from opendeep_jax.generation.engine import Engine, EngineConfig
    from opendeep_jax.generation.params import SamplingParams
    from opendeep_jax.serving.conversation import Conversation
    from opendeep_jax.serving.sources import open_model

    params = SamplingParams(
        temperature=values.temperature,
        top_k=values.top_k,
        top_p=values.top_p,
        min_p=values.min_p,
        seed=secrets.randbits(32) if values.seed < 0 else values.seed,
    )
    model, codec, name = open_model(source, values.dtype, None if values.step < 0 else values.step)
    codec.apply_chat([{"role": "user", "content": "."}])  # a model without a template cannot chat at all
    config = EngineConfig(
        slots=1,
        max_length=values.max_length or min(model.config.max_length, DEFAULT_LENGTH),
        vocab_size=min(codec.vocab_size, model.config.vocab_size),
    )
    engine = Engine(model, config, consume=True)
    del model
    conversation = Conversation(engine, codec, params, values.max_tokens, values.system)
    if question:
        answer(conversation, question, Console(highlight=False))
    else:
        chat(conversation, name)
