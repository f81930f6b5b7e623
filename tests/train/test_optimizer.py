"""Learning rates at the points that the reports state, AdamW against numpy, Muon matrix by matrix."""

import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import DENSE, OPTIMIZERS, compiled, packed_batch, random_arrays, run_config

from opendeep_jax.checkpoint.files import to_items
from opendeep_jax.config.load import load_recipe
from opendeep_jax.config.schedule import stage_at, step_at_tokens, tokens_before, total_steps
from opendeep_jax.config.schema import FaultsConfig, OptimizerConfig, ParallelConfig, Phase, TrainConfig
from opendeep_jax.faults.health import new_health
from opendeep_jax.faults.injection import gradient_faults
from opendeep_jax.models.parameters import model_definition
from opendeep_jax.parallel.mesh import make_mesh
from opendeep_jax.train.objective import mtp_loss_weight, pretraining
from opendeep_jax.train.optimizer import learning_rate_schedule, make_optimizer
from opendeep_jax.train.state import TrainState, state_shardings
from opendeep_jax.train.step import bias_update_speed, make_train_step

BILLION, TRILLION = 10**9, 10**12


def run(steps=100, **optimizer):
    """A run of a dense model with these optimizer settings."""
    settings = {"learning_rate": 1e-2, "warmup_steps": 0, "schedule": "constant"}
    train = TrainConfig(steps=steps, batch_size=8, compilation_cache="")
    return run_config(DENSE, optimizer=OptimizerConfig(**settings | optimizer), train=train)


def rates(config, *steps):
    """The learning rate at each step, as a fraction of the peak."""
    schedule = learning_rate_schedule(config)
    return [float(schedule(step)) for step in steps]


def test_the_warm_up_begins_at_its_first_stair_and_ends_at_the_peak():
    for schedule in ("constant", "cosine", "wsd"):
        assert rates(run(schedule=schedule, warmup_steps=10), 0, 4, 9, 10) == pytest.approx([0.1, 0.5, 1, 1])


def test_cosine_falls_to_its_final_fraction_over_what_follows_the_warm_up():
    config = run(schedule="cosine", warmup_steps=20, final_fraction=0.1)
    assert rates(config, 20, 60, 100) == pytest.approx([1.0, 0.55, 0.1])
    assert rates(config, 40) == pytest.approx([0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2])


def test_wsd_is_stable_and_then_falls_linearly():
    config = run(schedule="wsd", warmup_steps=10, decay_fraction=0.2, final_fraction=0.0)
    assert rates(config, 10, 79, 80, 90, 100) == pytest.approx([1, 1, 1, 0.5, 0], abs=1e-6)


def test_phases_follow_each_other_from_the_end_of_the_warm_up():
    tokens = 10 * 8 * 16  # ten steps
    phases = (Phase("constant", 1.0, tokens), Phase("linear", 0.5, tokens), Phase("cosine", 0.1, tokens), Phase(to=0.1))
    config = run(schedule="phases", warmup_steps=5, phases=phases)
    assert rates(config, 4, 5, 14, 15, 20, 25, 30, 35, 99) == pytest.approx(
        [1, 1, 1, 1, 0.75, 0.5, 0.3, 0.1, 0.1], abs=1e-6
    )


@pytest.fixture(scope="module")
def v3():
    return load_recipe("deepseek_v3")


def test_v3_learning_rate_is_the_reports_at_every_stage(v3):
    def rate(tokens):
        return v3.optimizer.learning_rate * rates(v3, round(step_at_tokens(v3, tokens)))[0]

    assert v3.optimizer.learning_rate * rates(v3, 0)[0] == pytest.approx(2.2e-4 / 2000, rel=1e-3)
    assert v3.optimizer.learning_rate * rates(v3, 1999)[0] == pytest.approx(2.2e-4)
    assert [rate(TRILLION), rate(10 * TRILLION)] == pytest.approx([2.2e-4] * 2)
    assert rate(12_150 * BILLION) == pytest.approx((2.2e-4 + 2.2e-5) / 2, rel=1e-3)  # half way down the cosine
    assert [rate(14_300 * BILLION), rate(14_632 * BILLION)] == pytest.approx([2.2e-5] * 2, rel=1e-4)
    assert [rate(14_634 * BILLION), rate(14_800 * BILLION)] == pytest.approx([7.3e-6] * 2, rel=1e-4)


def test_v3_batch_grows_from_3072_to_15360_rows_over_469_billion_tokens(v3):
    def rows(tokens):
        return stage_at(v3, math.ceil(step_at_tokens(v3, tokens))).batch_size

    assert rows(0) == 3072
    assert 3072 < rows(300 * BILLION) < 15_360
    assert rows(468 * BILLION) < 15_360 and rows(470 * BILLION) == 15_360


def test_v3_ends_at_14_8_trillion_tokens(v3):
    assert 0 <= tokens_before(v3, total_steps(v3)) - 14_800 * BILLION < 15_360 * 4096


def test_v3_mtp_weight_falls_after_10_trillion_tokens_and_biases_freeze_after_14_3(v3):
    def at(function, tokens):
        return float(function(v3, jnp.int32(math.ceil(step_at_tokens(v3, tokens)))))

    weights = [at(mtp_loss_weight, tokens) for tokens in (0, 9_990 * BILLION, 10_001 * BILLION, 14_800 * BILLION)]
    assert weights == pytest.approx([0.3, 0.3, 0.1, 0.1])
    speeds = [at(bias_update_speed, tokens) for tokens in (0, 14_290 * BILLION, 14_301 * BILLION)]
    assert speeds == pytest.approx([1e-3, 1e-3, 0])


AXES = {
    "matrix": ("embed", "mlp"),
    "norm": ("norm",),
    "stacked_norm": ("layers", "norm"),
    "embedding": ("vocab", "embed"),
    "experts": ("layers", "experts", "embed", "mlp"),
}
SHAPES = {"matrix": (6, 4), "norm": (5,), "stacked_norm": (3, 5), "embedding": (7, 6), "experts": (2, 3, 4, 8)}


def draw(seed, shapes=SHAPES):
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(random.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def three_steps(config, axes=AXES, shapes=SHAPES):
    """The parameters after three updates with fixed gradients, and the optimizer's state."""
    optimizer = make_optimizer(config, axes)

    def go(params, *gradients):
        state = optimizer.init(params)
        for grads in gradients:
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    return compiled(go, draw(0, shapes), *(draw(seed, shapes) for seed in (1, 2, 3)))


@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_adamw_is_the_papers_and_decays_matrices_alone(decay_embeddings):
    config = run(weight_decay=0.3, beta1=0.8, beta2=0.9, epsilon=1e-3, decay_embeddings=decay_embeddings)
    params, _ = three_steps(config)
    decayed = {"matrix", "experts"} | ({"embedding"} if decay_embeddings else set())
    for name, start in draw(0).items():
        x, m, v = np.float64(start), 0.0, 0.0
        for t in (1, 2, 3):
            grad = np.float64(draw(t)[name])
            m, v = 0.8 * m + 0.2 * grad, 0.9 * v + 0.1 * grad**2
            step = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
            x = x - 1e-2 * (step + (0.3 * x if name in decayed else 0))
        np.testing.assert_allclose(params[name], x, rtol=1e-5, atol=1e-6, err_msg=name)


def moments(state, *kinds):
    """The arrays by name of an optimizer state's moments, all or those of the kinds `mu` and `nu`."""
    return {
        (path[-1].key if kinds else path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if any(getattr(key, "name", None) in (kinds or ("mu", "nu")) for key in path)
    }


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_moments_are_stored_in_their_own_dtypes(kind):
    config = run(kind=kind, first_moment_dtype="bfloat16", second_moment_dtype="bfloat16")
    params, state = three_steps(config)
    assert {leaf.dtype for leaf in moments(state).values()} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in params.values()} == {jnp.dtype("float32")}
    exact, _ = three_steps(run(kind=kind))
    for name, value in params.items():
        np.testing.assert_allclose(value, exact[name], atol=2e-3, err_msg=name)  # of steps of 1e-2


def first_update(axes, params, grads, **optimizer):
    """What the first step adds to the parameters."""
    rule = make_optimizer(run(kind="muon", weight_decay=0.0, **optimizer), axes)
    return compiled(lambda params, grads: rule.update(grads, rule.init(params), params)[0], params, grads)


def test_muon_orthogonalizes_every_layers_and_experts_matrix_by_itself():
    params, grads = draw(0), draw(1)
    grads["experts"] *= jnp.array([1.0, 100.0])[:, None, None, None]  # one layer's gradients outweigh the other's
    together = first_update(AXES, params, grads)["experts"]
    for at in np.ndindex(2, 3):
        alone = first_update(
            {"expert": ("embed", "mlp")}, {"expert": params["experts"][at]}, {"expert": grads["experts"][at]}
        )
        np.testing.assert_allclose(together[at], alone["expert"], atol=1e-5)
        strengths = np.linalg.svd(together[at], compute_uv=False)
        # All directions move nearly alike, so much that the update's root mean square is about 0.2 learning rates.
        assert strengths.min() > 0.6 * strengths.max()
        assert np.sqrt(np.mean(np.square(together[at]))) == pytest.approx(0.2 * 1e-2, rel=0.3)


def test_muon_takes_heads_and_head_size_as_one_side_of_the_output_projection():
    shape, flat = {"out": (2, 3, 8)}, {"out": (6, 8)}
    heads = first_update({"out": ("heads", "head_dim", "embed")}, draw(0, shape), draw(1, shape))["out"]
    matrix = first_update({"out": ("mlp", "embed")}, draw(0, flat), draw(1, flat))["out"]
    np.testing.assert_allclose(heads.reshape(6, 8), matrix, atol=1e-5)


def test_muon_leaves_norms_and_embeddings_to_adamw():
    muon, _ = three_steps(run(kind="muon"))
    adamw, _ = three_steps(run(kind="adamw"))
    for name in ("norm", "stacked_norm", "embedding"):
        np.testing.assert_allclose(muon[name], adamw[name], rtol=1e-6)
    for name in ("matrix", "experts"):
        assert np.abs(muon[name] - adamw[name]).max() > 1e-3


def test_muon_decays_matrices():
    plain, decayed = (three_steps(run(kind="muon", weight_decay=weight))[0] for weight in (0.0, 0.5))
    want = draw(0)["matrix"] * (1 - 1e-2 * 0.5) ** 3 + (plain["matrix"] - draw(0)["matrix"])
    np.testing.assert_allclose(decayed["matrix"], want, atol=1e-4)


def test_the_rule_of_a_weight_follows_its_axes_in_a_whole_model():
    from small_models import V3

    definition = model_definition(V3)
    config = dataclasses.replace(run(kind="muon"), model=V3)
    params = {
        name: jax.ShapeDtypeStruct(s.shape, s.dtype) for name, s in definition.shapes().items() if "bias" not in name
    }
    state = jax.eval_shape(make_optimizer(config, definition.axes()).init, params)
    expected = {name for name in params if name.endswith("scale")} | {"embedding.embedding", "head.kernel"}
    assert set(moments(state, "nu")) == expected  # only AdamW keeps a second moment
    assert set(moments(state, "mu")) == set(params)


# ---- bfloat16 storage


def many_updates(config, size, counts, start=0.0, shape=(32, 16)):
    """Weights and state after phases of updates with gradients of one sign for each weight: (gradient, updates)."""
    axes = {"matrix": ("embed", "mlp")}
    rule, dtype = make_optimizer(config, axes), config.model.weight_dtype
    signs = jnp.asarray(np.random.default_rng(0).choice([-1.0, 1.0], shape), jnp.float32)

    def go(params, sizes):
        def update(carry, size):
            params, state = carry
            updates, state = rule.update({"matrix": size * signs}, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(update, (params, rule.init(params)), sizes)[0]

    params = {"matrix": (start + 0.0 * signs).astype(dtype)}
    sizes = jnp.concatenate([jnp.full((count,), part) for part, count in zip(size, counts, strict=True)])
    after, state = compiled(go, params, sizes)
    return (np.float64(params["matrix"]), np.float64(after["matrix"])), state, np.float64(signs)


STICKING = {
    "second moment, 0.99": ("nu", {"beta2": 0.99}),
    "second moment, 0.999": ("nu", {"beta2": 0.999}),
    "first moment, 0.99": ("mu", {"beta1": 0.99}),
    "first moment, 0.999": ("mu", {"beta1": 0.999}),
    "Muon's momentum, 0.999": ("mu", {"kind": "muon", "muon_momentum": 0.999}),
    "V3's second moment, 0.95": ("nu", {"beta2": 0.95}),
}


@pytest.mark.parametrize("moment, settings", STICKING.values(), ids=STICKING)
def test_a_moment_in_bfloat16_falls_again_as_in_exact_arithmetic(moment, settings):
    stored = {"first_moment_dtype": "bfloat16", "second_moment_dtype": "bfloat16", "muon_steps": 1}
    sizes, counts = (1.0, 0.1), (20, 600)
    _, state, signs = many_updates(run(weight_decay=0.0, **stored | settings), sizes, counts)
    found = np.float64(moments(state, moment)["matrix"]) * (signs if moment == "mu" else 1)
    beta, exact = next(value for name, value in settings.items() if "beta" in name or "momentum" in name), 0.0
    for size in np.repeat(sizes, counts):
        exact = beta * exact + (1 - beta) * (size**2 if moment == "nu" else size)
    assert found.mean() == pytest.approx(exact, rel=0.02)
    assert found.std() < 0.1 * exact


SLOW = {
    "AdamW at 1e-5": {"learning_rate": 1e-5, "weight_decay": 0.0},
    "AdamW at 1e-6": {"learning_rate": 1e-6, "weight_decay": 0.0},
    "Muon at 1e-5": {"kind": "muon", "learning_rate": 1e-5, "weight_decay": 0.0},
    "decay alone": {"learning_rate": 1e-4, "weight_decay": 0.1, "epsilon": 1e9},
    "all in bfloat16": {"learning_rate": 1e-5, "first_moment_dtype": "bfloat16", "second_moment_dtype": "bfloat16"},
}


@pytest.mark.parametrize("settings", SLOW.values(), ids=SLOW)
def test_weights_in_bfloat16_learn_at_small_rates_as_in_float32(settings):
    moved = {}
    for dtype in ("float32", "bfloat16"):
        config = run(**settings)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, weight_dtype=dtype))
        (before, after), _, signs = many_updates(config, (1.0,), (200,), start=0.02, shape=(256, 128))
        moved[dtype] = ((after - before) * signs).mean(), (after - before).mean()
    scale = max(map(abs, moved["float32"]))
    np.testing.assert_allclose(moved["bfloat16"], moved["float32"], atol=0.05 * scale)


def test_rounding_is_the_same_on_any_mesh_and_after_a_restart():
    axes = {"matrix": ("embed", "mlp"), "experts": ("layers", "experts", "embed", "mlp")}
    shapes = {"matrix": (8, 16), "experts": (2, 3, 8, 4)}
    config = run(first_moment_dtype="bfloat16", second_moment_dtype="bfloat16")
    rule = make_optimizer(config, axes)
    params = {name: value.astype("bfloat16") for name, value in draw(0, shapes).items()}

    @jax.jit
    def update(grads, state):
        updates, opt_state = rule.update(grads, state.opt_state, state.params)
        return state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)

    def steps(state, *seeds):
        for seed in seeds:
            state = update(draw(seed, shapes), state)
        return state

    start = TrainState(jnp.int32(0), params, rule.init(params), {}, new_health())
    alone, halfway = steps(start, 1, 2, 3), jax.device_get(steps(start, 1))
    jax.tree.map(np.testing.assert_array_equal, steps(halfway, 2, 3), alone)
    mesh = make_mesh(ParallelConfig(data=2, fsdp=4), jax.devices()[:8])
    definition = types.SimpleNamespace(axes=lambda: axes)
    with jax.set_mesh(mesh):
        divided = steps(jax.device_put(start, state_shardings(start, definition, mesh, zero_1=True)), 1, 2, 3)
    jax.tree.map(np.testing.assert_array_equal, divided, alone)


# ---- the run's step


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_applied_rate_is_the_logged_one_after_skipped_updates_and_batches_passed_over(kind):
    model = dataclasses.replace(DENSE, num_layers=1, num_dense_layers=1)
    settings = {"schedule": "cosine", "warmup_steps": 3, "learning_rate": 1e-3, "weight_decay": 0.3}
    config = dataclasses.replace(run(steps=12, kind=kind, **settings), model=model)
    config = dataclasses.replace(config, faults=FaultsConfig(drill=("nan_gradient@1-4",)))
    definition, batch = model_definition(model), packed_batch(rows=2, length=16, seed=1)
    rule = make_optimizer(config, definition.axes())
    params, bias = random_arrays(definition)
    start = TrainState(jnp.int32(0), params, rule.init(params), bias, new_health())
    faults = gradient_faults(config.faults.drill)
    step = jax.jit(make_train_step(config, definition, rule, pretraining(config), faults))

    def go(skipped, passed):
        state = start
        for _ in range(skipped):
            state, output = step(state, batch)
            assert output.check.skipped
        for _ in range(passed):
            state = state._replace(step=state.step + 1)
        after, output = step(state, batch)
        moved = {name: np.float64(after.params[name]) - np.float64(params[name]) for name in params}
        return int(state.step), float(output.metrics["learning_rate"]), moved

    schedule = learning_rate_schedule(config)
    paths = [go(0, 4), go(4, 0), go(4, 3), go(2, 7), go(0, 9)]
    assert [at for at, _, _ in paths] == [4, 4, 7, 9, 9]
    _, base, reference = paths[0]
    for at, logged, moved in paths:
        assert logged == pytest.approx(1e-3 * float(schedule(at)))
        for name in params:
            np.testing.assert_allclose(moved[name] / logged, reference[name] / base, rtol=2e-2, atol=1e-3, err_msg=name)


ADAM = {f".opt_state[0].{field}" for field in ("count", "mu['w']", "nu['w']")} | {".opt_state[2].count"}
BY_MUON, BY_ADAM = (f".opt_state.inner_states['{kind}'].inner_state" for kind in ("muon", "adamw"))
MUON = {f"{BY_MUON}[0].{field}" for field in ("count", "mu['w']", "ns_coeffs")} | {f"{BY_MUON}[3].count"}
MUON |= {f"{BY_ADAM}[{field}" for field in ("0].count", "2].count")}


@pytest.mark.parametrize("kind, names", [("adamw", ADAM), ("muon", MUON)])
def test_the_optimizers_arrays_have_the_names_that_older_checkpoints_have(kind, names):
    rule = make_optimizer(run(kind=kind), {"w": ("embed", "mlp")})
    params = {"w": jnp.zeros((4, 4))}
    state = TrainState(jnp.int32(0), params, rule.init(params), {}, new_health())
    assert {name for name in to_items(state)["optimizer"] if "opt_state" in name} == names
