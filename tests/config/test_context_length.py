"""A model's context length is that of the rows it is trained on, unless it is set or YaRN extends it."""

import dataclasses
import json

import pytest

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import from_json, load_run_config, record_context_length, save_run_config, to_json
from opendeep_jax.config.model import AttentionConfig, ModelConfig, RopeConfig
from opendeep_jax.config.overrides import apply
from opendeep_jax.config.schema import DataConfig, DataPhase, RunConfig
from opendeep_jax.interop import config_from_hf, config_to_hf
from opendeep_jax.record.workdir import check_workdir

SHORT, LONG = DataPhase("short", tokens=10**6), DataPhase("long", sequence_length=8192)


def model(context_length=0, **rope) -> ModelConfig:
    attention = AttentionConfig(kind="gqa", rope=RopeConfig(interleaved=False, **rope))
    return ModelConfig(context_length=context_length, attention=attention)


def run(rows=256, phases=(), **settings) -> RunConfig:
    return RunConfig(model=model(**settings), data=DataConfig(sequence_length=rows, phases=phases))


YARN = {"yarn_factor": 4.0, "yarn_original_length": 32_768}
CONTEXTS = {
    "short rows": (run(256), 256),
    "long rows": (run(131_072), 131_072),
    "a phase of longer rows": (run(256, (SHORT, LONG)), 8192),
    "phases of shorter rows": (run(16_384, (dataclasses.replace(SHORT, sequence_length=64), LONG)), 8192),
    "set": (run(256, context_length=1024), 1024),
    "YaRN": (run(4096, **YARN), 131_072),
    "YaRN on rows that are longer still": (run(200_000, **YARN), 200_000),
    "YaRN, set": (run(4096, context_length=65_536, **YARN), 65_536),
    "YaRN switched off": (run(512, yarn_original_length=32_768), 512),
}


@pytest.mark.parametrize("config, expected", CONTEXTS.values(), ids=CONTEXTS)
def test_the_context_follows_the_longest_row_unless_it_is_set_or_extended(config, expected):
    assert config.model.max_length == expected
    read = from_json(to_json(config))
    assert read == config and read.model.max_length == expected
    kept = dataclasses.replace(config.model.settled(), dtype="float32")  # as exports and engines have it
    assert kept.max_length == kept.context_length == expected


def test_other_rows_and_another_model_are_followed_anew():
    first = run(256)
    assert dataclasses.replace(first, data=DataConfig(sequence_length=1024)).model.max_length == 1024
    assert dataclasses.replace(first, model=dataclasses.replace(first.model, num_layers=2)).model.max_length == 256
    assert apply(first, ["--data.sequence_length=2048"]).model.max_length == 2048
    assert first.model.max_length == 256 and first.model.context_length == 0
    assert first.model == model() and json.loads(to_json(first))["model"]["context_length"] == 0


def test_a_context_below_the_rows_is_refused_and_the_cures_work():
    with pytest.raises(ConfigError, match="model.context_length = 4096: .*rows of 8192.*--model.context_length=8192"):
        run(8192, context_length=4096)
    with pytest.raises(ConfigError, match="rows of 8192"):
        run(256, (SHORT, LONG), context_length=4096)
    recipe = run(4096, context_length=4096)
    with pytest.raises(ConfigError, match="rows of 8192"):
        apply(recipe, ["--data.sequence_length=8192"])
    for fix, expected in (("8192", 8192), ("0", 8192), ("10000", 10_000)):
        longer = apply(recipe, ["--data.sequence_length=8192", f"--model.context_length={fix}"])
        assert longer.model.max_length == expected


def test_an_older_run_with_rows_beyond_its_context_can_still_be_read_and_resumed(tmp_path):
    old = json.loads(to_json(run(8192)))
    old["model"]["context_length"] = 4096
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert load_run_config(tmp_path).model.max_length == 8192
    check_workdir(run(8192, context_length=8192), tmp_path)
    del old["model"]["context_length"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert load_run_config(tmp_path).model.max_length == 8192
    check_workdir(run(8192), tmp_path)


def test_on_resume_the_context_may_change_and_the_rotation_may_not(tmp_path):
    there = run(8192)
    save_run_config(there, there, tmp_path)
    check_workdir(run(8192, context_length=16_384), tmp_path)
    for changes in (YARN, {"yarn_original_length": 8192}, {"theta": 1e6}):
        with pytest.raises(ConfigError, match=r"(?s)another configuration.*model\.attention\.rope"):
            check_workdir(run(8192, context_length=8192, **changes), tmp_path)


def test_a_run_that_has_ended_takes_another_context_and_nothing_else(tmp_path):
    there = run(8192)
    save_run_config(there, there, tmp_path)
    wanted = dataclasses.replace(run(8192, context_length=16_384), name="other")
    record_context_length(wanted, there, tmp_path)
    assert load_run_config(tmp_path) == dataclasses.replace(there, model=model(16_384))
    assert "context_length  0 -> 16384" in (tmp_path / "config_diff.txt").read_text()


def test_yarn_on_the_command_line_extends_a_context_that_the_recipe_sets():
    recipe, yarn = run(4096, context_length=40_960), [f"--model.attention.rope.{key}={YARN[key]}" for key in YARN]
    assert apply(recipe, yarn).model.max_length == 131_072
    assert apply(recipe, [*yarn, "--model.context_length=65536"]).model.max_length == 65_536
    assert apply(recipe, [*yarn, "--data.sequence_length=100000"]).model.max_length == 131_072
    assert apply(recipe, ["--model.attention.rope.yarn_factor=2"]).model.max_length == 40_960


LLAMA = {
    **{"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 1e6, "max_position_embeddings": 40_960},
}
SCALING = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
FILES = {
    "as model cards add it": ({"rope_scaling": SCALING}, 131_072),
    "with the context extended as well": ({"rope_scaling": SCALING, "max_position_embeddings": 131_072}, 131_072),
    "by its older name": ({"rope_scaling": SCALING | {"type": "yarn", "rope_type": None}}, 131_072),
    "as rope_parameters": ({"rope_parameters": SCALING | {"rope_theta": 1e6}}, 131_072),
    "without the original length": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, 81_920),
    "of less reach than the context": ({"rope_scaling": SCALING | {"factor": 1.1}}, 40_960),
    "plain": ({}, 40_960),
    "linear": ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 40_960),
    "Llama 3.2's own stretch, which goes beyond what it is for": (
        {
            "rope_scaling": {
                **{"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
                "original_max_position_embeddings": 8192,
            }
        },
        40_960,
    ),
}


@pytest.mark.parametrize("changes, expected", FILES.values(), ids=FILES)
def test_yarn_in_a_config_json_extends_the_context(changes, expected):
    read = config_from_hf(LLAMA | changes)
    assert read.max_length == expected
    written = config_to_hf(read)
    assert written["max_position_embeddings"] == expected and config_from_hf(written) == read


def test_a_context_set_below_yarns_reach_can_be_exported():
    config = dataclasses.replace(config_from_hf(LLAMA | {"rope_scaling": SCALING}), context_length=8192)
    assert config_to_hf(config)["max_position_embeddings"] == 8192
