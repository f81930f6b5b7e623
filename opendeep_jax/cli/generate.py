"""`opendeep generate --workdir=RUN|--model=SOURCE --prompt=TEXT|--prompts=FILE`"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from opendeep_jax.cli.flags import make_flags, parse
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.generation.params import SamplingParams
from opendeep_jax.serving.sources import source_kind

PURPOSE = """Continues text with a model: a run's, a Hugging Face directory, or a .gguf file.

One prompt is printed with its continuation, piece by piece as it comes. Many, from a file with one in each line or from
.jsonl with a `prompt` in each, are continued together, and printed as JSON lines in their order."""
USAGE = "--workdir=RUN|--model=SOURCE --prompt=TEXT|--prompts=FILE [--name=value ...]"
LEAST = {"max_length": 0, "speculate": 0, "step": -1, "slots": 1, "n": 1}


def main(argv: Sequence[str]) -> None:
    """Prints prompts and their continuations. Raises ConfigError for what cannot be done, before a model is read."""
    flags = make_flags(
        model=("", "A run's work directory, a Hugging Face directory, or a .gguf file."),
        workdir=("", "The same as --model, for a run."),
        step=(-1, "Step of a run's checkpoint; -1 takes the newest."),
        prompt=("", "Text to continue."),
        prompts=("", "File of texts to continue."),
        n=(1, "Continuations of each prompt, by seeds that follow each other."),
        max_tokens=(200, "Longest continuation, in tokens."),
        temperature=(0.8, "0 takes the most likely token every time."),
        top_k=(50, "Sample among this many most likely tokens; 0 among all."),
        top_p=(1.0, "Sample among the fewest most likely tokens that together have this probability."),
        min_p=(0.0, "Sample among tokens at least this likely, relative to the most likely."),
        seed=(0, "Seed of the sampling."),
        stop=("", "Text that ends a continuation."),
        slots=(8, "Continuations that are written at once."),
        max_length=(0, "Longest prompt and continuation together, in tokens; 0 takes the model's, at most 4096."),
        speculate=(0, "Tokens to guess ahead with a multi-token prediction module."),
        dtype=("", "float32 or bfloat16; by default what suits the machine."),
    )
    values = parse(flags, argv, "opendeep generate", PURPOSE, USAGE)
    if bool(values.model) == bool(values.workdir):
        both = "and --model are both given: leave one out" if values.model else "is missing: give it, or --model=SOURCE"
        raise ConfigError(f"--workdir {both}, for the model to continue texts with.")
    if values.prompt and values.prompts:
        raise ConfigError("--prompt and --prompts are both given. Leave one out.")
    for name, least in LEAST.items():
        if not values[name].value >= least:
            raise ConfigError(f"--{name}={values[name].value}: must be at least {least}.")
    settings = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed")
    try:
        params = SamplingParams(**{name: values[name].value for name in settings})
    except ConfigError as error:
        raise ConfigError(f"--{error}") from error
    source = values.model or values.workdir
    source_kind(source)

    from opendeep_jax.serving.continuation import continued, read_prompts

    prompts = read_prompts(Path(values.prompts)) if values.prompts else [values.prompt]

    from opendeep_jax.generation.engine import Engine, EngineConfig
    from opendeep_jax.serving.sources import open_model

    model, codec, _ = open_model(source, values.dtype, None if values.step < 0 else values.step)
    config = EngineConfig(
        slots=min(values.slots, len(prompts) * values.n),
        max_length=values.max_length,
        vocab_size=min(codec.vocab_size, model.config.vocab_size),
        speculate=values.speculate,
    )
    engine = Engine(model, config, consume=True)
    del model
    texts = [prompt for prompt in prompts for _ in range(values.n)]
    each = [dataclasses.replace(params, seed=(params.seed + i % values.n) % 2**32) for i in range(len(texts))]
    pieces = continued(engine, codec, texts, each, [values.stop])
    if len(texts) == 1:
        first = next(pieces, None)  # a prompt that is too long is the whole answer, so nothing is printed before this
        print(f"{values.prompt or texts[0]}{first.text if first else ''}", end="", flush=True)
        for piece in pieces:
            print(piece.text, end="", flush=True)
        print()
        return
    written, finished = [""] * len(texts), {}
    shown = 0
    for piece in pieces:
        written[piece.prompt] += piece.text
        if piece.finish:
            finished[piece.prompt] = piece.finish
        while shown in finished:  # in their order
            line = {"prompt": texts[shown], "text": written[shown], "seed": each[shown].seed, "finish": finished[shown]}
            print(json.dumps(line, ensure_ascii=False), flush=True)
            shown += 1
    if engine.stats.drafted_tokens:
        drafted, accepted = engine.stats.drafted_tokens, engine.stats.accepted_tokens
        print(f"{accepted:,} of {drafted:,} drafted tokens stood.", file=sys.stderr)
