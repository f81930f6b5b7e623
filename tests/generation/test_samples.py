"""What training on samples needs: new weights without compiling, groups of one prompt, and what was drawn from."""

import dataclasses

import jax
import numpy as np
import pytest
from generators import LENGTH, SETTINGS, engine_of, logits_of, mixed_requests, model_of
from small_models import random_model

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import ParallelConfig
from opendeep_jax.generation.engine import Engine, EngineConfig
from opendeep_jax.generation.requests import SamplingParams
from opendeep_jax.models.parameters import split
from opendeep_jax.parallel.mesh import make_mesh

HOT = SamplingParams(max_tokens=12, temperature=1.1, seed=7, logprobs=0)
PROMPT = [5, 6, 7, 9, 3, 8, 2, 4, 5, 1, 6]  # a whole page and a part


@pytest.fixture
def compiled():
    """A function to the number of programs that XLA has been asked for in this test."""
    names = []

    def listen(event, _, **more):
        if event.endswith("backend_compile_duration"):
            names.append(more)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: len(names)
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("family, sizes", [("v3", {}), ("dense", {"fsdp": 2, "tensor": 2})])
def test_loaded_weights_give_what_a_fresh_engine_of_them_gives_and_compile_nothing(family, sizes, compiled):
    mesh = make_mesh(ParallelConfig(**{"fsdp": 1} | sizes), jax.devices()[: 4 if sizes else 1])
    prompts, params = mixed_requests(5, seed=3, longest=20)
    other = random_model(model_of(family).config, seed=1)
    engine = Engine(model_of(family), EngineConfig(**SETTINGS), mesh)
    first = engine.generate(prompts, params)
    held, (_, *arrays) = engine.weights, split(other)
    before = compiled()
    engine.load(*arrays)
    second = engine.generate(prompts, params)
    assert compiled() == before
    assert all(array.is_deleted() for array in jax.tree.leaves(held))
    assert not any(array.is_deleted() for array in jax.tree.leaves(arrays))
    fresh = Engine(other, EngineConfig(**SETTINGS), mesh)
    assert fresh.generate(prompts, params) == second != first
    assert compiled() == before  # nor does a second engine of one configuration
    engine.load(*split(model_of(family))[1:])
    assert engine.generate(prompts, params) == first


def test_weights_are_not_replaced_under_requests_nor_by_those_of_another_model():
    engine = Engine(model_of("dense"), EngineConfig(**SETTINGS))
    _, params, router_bias = split(model_of("dense"))
    request = engine.submit(PROMPT, HOT)
    with pytest.raises(ConfigError, match="Requests are running"):
        engine.load(params, router_bias)
    engine.abort(request)
    engine.step()
    with pytest.raises(ConfigError, match="is no weight of this model"):
        engine.load(params | {"head.bias": params["final_norm.scale"]}, router_bias)
    assert engine.generate([PROMPT], HOT) == engine_of("dense").generate([PROMPT], HOT)


@pytest.mark.parametrize(
    "family, settings, count",
    [("v3", {}, 3), ("gqa", {}, 9), ("nemotron-h", {}, 6), ("gqa with mtp", {"speculate": 2}, 3)],
)
def test_samples_of_a_group_are_those_of_requests_by_themselves(family, settings, count):
    engine = engine_of(family, **settings)
    for prompt in (PROMPT, PROMPT[:3], [4] * 40):
        alone = engine.generate([prompt] * count, [dataclasses.replace(HOT, seed=7 + i) for i in range(count)])
        before = engine.stats
        other = engine.submit([9, 9], dataclasses.replace(HOT, max_tokens=20))
        first = engine.submit(prompt, HOT, samples=count)
        while engine.busy:
            engine.step()
        assert [one.tokens for one in first.samples] == [one.tokens for one in alone]
        for one, want in zip(first.samples, alone, strict=True):
            assert [x.logprob for x in one.logprobs] == pytest.approx([x.logprob for x in want.logprobs], abs=1e-5)
        assert len(other.tokens) == 20 and engine.stats.free_pages == engine.stats.total_pages
        read = engine.stats.prompt_tokens - before.prompt_tokens
        if "M" not in engine.model.layer_pattern:  # whose states go on with their request
            assert read == len(prompt) + 2 - 2 * (engine.config.speculate > 0)


def test_groups_on_a_mesh_stay_beside_their_leaders():
    mesh = make_mesh(ParallelConfig(data=2), jax.devices()[:2])
    engine = Engine(model_of("dense"), EngineConfig(**SETTINGS), mesh)  # two slots of each device, three samples
    first = [engine.submit(prompt, HOT, samples=3) for prompt in (PROMPT, [3] * 20)]
    while engine.busy:
        engine.step()
    for prompt, one in zip((PROMPT, [3] * 20), first, strict=True):
        seeds = [dataclasses.replace(HOT, seed=7 + i) for i in range(3)]
        want = engine_of("dense").generate([prompt] * 3, seeds)
        assert [each.tokens for each in one.samples] == [each.tokens for each in want]
    assert engine.stats.free_pages == engine.stats.total_pages


@pytest.mark.parametrize("which, steps", [(0, 1), (0, 3), (1, 1), (1, 3), (5, 1)])
def test_an_aborted_sample_disturbs_no_other_of_its_group(which, steps):
    engine = Engine(model_of("dense"), EngineConfig(**SETTINGS | {"prefill_tokens": 16}))
    prompt = [2, 3] * 20  # three steps of prefilling
    alone = [engine_of("dense").generate([prompt], dataclasses.replace(HOT, seed=7 + i))[0].tokens for i in range(6)]
    requests = engine.submit(prompt, HOT, samples=6).samples
    for _ in range(steps):
        engine.step()
    engine.abort(requests[which])
    while engine.busy:
        engine.step()
    assert requests[which].finish == "aborted" and engine.stats.free_pages == engine.stats.total_pages
    kept = [i for i in range(6) if i != which]
    assert [requests[i].tokens for i in kept] == [alone[i] for i in kept]


def drawn_from(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The log-probabilities that a token is drawn by, in float64."""
    logits = logits.astype(np.float64)
    for token, value in params.logit_bias:
        logits[token] += value
    logits = logits / params.temperature
    if params.top_k:
        logits[logits < np.sort(logits)[-params.top_k]] = -np.inf
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    order = np.argsort(-weights)
    within = np.cumsum(weights[order]) - weights[order] < params.top_p
    keep = np.zeros(len(logits), bool)
    keep[order[within]] = True
    keep &= weights >= params.min_p * weights.max()
    with np.errstate(divide="ignore"):
        return np.log(np.where(keep, weights, 0) / weights[keep].sum())


@pytest.mark.parametrize(
    "more",
    [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.8, "logit_bias": ((3, 2.0),)}],
    ids=str,
)
def test_log_probabilities_of_what_was_drawn_from_are_those_of_plain_arithmetic(more):
    engine = engine_of("dense", kept_tokens=True)
    params = dataclasses.replace(HOT, temperature=0.7, drawn_logprobs=True, logprobs=-1, **more)
    request = engine.submit(PROMPT, params)
    while engine.busy:
        engine.step()
    logits = logits_of("dense", PROMPT + request.tokens)[len(PROMPT) - 1 : -1]
    for row, token, given, kept in zip(logits, request.tokens, request.drawn_logprobs, request.kept, strict=True):
        want = drawn_from(row.copy(), params)
        assert given == pytest.approx(want[token], abs=2e-4)
        allowed = np.flatnonzero(np.isfinite(want))
        assert kept is None if len(allowed) == len(row) else kept.tolist() == allowed.tolist()


def test_drafts_do_not_change_what_was_drawn_from():
    params = dataclasses.replace(HOT, top_p=0.8, drawn_logprobs=True)
    outputs = []
    for settings in ({}, {"speculate": 2}):
        engine = engine_of("gqa with mtp", **settings)
        request = engine.submit(PROMPT, params)
        while engine.busy:
            engine.step()
        outputs.append(request)
    plain, drafted = outputs
    assert plain.tokens == drafted.tokens and len(drafted.drawn_logprobs) == len(drafted.logprobs) == 12
    assert drafted.drawn_logprobs == pytest.approx(plain.drawn_logprobs, abs=1e-4)


def test_the_sampled_end_is_kept_with_its_log_probabilities_on_request():
    engine = engine_of("dense")
    whole = engine.generate([PROMPT], HOT)[0]
    ends = dataclasses.replace(HOT, end_ids=(whole.tokens[5],))
    count = whole.tokens.index(whole.tokens[5])
    (without,), (kept,) = (engine.generate([PROMPT], one) for one in (ends, dataclasses.replace(ends, keep_end=True)))
    assert without.tokens == whole.tokens[:count] and kept.tokens == whole.tokens[: count + 1]
    assert kept.logprobs == whole.logprobs[: count + 1] and kept.finish == without.finish == "stop"


@pytest.mark.parametrize("family, settings", [("v3", {}), ("v3", {"speculate": 2}), ("nemotron-h", {})])
def test_expert_choices_are_the_routers(family, settings):
    model, engine = model_of(family), engine_of(family, expert_choices=True, **settings)
    requests = engine.submit(PROMPT, HOT, samples=2).samples
    plain = engine_of(family, **settings).submit(PROMPT, HOT, samples=2).samples
    while engine.busy or engine_of(family, **settings).busy:
        engine.step()
        engine_of(family, **settings).step()
    loads = jax.jit(lambda tokens, segments: {
        name: report["load"].value
        for name, report in model.forward(tokens, segments).reports.items()
        if "load" in report and not name.startswith("mtp")
    })  # fmt: skip
    for request, same in zip(requests, plain, strict=True):
        assert request.tokens == same.tokens and same.experts == []
        choices, text = np.concatenate(request.experts), np.array(PROMPT + request.tokens)
        assert choices.shape == (len(text) - 1, model.config.num_moe_layers, model.config.moe.experts_per_token)
        for length in (1, len(PROMPT), len(text) - 1):  # so many tokens chose so many of each expert
            tokens = np.zeros((1, LENGTH), np.int32)
            tokens[0, : len(text)] = text
            (want,) = loads(tokens, (np.arange(LENGTH) < length)[None].astype(np.int32)).values()
            for layer, load in enumerate(np.atleast_2d(want)):
                count = np.bincount(choices[:length, layer].reshape(-1), minlength=model.config.moe.num_experts)
                assert count.tolist() == load.tolist()


@pytest.mark.parametrize("family, runs", [("deep v3", [1, 4]), ("deep hybrid", [4, 4, 1])])
def test_layers_that_are_scanned_have_pages_slots_and_choices_of_their_own(family, runs):
    model, engine = model_of(family), engine_of(family, expert_choices=True)
    assert [len(run.layers) for run in engine.programs.layout.runs] == runs
    requests = engine.submit(PROMPT, HOT, samples=2).samples
    while engine.busy:
        engine.step()
    assert requests[0].tokens != requests[1].tokens
    for request in requests:
        text = PROMPT + request.tokens
        logits = logits_of(family, text)[len(PROMPT) - 1 : -1]
        want = jax.nn.log_softmax(logits)[np.arange(len(logits)), request.tokens]
        np.testing.assert_allclose([one.logprob for one in request.logprobs], want, atol=1e-4)
    choices, tokens = np.concatenate(request.experts), np.array([text[:-1]])
    reports = jax.jit(lambda *given: model.forward(*given).reports)(tokens, np.ones_like(tokens))
    (load,) = (np.atleast_2d(report["load"].value) for report in reports.values() if "load" in report)
    counts = [np.bincount(layer.reshape(-1), minlength=load.shape[1]) for layer in choices.swapaxes(0, 1)]
    assert np.array_equal(counts, load)


def test_a_dense_model_has_no_expert_choices():
    with pytest.raises(ConfigError, match="this model has no experts"):
        Engine(model_of("dense"), EngineConfig(**SETTINGS | {"expert_choices": True}))


def test_samples_come_in_columns_as_single_requests_have_them():
    engine = engine_of("dense")
    ends = dataclasses.replace(HOT, end_ids=tuple(range(0, 64, 9)), logprobs=-1)
    found = engine.sample([PROMPT, [3, 1]], ends, samples=3)
    assert found.prompt.tolist() == [0, 0, 0, 1, 1, 1] and len(set(found.lengths.tolist())) > 1
    for row in range(6):
        one = dataclasses.replace(ends, seed=7 + row, keep_end=True, logprobs=0)
        (want,) = engine.generate([[PROMPT, [3, 1]][row // 3]], one)
        length = found.lengths[row]
        assert found.ids[row, :length].tolist() == want.tokens and not found.ids[row, length:].any()
        np.testing.assert_allclose(found.logprobs[row, :length], [x.logprob for x in want.logprobs], atol=1e-5)
        assert found.ended[row] == (want.finish == "stop") and (found.drawn_logprobs[row, :length] < 0).all()
