"""Sampling: greedy or by seed, until the end of the text, in whatever context fits."""

import itertools
from functools import partial

import jax
import numpy as np
import pytest
from small_models import DENSE, random_arrays, random_model

from opendeep_jax.generation.sampler import continue_prompts, make_next_tokens
from opendeep_jax.models.parameters import model_definition

LENGTH, VOCABULARY, NEVER = 12, 60, -1  # the model has 64 rows, of which the tokenizer uses 60
PROMPTS = [[1, 7, 8, 9], [1, 5]]


@pytest.fixture(scope="module")
def sample():
    """A function (temperature, top_k, prompts, max_tokens, seed, end) to the list of what `continue_prompts` yields."""
    definition = model_definition(DENSE)
    arrays = random_arrays(definition)
    made = {}

    def sample(temperature=0.0, top_k=0, prompts=PROMPTS, max_tokens=6, seed=0, end=NEVER):
        if (temperature, top_k) not in made:
            made[temperature, top_k] = make_next_tokens(definition, VOCABULARY, temperature, top_k)
        return list(continue_prompts(made[temperature, top_k], *arrays, prompts, end, LENGTH, max_tokens, seed))

    return sample


def test_each_step_adds_a_token_to_every_text(sample):
    steps = sample()
    assert [[len(text) for text in texts] for texts in steps] == [[n, n] for n in range(1, 7)]
    for before, after in itertools.pairwise(steps):
        assert [text[:-1] for text in after] == before


def test_greedy_takes_the_most_likely_token_of_the_tokenizers_vocabulary(sample):
    *_, (first, _) = sample()
    model = jax.jit(partial(lambda model, tokens: model(tokens), random_model(DENSE)))
    text = [*PROMPTS[0], *first]
    row = np.zeros((1, LENGTH), np.int32)
    row[0, : len(text)] = text
    logits = np.asarray(model(row))[0, :, :VOCABULARY]
    assert [int(logits[place].argmax()) for place in range(3, 9)] == first


def test_greedy_needs_no_seed_and_is_top_1(sample):
    assert sample(seed=0) == sample(seed=1) == sample(temperature=1.0, top_k=1, seed=2)


def test_the_seed_decides_the_samples(sample):
    hot = partial(sample, temperature=2.0)
    assert hot(seed=3) == hot(seed=3)
    assert hot(seed=3) != hot(seed=4)


def test_samples_do_not_depend_on_the_other_prompts(sample):
    *_, (first, _) = sample(temperature=2.0, seed=3)
    *_, (alone, _) = sample(temperature=2.0, seed=3, prompts=[PROMPTS[0], [1, 2, 3]])
    assert first == alone


def test_tokens_beyond_the_tokenizers_vocabulary_are_never_sampled(sample):
    texts = [text for seed in range(6) for text in sample(temperature=100.0, seed=seed)[-1]]
    assert max(token for text in texts for token in text) < VOCABULARY
    assert len({token for text in texts for token in text}) > 30  # so hot that all are alike


def test_a_text_ends_before_the_end_token_and_the_others_go_on(sample):
    *_, (first, second) = sample()
    end = first[2]
    assert end not in second
    *_, (ended, other) = sample(end=end)
    assert (ended, other) == (first[: first.index(end)], second)


def test_sampling_stops_when_all_texts_have_ended(sample):
    *_, (first, _) = sample(prompts=PROMPTS[:1] * 2)
    end = first[2]
    assert len(sample(prompts=PROMPTS[:1] * 2, max_tokens=50, end=end)) == first.index(end) + 1


def test_a_text_longer_than_the_context_goes_on(sample):
    prompt = [1, *range(2, 30)]
    *_, (text,) = sample(prompts=[prompt], max_tokens=20)
    assert len(text) == 20
    # The context is the beginning mark and the latest tokens: what was forgotten doesn't matter.
    *_, (again,) = sample(prompts=[[1, *range(40, 50), *prompt[11:]]], max_tokens=20)
    assert text == again
