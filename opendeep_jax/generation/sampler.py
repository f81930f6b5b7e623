"""Plain sampling: the whole context again for every token, nothing cached. Simple, and fast enough for small models.

For samples in the middle of training. The engine would hold the weights a second time, each layer by itself, and it
works neither over several processes nor over a mesh that divides rows or the stack of layers, as training does.

B prompts, L context length, V vocabulary.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from opendeep_jax.generation.sampling import limited
from opendeep_jax.models.parameters import Arrays, ModelDefinition

NextTokens = Callable[[Arrays, Arrays, jax.Array, jax.Array, jax.Array], jax.Array]


def make_next_tokens(definition: ModelDefinition, vocab_size: int, temperature: float, top_k: int) -> NextTokens:
    """A jitted function (params, router_bias, tokens [B, L], lengths [B], key data [B, 2]) to each row's next token.

    Args:
        vocab_size: the tokenizer's; the rest of the model's vocabulary is never sampled.
        temperature: 0 takes the most likely token.
        top_k: sample among this many most likely tokens; 0 among all.
    """

    @jax.jit
    def next_tokens(params, router_bias, tokens, lengths, keys):
        model = definition.model(params, router_bias)
        segment_ids = (jnp.arange(tokens.shape[1]) < lengths[:, None]).astype(jnp.int32)
        hidden = model.forward(tokens, segment_ids).hidden
        last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
        logits = limited(model.logits(last), vocab_size)
        if not jax.sharding.get_abstract_mesh().empty:  # every process sees every row's token
            logits = jax.lax.with_sharding_constraint(logits, jax.sharding.PartitionSpec())
        if temperature == 0:
            return jnp.argmax(logits, axis=-1)
        if 0 < top_k < vocab_size:
            smallest = jax.lax.top_k(logits, top_k)[0][:, -1:]
            logits = jnp.where(logits >= smallest, logits, -jnp.inf)
        return jax.vmap(jax.random.categorical)(jax.random.wrap_key_data(keys), logits / temperature)

    return next_tokens


def continue_prompts(
    next_tokens: NextTokens,
    params: Arrays,
    router_bias: Arrays,
    prompts: list[list[int]],
    end: int,
    length: int,
    max_tokens: int,
    seed: int,
) -> Iterator[list[list[int]]]:
    """Yield the continuation of each prompt so far, after each token; a text ends before the token `end`.

    Prompts are token ids, the beginning mark first. A context longer than `length` forgets its older half, that mark
    excepted. A row's samples depend on the seed and its place in the list, not on the other prompts.
    """
    texts = [list(prompt) for prompt in prompts]
    done = [False] * len(texts)
    for count in range(max_tokens):
        contexts = [_window(text, length) for text in texts]
        tokens = np.zeros((len(texts), length), np.int32)
        for row, context in zip(tokens, contexts, strict=True):
            row[: len(context)] = context
        keys = _keys(seed, count, len(texts))
        lengths = np.array([len(context) for context in contexts], np.int32)
        for i, token in enumerate(np.asarray(next_tokens(params, router_bias, tokens, lengths, keys))):
            done[i] = done[i] or token == end
            if not done[i]:
                texts[i].append(int(token))
        yield [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
        if all(done):
            return


def _keys(seed: int, count: int, rows: int) -> np.ndarray:
    """One key for each row's next token, as numbers, which every process of a job has the same."""
    return np.asarray(_key_data(seed, count, np.arange(rows)))


@jax.jit
def _key_data(seed, count, rows):
    key = jax.random.fold_in(jax.random.key(seed), count)
    return jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(key, rows))


def _window(text: list[int], length: int) -> list[int]:
    """The context that fits: dropping half at a time keeps most positions steady from token to token."""
    if len(text) <= length:
        return text
    half = max(length // 2, 1)
    over = len(text) - length
    return text[:1] + text[1 + -(-over // half) * half :]
