"""The model families of the hub that are read and written, one file for each group."""

from opendeep_jax.interop.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from opendeep_jax.interop.families.gemma import GEMMA3
from opendeep_jax.interop.families.gpt_oss import GPT_OSS
from opendeep_jax.interop.families.llama import LLAMA
from opendeep_jax.interop.families.nemotron import NEMOTRON
from opendeep_jax.interop.families.nemotron_h import NEMOTRON_H
from opendeep_jax.interop.families.olmo import OLMO2, OLMO3
from opendeep_jax.interop.families.qwen import QWEN2, QWEN3, QWEN3_MOE

FAMILIES = (
    DEEPSEEK_V3,
    DEEPSEEK_V2,
    LLAMA,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    OLMO2,
    OLMO3,
    GEMMA3,
    GPT_OSS,
    NEMOTRON,
    NEMOTRON_H,
)
"""Families in the order in which they are tried: where two fit, it is written as the first."""

OTHER_NAMES = {"kimi_k2": "deepseek_v3", "gemma3": "gemma3_text"}
"""Model types that are another's architecture."""

BY_MODEL_TYPE = {family.model_type: family for family in FAMILIES}
BY_MODEL_TYPE |= {name: BY_MODEL_TYPE[family] for name, family in OTHER_NAMES.items()}
