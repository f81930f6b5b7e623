"""config.json of the released models, as their pages have them: the keys that say something about the model.

Written down apart from the recipes, so that each checks the other.
"""

from typing import Any


def sizes(hidden: int, layers: int, heads: int, mlp: int, **more: Any) -> dict[str, Any]:
    """The four that every family has, and more."""
    four = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": mlp}
    return four | more


def llama3_rope(factor: float) -> dict[str, Any]:
    """Llama 3's stretch."""
    bounds = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_scaling": {"rope_type": "llama3", "factor": factor} | bounds}


def deepseek_yarn(factor: float, mscale: float = 1.0, beta_fast: float = 32) -> dict[str, Any]:
    """DeepSeek's YaRN."""
    scaling = {"type": "yarn", "factor": factor, "original_max_position_embeddings": 4096}
    scaling |= {"mscale": mscale, "mscale_all_dim": mscale, "beta_fast": beta_fast, "beta_slow": 1}
    return {"rope_scaling": scaling}


LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
}
SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49_152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
QWEN2_5 = {"model_type": "qwen2", "rope_theta": 1_000_000.0, "use_sliding_window": False, "rms_norm_eps": 1e-6}
QWEN2_5_SMALL = QWEN2_5 | {"vocab_size": 151_936, "num_key_value_heads": 2, "tie_word_embeddings": True}
QWEN2_5_LARGE = QWEN2_5 | {"vocab_size": 152_064, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5}
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "max_position_embeddings": 40_960,
    "attention_bias": False,
}
QWEN3_MOE = QWEN3 | {
    "model_type": "qwen3_moe",
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "rope_local_base_freq": 10_000,
    "sliding_window_pattern": 6,
    "attention_bias": False,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "head_dim": 256,
    "tie_word_embeddings": True,
}
GEMMA3_SMALL = GEMMA3 | {
    "vocab_size": 262_144,
    "sliding_window": 512,
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 1,
}
GEMMA3_LARGE = GEMMA3 | {
    "vocab_size": 262_208,
    "sliding_window": 1024,
    "max_position_embeddings": 131_072,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
}
OLMO2 = {
    "model_type": "olmo2",
    "vocab_size": 100_352,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500_000,
}
OLMO3 = OLMO2 | {
    "model_type": "olmo3",
    "vocab_size": 100_278,
    "max_position_embeddings": 65_536,
    "sliding_window": 4096,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32,
        "beta_slow": 1,
    },
}
GPT_OSS = sizes(2880, 0, 64, 2880) | {
    "model_type": "gpt_oss",
    "vocab_size": 201_088,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_experts_per_tok": 4,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "sliding_window": 128,
    "max_position_embeddings": 131_072,
    "rope_theta": 150_000,
    "swiglu_limit": 7.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
}
NEMOTRON = {
    "model_type": "nemotron",
    "vocab_size": 256_000,
    "hidden_act": "relu2",
    "num_key_value_heads": 8,
    "norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10_000,
    "max_position_embeddings": 4096,
}
DEEPSEEK = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000,
    "max_position_embeddings": 163_840,
    "moe_layer_freq": 1,
}
V2 = DEEPSEEK | {
    "model_type": "deepseek_v2",
    "vocab_size": 102_400,
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
V3 = DEEPSEEK | {
    "model_type": "deepseek_v3",
    "vocab_size": 129_280,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "q_lora_rank": 1536,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 1,
}
ONE_GROUP = {"n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0, "first_k_dense_replace": 1}
MOONLIGHT = ONE_GROUP | {
    "vocab_size": 163_840,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408,
    "routed_scaling_factor": 2.446,
    "rope_theta": 50_000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
}
KIMI_K2 = ONE_GROUP | {
    "vocab_size": 163_840,
    "n_routed_experts": 384,
    "routed_scaling_factor": 2.827,
    "rope_theta": 50_000.0,
    "max_position_embeddings": 131_072,
}
THREE_LOCAL = [*["sliding_attention"] * 3, "full_attention"]
ONE_LOCAL = ["sliding_attention", "full_attention"]

HUB = {
    "llama3:1b": LLAMA3 | sizes(2048, 16, 32, 8192, head_dim=64, tie_word_embeddings=True) | llama3_rope(32.0),
    "llama3:3b": LLAMA3 | sizes(3072, 28, 24, 8192, head_dim=128, tie_word_embeddings=True) | llama3_rope(32.0),
    "llama3:8b": LLAMA3 | sizes(4096, 32, 32, 14_336) | llama3_rope(8.0),
    "llama3:70b": LLAMA3 | sizes(8192, 80, 64, 28_672) | llama3_rope(8.0),
    "llama3:405b": LLAMA3 | sizes(16_384, 126, 128, 53_248) | llama3_rope(8.0),
    "smollm2:135m": SMOLLM2 | sizes(576, 30, 9, 1536, num_key_value_heads=3, rope_theta=100_000),
    "smollm2:360m": SMOLLM2 | sizes(960, 32, 15, 2560, num_key_value_heads=5, rope_theta=100_000),
    "smollm2:1.7b": SMOLLM2 | sizes(2048, 24, 32, 8192, num_key_value_heads=32, rope_theta=130_000),
    "qwen2_5:0.5b": QWEN2_5_SMALL | sizes(896, 24, 14, 4864, max_position_embeddings=32_768),
    "qwen2_5:1.5b": QWEN2_5_SMALL | sizes(1536, 28, 12, 8960, max_position_embeddings=131_072),
    "qwen2_5:3b": QWEN2_5_SMALL | sizes(2048, 36, 16, 11_008, max_position_embeddings=32_768),
    "qwen2_5:7b": QWEN2_5_LARGE | sizes(3584, 28, 28, 18_944, num_key_value_heads=4, rms_norm_eps=1e-6),
    "qwen2_5:14b": QWEN2_5_LARGE | sizes(5120, 48, 40, 13_824, num_key_value_heads=8),
    "qwen2_5:32b": QWEN2_5_LARGE | sizes(5120, 64, 40, 27_648, num_key_value_heads=8),
    "qwen2_5:72b": QWEN2_5_LARGE | sizes(8192, 80, 64, 29_568, num_key_value_heads=8),
    "qwen3:0.6b": QWEN3 | sizes(1024, 28, 16, 3072, tie_word_embeddings=True),
    "qwen3:1.7b": QWEN3 | sizes(2048, 28, 16, 6144, tie_word_embeddings=True),
    "qwen3:4b": QWEN3 | sizes(2560, 36, 32, 9728, tie_word_embeddings=True),
    "qwen3:8b": QWEN3 | sizes(4096, 36, 32, 12_288),
    "qwen3:14b": QWEN3 | sizes(5120, 40, 40, 17_408),
    "qwen3:32b": QWEN3 | sizes(5120, 64, 64, 25_600),
    "qwen3:30b-a3b": QWEN3_MOE | sizes(2048, 48, 32, 6144, moe_intermediate_size=768),
    "qwen3:235b-a22b": QWEN3_MOE | sizes(4096, 94, 64, 12_288, moe_intermediate_size=1536),
    "gemma3:270m": GEMMA3_SMALL | sizes(640, 18, 4, 2048),
    "gemma3:1b": GEMMA3_SMALL | sizes(1152, 26, 4, 6912),
    "gemma3:4b": GEMMA3_LARGE | sizes(2560, 34, 8, 10_240, num_key_value_heads=4),
    "gemma3:12b": GEMMA3_LARGE | sizes(3840, 48, 16, 15_360, num_key_value_heads=8),
    "gemma3:27b": GEMMA3_LARGE
    | sizes(5376, 62, 32, 21_504, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=168),
    "olmo2:1b": OLMO2 | sizes(2048, 16, 16, 8192, num_key_value_heads=16),
    "olmo2:7b": OLMO2 | sizes(4096, 32, 32, 11_008, num_key_value_heads=32),
    "olmo2:13b": OLMO2 | sizes(5120, 40, 40, 13_824, num_key_value_heads=40),
    "olmo2:32b": OLMO2 | sizes(5120, 64, 40, 27_648, num_key_value_heads=8),
    "olmo3:7b": OLMO3 | sizes(4096, 32, 32, 11_008, num_key_value_heads=32, layer_types=THREE_LOCAL * 8),
    "olmo3:32b": OLMO3 | sizes(5120, 64, 40, 27_648, num_key_value_heads=8, layer_types=THREE_LOCAL * 16),
    "gpt_oss:20b": GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32, "layer_types": ONE_LOCAL * 12},
    "gpt_oss:120b": GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128, "layer_types": ONE_LOCAL * 18},
    "nemotron:4b": NEMOTRON | sizes(3072, 32, 24, 9216, head_dim=128),
    "nemotron:8b": NEMOTRON | sizes(4096, 32, 48, 16_384, head_dim=128),
    "nemotron:15b": NEMOTRON | sizes(6144, 32, 48, 24_576, head_dim=128),
    "nemotron:340b": NEMOTRON | sizes(18_432, 96, 96, 73_728, head_dim=192),
    "deepseek:v2-lite": V2
    | sizes(2048, 27, 16, 10_944, num_key_value_heads=16, q_lora_rank=None, n_routed_experts=64)
    | {"moe_intermediate_size": 1408, "n_group": 1, "topk_group": 1, "topk_method": "greedy"}
    | {"routed_scaling_factor": 1.0}
    | deepseek_yarn(40, 0.707),
    "deepseek:v2": V2
    | sizes(5120, 60, 128, 12_288, num_key_value_heads=128, q_lora_rank=1536, n_routed_experts=160)
    | {"moe_intermediate_size": 1536, "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy"}
    | {"routed_scaling_factor": 16.0}
    | deepseek_yarn(40, 0.707),
    "deepseek:v3": V3 | sizes(7168, 61, 128, 18_432, num_key_value_heads=128) | deepseek_yarn(40),
    "deepseek:r1": V3 | sizes(7168, 61, 128, 18_432, num_key_value_heads=128) | deepseek_yarn(40),
    "deepseek:moonlight": V3 | MOONLIGHT | sizes(2048, 27, 16, 11_264, num_key_value_heads=16),
    "deepseek:kimi-k2": V3
    | KIMI_K2
    | sizes(7168, 61, 64, 18_432, num_key_value_heads=64)
    | deepseek_yarn(32.0, beta_fast=1.0),
}
"""By recipe and size."""

PARAMETERS = {
    "llama3:1b": 1_235_814_400,
    "llama3:3b": 3_212_749_824,
    "llama3:8b": 8_030_261_248,
    "llama3:70b": 70_553_706_496,
    "llama3:405b": 405_853_388_800,
    "smollm2:135m": 134_515_008,
    "smollm2:360m": 361_821_120,
    "smollm2:1.7b": 1_711_376_384,
    "qwen2_5:0.5b": 494_032_768,
    "qwen2_5:1.5b": 1_543_714_304,
    "qwen2_5:3b": 3_085_938_688,
    "qwen2_5:7b": 7_615_616_512,
    "qwen2_5:14b": 14_770_033_664,
    "qwen2_5:32b": 32_763_876_352,
    "qwen2_5:72b": 72_706_203_648,
    "qwen3:0.6b": 596_049_920,
    "qwen3:1.7b": 1_720_574_976,
    "qwen3:4b": 4_022_468_096,
    "qwen3:8b": 8_190_735_360,
    "qwen3:14b": 14_768_307_200,
    "qwen3:32b": 32_762_123_264,
    "qwen3:30b-a3b": 30_532_122_624,
    "qwen3:235b-a22b": 235_093_634_560,
    "gemma3:270m": 268_098_176,
    "gemma3:1b": 999_885_952,
    "gemma3:4b": 3_880_263_168,
    "gemma3:12b": 11_766_034_176,
    "gemma3:27b": 27_009_346_304,
    "olmo2:1b": 1_484_916_736,
    "olmo2:7b": 7_298_617_344,
    "olmo2:13b": 13_716_198_400,
    "olmo2:32b": 32_234_279_936,
    "olmo3:7b": 7_298_011_136,
    "olmo3:32b": 32_233_522_176,
    "gpt_oss:20b": 20_914_757_184,
    "gpt_oss:120b": 116_829_156_672,
    "nemotron:4b": 4_190_509_056,
    "nemotron:8b": 8_271_699_968,
    "nemotron:15b": 15_628_775_424,
    "nemotron:340b": 341_029_195_776,
    "deepseek:v2-lite": 15_706_484_224,
    "deepseek:v2": 235_741_434_880,
    "deepseek:v3": 671_026_404_352,
    "deepseek:r1": 671_026_404_352,
    "deepseek:moonlight": 15_960_108_544,
    "deepseek:kimi-k2": 1_026_408_209_408,
}
"""Parameters that transformers 5.23 counts in the model it builds of each (its buffers, as routers' biases, apart)."""
