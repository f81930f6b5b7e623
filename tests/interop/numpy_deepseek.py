"""DeepSeek-V3's forward pass in float64 NumPy, written from the reports with plain loops: a second opinion.

It shares no code with `opendeep_jax` or with transformers, reads the hub's files by itself, goes token by token and
head by head, and is right before it is fast. One sequence at a time: L tokens, D width, V vocabulary.
"""

import json
import math
from pathlib import Path

import numpy as np


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The float32 tensors of a safetensors file, as float64."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            assert entry["dtype"] == "F32", name
            begin, end = entry["data_offsets"]
            values = np.frombuffer(data[start + begin : start + end], np.float32)
            tensors[name] = values.reshape(entry["shape"]).astype(np.float64)
    return tensors


def forward(directory: Path, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Logits [L, V] of the main model, and of the MTP module [L - 1, V] if the files hold one, for tokens [L]."""
    config = json.loads((directory / "config.json").read_text())
    weights = read_tensors(directory / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    head = weights.get("lm_head.weight", embedding)
    hidden = embedding[tokens]
    for layer in range(config["num_hidden_layers"]):
        hidden = block(config, weights, layer, hidden)
    hidden = normalize(hidden, weights["model.norm.weight"])
    mtp_logits = None
    layer = config["num_hidden_layers"]
    prefix = f"model.layers.{layer}."
    if prefix + "eh_proj.weight" in weights:
        next_embedding = normalize(embedding[tokens[1:]], weights[prefix + "enorm.weight"])
        previous = normalize(hidden[:-1], weights[prefix + "hnorm.weight"])
        joined = np.concatenate([next_embedding, previous], axis=1) @ weights[prefix + "eh_proj.weight"].T
        output = block(config, weights, layer, joined)
        mtp_logits = normalize(output, weights[prefix + "shared_head.norm.weight"]) @ head.T
    return hidden @ head.T, mtp_logits


def block(config: dict, weights: dict, layer: int, hidden: np.ndarray) -> np.ndarray:
    """One transformer block, on [L, D]."""
    w = {name.removeprefix(f"model.layers.{layer}."): value for name, value in weights.items()}
    hidden = hidden + attention(config, w, normalize(hidden, w["input_layernorm.weight"]))
    inputs = normalize(hidden, w["post_attention_layernorm.weight"])
    if layer < config["first_k_dense_replace"]:
        return hidden + swiglu(w, "mlp.", inputs)
    return hidden + np.stack([mixture(config, w, token) for token in inputs])


def normalize(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """RMSNorm over the last axis."""
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * scale


def swiglu(w: dict, prefix: str, x: np.ndarray) -> np.ndarray:
    """down(silu(gate x) * up x)."""
    gate = x @ w[prefix + "gate_proj.weight"].T
    up = x @ w[prefix + "up_proj.weight"].T
    return (gate / (1 + np.exp(-gate)) * up) @ w[prefix + "down_proj.weight"].T


def attention(config: dict, w: dict, x: np.ndarray) -> np.ndarray:
    """Multi-head latent attention on [L, D], each query on its own."""
    nope, rotated, size = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    latent_size, heads = config["kv_lora_rank"], config["num_attention_heads"]
    if config["q_lora_rank"]:
        compressed = normalize(x @ w["self_attn.q_a_proj.weight"].T, w["self_attn.q_a_layernorm.weight"])
        queries = compressed @ w["self_attn.q_b_proj.weight"].T
    else:
        queries = x @ w["self_attn.q_proj.weight"].T
    down = x @ w["self_attn.kv_a_proj_with_mqa.weight"].T
    latent = normalize(down[:, :latent_size], w["self_attn.kv_a_layernorm.weight"])
    keys_and_values = (latent @ w["self_attn.kv_b_proj.weight"].T).reshape(len(x), heads, nope + size)
    queries = queries.reshape(len(x), heads, nope + rotated)
    frequencies, turn_scale, score_scale = rope_constants(config)
    shared_key = [rotate(down[i, latent_size:], i, frequencies, turn_scale) for i in range(len(x))]
    outputs = np.zeros((len(x), heads * size))
    for i in range(len(x)):
        for h in range(heads):
            query = np.concatenate([queries[i, h, :nope], rotate(queries[i, h, nope:], i, frequencies, turn_scale)])
            scores = np.array(
                [query @ np.concatenate([keys_and_values[j, h, :nope], shared_key[j]]) for j in range(i + 1)]
            )
            share = np.exp(scores * score_scale - (scores * score_scale).max())
            share /= share.sum()
            outputs[i, h * size : (h + 1) * size] = share @ keys_and_values[: i + 1, h, nope:]
    return outputs @ w["self_attn.o_proj.weight"].T


def rope_constants(config: dict) -> tuple[list[float], float, float]:
    """Angle per position of each pair, the factor on cosine and sine, and the factor on attention scores."""
    size, base = config["qk_rope_head_dim"], config["rope_theta"]
    frequencies = [base ** (-2 * pair / size) for pair in range(size // 2)]
    score_scale = 1 / math.sqrt(config["qk_nope_head_dim"] + size)
    yarn = config["rope_scaling"]
    if yarn is None:
        return frequencies, 1.0, score_scale

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(yarn["factor"]) + 1

    def pair_with_turns(turns: float) -> float:  # the pair that turns this often within the original length
        return size / 2 * math.log(yarn["original_max_position_embeddings"] / (2 * math.pi * turns)) / math.log(base)

    first, last = math.floor(pair_with_turns(yarn["beta_fast"])), math.ceil(pair_with_turns(yarn["beta_slow"]))
    assert 0 <= first < last < size, "the ramp needs no clipping in these models"
    for pair in range(size // 2):
        stretched = min(max((pair - first) / (last - first), 0), 1)
        frequencies[pair] *= 1 - stretched + stretched / yarn["factor"]
    turn_scale = temperature(yarn["mscale"]) / temperature(yarn["mscale_all_dim"])
    return frequencies, turn_scale, score_scale * temperature(yarn["mscale_all_dim"]) ** 2


def rotate(x: np.ndarray, position: int, frequencies: list[float], scale: float) -> np.ndarray:
    """Turns each pair (0, 1), (2, 3), ... of [R], as complex numbers."""
    turned = (x[0::2] + 1j * x[1::2]) * np.exp(1j * position * np.array(frequencies)) * scale
    return np.stack([turned.real, turned.imag], axis=-1).ravel()


def mixture(config: dict, w: dict, x: np.ndarray) -> np.ndarray:
    """The experts' output for one token [D]."""
    scores = 1 / (1 + np.exp(-(w["mlp.gate.weight"] @ x)))
    biased = scores + w["mlp.gate.e_score_correction_bias"]
    groups = np.split(np.arange(len(scores)), config["n_group"])
    best_groups = sorted(groups, key=lambda group: -np.sort(biased[group])[-2:].sum())[: config["topk_group"]]
    candidates = [expert for group in best_groups for expert in group]
    chosen = sorted(candidates, key=lambda expert: -biased[expert])[: config["num_experts_per_tok"]]
    total = sum(scores[expert] for expert in chosen) if config["norm_topk_prob"] else 1.0
    output = swiglu(w, "mlp.shared_experts.", x)
    for expert in chosen:
        weight = scores[expert] / total * config["routed_scaling_factor"]
        output = output + weight * swiglu(w, f"mlp.experts.{expert}.", x)
    return output
