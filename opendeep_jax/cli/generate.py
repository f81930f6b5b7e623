"""`opendeep generate --workdir=RUN|--model=SOURCE --prompt=TEXT|--prompts=FILE`"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opendeep_jax.cli.engine_flags import read_flags, sampling
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.generation.requests import SamplingParams

if TYPE_CHECKING:
    from opendeep_jax.generation.answers import Piece
    from opendeep_jax.generation.requests import EngineStats

PURPOSE = """Continues text with a model: a run's, a Hugging Face directory, or a .gguf file.

One prompt is printed with its continuation, piece by piece as it comes. Many, from a file with one in each line or from
.jsonl with a `prompt` in each, are continued together, and printed as JSON lines in their order."""
USAGE = "--workdir=RUN|--model=SOURCE --prompt=TEXT|--prompts=FILE [--name=value ...]"
FLAGS = {
    "prompt": ("", "Text to continue."),
    "prompts": ("", "File of texts to continue."),
    "n": (1, "Continuations of each prompt, by seeds that follow each other."),
    "max_tokens": (200, "Longest continuation, in tokens."),
    "temperature": (0.8, "0 takes the most likely token every time."),
    "top_k": (50, "Sample among this many most likely tokens; 0 among all."),
    "top_p": (1.0, "Sample among the fewest most likely tokens that together have this probability."),
    "min_p": (0.0, "Sample among tokens at least this likely, relative to the most likely."),
    "seed": (0, "Seed of the sampling."),
    "stop": ("", "Text that ends a continuation."),
    "slots": (8, "Continuations that are written at once."),
    "max_length": (0, "Longest prompt and continuation together, in tokens; 0 takes the model's, as memory allows."),
    "speculate": (0, "Tokens to guess ahead with a multi-token prediction module."),
}
LEAST = {"max_length": 0, "speculate": 0, "slots": 1, "n": 1}


def main(argv: Sequence[str]) -> None:
    """Print prompts and their continuations. Raises ConfigError for invalid settings, before a model is read."""
    values, choice = read_flags(FLAGS, argv, "opendeep generate", PURPOSE, USAGE, LEAST)
    if values.prompt and values.prompts:
        raise ConfigError("--prompt and --prompts are both given. Leave one out.")

    from opendeep_jax.pretrained.sources import open_tokenizer
    from opendeep_jax.serving.continuation import continued, read_prompts

    tokenizer, _ = open_tokenizer(choice.source)
    params = sampling(values, tokenizer, max_tokens=values.max_tokens)
    prompts = read_prompts(Path(values.prompts)) if values.prompts else [values.prompt]
    texts = [prompt for prompt in prompts for _ in range(values.n)]
    each = [dataclasses.replace(params, seed=(params.seed + i % values.n) % 2**32) for i in range(len(texts))]

    from opendeep_jax.generation.requests import EngineConfig
    from opendeep_jax.pretrained.engines import open_engine

    slots = min(values.slots, len(texts))
    config = EngineConfig(slots=slots, max_length=values.max_length, speculate=values.speculate)
    engine = open_engine(choice, tokenizer, config)
    pieces = continued(engine, tokenizer, texts, each, [values.stop])
    if len(texts) == 1:
        _print_one(texts[0], pieces)
    else:
        _print_lines(texts, each, pieces)
    _print_drafts(engine.stats)


def _print_one(prompt: str, pieces: "Iterator[tuple[int, Piece]]") -> None:
    """Print the prompt with its continuation, as it comes."""
    print(prompt, end="", flush=True)
    for _, piece in pieces:
        print(piece.text, end="", flush=True)
    print()


def _print_lines(
    prompts: Sequence[str], params: Sequence[SamplingParams], pieces: "Iterator[tuple[int, Piece]]"
) -> None:
    """Print a JSON line for each prompt in order, as soon as it and those before it are done."""
    texts, finished, shown = [""] * len(prompts), {}, 0
    for place, piece in pieces:
        texts[place] += piece.text
        if piece.finish:
            finished[place] = piece.finish
        while shown in finished:
            line = {"prompt": prompts[shown], "text": texts[shown], "seed": params[shown].seed}
            print(json.dumps(line | {"finish": finished[shown]}, ensure_ascii=False), flush=True)
            shown += 1


def _print_drafts(stats: "EngineStats") -> None:
    if stats.drafted_tokens:
        print(f"{stats.accepted_tokens:,} of {stats.drafted_tokens:,} drafted tokens stood.", file=sys.stderr)
