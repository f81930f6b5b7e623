"""Rules for the fields of a model's configuration: generators of sentences about violations.

As `rules.py` has them for a run. Standard library only.
"""

import math
from collections.abc import Iterator
from typing import Any

from opendeep_jax.config.limits import ABOVE_0, FROM_0, FROM_1
from opendeep_jax.config.sentences import limited, problem

REMAT_NAMES = (
    "q_latent",
    "kv_latent",
    "query",
    "key_value",
    "attention_output",
    "residual",
    "router_logits",
    "routing",
    "mlp_gate",
    "mlp_up",
    "expert_gate",
    "expert_up",
    "mamba_input",
)
"""Activations that the blocks name, and that `model.remat.names` may list."""

OFFLOAD_NAMES = (*REMAT_NAMES, "block_input")
"""Activations that `model.remat.offload` may list."""


def model_problems(model: Any) -> Iterator[str]:
    """Yield a sentence for each rule that a `ModelConfig` breaks."""
    if model.activation == "clamped_swiglu" and not model.gated_mlp:
        yield problem("model.gated_mlp", False, "clamped_swiglu multiplies a gate by a projection", "Set it to True")
    if model.num_dense_layers > model.num_layers and not model.layer_pattern:
        yield problem(
            "model.num_dense_layers",
            model.num_dense_layers,
            f"cannot exceed model.num_layers, which is {model.num_layers}",
            "Lower it or add layers",
        )
    for layer in model.attention.sliding_layers:
        if not 0 <= layer < model.num_layers:
            yield problem(
                "model.attention.sliding_layers",
                layer,
                f"is the index of no layer; model.num_layers is {model.num_layers}",
                f"Use indices from 0 to {model.num_layers - 1}",
            )
    if "-" in model.layer_pattern or (not model.layer_pattern and model.num_leading_dense_layers > 0):
        yield from limited(FROM_1, "model", model, "mlp_size")
    if model.layer_pattern:
        yield from _hybrid_problems(model)
    yield from _attention_problems(model.attention)
    yield from _mamba_problems(model.mamba)
    if model.moe.num_experts > 0:
        yield from _moe_problems(model.moe)
        if model.moe.expert_bias and not model.gated_mlp:
            yield problem("model.moe.expert_bias", True, "is for experts with a gate", "Set gated_mlp to True")
    for name in model.remat.names:
        if name not in REMAT_NAMES:
            yield problem("model.remat.names", name, "names no activation", f"Known names: {', '.join(REMAT_NAMES)}")
    for name in model.remat.offload:
        if name not in OFFLOAD_NAMES:
            known = ", ".join(OFFLOAD_NAMES)
            yield problem("model.remat.offload", name, "names no activation", f"Known names: {known}")


LETTERS = {"M": "Mamba-2", "*": "attention", "-": "a feed-forward", "E": "a mixture of experts"}


def _hybrid_problems(model: Any) -> Iterator[str]:
    pattern, name = model.layer_pattern, "model.layer_pattern"
    known = ", ".join(f"{letter} for {kind}" for letter, kind in LETTERS.items())
    if unknown := sorted(set(pattern) - set(LETTERS)):
        yield problem(name, unknown[0], "is the letter of no layer", f"Known letters: {known}")
    if len(pattern) != model.num_layers:
        rule = f"has {len(pattern)} letters for model.num_layers = {model.num_layers} layers"
        yield problem(name, pattern[:100], rule, "Write one letter for each")
    if ("E" in pattern) != (model.moe.num_experts > 0):
        rule = f"model.moe.num_experts is {model.moe.num_experts}"
        yield problem(name, pattern[:100], rule, "Layers E and experts need each other")
    for field, only in (("norm_placement", "pre"), ("mtp.depth", 0), ("attention.sliding_layers", ())):
        value = model
        for part in field.split("."):
            value = getattr(value, part)
        if value != only:
            yield problem(f"model.{field}", value, f"must be {only!r} where layer_pattern is given", "")


def _mamba_problems(mamba: Any) -> Iterator[str]:
    where = "model.mamba"
    if 0 < mamba.time_step_max <= mamba.time_step_min:
        rule = f"must be above time_step_min, which is {mamba.time_step_min}, or 0 for no bound"
        yield problem(f"{where}.time_step_max", mamba.time_step_max, rule, "")
    if mamba.num_groups > 0 and mamba.num_heads % mamba.num_groups:
        rule = f"must be a multiple of num_groups, which is {mamba.num_groups}"
        yield problem(f"{where}.num_heads", mamba.num_heads, rule, "Heads are divided among the groups")


HYBRID_MESH_AXES = ("stage", "context", "tensor")


def hybrid_mesh_problems(model: Any, sizes: dict[str, int]) -> Iterator[str]:
    """Yield a sentence for each axis of a mesh that a hybrid, or experts without a gate, can't be divided over.

    Args:
        sizes: devices along each axis; -1 is not known yet.
    """
    for axis in HYBRID_MESH_AXES if model.layer_pattern else ():
        if sizes.get(axis, 1) > 1:
            rule = "a hybrid (model.layer_pattern) is divided over data and fsdp only: a state needs the whole row"
            yield problem(f"parallel.{axis}", sizes[axis], rule, "Set it to 1")
    if sizes.get("expert", 1) > 1 and model.moe.num_experts and not model.gated_mlp:
        rule = "experts without a gate (model.gated_mlp=False) stay on one device"
        yield problem("parallel.expert", sizes["expert"], rule, "Set it to 1")


def _attention_problems(attention: Any) -> Iterator[str]:
    where = "model.attention"
    if attention.kind == "mla":
        yield from limited(FROM_0, where, attention, "q_lora_rank")
        yield from limited(
            FROM_1, where, attention, "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"
        )
        rotated = "qk_rope_head_dim"
        yield from limited(ABOVE_0, where, attention, "latent_norm_epsilon")
        yield from _gqa_only_problems(attention)
    else:
        yield from limited(FROM_1, where, attention, "num_kv_heads", "head_dim")
        yield from limited(FROM_0, where, attention, "rotary_dim", "window", "sliding_rope_theta", "logit_softcap")
        rotated = "rotary_dim" if attention.rotary_dim else "head_dim"
        if attention.rotary_dim > attention.head_dim:
            yield problem(
                f"{where}.rotary_dim",
                attention.rotary_dim,
                f"cannot exceed head_dim, which is {attention.head_dim}",
                "Set it to 0 to rotate all of a head",
            )
        if attention.sliding_layers and attention.window < 1:
            yield problem(
                f"{where}.window",
                attention.window,
                "must be at least 1 where sliding_layers names layers",
                "Set it to the tokens that they see",
            )
        if attention.num_kv_heads > 0 and attention.num_heads % attention.num_kv_heads:
            yield problem(
                f"{where}.num_heads",
                attention.num_heads,
                f"must be a multiple of num_kv_heads, which is {attention.num_kv_heads}",
                f"Set num_kv_heads to a divisor of {attention.num_heads}, or num_heads to "
                f"{math.ceil(attention.num_heads / attention.num_kv_heads) * attention.num_kv_heads}",
            )
    size = getattr(attention, rotated)
    if size % 2 and attention.rotated:
        yield problem(f"{where}.{rotated}", size, "must be even, as RoPE rotates pairs", f"Use {size + 1}")
    rope = attention.rope
    stretches = [name for name in ("yarn_factor", "llama3_factor", "linear_factor") if getattr(rope, name) > 1]
    if len(stretches) > 1:
        yield problem(
            f"{where}.rope.{stretches[1]}",
            getattr(rope, stretches[1]),
            f"must be 1 where {stretches[0]} stretches the context already",
            "Choose one of the two",
        )
    if rope.llama3_high_frequency <= rope.llama3_low_frequency:
        yield problem(
            f"{where}.rope.llama3_high_frequency",
            rope.llama3_high_frequency,
            f"must exceed llama3_low_frequency, which is {rope.llama3_low_frequency}",
            "The usual values are 4 and 1",
        )
    if rope.yarn_mscale < 0 and not (
        rope.yarn_factor > 1 and 1 + 0.1 * rope.yarn_mscale * math.log(rope.yarn_factor) > 0
    ):
        yield problem(
            f"{where}.rope.yarn_mscale",
            rope.yarn_mscale,
            "must be at least 0, or leave the temperature 1 + 0.1 yarn_mscale ln(yarn_factor) positive",
            "The usual value is 1",
        )
    if rope.yarn_beta_fast < rope.yarn_beta_slow:
        yield problem(
            f"{where}.rope.yarn_beta_fast",
            rope.yarn_beta_fast,
            f"must not be below yarn_beta_slow, which is {rope.yarn_beta_slow}",
            "The usual values are 32 and 1",
        )


GQA_ONLY = {
    "qkv_bias": False,
    "out_bias": False,
    "qk_norm": "none",
    "sinks": False,
    "logit_softcap": 0,
    "window": 0,
    "sliding_layers": (),
    "sliding_rope_theta": 0,
    "rotary_dim": 0,
    "rotated": True,
}


def _gqa_only_problems(attention: Any) -> Iterator[str]:
    for name, off in GQA_ONLY.items():
        if getattr(attention, name) != off:
            yield problem(
                f"model.attention.{name}",
                getattr(attention, name),
                "is for grouped-query attention, and kind is 'mla'",
                f"Set it to {off!r}, or kind to 'gqa'",
            )


def _moe_problems(moe: Any) -> Iterator[str]:
    where = "model.moe"
    counts = ("experts_per_token", "expert_size", "num_groups", "groups_per_token")
    yield from limited(FROM_1, where, moe, *counts)
    yield from limited(FROM_0, where, moe, "num_shared_experts", "shared_expert_size")
    yield from limited(FROM_0, where, moe, "bias_update_speed", "bias_update_until_tokens")
    yield from limited(FROM_0, where, moe, "balance_loss_weight")
    yield from limited(ABOVE_0, where, moe, "routed_scaling_factor")
    if min(getattr(moe, field) for field in counts) < 1:
        return  # the rules below divide by these
    if moe.num_experts % moe.num_groups:
        yield problem(
            f"{where}.num_experts",
            moe.num_experts,
            f"must be a multiple of num_groups, which is {moe.num_groups}",
            f"Use {math.ceil(moe.num_experts / moe.num_groups) * moe.num_groups} experts, or a number of groups "
            f"that divides {moe.num_experts}",
        )
        return
    if moe.groups_per_token > moe.num_groups:
        yield problem(
            f"{where}.groups_per_token",
            moe.groups_per_token,
            f"cannot exceed num_groups, which is {moe.num_groups}",
            "Keep fewer groups",
        )
        return
    group_size = moe.num_experts // moe.num_groups
    if moe.experts_per_token > group_size * moe.groups_per_token:
        yield problem(
            f"{where}.experts_per_token",
            moe.experts_per_token,
            f"cannot exceed the {group_size * moe.groups_per_token} experts that the {moe.groups_per_token} kept of "
            f"{moe.num_groups} groups hold ({group_size} each)",
            "Choose fewer experts per token, or raise groups_per_token or num_experts",
        )
    if moe.group_score == "top2_sum" and moe.num_groups > 1 and group_size < 2:
        yield problem(
            f"{where}.group_score",
            moe.group_score,
            f"needs at least 2 experts in a group, and {moe.num_experts} experts in {moe.num_groups} groups give 1",
            "Use fewer groups, or group_score='max'",
        )
