"""Streamed completions of many prompts at a time."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.generation.answers import Answer, Piece, answer_all
from opendeep_jax.generation.requests import SamplingParams
from opendeep_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from opendeep_jax.generation.engine import Engine


def continued(
    engine: "Engine",
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    params: Sequence[SamplingParams],
    stop: Sequence[str] = (),
) -> Iterator[tuple[int, Piece]]:
    """Continue each prompt until its end, a stop string or its longest length; yield pieces as they come, each with its
    prompt's place.

    Args:
        engine: idle.
        params: each prompt's; the tokenizer's end tokens are added.
        stop: texts that end an output, and are no part of it.
    Raises:
        ConfigError: a prompt is too long; said at once, before the first piece is asked for.
    """
    requests = []
    for prompt, one in zip(prompts, params, strict=True):
        ids = tokenizer.encode_prompt(prompt) or list(tokenizer.end_ids[:1])  # no begin token: the end token
        requests.append(engine.submit(ids, dataclasses.replace(one, end_ids=tokenizer.end_ids)))
    stop = [text for text in stop if text]
    return answer_all(engine, requests, [Answer(tokenizer, stop, before=request.prompt) for request in requests])


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file: of its lines, or in a .jsonl file of their `prompt` fields.

    Raises:
        ConfigError: there is no such file, it holds none, or a line is not such an object.
    """
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
        if path.suffix != ".jsonl":
            prompts = lines
        else:
            prompts = [json.loads(line)["prompt"] for line in lines]
            if not all(isinstance(prompt, str) for prompt in prompts):
                raise TypeError("a prompt that is no text")
    except OSError as error:
        raise ConfigError(f"--prompts={path}: cannot be read ({error.strerror}). Name a file of prompts.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f'--prompts={path}: must be UTF-8, and in a .jsonl file each line an object such as {{"prompt": "Once"}} '
            f"({error})."
        ) from error
    if not prompts:
        raise ConfigError(f"--prompts={path}: holds no prompt. Write one in each line.")
    return prompts
