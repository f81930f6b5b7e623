"""Makes the golden references of families/ from Hugging Face transformers: one directory for each family and variant.

    config.json          as on the hub: rope_theta, rope_scaling, torch_dtype
    transformers.json    the same as transformers 5 writes it: rope_parameters, dtype, every default spelled out
    model.safetensors    float32, as transformers saves it; experts in MXFP4 in one case
    expected.npz         what transformers computes from them, on a CPU in float32:
        tokens            int32 [2, L], L beyond any window
        logits            float32 [2, L, V]
        continuation      int32 [64], greedy, after the first PROMPT tokens of the first row

Run from the repository root in an environment with torch 2.13.0 (CPU), transformers 5.23.0, safetensors 0.8.0 and
numpy 2.4.6 on Python 3.11, with the names of cases or without for all; the tests need none of the first three:

    python tests/golden/make_families.py llama3 gemma3

The weights are drawn wide (fan-in scaled; norms, biases and sinks away from 0 and 1) so that a mistake shows in the
logits. A seed is taken only if no expert and no token of the continuation is chosen by a small margin: a near-tie could
go either way in another implementation without being wrong.
"""

import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.utils import logging

DIRECTORY = Path(__file__).parent / "families"
PROMPT, LENGTH, NEW = 17, 41, 64
MIN_ROUTING_MARGIN, MIN_TOKEN_MARGIN = 5e-4, 3e-3

BASE = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 30,
    "initializer_range": 0.02,
    "intermediate_size": 44,
    "max_position_embeddings": 128,
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 131,
}
LLAMA = BASE | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 8, "mlp_bias": False}
LLAMA |= {"attention_bias": False}
LLAMA3_SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
QWEN2 = BASE | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 48,
    "intermediate_size": 34,
    "max_window_layers": 3,
    "num_hidden_layers": 3,
    "sliding_window": 128,
    "use_sliding_window": False,
}
QWEN3 = BASE | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 8,
    "max_window_layers": 3,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}
QWEN3_MOE = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "moe_intermediate_size": 14,
    "norm_topk_prob": True,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
}
GEMMA3 = {key: value for key, value in BASE.items() if key != "hidden_act"} | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "attn_logit_softcapping": None,
    "attention_bias": False,
    "final_logit_softcapping": None,
    "head_dim": 8,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 24,
    "intermediate_size": 34,
    "num_attention_heads": 4,
    "num_hidden_layers": 7,
    "query_pre_attn_scalar": 7,
    "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 50.0,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "rope_theta": 5000.0,
    "sliding_window": 9,
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
}
OLMO2 = BASE | {
    "architectures": ["Olmo2ForCausalLM"],
    "model_type": "olmo2",
    "attention_bias": False,
    "hidden_size": 48,
    "intermediate_size": 34,
}
OLMO3 = OLMO2 | {
    "architectures": ["Olmo3ForCausalLM"],
    "model_type": "olmo3",
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "num_hidden_layers": 4,
    "rope_theta": 500000,
    "rope_scaling": {
        "attention_factor": 0.1 * math.log(4.0) + 1.0,
        "beta_fast": 2.0,
        "beta_slow": 0.25,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_type": "yarn",
    },
    "sliding_window": 7,
}
GPT_OSS = BASE | {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "experts_per_token": 2,
    "head_dim": 12,
    "initial_context_length": 32,
    "intermediate_size": 18,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_local_experts": 5,
    "output_router_logits": False,
    "rope_scaling": {
        "beta_fast": 2.0,
        "beta_slow": 0.25,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150.0,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 6,
    "swiglu_limit": 1.25,
}
NEMOTRON = {key: value for key, value in BASE.items() if key != "rms_norm_eps"} | {
    "architectures": ["NemotronForCausalLM"],
    "model_type": "nemotron",
    "attention_bias": False,
    "head_dim": 12,
    "hidden_act": "relu2",
    "mlp_bias": False,
    "norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
}
NEMOTRON_H = {key: value for key, value in BASE.items() if key not in ("hidden_act", "rms_norm_eps")} | {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "attention_bias": False,
    "chunk_size": 16,
    "conv_kernel": 4,
    "expand": 2,
    "head_dim": 7,
    "hybrid_override_pattern": "ME*-M",
    "layer_norm_epsilon": 1e-5,
    "mamba_head_dim": 5,
    "mamba_hidden_act": "silu",
    "mamba_num_heads": 6,
    "mamba_proj_bias": False,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "moe_intermediate_size": 14,
    "moe_latent_size": None,
    "moe_shared_expert_intermediate_size": 18,
    "n_group": 1,
    "n_groups": 3,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 5,
    "rms_norm_eps": 1e-5,
    "routed_scaling_factor": 2.5,
    "ssm_state_size": 9,
    "time_step_limit": [0.0, math.inf],
    "time_step_min": 0.001,
    "topk_group": 1,
    "use_bias": False,
    "use_conv_bias": True,
}
for key in ("rope_scaling", "rope_theta"):
    del NEMOTRON_H[key]
DEEPSEEK = BASE | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 12,
    "moe_intermediate_size": 14,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 7,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 3,
    "num_experts_per_tok": 3,
    "num_key_value_heads": 3,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "rms_norm_eps": 1e-2,  # far from the latents' 1e-6
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "v_head_dim": 9,
}
KIMI_YARN = {
    "beta_fast": 2.0,
    "beta_slow": 0.25,
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 32,
    "type": "yarn",
}

CASES = {
    "llama3": LLAMA | {"rope_scaling": LLAMA3_SCALING},
    "llama_tied": LLAMA
    | {"attention_bias": True, "rope_scaling": {"type": "linear", "factor": 2.0}, "tie_word_embeddings": True},
    "llama_biases": LLAMA
    | {"attention_bias": True, "head_dim": 4, "mlp_bias": True, "num_hidden_layers": 2, "num_key_value_heads": 1},
    "smollm2": LLAMA
    | {"is_llama_config": True, "num_key_value_heads": 3, "rope_interleaved": False, "tie_word_embeddings": True},
    "qwen2": QWEN2,
    "qwen2_sliding": QWEN2
    | {"max_window_layers": 1, "sliding_window": 8, "tie_word_embeddings": True, "use_sliding_window": True},
    "qwen3": QWEN3,
    "qwen3_bias": QWEN3
    | {
        "attention_bias": True,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32, "type": "yarn"},
        "tie_word_embeddings": False,
    },
    "qwen3_moe": QWEN3_MOE,
    "qwen3_moe_unnormalized": QWEN3_MOE
    | {"mlp_only_layers": [], "norm_topk_prob": False, "num_hidden_layers": 2, "tie_word_embeddings": True},
    "gemma3": GEMMA3,
    "gemma3_softcapped": GEMMA3
    | {
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 3.0,
        "num_hidden_layers": 4,
        "rope_scaling": None,
        "sliding_window_pattern": 2,
    },
    "olmo2": OLMO2,
    "olmo3": OLMO3,
    "olmo3_bases": OLMO3
    | {
        "attention_bias": True,
        "layer_types": ["full_attention", "sliding_attention"],
        "num_hidden_layers": 2,
        "num_key_value_heads": 6,
        "rope_scaling": {
            "attention_factor": 0.7,
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "rope_type": "yarn",
        },
        "rope_theta": 50.0,  # of the layer that does not slide alone
    },
    "gpt_oss": GPT_OSS,
    "gpt_oss_mxfp4": GPT_OSS
    | {
        "hidden_size": 64,
        "intermediate_size": 32,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_hidden_layers": 2,
        "quantization_config": {
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
            "quant_method": "mxfp4",
        },
    },
    "nemotron": NEMOTRON,
    "nemotron_h": NEMOTRON_H,
    "nemotron_h_biases": NEMOTRON_H
    | {"hybrid_override_pattern": "-ME", "mlp_bias": True, "n_groups": 1, "num_hidden_layers": 3},
    "nemotron_h_dense": NEMOTRON_H
    | {
        "conv_kernel": 3,
        "head_dim": 8,
        "hybrid_override_pattern": "M-MM-*",
        "num_hidden_layers": 6,
        "n_groups": 2,
        "time_step_limit": [0.3, 1.0],  # so that both ends bound some
        "use_conv_bias": False,
    },
    "moonlight": DEEPSEEK,
    "kimi_k2": DEEPSEEK
    | {
        "model_type": "kimi_k2",
        "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
        "n_shared_experts": 1,
        "num_hidden_layers": 2,
        "q_lora_rank": 16,
        "rope_scaling": KIMI_YARN,
        "routed_scaling_factor": 2.827,
    },
}
KNOWN_AS = {"kimi_k2": "deepseek_v3"}  # to transformers, which leaves Kimi K2 to code of its own repository


def transformers_config(config: dict):
    """The transformers configuration object of a hub-style dictionary, without quantization."""
    config = json.loads(json.dumps({key: value for key, value in config.items() if key != "quantization_config"}))
    return AutoConfig.for_model(KNOWN_AS.get(config["model_type"], config.pop("model_type")), **config)


def draw_weights(model: torch.nn.Module, config: dict, seed: int) -> None:
    """Fills every parameter and router bias with numbers that a mistake would show in."""
    generator = torch.Generator().manual_seed(seed)
    zero_centered = config["model_type"] in ("gemma3_text", "nemotron")
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith(("inv_freq", "embed_scale")):
                continue
            if name.endswith(("bias", "sinks")):
                tensor.copy_(0.4 * noise)
            elif "norm" in name:
                tensor.copy_((0 if zero_centered else 1) + 0.3 * noise)
            elif "embed_tokens" in name and not config["tie_word_embeddings"]:
                tensor.copy_(noise)
            elif config["model_type"] == "gpt_oss" and "experts" in name:
                tensor.copy_(noise / math.sqrt(tensor.shape[-2]))  # [experts, in, out]
            else:
                tensor.copy_(noise / math.sqrt(tensor.shape[-1]))


def draw_mxfp4(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Experts' weights in MXFP4 under the hub's names; the model gets what they stand for."""
    generator = torch.Generator().manual_seed(seed)
    packed = {}
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith(("gate_up_proj", "down_proj")):
                experts, rows, columns = tensor.shape
                blocks = torch.randint(256, (experts, columns, rows // 32, 16), generator=generator, dtype=torch.uint8)
                scales = torch.randint(122, 125, blocks.shape[:-1], generator=generator, dtype=torch.uint8)
                packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
                tensor.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    return packed


def watch_routers(model: torch.nn.Module, config: dict) -> list[float]:
    """A list that each forward pass of each router adds the smallest margin of a choice to."""
    margins: list[float] = []

    def watch(router, inputs, _):
        logits = inputs[0].reshape(-1, inputs[0].shape[-1]) @ router.weight.T + getattr(router, "bias", 0.0)
        scores = logits
        if hasattr(router, "e_score_correction_bias"):
            scores = logits.sigmoid() + router.e_score_correction_bias
        ranked = scores.sort(-1, descending=True).values
        chosen = config["num_experts_per_tok"]
        margins.append((ranked[:, chosen - 1] - ranked[:, chosen]).min().item())

    for child in model.modules():
        if type(child).__name__.lower().endswith("topkrouter"):
            child.register_forward_hook(watch)
    return margins


def continued(model: torch.nn.Module, prompt: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The 64 likeliest next tokens, one after the other without a cache, and the smallest margin of a choice."""
    tokens, margin = prompt[None], math.inf
    for _ in range(NEW):
        best = model(input_ids=tokens, use_cache=False).logits[0, -1].topk(2)
        margin = min(margin, (best.values[0] - best.values[1]).item())
        tokens = torch.cat([tokens, best.indices[None, :1]], dim=1)
    return tokens[0, len(prompt) :], margin


def make_case(name: str, config: dict) -> None:
    """Writes one case, with the first seed whose choices are all decisive."""
    model = AutoModelForCausalLM.from_config(
        transformers_config(config), attn_implementation="eager", experts_implementation="eager"
    ).eval()
    for child in model.modules():
        if "time_step_limit" in config and hasattr(child, "time_step_limit"):
            child.time_step_limit = tuple(config["time_step_limit"])  # as in NVIDIA's own code
    margins = watch_routers(model, config)
    has_experts = any("router" in type(child).__name__.lower() for child in model.modules())
    with torch.no_grad():
        for seed in range(2000):
            margins.clear()
            draw_weights(model, config, seed)
            packed = draw_mxfp4(model, seed) if "quantization_config" in config else {}
            tokens = torch.randint(config["vocab_size"], (2, LENGTH), generator=torch.Generator().manual_seed(seed))
            logits = model(input_ids=tokens, use_cache=False).logits
            if min(margins, default=1.0) < MIN_ROUTING_MARGIN:
                continue
            continuation, margin = continued(model, tokens[0, :PROMPT])
            if margin > MIN_TOKEN_MARGIN and min(margins, default=1.0) > MIN_ROUTING_MARGIN:
                break
        else:
            raise SystemExit(f"{name}: no seed is decisive")
    assert bool(margins) == has_experts, "routers are watched"
    directory = DIRECTORY / name
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary)
        written = json.loads((Path(temporary) / "config.json").read_text())
        saved = load_file(Path(temporary) / "model.safetensors")
    if packed:
        saved = {key: value for key, value in saved.items() if f"{key}_blocks" not in packed} | packed
    save_file(saved, directory / "model.safetensors", metadata={"format": "pt"})
    for file, content in (("config.json", config), ("transformers.json", written)):
        (directory / file).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    np.savez_compressed(
        directory / "expected.npz",
        tokens=tokens.numpy().astype(np.int32),
        logits=logits.numpy(),
        continuation=continuation.numpy().astype(np.int32),
    )
    size = sum(path.stat().st_size for path in directory.iterdir())
    print(
        f"{name:24} seed {seed:4}  margins {margin:.1e} {min(margins, default=1.0):.1e}  "
        f"largest logit {logits.abs().max().item():5.2f}  {size / 1e3:.0f} kB",
        flush=True,
    )


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for case in sys.argv[1:] or CASES:
        make_case(case, CASES[case])
