"""Our decoder computes what Hugging Face transformers computes: tests/golden/, made by make_golden.py there."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy_deepseek import forward

from opendeep_jax.interop import config_from_hf, load_hf
from opendeep_jax.interop.hf_config import family_of
from opendeep_jax.interop.hf_layout import layout
from opendeep_jax.ops import rope

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))


def expected(case: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / case / "expected.npz") as file:
        return dict(file)


def mean_loss(logits, tokens):
    """Mean next-token cross-entropy in nats."""
    log_probabilities = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1).mean()


def test_every_mechanism_of_the_family_has_a_case():
    configs = [config_from_hf(GOLDEN / case) for case in CASES]
    assert {config.attention.q_lora_rank > 0 for config in configs} == {True, False}
    assert {config.attention.rope.yarn_factor > 1 for config in configs} == {True, False}
    assert {config.moe.num_groups > 1 for config in configs} == {True, False}
    assert {config.moe.scoring for config in configs} == {"sigmoid", "softmax"}
    assert {config.moe.normalize_weights for config in configs} == {True, False}
    assert {config.tie_embeddings for config in configs} == {True, False}
    assert {config.moe.num_shared_experts for config in configs} == {1, 2}
    assert {config.num_dense_layers for config in configs} == {0, 1, 2}
    assert {config.mtp.depth for config in configs} == {0, 1}


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_equal_those_of_transformers(case):
    golden = expected(case)
    model = load_hf(GOLDEN / case)
    tokens = jnp.asarray(golden["tokens"])
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_and_logits(params):
        logits = nnx.merge(graph, params, rest)(tokens)
        return mean_loss(logits, tokens), logits

    (loss, logits), gradients = jax.jit(jax.value_and_grad(loss_and_logits, has_aux=True))(params)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-4)

    arrays = {".".join(map(str, path)): np.asarray(variable[...]) for path, variable in nnx.to_flat_state(gradients)}
    total = np.sqrt(sum(np.sum(np.square(array, dtype=np.float64)) for array in arrays.values()))
    np.testing.assert_allclose(total, golden["grad_norm"], rtol=1e-4)
    norms = {
        tensor.name: np.linalg.norm(arrays[tensor.path][tensor.index])
        for tensor in layout(
            {path: array.shape for path, array in arrays.items()}, model.config, family_of(model.config)
        )
        if not tensor.path.startswith("mtp")
    }
    assert set(norms) == set(golden["tensor_names"])
    np.testing.assert_allclose(
        [norms[name] for name in golden["tensor_names"]], golden["tensor_grad_norms"], rtol=1e-4, atol=1e-5 * total
    )


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("v3")])
def test_a_plain_numpy_forward_pass_gives_the_golden_logits_too(case):
    golden = expected(case)
    logits, mtp_logits = forward(GOLDEN / case, golden["tokens"][0])
    np.testing.assert_allclose(logits, golden["logits"][0], atol=1e-5, rtol=0)
    assert (mtp_logits is None) == ("mtp_logits" not in golden)
    if mtp_logits is not None:
        np.testing.assert_allclose(mtp_logits, golden["mtp_logits"][0], atol=1e-5, rtol=0)


def test_logits_equal_those_of_a_plain_numpy_forward_pass_on_other_tokens():
    tokens = np.arange(40) * 7 % 96
    reference, _ = forward(GOLDEN / "v3_yarn_two_mscales", tokens)
    model = load_hf(GOLDEN / "v3_yarn_two_mscales")
    logits = jax.jit(model.__call__)(jnp.asarray(tokens)[None])
    np.testing.assert_allclose(logits[0], reference, atol=1e-4, rtol=0)


def test_mtp_logits_equal_those_of_transformers():
    golden = expected("v3_mtp")
    model = load_hf(GOLDEN / "v3_mtp")
    tokens = jnp.asarray(golden["tokens"])

    def mtp_logits(tokens):
        (hidden,) = model.forward(tokens, mtp_tokens=[jnp.roll(tokens, -1, axis=1)]).mtp_hidden
        return hidden @ model.head_kernel()

    np.testing.assert_allclose(jax.jit(mtp_logits)(tokens)[:, :-1], golden["mtp_logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_rotation_frequencies_equal_those_of_transformers(case):
    golden, config = expected(case), config_from_hf(GOLDEN / case)
    ours = rope.frequencies(config.attention.rope, config.attention.qk_rope_head_dim)
    np.testing.assert_allclose(ours, golden["inverse_frequencies"], rtol=1e-6)


@pytest.mark.parametrize(("name", "mscale"), [("deepseek_v3", 1.0), ("deepseek_v2_lite", 0.707)])
def test_yarn_of_the_released_models_equals_that_of_transformers(name, mscale):
    yarn = config_from_hf(GOLDEN / "v3_yarn").attention.rope
    yarn = type(yarn)(yarn_factor=40.0, yarn_original_length=4096, yarn_mscale=mscale, yarn_mscale_all_dim=mscale)
    with np.load(GOLDEN / "rope.npz") as file:
        np.testing.assert_allclose(rope.frequencies(yarn, 64), file[f"{name}.inverse_frequencies"], rtol=1e-6)
        cosine, _ = rope.rotations(yarn, jnp.zeros((1, 1), jnp.int32), 64)
        np.testing.assert_allclose(cosine, file[f"{name}.attention_factor"], rtol=1e-6)
