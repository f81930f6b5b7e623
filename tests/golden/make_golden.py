"""Makes the golden references in this directory from Hugging Face transformers.

Each case is a directory that looks like a DeepSeek repository on the hub, with tiny random weights:

    config.json          hub-style keys (rope_theta, rope_scaling, torch_dtype)
    model.safetensors    float32, hub names (one tensor per expert)
    expected.npz         what transformers computes from them, on a CPU in float32:
        tokens            int32 [B, L]
        logits            float32 [B, L, V]
        loss              float32 [], mean next-token cross-entropy over B * (L - 1) predictions, nats
        grad_norm         float32 [], global norm of its gradient over all parameters
        tensor_names      str [T], the hub name of every tensor that takes a gradient
        tensor_grad_norms float32 [T], norm of the gradient by tensor
        inverse_frequencies float32 [R / 2], radians per position, and attention_factor float32 [], on cos and sin
        mtp_logits        float32 [B, L - 1, V], only with an MTP module: position i sees token i + 1, predicts i + 2

`rope.npz` holds the YaRN frequencies of the real DeepSeek-V3 and DeepSeek-V2-Lite.

Run from the repository root in an environment with torch 2.13.0 (CPU), transformers 5.23.0, safetensors 0.8.0 and
numpy 2.4.6 on Python 3.11; the tests need none of the first three:

    python tests/golden/make_golden.py

The weights are drawn wide (fan-in scaled, norm weights away from one, router biases away from zero) so that a mistake
shows in the logits, and a seed is taken only if no expert or group is chosen by a margin under MIN_MARGIN: a
near-tie could go either way in another implementation without being wrong.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

DIRECTORY = Path(__file__).parent
MIN_MARGIN = 2e-4

V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "kv_lora_rank": 16,
    "max_position_embeddings": 64,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 16,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "float32",
    "transformers_version": "5.23.0",
    "use_cache": True,
    "v_head_dim": 10,
    "vocab_size": 96,
}
V2 = V3 | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "n_group": 1,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "q_lora_rank": None,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_group": 1,
    "topk_method": "greedy",
}
del V2["num_nextn_predict_layers"]
# With LONG below, the correction range is 1.22 to 3.93: rounded at both ends, and the ramp between has inner points.
YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 32,
    "beta_fast": 2,
    "beta_slow": 0.25,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
LONG = {"rope_theta": 100, "qk_rope_head_dim": 12, "max_position_embeddings": 1280}

CASES = {
    "v3_q_lora": V3,
    "v3_no_q_lora": V3 | {"q_lora_rank": None, "first_k_dense_replace": 2, "n_shared_experts": 2},
    "v3_ungrouped": V3 | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "num_hidden_layers": 2},
    "v3_wide_groups": V3
    | {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "norm_topk_prob": False, "routed_scaling_factor": 1.5},
    "v3_yarn": V3 | LONG | {"rope_scaling": YARN, "num_hidden_layers": 2},
    "v3_yarn_two_mscales": V3
    | LONG
    | {"rope_scaling": YARN | {"mscale": 1.3, "mscale_all_dim": 0.6}, "num_hidden_layers": 2, "q_lora_rank": None},
    "v3_tied": V3 | {"tie_word_embeddings": True, "num_hidden_layers": 2},
    "v3_mtp": V3 | {"num_nextn_predict_layers": 1, "num_hidden_layers": 2},
    "v2_lite": V2 | LONG | {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    "v2_grouped": V2
    | {
        "q_lora_rank": 24,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
        "num_hidden_layers": 2,
    },
}
REAL_YARN = YARN | {"original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
REAL_ROPES = {"deepseek_v3": REAL_YARN, "deepseek_v2_lite": REAL_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}}


def transformers_config(config: dict):
    """The transformers configuration object of a hub-style dictionary."""
    kind = {"deepseek_v2": DeepseekV2Config, "deepseek_v3": DeepseekV3Config}[config["model_type"]]
    return kind(**json.loads(json.dumps(config)))


def draw_weights(module: torch.nn.Module, config: dict, seed: int) -> None:
    """Fills every parameter and router bias with numbers that a mistake would show in."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, tensor in tensors.items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(0.2 * noise)
            elif "norm" in name:
                tensor.copy_(1 + 0.3 * noise)
            elif "embed_tokens" in name and not config["tie_word_embeddings"]:
                tensor.copy_(noise)
            elif not name.endswith("inv_freq"):
                tensor.copy_(noise / math.sqrt(tensor.shape[-1]))


def hub_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Transformers' stacked experts under the hub's names: one gate, up and down projection for each expert."""
    hub = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            for expert, (gate, up) in enumerate(t.chunk(2) for t in tensor):
                hub[f"{prefix}{expert}.gate_proj.weight"] = gate
                hub[f"{prefix}{expert}.up_proj.weight"] = up
        elif name.endswith("experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            for expert, down in enumerate(tensor):
                hub[f"{prefix}{expert}.down_proj.weight"] = down
        else:
            hub[name] = tensor
    return {name: tensor.detach().clone().contiguous() for name, tensor in hub.items()}


def hub_mtp_tensors(mtp: MtpModel, num_layers: int) -> dict[str, torch.Tensor]:
    """The MTP modules as the hub stores them: layers after the last one, without the copies of embedding and head."""
    renamed = {}
    for name, tensor in mtp.layers.state_dict().items():
        index, rest = name.split(".", 1)
        rest = rest.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
        renamed[f"model.layers.{num_layers + int(index)}.{rest}"] = tensor
    return hub_tensors(renamed)


def routing_margin(config: dict, router: torch.nn.Module, inputs: torch.Tensor) -> float:
    """The smallest score difference that decides a choice of group or expert for any of the inputs [T, D]."""
    logits = inputs.reshape(-1, inputs.shape[-1]) @ router.weight.T
    grouped = config["topk_method"] != "greedy" and config["n_group"] > config["topk_group"]
    v3 = config["model_type"] == "deepseek_v3"
    scores = logits.sigmoid() + router.e_score_correction_bias if v3 else logits.softmax(-1)
    margin = math.inf
    if grouped:
        by_group = scores.view(len(scores), config["n_group"], -1)
        group_scores = by_group.topk(2, dim=-1).values.sum(-1) if v3 else by_group.amax(-1)
        ranked = group_scores.sort(-1, descending=True)
        kept = config["topk_group"]
        margin = (ranked.values[:, kept - 1] - ranked.values[:, kept]).min().item()
        keep = torch.zeros_like(group_scores).scatter_(1, ranked.indices[:, :kept], 1.0).bool()
        scores = by_group.masked_fill(~keep[:, :, None], -math.inf).flatten(1)
    ranked = scores.sort(-1, descending=True).values
    chosen = config["num_experts_per_tok"]
    return min(margin, (ranked[:, chosen - 1] - ranked[:, chosen]).min().item())


def watch_routers(config: dict, module: torch.nn.Module) -> list[float]:
    """A list that each forward pass of each router in the module adds its margin to."""
    margins: list[float] = []
    for child in module.modules():
        if type(child).__name__.endswith("TopkRouter"):
            child.register_forward_hook(
                lambda router, inputs, _: margins.append(routing_margin(config, router, inputs[0].detach()))
            )
    return margins


def mtp_logits(model: torch.nn.Module, mtp: MtpModel, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of the first MTP module at positions 0 to L - 2, from the main model's last hidden states [B, L, D]."""
    length = tokens.shape[1] - 1
    positions = torch.arange(length)[None]
    mask = torch.full((length, length), -math.inf).triu(1)[None, None]
    output = mtp.layers[0](
        inputs_embeds=model.model.embed_tokens(tokens[:, 1:]),
        previous_hidden_state=hidden[:, :-1],
        position_embeddings=model.model.rotary_emb(hidden, positions),
        attention_mask=mask,
        position_ids=positions,
        past_key_values=None,
    )
    return model.lm_head(output)


def make_case(name: str, config: dict) -> None:
    """Writes one case, with the first seed whose routing is decisive."""
    kind = {"deepseek_v2": DeepseekV2ForCausalLM, "deepseek_v3": DeepseekV3ForCausalLM}[config["model_type"]]
    model = kind._from_config(transformers_config(config), attn_implementation="eager", experts_implementation="eager")
    depth = config.get("num_nextn_predict_layers", 0)
    mtp = MtpModel(model, depth) if depth else None
    margins = watch_routers(config, torch.nn.ModuleList([model] + ([mtp.layers] if mtp else [])))
    batch, length = (1, 72) if config["rope_scaling"] else (2, 24)
    for seed in range(1000):
        draw_weights(model, config, seed)
        if mtp:
            draw_weights(mtp.layers, config, seed + 1000)
        tokens = torch.randint(config["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))
        margins.clear()
        model.zero_grad()
        output = model(input_ids=tokens, labels=tokens, output_hidden_states=True, use_cache=False)
        expected = {}
        if mtp:
            last = model.model(input_ids=tokens, use_cache=False).last_hidden_state
            with torch.no_grad():
                expected["mtp_logits"] = mtp_logits(model, mtp, tokens, last).numpy()
        if min(margins) > MIN_MARGIN:
            break
    output.loss.backward()
    tensors = hub_tensors(model.state_dict())
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    gradients = hub_tensors({name: p.grad for name, p in model.named_parameters()})
    norms = {name: gradient.norm().item() for name, gradient in gradients.items()}
    rotary = model.model.rotary_emb
    expected |= {
        "tokens": tokens.numpy().astype(np.int32),
        "logits": output.logits.detach().numpy(),
        "loss": np.float32(output.loss.item()),
        "grad_norm": np.float32(math.hypot(*norms.values())),
        "tensor_names": np.array(list(norms)),
        "tensor_grad_norms": np.array(list(norms.values()), np.float32),
        "inverse_frequencies": rotary.inv_freq.numpy(),
        "attention_factor": np.float32(rotary.attention_scaling),
    }
    directory = DIRECTORY / name
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(
        tensors | (hub_mtp_tensors(mtp, config["num_hidden_layers"]) if mtp else {}),
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    np.savez_compressed(directory / "expected.npz", **expected)

    # Transformers must read the directory back as a hub repository and agree with itself.
    again, report = kind.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"], report
    with torch.no_grad():
        difference = (again(tokens).logits - output.logits).abs().max().item()
    assert difference < 1e-4, difference
    print(
        f"{name:20} seed {seed:3}  loss {output.loss.item():.4f}  |grad| {expected['grad_norm']:.4f}  "
        f"margin {min(margins):.1e}  largest logit {output.logits.abs().max().item():.2f}  reloaded {difference:.1e}"
    )


def make_ropes() -> None:
    """Writes the frequencies and attention factors of the real models."""
    arrays = {}
    for name, scaling in REAL_ROPES.items():
        real = {"qk_rope_head_dim": 64, "max_position_embeddings": 163840, "rope_scaling": scaling}
        config = transformers_config(V3 | real)
        frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](config)
        arrays[f"{name}.inverse_frequencies"] = frequencies.numpy()
        arrays[f"{name}.attention_factor"] = np.float32(factor)
    np.savez_compressed(DIRECTORY / "rope.npz", **arrays)


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for case, case_config in CASES.items():
        make_case(case, case_config)
    make_ropes()
