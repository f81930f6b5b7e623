"""Text from a run's checkpoint."""

from collections.abc import Iterator
from pathlib import Path

from opendeep_jax.config.load import load_run_config
from opendeep_jax.config.schedule import stages
from opendeep_jax.data.provenance import run_tokenizer
from opendeep_jax.generation.sampler import continue_prompts, make_next_tokens
from opendeep_jax.models.parameters import split
from opendeep_jax.train.checkpoint import load_model
from opendeep_jax.train.programs import use_compilation_cache


def generate_from_workdir(
    workdir: str | Path,
    prompt: str,
    max_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    step: int | None = None,
) -> Iterator[str]:
    """Continues a prompt with the model of a run's checkpoint, yielding text as it comes.

    Raises:
        ConfigError: where there is no run or no such checkpoint.
    """
    use_compilation_cache(load_run_config(workdir))
    model, config = load_model(workdir, step)
    tokenizer = run_tokenizer(workdir)
    skeleton, params, router_bias = split(model)
    next_tokens = make_next_tokens(skeleton, tokenizer.vocab_size, temperature, top_k)
    shown = ""
    ids = [tokenizer.bos_id, *map(int, tokenizer.encode(prompt))]
    # The whole context is computed again for each token, so no more of it than will be filled.
    longest = max(stage.length for stage in stages(config))
    length = min(longest, 1 << (len(ids) + max_tokens - 1).bit_length())
    for (text,) in continue_prompts(
        next_tokens, params, router_bias, [ids], tokenizer.eos_id, length, max_tokens, seed
    ):
        # The bytes of an unfinished character wait for its end.
        ready = tokenizer.decode(text).rstrip("\ufffd")
        if ready.startswith(shown):
            yield ready[len(shown) :]
            shown = ready
