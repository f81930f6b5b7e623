"""Model directories of the hub: read whole or refused, and written so that nothing changes."""

import re
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hf_directories import (
    ALL,
    GOLDEN,
    arrays_of,
    assert_same_bits,
    changed_copy,
    family,
    name_of,
    random_model,
    tensors_of,
    write_tensors,
)

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import AttentionConfig, ModelConfig, MoEConfig, MTPConfig
from opendeep_jax.interop import load_hf, save_hf
from opendeep_jax.interop.hf_config import differences
from opendeep_jax.interop.hf_layout import HubTensor
from opendeep_jax.interop.hf_weights import read_into
from opendeep_jax.interop.safetensors import SINGLE_NAME, read_directory


@pytest.mark.parametrize("case", ALL, ids=name_of)
def test_loading_and_saving_gives_back_every_tensor_to_the_bit(case, tmp_path):
    save_hf(load_hf(case), tmp_path / "saved", max_shard_bytes=40_000)
    original, saved = tensors_of(case), tensors_of(tmp_path / "saved")
    repeated = {name for name in saved if name.endswith(("2.embed_tokens.weight", "shared_head.head.weight"))}
    assert bool(repeated) == (case.name == "v3_mtp")
    packed = {name for name in original if name.endswith(("_blocks", "_scales"))}
    unpacked = {name.removesuffix("_blocks") for name in packed if name.endswith("_blocks")}
    assert bool(packed) == (case.name == "gpt_oss_mxfp4")
    assert unpacked <= saved.keys()
    assert_same_bits(
        {name: array for name, array in original.items() if name not in packed},
        {name: array for name, array in saved.items() if name not in repeated | unpacked},
    )


MOE = MoEConfig(num_experts=4, expert_size=8)
SMALL = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    num_layers=3,
    mlp_size=24,
    dtype="float32",
    attention=AttentionConfig(
        num_heads=2, kv_lora_rank=8, q_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5
    ),
    moe=MOE,
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mtp": MTPConfig(depth=2)},
        {"mtp": MTPConfig(depth=1), "tie_embeddings": True},
        {"moe": MoEConfig(), "num_dense_layers": 3},
        {"moe": MoEConfig(), "num_dense_layers": 3, "mtp": MTPConfig(depth=1)},
        {"moe": replace(MOE, num_shared_experts=0), "num_dense_layers": 0},
    ],
)
def test_saving_and_loading_gives_back_the_model_to_the_bit(changes, dtype, tmp_path):
    config = replace(SMALL, dtype=dtype, **changes)
    model = random_model(config)
    save_hf(model, tmp_path / "saved", max_shard_bytes=10_000)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    loaded = load_hf(tmp_path / "saved", jnp.dtype(dtype))
    assert not differences(loaded.config, config)
    assert loaded.config.dtype == dtype
    assert_same_bits(arrays_of(loaded), arrays_of(model))


def test_a_sigmoid_router_without_bias_is_saved_as_one_with_a_bias_of_zero(tmp_path):
    model = random_model(replace(SMALL, moe=replace(MOE, use_router_bias=False)))
    save_hf(model, tmp_path / "saved")
    loaded = load_hf(tmp_path / "saved")
    arrays = arrays_of(loaded)
    assert not np.any(arrays.pop("moe_layers.moe.router_bias"))
    assert_same_bits(arrays, arrays_of(model))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, "bfloat16", np.dtype("float32")])
def test_dtype_sets_parameters_and_computation_but_not_the_router_bias(dtype):
    model = load_hf(GOLDEN / "v3_q_lora", dtype)
    assert model.config.dtype == jnp.dtype(dtype).name
    assert {variable.dtype for variable in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype(dtype)}
    assert model.moe_layers.moe.router_bias.dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.int8, "half", "bfloat"])
def test_a_dtype_that_a_model_cannot_compute_in_is_refused(dtype):
    with pytest.raises(ConfigError, match="float32 or bfloat16"):
        load_hf(GOLDEN / "v3_q_lora", dtype)


def test_bfloat16_files_are_read(tmp_path):
    halved = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors_of(GOLDEN / "v3_tied").items()}
    model = load_hf(changed_copy(GOLDEN / "v3_tied", tmp_path / "model", **halved))
    stored = halved["model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_array_equal(model.embedding.embedding[...], stored)


def test_float8_blocks_are_multiplied_by_their_scales_in_any_part(tmp_path):
    random = np.random.default_rng(0)
    weight = random.normal(size=(200, 300)).astype(ml_dtypes.float8_e4m3fn)
    scale = random.uniform(1, 2, (2, 3)).astype(np.float32)
    write_tensors(tmp_path, {"w": weight, "w_scale_inv": scale})
    stored, tensor = read_directory(tmp_path), HubTensor("w", "attention.query", (), (300, 4, 50), inputs=1)
    whole, part = np.empty((300, 4, 50), np.float32), np.empty((30, 2, 50), np.float32)
    read_into(whole, tensor, stored, (slice(0, 300), slice(0, 4), slice(0, 50)))
    for row, column in [(0, 0), (127, 128), (128, 127), (199, 299)]:
        ours = whole[column, row // 50, row % 50]
        assert ours == np.float32(weight[row, column]) * scale[row // 128, column // 128]
    read_into(part, tensor, stored, (slice(110, 140), slice(2, 4), slice(0, 50)))
    np.testing.assert_array_equal(part, whole[110:140, 2:4])
    read_into(part[..., :7], tensor, stored, (slice(0, 30), slice(1, 3), slice(40, 47)))
    np.testing.assert_array_equal(part[..., :7], whole[:30, 1:3, 40:47])


def test_mxfp4_is_read_in_any_part(tmp_path):
    stored = read_directory(family("gpt_oss_mxfp4"))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    tensor = HubTensor(name, "moe_layers.moe.up", (1,), (5, 64, 32), first=1, step=2)
    whole, part = np.empty((5, 64, 32), np.float32), np.empty((2, 64, 11), np.float32)
    read_into(whole, tensor, stored, (slice(0, 5), slice(0, 64), slice(0, 32)))
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for expert, row, column in [(0, 0, 0), (4, 63, 31), (3, 33, 7)]:
        byte = int(stored[f"{name}_blocks"].read()[expert, 2 * column + 1, row // 32, row % 32 // 2])
        exponent = int(stored[f"{name}_scales"].read()[expert, 2 * column + 1, row // 32]) - 127
        number = byte >> 4 if row % 2 else byte & 15
        assert whole[expert, row, column] == (-1) ** (number >> 3) * values[number & 7] * 2.0**exponent
    read_into(part, tensor, stored, (slice(3, 5), slice(0, 64), slice(20, 31)))
    np.testing.assert_array_equal(part, whole[3:5, :, 20:31])


def test_a_float8_model_is_read(tmp_path):
    name = "model.layers.0.self_attn.o_proj.weight"
    stored = tensors_of(GOLDEN / "v3_tied")[name].astype(ml_dtypes.float8_e4m3fn)
    scale = np.full((1, 1), 0.5, np.float32)
    model = load_hf(changed_copy(GOLDEN / "v3_tied", tmp_path / "model", **{name: stored, name + "_scale_inv": scale}))
    ours = model.dense_layers.attention.out[...][0].reshape(stored.shape[::-1]).T
    np.testing.assert_array_equal(ours, stored.astype(np.float32) * 0.5)


def test_an_announced_mtp_module_may_be_absent(tmp_path):
    model = load_hf(changed_copy(GOLDEN / "v3_q_lora", tmp_path / "model", {"num_nextn_predict_layers": 1}))
    assert (model.config.mtp.depth, len(model.mtp)) == (0, 0)


MTP_COPIES = {
    "model.layers.2.embed_tokens.weight": "model.embed_tokens.weight",
    "model.layers.2.shared_head.head.weight": "lm_head.weight",
}


def test_true_copies_of_shared_tensors_and_old_rotation_buffers_are_passed_over(tmp_path):
    tensors = tensors_of(GOLDEN / "v3_mtp")
    extra = {name: tensors[of] for name, of in MTP_COPIES.items()}
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    directory = changed_copy(GOLDEN / "v3_mtp", tmp_path / "model", **extra)
    assert_same_bits(arrays_of(load_hf(directory)), arrays_of(load_hf(GOLDEN / "v3_mtp")))


@pytest.mark.parametrize("name", MTP_COPIES)
def test_a_copy_with_other_values_than_what_it_repeats_is_refused(name, tmp_path):
    other = tensors_of(GOLDEN / "v3_mtp")[MTP_COPIES[name]].copy()
    other[-1, -1] += 1
    directory = changed_copy(GOLDEN / "v3_mtp", tmp_path / "model", **{name: other})
    with pytest.raises(ConfigError, match=re.escape(f"{name} (must equal {MTP_COPIES[name]})")):
        load_hf(directory)


def test_every_missing_unexpected_and_misshapen_tensor_is_named(tmp_path):
    changes = {
        "model.norm.weight": None,
        "model.layers.1.mlp.experts.5.up_proj.weight": None,
        "model.layers.1.mlp.experts.8.up_proj.weight": np.zeros((16, 32), np.float32),
        "lm_head.weight": np.zeros((96, 31), np.float32),
    }
    with pytest.raises(ConfigError) as error:
        load_hf(changed_copy(GOLDEN / "v3_q_lora", tmp_path / "model", **changes))
    message = str(error.value)
    assert "2 missing: model.layers.1.mlp.experts.5.up_proj.weight, model.norm.weight;" in message
    assert "1 unexpected: model.layers.1.mlp.experts.8.up_proj.weight;" in message
    assert "1 misshapen: lm_head.weight (is [96, 31], must be [96, 32])." in message


def test_a_long_list_of_missing_tensors_is_cut(tmp_path):
    with pytest.raises(ConfigError, match="and 28 more") as error:
        load_hf(changed_copy(GOLDEN / "v3_q_lora", tmp_path / "model", {"n_routed_experts": 16}))
    assert len(str(error.value)) < 3000


def test_truncated_weights_are_refused(tmp_path):
    shutil.copytree(GOLDEN / "v3_q_lora", tmp_path / "model")
    weights = tmp_path / "model" / SINGLE_NAME
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="cut off"):
        load_hf(tmp_path / "model")


def test_another_family_is_refused_before_its_weights_are_looked_at(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ConfigError, match="mamba"):
        load_hf(tmp_path)


def test_saving_never_overwrites_a_model(tmp_path):
    model = load_hf(GOLDEN / "v3_tied")
    save_hf(model, tmp_path / "saved")
    with pytest.raises(ConfigError, match=f"already holds config.json, {SINGLE_NAME}"):
        save_hf(model, tmp_path / "saved")


def test_a_model_without_a_hub_form_leaves_no_directory_behind(tmp_path):
    attention = AttentionConfig(kind="gqa", num_heads=2, num_kv_heads=1, head_dim=4)
    model = random_model(replace(SMALL, attention=attention))
    with pytest.raises(ConfigError, match="no Hugging Face form.*attention.rope.interleaved=True"):
        save_hf(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
