"""`opendeep chat --model=SOURCE [--prompt=TEXT]`"""

import secrets
import sys
from collections.abc import Sequence

from opendeep_jax.cli.engine_flags import read_flags, sampling
from opendeep_jax.config.checks import ConfigError

PURPOSE = """Talks with a model in the terminal: a run's, a Hugging Face directory, or a .gguf file.

With --prompt, or with text piped to it, it answers once and ends; standard output then has the answer alone."""
USAGE = "--model=SOURCE|--workdir=RUN [--system=TEXT] [--prompt=TEXT] [--name=value ...]"
FLAGS = {
    "system": ("", "Instruction that the conversation begins with."),
    "prompt": ("", "One question; its answer is printed, and the program ends."),
    "max_tokens": (0, "Longest answer in tokens; 0 takes what the context leaves."),
    "temperature": (0.7, "0 takes the likeliest token every time."),
    "top_k": (0, "Sample among this many likeliest tokens; 0 among all."),
    "top_p": (0.95, "Sample among the likeliest tokens that together have this probability."),
    "min_p": (0.0, "Sample among tokens at least this likely, relative to the likeliest."),
    "seed": (-1, "Seed of the sampling; -1 draws one."),
    "max_length": (0, "Longest conversation in tokens; 0 takes the model's context, as far as memory holds it."),
}
LEAST = {"max_tokens": 0, "max_length": 0, "seed": -1}


def main(argv: Sequence[str]) -> None:
    """Chat until /quit, or answer once. Raises ConfigError for an invalid source or setting."""
    values, choice = read_flags(FLAGS, argv, "opendeep chat", PURPOSE, USAGE, LEAST)

    from opendeep_jax.serving.terminal import answer, chat, piped_input

    piped = piped_input()
    question = "\n\n".join(filter(None, (values.prompt, (piped or "").strip())))
    if piped is not None and not question:
        raise ConfigError("standard input is empty, and --prompt is not given. Ask something with either.")
    if not question and (sys.stdin is None or not sys.stdin.isatty()):
        raise ConfigError("there is no terminal to talk in. Give --prompt=TEXT, or pipe the question.")

    from rich.console import Console

    from opendeep_jax.generation.requests import EngineConfig
    from opendeep_jax.pretrained.engines import open_engine
    from opendeep_jax.pretrained.sources import open_tokenizer
    from opendeep_jax.serving.conversation import Conversation

    tokenizer, name = open_tokenizer(choice.source)
    params = sampling(values, tokenizer, seed=secrets.randbits(32) if values.seed < 0 else values.seed)
    tokenizer.apply_chat([{"role": "user", "content": "."}])  # a model without a template cannot chat at all
    config = EngineConfig(slots=1, max_length=values.max_length)
    engine = open_engine(choice, tokenizer, config)
    conversation = Conversation(engine, tokenizer, params, values.max_tokens, values.system)
    if question:
        answer(conversation, question, Console(highlight=False))
    else:
        chat(conversation, name)
