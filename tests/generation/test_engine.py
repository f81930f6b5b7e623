"""The engine gives each request what the model alone would give it, whatever else is running."""

import dataclasses
import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generators import LENGTH, SETTINGS, engine_of, logits_of, mixed_requests, model_of
from small_models import FAMILIES, random_model

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import ParallelConfig
from opendeep_jax.generation.cache import make_cache
from opendeep_jax.generation.engine import Engine, EngineConfig
from opendeep_jax.generation.forward import Rows, forward
from opendeep_jax.generation.requests import SamplingParams
from opendeep_jax.generation.weights import convert, layout_of, one_device_mesh
from opendeep_jax.models.attention import GroupedQueryAttention, MultiHeadLatentAttention
from opendeep_jax.models.decoder import Block, MixerBlock
from opendeep_jax.models.layers import FeedForward
from opendeep_jax.models.mamba2 import Mamba2
from opendeep_jax.models.moe import MoE
from opendeep_jax.models.parameters import split
from opendeep_jax.parallel.mesh import make_mesh

LENGTHS = itertools.count(1000)
GREEDY = SamplingParams(max_tokens=20, temperature=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_and_its_probabilities_are_those_of_the_model_without_a_cache(family):
    prompts = [list(range(1, 1 + length)) for length in (1, 7, 45)]  # within a chunk, and over several
    out = engine_of(family).generate(prompts, dataclasses.replace(GREEDY, logprobs=0))
    for prompt, completion in zip(prompts, out, strict=True):
        logits = logits_of(family, prompt + completion.tokens)[len(prompt) - 1 : -1]
        assert completion.tokens == logits.argmax(-1).tolist() and completion.finish == "length"
        logprobs = np.asarray(jax.nn.log_softmax(logits))[np.arange(20), completion.tokens]
        np.testing.assert_allclose([one.logprob for one in completion.logprobs], logprobs, atol=1e-4)


def called(modules, program) -> list[str]:
    """The names of the modules that are called while a program is traced, in order."""
    calls = []

    def counting(module, call):
        return lambda *given: calls.append(module.__name__) or call(*given)

    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, "__call__", counting(module, module.__call__))
        jax.eval_shape(program)
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_called_as_training_calls_them(family):
    """So what is added to a layer, an attention or a mixer is in generation too."""
    model = model_of(family)
    layout, (_, *arrays) = layout_of(model.config, one_device_mesh()), split(model)
    weights = convert(layout, arrays[0] | arrays[1])
    one, cache = jnp.ones(1, jnp.int32), make_cache(layout, 4, 8, 1)
    modules = (Block, MixerBlock, MultiHeadLatentAttention, GroupedQueryAttention, Mamba2, MoE, FeedForward)
    generated = called(modules, lambda: forward(layout, weights, cache, Rows(one[None], one, one, one[None], one)))
    trained = called(modules, lambda: model(jnp.ones((1, 8), jnp.int32)))
    assert set(generated) == set(trained)
    assert len([name for name in generated if name.endswith("Block")]) == len(layout.runs)


def fresh_model():
    """A model of a configuration of its own, whose programs no other test shares."""
    return random_model(dataclasses.replace(model_of("dense").config, context_length=next(LENGTHS)))


class OwnCore(GroupedQueryAttention):
    """An attention whose scores are not those that a cache knows."""

    def over_row(self, context, query, key, value, scoring):
        return super().over_row(context, query, key, value, scoring._replace(scale=-scoring.scale))


def test_a_core_that_the_cache_does_not_know_is_refused(monkeypatch):
    from opendeep_jax.models import attention

    monkeypatch.setattr(attention, "GroupedQueryAttention", OwnCore)
    engine = Engine(fresh_model(), EngineConfig(**SETTINGS))
    with pytest.raises(ConfigError, match="OwnCore has a core of its own, and generation knows none over a cache"):
        engine.generate([[1]], GREEDY)


def test_an_attention_that_calls_no_core_is_refused(monkeypatch):
    monkeypatch.setattr(GroupedQueryAttention, "__call__", lambda self, x, *_: x)
    engine = Engine(fresh_model(), EngineConfig(**SETTINGS))
    with pytest.raises(ConfigError, match="Block called its core 0 times"):
        engine.generate([[1]], GREEDY)


def test_two_hundred_requests_that_come_and_go_get_token_for_token_what_each_gets_alone():
    engine = engine_of("dense")
    prompts, params = mixed_requests(200)
    alone = [engine.generate([prompt], one)[0] for prompt, one in zip(prompts, params, strict=True)]
    order, arrivals = random.Random(0), []
    waiting = list(zip(prompts, params, strict=True))
    while waiting or engine.busy:
        for prompt, one in [waiting.pop(0) for _ in range(min(order.randint(0, 3), len(waiting)))]:
            arrivals.append(engine.submit(prompt, one))
        engine.step()
    for request, want in zip(arrivals, alone, strict=True):
        assert (request.tokens, request.finish) == (want.tokens, want.finish)
        assert [one.token for one in request.logprobs] == [one.token for one in want.logprobs]
    assert {"stop", "length"} == {completion.finish for completion in alone}
    assert engine.stats.free_pages == engine.stats.total_pages and not engine.stats.running


@pytest.mark.parametrize("family", ["v3", "gpt-oss"])
def test_a_requests_seed_decides_its_draws_and_not_its_neighbors(family):
    engine = engine_of(family)
    prompts, params = mixed_requests(9, seed=5)
    together = engine.generate(prompts, params)
    again = engine.generate(prompts[::-1], params[::-1])[::-1]
    assert [one.tokens for one in together] == [one.tokens for one in again]
    drawn = dataclasses.replace(params[1], temperature=1.0, top_p=1.0, top_k=0, max_tokens=20, end_ids=())
    outputs = {
        tuple(engine.generate([prompts[0]], dataclasses.replace(drawn, seed=seed))[0].tokens) for seed in range(4)
    }
    assert len(outputs) == 4


@pytest.mark.parametrize(
    "family, sizes",
    [
        ("v3", {"expert": 2, "tensor": 2, "data": 2}),
        ("gqa", {"fsdp": 4, "tensor": 2}),
        ("gpt-oss", {"expert": 4, "tensor": 2}),
    ],
)
def test_a_mesh_gives_the_tokens_of_one_device(family, sizes):
    prompts, params = mixed_requests(11, seed=2, longest=40)
    params = [dataclasses.replace(one, max_tokens=min(one.max_tokens, 12)) for one in params]
    want = engine_of(family, slots=8).generate(prompts, params)
    mesh = make_mesh(ParallelConfig(**sizes))
    engine = Engine(model_of(family), EngineConfig(**SETTINGS | {"slots": 8}), mesh)
    assert [one.tokens for one in engine.generate(prompts, params)] == [one.tokens for one in want]
    assert engine.stats.free_pages == engine.stats.total_pages


def test_requests_wait_for_pages_and_are_served_in_order():
    engine = Engine(model_of("dense"), EngineConfig(**SETTINGS | {"cache_tokens": 64}))
    prompts = [[i + 1] * 20 for i in range(6)]
    requests = [engine.submit(prompt, GREEDY) for prompt in prompts]
    finished = []
    while engine.busy:
        finished += [one.request for one in engine.step() if one.finish]
        assert engine.stats.running <= 1  # 40 positions are five of the eight pages
    assert finished == requests
    want = engine_of("dense").generate(prompts, GREEDY)
    assert [request.tokens for request in requests] == [one.tokens for one in want]


@pytest.mark.parametrize("when", ["waiting", "running"])
def test_an_aborted_request_frees_its_pages_and_disturbs_no_other(when):
    engine = engine_of("dense")
    prompts = [[i + 1] * 30 for i in range(6)]  # two more than there are slots
    want = [one.tokens for one in engine.generate(prompts, GREEDY)]
    requests = [engine.submit(prompt, GREEDY) for prompt in prompts]
    for _ in range(5):
        engine.step()
    doomed = requests[5 if when == "waiting" else 1]
    engine.abort(doomed)
    engine.abort(doomed)
    reports = [one for one in engine.step() if one.request is doomed]
    assert [one.finish for one in reports] == ["aborted"] and doomed.pages == []
    while engine.busy:
        engine.step()
    assert [r.tokens for r in requests if r is not doomed] == [
        t for r, t in zip(requests, want, strict=True) if r is not doomed
    ]
    assert engine.stats.free_pages == engine.stats.total_pages
    engine.abort(doomed)  # after its end
    assert not engine.busy and engine.step() == []


def test_output_ends_before_an_end_token_at_max_tokens_or_where_the_length_is_full():
    engine, prompt = engine_of("dense"), [5, 6, 7]
    whole = engine.generate([prompt], GREEDY)[0].tokens
    end = whole[7]
    stopped = engine.generate([prompt], dataclasses.replace(GREEDY, end_ids=(end,)))[0]
    assert stopped.tokens == whole[: whole.index(end)] and stopped.finish == "stop"
    full = engine.generate([[1] * (LENGTH - 3)], GREEDY)[0]
    assert len(full.tokens) == 3 and full.finish == "length"
    assert len(engine.generate([prompt], dataclasses.replace(GREEDY, max_tokens=1))[0].tokens) == 1


@pytest.mark.parametrize("family", ["v2", "gemma"])
def test_log_probabilities_are_the_models_before_temperature(family):
    params = SamplingParams(max_tokens=6, temperature=1.5, top_k=3, logprobs=4, seed=1)
    (out,) = engine_of(family).generate([[3, 9, 4]], params)
    logits = logits_of(family, [3, 9, 4, *out.tokens]).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert len(out.logprobs) == 6
    for place, one in enumerate(out.logprobs):
        row = expected[2 + place]
        assert one.token == out.tokens[place] and one.logprob == pytest.approx(row[one.token], abs=1e-4)
        assert [token for token, _ in one.top] == np.argsort(-row)[:4].tolist()
        assert [value for _, value in one.top] == pytest.approx(np.sort(row)[::-1][:4], abs=1e-4)


def test_what_is_left_in_freed_pages_reaches_nobody():
    """A page may hold anything, NaN too, before a request writes to it."""
    for family in ("v3", "dense"):
        engine = Engine(model_of(family), EngineConfig(**SETTINGS))
        engine.cache = jax.tree.map(lambda x: x * np.nan, engine.cache)
        prompts = [[5, 6, 7], [8] * 45]
        want = engine_of(family).generate(prompts, GREEDY)
        assert [one.tokens for one in engine.generate(prompts, GREEDY)] == [one.tokens for one in want]


def test_tokens_beyond_the_tokenizers_are_never_chosen():
    engine = Engine(model_of("dense"), EngineConfig(**SETTINGS | {"vocab_size": 11}))
    drawn = engine.generate([[1]] * 4, [SamplingParams(max_tokens=60, temperature=5.0, seed=s) for s in range(4)])
    assert max(max(one.tokens) for one in drawn) == 10


@pytest.mark.parametrize(
    "prompt, params, message",
    [
        ([], GREEDY, "The prompt is empty"),
        ([1] * LENGTH, GREEDY, f"has {LENGTH} tokens, and prompt and output together may have {LENGTH}"),
        ([64], GREEDY, "holds the token 64; the model's are 0 to 63"),
        ([-1], GREEDY, "holds the token -1"),
    ],
)
def test_prompts_that_cannot_be_served_are_refused_at_once(prompt, params, message):
    with pytest.raises(ConfigError, match=message):
        engine_of("dense").submit(prompt, params)


def test_a_request_that_never_fits_the_cache_is_refused_instead_of_waiting_for_ever():
    engine = Engine(model_of("dense"), EngineConfig(**SETTINGS | {"cache_tokens": 32}))
    with pytest.raises(ConfigError, match="take 5 pages, and the cache has 4"):
        engine.submit([1] * 20, GREEDY)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"slots": 0}, "slots = 0: must be at least 1"),
        ({"max_length": 10**6}, "the model's positions go up to 256"),
        ({"prefill_tokens": 48}, "must be a power of two from 16"),
        ({"vocab_size": 65}, "They do not belong together"),
        ({"speculate": 1}, "no MTP module"),
        ({"page_size": -1}, "page_size = -1"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Engine(model_of("dense"), EngineConfig(**SETTINGS | change))


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"tensor": 4, "data": 2}, "num_heads = 2: must divide over parallel.tensor = 4"),
        ({"context": 2, "data": 4}, "parallel.context = 2"),
        ({"data": 8}, "slots = 4: must be a multiple of the mesh's 8 groups"),
    ],
)
def test_meshes_that_do_not_divide_the_model_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        Engine(model_of("v3"), EngineConfig(**SETTINGS), make_mesh(ParallelConfig(**sizes)))


@pytest.mark.parametrize("family", ["v3", "gemma", "olmo"])
def test_a_bfloat16_model_generates_in_bfloat16_with_its_own_probabilities(family):
    model = random_model(dataclasses.replace(model_of(family).config, dtype="bfloat16"))
    engine = Engine(model, EngineConfig(**SETTINGS))
    assert {x.dtype.itemsize for x in jax.tree.leaves(engine.cache)} == {2}
    prompt = list(range(1, 8))
    (out,) = engine.generate([prompt], SamplingParams(max_tokens=20, temperature=0, logprobs=0))
    logits = model(jnp.asarray([prompt + out.tokens]))[0, len(prompt) - 1 : -1]
    want = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(out.tokens)[:, None], axis=1)[:, 0]
    distance = np.abs(np.array([given.logprob for given in out.logprobs]) - want)
    assert distance.mean() < 0.015 and distance.max() < 0.06  # rounding; another text's are 0.6 away on average


def test_a_consumed_models_arrays_are_given_up_and_the_engine_has_all_it_needs():
    config = dataclasses.replace(model_of("v3").config, tie_embeddings=True)
    model = random_model(config)
    want = Engine(model, EngineConfig(**SETTINGS)).generate([[1, 2, 3]], GREEDY)
    engine = Engine(model, EngineConfig(**SETTINGS), consume=True)
    assert engine.generate([[1, 2, 3]], GREEDY) == want
    assert model.moe_layers.moe.gate.get_value().is_deleted()
