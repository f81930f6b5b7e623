"""The rotation's keys of config.json, both ways: rope_theta and rope_scaling as on the hub, or rope_parameters.

Transformers 5 writes rope_parameters, which hold the base too, and for some families a set for each type of layer.
"""

import math
from collections.abc import Mapping
from typing import Any

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import RopeConfig
from opendeep_jax.interop.hf_family import FULL, SLIDING, Raw, integer, number, require

KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
"""Keys that this module reads."""
KINDS = ("default", "linear", "llama3", "yarn")
SETTINGS = frozenset(
    "rope_theta factor original_max_position_embeddings low_freq_factor high_freq_factor beta_fast beta_slow truncate "
    "attention_factor mscale mscale_all_dim partial_rotary_factor".split()
)
"""Keys inside rope_scaling and rope_parameters, of which each kind reads its own."""


def parameters(raw: Raw, layer_type: str = "") -> dict[str, Any]:
    """Return the settings of rotation, with their kind as "rope_type"; empty where there are none.

    Args:
        layer_type: whose, where rope_parameters has a set for each type.

    Raises:
        ConfigError: no object of settings, or a kind that is unknown here.
    """
    found = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if isinstance(found, Mapping) and (SLIDING in found or FULL in found):
        found = found.get(layer_type or FULL) or {}
    if not isinstance(found, Mapping):
        raise ConfigError(f"rope_scaling = {found!r}: must be an object of settings, or null for plain rotation.")
    found = {key: value for key, value in found.items() if value is not None}
    kind = found.pop("rope_type", found.pop("type", "default"))
    found.pop("type", None)
    if kind not in KINDS:
        raise ConfigError(f"rope type = {kind!r}: must be one of {', '.join(KINDS)}. No other is implemented here.")
    if unknown := sorted(str(key) for key in found if key not in SETTINGS):
        raise ConfigError(
            f"rope_scaling has {', '.join(unknown)}: no setting of a rotation that is known here. If the model is the "
            "same without, remove it."
        )
    return found | {"rope_type": kind}


def read_rope(raw: Raw, theta: float = 10_000.0, partial: bool = False) -> dict[str, Any]:
    """Return the fields of the rotation of grouped-query attention, as transformers computes it.

    Args:
        theta: The family's base where config.json has none.
        partial: The family may rotate a part of each head, and reads partial_rotary_factor itself.
    """
    found = parameters(raw)
    if not partial:
        require(found, "partial_rotary_factor", 1.0)
    fields = {"theta": number(found, "rope_theta", raw.get("rope_theta", theta))}
    kind = found["rope_type"]
    if kind == "linear":
        fields["linear_factor"] = number(found, "factor")
    elif kind == "llama3":
        fields |= {
            "llama3_factor": number(found, "factor"),
            "llama3_low_frequency": number(found, "low_freq_factor"),
            "llama3_high_frequency": number(found, "high_freq_factor"),
            "llama3_original_length": _original_length(raw, found),
        }
    elif kind == "yarn":
        fields |= _read_yarn(raw, found)
    return {f"attention.rope.{name}": value for name, value in fields.items()}


def read_ropes(raw: Raw, theta: float, sliding_theta: float) -> dict[str, Any]:
    """`read_rope`, and the sliding layers' base where their rotation is their own.

    Args:
        theta: The base where config.json has none.
        sliding_theta: The sliding layers' base where config.json has none.

    Raises:
        ConfigError: the sliding layers' rotation is stretched, and not as the others' is.
    """
    if raw.get("rope_parameters") and not _by_layer_type(raw):
        raise ConfigError(
            f"rope_parameters = {raw['rope_parameters']!r}: must have a set for {FULL!r} and one for {SLIDING!r}; "
            "transformers passes over any other. Write one for each, or the keys rope_theta and rope_scaling."
        )
    fields = read_rope(raw, theta)
    full = parameters(raw)
    require(full, "truncate", True)  # transformers does not find it where each type of layer has a set
    sliding = parameters(raw, SLIDING) if _by_layer_type(raw) else {"rope_type": "default"}
    own = number(sliding, "rope_theta", sliding_theta)
    same_theta = own == fields["attention.rope.theta"]
    if same_theta and {**sliding, "rope_theta": 0} == {**full, "rope_theta": 0}:
        return fields
    if sliding["rope_type"] != "default":
        raise ConfigError(
            f"rope_parameters has {sliding!r} for sliding layers: only plain rotation, or the other layers' own, can "
            "be read. This variant is not implemented here."
        )
    return fields | {"attention.sliding_rope_theta": own}


def _by_layer_type(raw: Raw) -> bool:
    found = raw.get("rope_parameters")
    return isinstance(found, Mapping) and (SLIDING in found or FULL in found)


def _original_length(raw: Raw, found: Raw) -> int:
    key = "original_max_position_embeddings"
    return integer(found, key) if key in found else integer(raw, "max_position_embeddings")


def _read_yarn(raw: Raw, found: Raw) -> dict[str, Any]:
    length = _original_length(raw, found)
    factor = number(found, "factor") if "factor" in found else integer(raw, "max_position_embeddings") / length
    fields = {
        "yarn_factor": factor,
        "yarn_original_length": length,
        "yarn_beta_fast": number(found, "beta_fast", 32.0) or 32.0,
        "yarn_beta_slow": number(found, "beta_slow", 1.0) or 1.0,
        "yarn_truncate": found.get("truncate", True),
        "yarn_mscale_all_dim": 0.0,
    }
    if factor <= 1:
        return fields
    slope = 0.1 * math.log(factor)
    temperature = 1 + slope
    if "attention_factor" in found:
        temperature = number(found, "attention_factor")
    elif found.get("mscale") and found.get("mscale_all_dim"):
        temperature = (1 + slope * number(found, "mscale")) / (1 + slope * number(found, "mscale_all_dim"))
    usual = math.isclose(temperature, 1 + slope, rel_tol=1e-9)
    return fields | {"yarn_mscale": 1.0 if usual else (temperature - 1) / slope}


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """Return the hub's keys for a rotation of grouped-query attention."""
    return {"rope_theta": rope.theta, "rope_scaling": write_scaling(rope)}


def write_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    """Return the hub's rope_scaling of grouped-query attention; None for plain rotation."""
    if rope.linear_factor > 1:
        return {"rope_type": "linear", "factor": rope.linear_factor}
    if rope.llama3_factor > 1:
        return {
            "rope_type": "llama3",
            "factor": rope.llama3_factor,
            "low_freq_factor": rope.llama3_low_frequency,
            "high_freq_factor": rope.llama3_high_frequency,
            "original_max_position_embeddings": rope.llama3_original_length,
        }
    if rope.yarn_factor <= 1:
        return None
    scaling = {
        "rope_type": "yarn",
        "factor": rope.yarn_factor,
        "original_max_position_embeddings": rope.yarn_original_length,
        "beta_fast": rope.yarn_beta_fast,
        "beta_slow": rope.yarn_beta_slow,
    }
    if not rope.yarn_truncate:
        scaling["truncate"] = False
    if rope.yarn_mscale != 1:
        scaling["attention_factor"] = 1 + 0.1 * rope.yarn_mscale * math.log(rope.yarn_factor)
    return scaling
