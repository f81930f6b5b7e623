"""Plain sampling: the whole context again for every token, nothing cached. Simple, and fast enough for small models.

B prompts, L context length, V vocabulary.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.data.pipeline import prepare_tokenizer
from opendeep_jax.data.tokenizer import Tokenizer
from opendeep_jax.models.parameters import Arrays, Skeleton, split
from opendeep_jax.train.checkpoint import load_model

NextTokens = Callable[[Arrays, Arrays, jax.Array, jax.Array, jax.Array], jax.Array]


def make_next_tokens(skeleton: Skeleton, vocab_size: int, temperature: float, top_k: int) -> NextTokens:
    """A jitted function (params, router_bias, tokens [B, L], lengths [B], keys [B]) to the next token of each row.

    Args:
        vocab_size: the tokenizer's; the rest of the model's vocabulary is never sampled.
        temperature: 0 takes the most likely token.
        top_k: sample among this many most likely tokens; 0 among all.
    """

    @jax.jit
    def next_tokens(params, router_bias, tokens, lengths, keys):
        model = skeleton.model(params, router_bias)
        segment_ids = (jnp.arange(tokens.shape[1]) < lengths[:, None]).astype(jnp.int32)
        hidden = model.forward(tokens, segment_ids).hidden
        last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
        logits = jnp.einsum("bd,dv->bv", last, model.head_kernel(), preferred_element_type=jnp.float32)
        logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
        if temperature == 0:
            return jnp.argmax(logits, axis=-1)
        if 0 < top_k < vocab_size:
            smallest = jax.lax.top_k(logits, top_k)[0][:, -1:]
            logits = jnp.where(logits >= smallest, logits, -jnp.inf)
        return jax.vmap(jax.random.categorical)(keys, logits / temperature)

    return next_tokens


def continue_prompts(
    next_tokens: NextTokens,
    params: Arrays,
    router_bias: Arrays,
    tokenizer: Tokenizer,
    prompts: list[str],
    length: int,
    max_tokens: int,
    seed: int,
) -> Iterator[list[str]]:
    """Yields the continuation of each prompt so far, after each token; a text ends at the end-of-text token.

    A context longer than `length` forgets its older half, the beginning mark excepted.
    """
    texts = [[tokenizer.bos_id, *map(int, tokenizer.encode(prompt))] for prompt in prompts]
    begun = [len(text) for text in texts]
    done = [False] * len(texts)
    for count in range(max_tokens):
        contexts = [_window(text, length) for text in texts]
        tokens = np.zeros((len(texts), length), np.int32)
        for row, context in zip(tokens, contexts, strict=True):
            row[: len(context)] = context
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), i), count))(
            np.arange(len(texts))
        )
        lengths = np.array([len(context) for context in contexts], np.int32)
        for i, token in enumerate(np.asarray(next_tokens(params, router_bias, tokens, lengths, keys))):
            done[i] = done[i] or token == tokenizer.eos_id
            if not done[i]:
                texts[i].append(int(token))
        yield [tokenizer.decode(text[start:]) for text, start in zip(texts, begun, strict=True)]
        if all(done):
            return


def _window(text: list[int], length: int) -> list[int]:
    """The context that fits: dropping half at a time keeps most positions steady from token to token."""
    if len(text) <= length:
        return text
    half = max(length // 2, 1)
    over = len(text) - length
    return text[:1] + text[1 + -(-over // half) * half :]


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
    model, config = load_model(workdir, step)
    tokenizer = prepare_tokenizer(config.data, progress=False)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"The tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, more than the model's vocabulary of "
            f"{config.model.vocab_size}. Use the tokenizer that the run was trained with."
        )
    skeleton, params, router_bias = split(model)
    next_tokens = make_next_tokens(skeleton, tokenizer.vocab_size, temperature, top_k)
    length = config.data.sequence_length
    shown = ""
    for (text,) in continue_prompts(
        next_tokens, params, router_bias, tokenizer, [prompt], length, max_tokens, seed
    ):
        # The bytes of an unfinished character wait for its end.
        ready = text.rstrip("\ufffd")
        if ready.startswith(shown):
            yield ready[len(shown) :]
            shown = ready
