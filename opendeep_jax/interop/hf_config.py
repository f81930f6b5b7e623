"""config.json of any family and our ModelConfig, both ways.

A model is written as the first family whose config.json, read again, gives the same model: nothing is ever lost on the
way out. What cannot be said in any family's words is named.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import AttentionConfig, MambaConfig, ModelConfig, MoEConfig, MTPConfig, RopeConfig
from opendeep_jax.interop.families import BY_MODEL_TYPE, FAMILIES
from opendeep_jax.interop.hf_family import Family, integer, require

MAX_BYTES = 16 * 2**20
"""Largest config.json that is read; published ones have a few kilobytes."""

# Keys that say nothing about the model's mathematics, or nothing more than the others do.
PASSED_OVER = frozenset(
    """
    architectures model_type torch_dtype dtype transformers_version auto_map name_or_path tokenizer_class
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id quantization_config
    attention_dropout hidden_dropout embd_pdrop attn_pdrop resid_pdrop dropout layerdrop
    use_cache cache_implementation attn_implementation output_attentions output_hidden_states output_router_logits
    output_scores return_dict return_dict_in_generate router_aux_loss_coef pretraining_tp gradient_checkpointing
    is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder pruned_heads
    torchscript use_bfloat16 tf_legacy_loss chunk_size_feed_forward problem_type id2label label2id num_labels
    finetuning_task task_specific_params prefix max_length min_length do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    transformers.js_config model_max_length vocab_file torch_compile
    """.split()
)
# Settings of training and execution, which no config.json has.
NOT_WRITTEN = (
    "init_std",
    "dtype",
    "precision",
    "weight_dtype",
    "remat.",
    "execution.",
    "moe.bias_update",
    "moe.balance_loss",
    "mtp.loss",
    "mtp.final",
)


def config_from_hf(source: str | Path | Mapping[str, Any]) -> ModelConfig:
    """Return the ModelConfig that a config.json describes, in the dtype it names (bfloat16 if none).

    Args:
        source: A directory with a config.json, or its contents as a mapping.

    Raises:
        ConfigError: no readable config.json, an unknown family or key, a missing key, or keys that contradict each
            other.
    """
    if isinstance(source, Mapping):
        return _model_config(source)
    path = Path(source) / "config.json"
    raw = read_json(path)
    try:
        return _model_config(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def family_of_directory(directory: Path) -> Family:
    """Return the family that a directory's config.json names."""
    return _family(read_json(directory / "config.json"))


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return the object of a JSON file. Raises ConfigError where it is missing or cannot be a model's."""
    try:
        with path.open("rb") as file:
            text = file.read(max_bytes + 1)
        if len(text) > max_bytes:
            raise ConfigError(f"{path} has more than {max_bytes} bytes. It is no model's; download it again.")
        raw = json.loads(text)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} does not exist. Name a directory with a Hugging Face config.json and *.safetensors files."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} cannot be read as JSON ({error!s:.300}). Download it again.") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a JSON {type(raw).__name__}, not an object of settings. Download it again.")
    return raw


def _family(raw: Mapping[str, Any]) -> Family:
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in BY_MODEL_TYPE:
        raise ConfigError(
            f"model_type = {model_type!r}: must be one of {', '.join(BY_MODEL_TYPE)}. No other family is read yet."
        )
    return BY_MODEL_TYPE[model_type]


def _numbers(value: Any) -> Any:
    """Return a config.json's value with {"__float__": "Infinity"}, as transformers 5 writes it, as a number."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: _numbers(entry) for key, entry in value.items()}
    return [_numbers(entry) for entry in value] if isinstance(value, list) else value


def _model_config(raw: Mapping[str, Any]) -> ModelConfig:
    raw = _numbers(raw)
    family = _family(raw)
    if raw["model_type"] == "gemma3":  # it sees images, too
        if not isinstance(raw.get("text_config"), Mapping):
            raise ConfigError("gemma3 needs the key text_config, the settings of its language model. Add it.")
        outer = ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config")
        raw = {key: raw[key] for key in outer if key in raw} | dict(raw["text_config"])
    raw = {key: value for key, value in raw.items() if value is not None} | {"model_type": family.model_type}
    _check_quantization(raw)
    unknown = [key for key, value in raw.items() if not _is_known(key, value, family)]
    if unknown:
        raise ConfigError(
            f"{', '.join(f'{key} = {raw[key]!r}'[:200] for key in sorted(unknown))}: no key of {family.model_type} "
            "that is known here. If the model is the same without, remove it from config.json."
        )
    raw = {**family.defaults, **raw}
    missing = sorted(key for key in family.fields if key not in raw)
    if missing:
        raise ConfigError(f"{family.model_type} needs the keys {', '.join(missing)}, which are missing. Add them.")
    for key, value in family.fixed.items():
        require(raw, key, value)
    integer(raw, "max_position_embeddings")  # of which 0 would mean something else in our configuration
    return _build(
        dict(family.implied)
        | {field: raw[key] for key, field in family.fields.items()}
        | family.read(raw)
        | {"dtype": _dtype(raw)}
    ).reaching()


def _is_known(key: str, value: Any, family: Family) -> bool:
    if key in PASSED_OVER or key in family.fields or key in family.fixed or key in family.defaults:
        return True
    return key in (*family.understood, *family.harmless) or key.startswith(("_", "unsloth")) or value is False


def _check_quantization(raw: Mapping[str, Any]) -> None:
    """Raise ConfigError unless the weights are plain, DeepSeek's float8 blocks or MXFP4."""
    found = raw.get("quantization_config", {})
    if not isinstance(found, Mapping):
        raise ConfigError(
            f"quantization_config = {found!r}: must be an object of settings. Download config.json again."
        )
    method = found.get("quant_method")
    blocks = found.get("weight_block_size", [128, 128])
    if method not in (None, "fp8", "mxfp4") or (method == "fp8" and blocks != [128, 128]):
        raise ConfigError(
            f"quantization_config has quant_method = {method!r} and weight_block_size = {blocks!r}: weights are read "
            "in float32, bfloat16 or float16, in float8 with scales of 128 x 128 blocks, or in MXFP4. Take the model's "
            "own files, before they were quantized."
        )


def _dtype(raw: Mapping[str, Any]) -> str:
    """Compute dtype; float16 weights are read into bfloat16's wider range."""
    name = raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
    return "float32" if name in ("float32", "float64") else "bfloat16"


def _build(fields: Mapping[str, Any]) -> ModelConfig:
    """Return the ModelConfig of dotted fields and defaults. Raises ConfigError for invalid fields."""
    if not fields.get("attention.sliding_layers"):  # a family names its sliding layers' rotation even for none
        fields = {name: value for name, value in fields.items() if name != "attention.sliding_rope_theta"}

    def under(prefix: str) -> dict[str, Any]:
        names = {name.removeprefix(prefix): value for name, value in fields.items() if name.startswith(prefix)}
        return {name: value for name, value in names.items() if "." not in name}

    attention = AttentionConfig(**under("attention."), rope=RopeConfig(**under("attention.rope.")))
    moe = MoEConfig(**under("moe.")) if fields.get("moe.num_experts", 0) else MoEConfig()
    parts = {"moe": moe, "mamba": MambaConfig(**under("mamba.")), "mtp": MTPConfig(**under("mtp."))}
    return ModelConfig(**under(""), attention=attention, **parts)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return a configuration's fields by their dotted names."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = prefix + field.name
        fields |= flat(value, name + ".") if dataclasses.is_dataclass(value) else {name: value}
    return fields


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the hub's config.json for a model: that of the first family which can say all of it.

    Raises:
        ConfigError: no family describes the model; says what the nearest one would lose.
    """
    return _written(config)[1]


def family_of(config: ModelConfig) -> Family:
    """Return the family that a model is written as. Raises ConfigError as `config_to_hf` does."""
    return _written(config)[0]


def _written(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    kind = config.attention.kind
    problems = []
    for family in FAMILIES:
        if family.implied["attention.kind"] != kind:
            continue
        try:
            raw = _write(family, config)
            lost = differences(config, _model_config(raw))
        except ConfigError as error:
            problems.append((1, f"as {family.model_type}: {str(error).rstrip('.')}"))
            continue
        if not lost:
            return family, raw
        said = ", ".join(f"{name}={ours!r} (would be read as {theirs!r})" for name, ours, theirs in lost)
        problems.append((len(lost), f"as {family.model_type} it would lose {said}"))
    nearest = min(problems, key=lambda problem: problem[0])[1]
    raise ConfigError(
        f"model has no Hugging Face form: {nearest}. Change what differs, or keep the model in its own checkpoint."
    )


def _write(family: Family, config: ModelConfig) -> dict[str, Any]:
    fields = flat(config)
    return (
        {"architectures": [family.architecture], "model_type": family.model_type}
        | dict(family.fixed)
        | {key: fields[field] for key, field in family.fields.items()}
        | {"max_position_embeddings": config.max_length, "torch_dtype": config.dtype}
        | family.write(config)
    )


def differences(
    one: ModelConfig, other: ModelConfig, ignored: tuple[str, ...] = (), tolerance: float = 1e-9
) -> list[tuple[str, Any, Any]]:
    """Return the fields, with both values, in which two configurations describe different models.

    Args:
        ignored: what the names of fields that do not count begin with.
        tolerance: how far numbers may be apart, relative to them.
    """

    def same(left: Any, right: Any) -> bool:
        if isinstance(left, float) and isinstance(right, int | float):
            return math.isclose(left, right, rel_tol=tolerance)
        return left == right

    left, right = _described(one), _described(other)
    names = sorted(name for name in left.keys() | right.keys() if not name.startswith(ignored))
    return [(n, left.get(n), right.get(n)) for n in names if not same(left.get(n), right.get(n))]


def _described(config: ModelConfig) -> dict[str, Any]:
    """Return a model's fields without settings of training and those that other settings switch off."""
    attention, moe, rope = config.attention, config.moe, config.attention.rope
    fields = {name: value for name, value in flat(config).items() if not name.startswith(NOT_WRITTEN)}
    fields |= {
        "context_length": max(config.max_length, rope.yarn_reach),  # a file with YaRN is read as reaching that far
        "num_dense_layers": config.num_leading_dense_layers,
        "attention.query_scale": attention.query_scale or attention.qk_head_dim**-0.5,
        "moe.use_router_bias": moe.use_router_bias or moe.scoring == "sigmoid",  # it is written as a bias of zero
    }
    unused: list[str] = []
    if attention.kind == "mla":
        unused += ["attention.num_kv_heads", "attention.head_dim"]
    else:
        latent = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        unused += [f"attention.{name}" for name in (*latent, "latent_norm_epsilon")]
        fields["attention.rotary_dim"] = attention.rotary_dim or attention.head_dim
        if fields["attention.rotary_dim"] == attention.head_dim and not attention.sliding_rope_theta:
            # Where all of a head turns, a temperature in the softmax is one of the rotation.
            fields["attention.rope.yarn_mscale_all_dim"] = 0.0
    if not attention.sliding_layers:
        fields |= {"attention.window": 0, "attention.sliding_rope_theta": 0.0}
    if not moe.num_experts:
        unused += [name for name in fields if name.startswith("moe.")]
    elif moe.num_groups == 1:
        unused += ["moe.group_score", "moe.groups_per_token"]
    if config.layer_pattern:  # of shared experts only the width of all counts
        fields |= {"moe.num_shared_experts": min(moe.num_shared_experts, 1), "moe.shared_expert_size": moe.shared_size}
    if not attention.rotated:
        unused += [name for name in fields if name.startswith("attention.rope.")] + ["attention.rotary_dim"]
    if "M" not in config.layer_pattern:
        unused += [name for name in fields if name.startswith("mamba.")]
    if not config.num_leading_dense_layers or (config.layer_pattern and "-" not in config.layer_pattern):
        unused += ["mlp_size"]
    if config.activation != "clamped_swiglu":
        unused += ["swiglu_alpha", "swiglu_limit"]
    for stretch in ("yarn", "llama3"):
        if getattr(rope, f"{stretch}_factor") <= 1:
            unused += [name for name in fields if name.startswith(f"attention.rope.{stretch}_")]
    plain = max(rope.yarn_factor, rope.llama3_factor, rope.linear_factor) <= 1
    if plain and attention.sliding_rope_theta == rope.theta:
        fields["attention.sliding_rope_theta"] = 0.0
    return {name: value for name, value in fields.items() if name not in unused}
