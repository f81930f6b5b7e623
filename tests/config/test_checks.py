"""Every combination that cannot work is refused, with the field, its value, the rule and the fix."""

import dataclasses
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opendeep_jax.config.checks import ConfigError, check_devices, check_run, deferred
from opendeep_jax.config.limits import field_types
from opendeep_jax.config.load import diff
from opendeep_jax.config.schema import (
    AttentionConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    FaultsConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    OptimizerConfig,
    ParallelConfig,
    Phase,
    RampStage,
    RematConfig,
    RopeConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)

PHASES = (Phase("constant", 1.0, 1000), Phase("constant", 0.1))


def model(**changes) -> ModelConfig:
    return ModelConfig(**changes)


def moe(**changes) -> ModelConfig:
    return ModelConfig(moe=MoEConfig(**{"num_experts": 16, **changes}))


def run(**changes) -> RunConfig:
    return RunConfig(**changes)


CONTRADICTIONS = {
    "model.hidden_size = 0": lambda: model(hidden_size=0),
    "model.num_layers = 0": lambda: model(num_layers=0, num_dense_layers=0),
    "model.vocab_size = -1": lambda: model(vocab_size=-1),
    "model.mlp_size = 0": lambda: model(mlp_size=0),
    "model.init_std = 0.0": lambda: model(init_std=0.0),
    "model.norm_epsilon = 0.0": lambda: model(norm_epsilon=0.0),
    "model.num_dense_layers = 5": lambda: model(num_layers=4, num_dense_layers=5),
    "model.attention.num_heads = 6": lambda: model(attention=AttentionConfig(kind="gqa", num_heads=6, num_kv_heads=4)),
    "model.attention.head_dim = 15": lambda: model(attention=AttentionConfig(kind="gqa", head_dim=15)),
    "model.attention.qk_rope_head_dim = 7": lambda: model(attention=AttentionConfig(qk_rope_head_dim=7)),
    "model.attention.kv_lora_rank = 0": lambda: model(attention=AttentionConfig(kv_lora_rank=0)),
    "model.attention.q_lora_rank = -1": lambda: model(attention=AttentionConfig(q_lora_rank=-1)),
    "model.attention.rope.theta = 0.0": lambda: model(attention=AttentionConfig(rope=RopeConfig(theta=0.0))),
    "model.attention.rope.yarn_factor = 0.5": lambda: model(
        attention=AttentionConfig(rope=RopeConfig(yarn_factor=0.5))
    ),
    "model.attention.rope.yarn_beta_fast = 0.5": lambda: model(
        attention=AttentionConfig(rope=RopeConfig(yarn_beta_fast=0.5))
    ),
    "model.moe.num_experts = 10": lambda: moe(num_experts=10, num_groups=4),
    "model.moe.num_experts = -1": lambda: moe(num_experts=-1),
    "model.moe.groups_per_token = 5": lambda: moe(num_groups=4, groups_per_token=5),
    "model.moe.experts_per_token = 9": lambda: moe(num_groups=4, groups_per_token=2, experts_per_token=9),
    "model.moe.experts_per_token = 17": lambda: moe(experts_per_token=17),
    "model.moe.experts_per_token = 0": lambda: moe(experts_per_token=0),
    "model.moe.expert_size = 0": lambda: moe(expert_size=0),
    "model.moe.group_score = 'top2_sum'": lambda: moe(num_groups=16, groups_per_token=8),
    "model.moe.balance_loss_weight = -1.0": lambda: moe(balance_loss_weight=-1.0),
    "model.mtp.depth = -1": lambda: model(mtp=MTPConfig(depth=-1)),
    "model.remat.names = 'expert_row'": lambda: model(remat=RematConfig(names=("expert_row",))),
    "name = ''": lambda: run(name=""),
    "seed = -1": lambda: run(seed=-1),
    "data.sources = ()": lambda: run(data=DataConfig(sources=())),
    "data.sources.0.weight = 0.0": lambda: run(data=DataConfig(sources=(SourceConfig(weight=0.0),))),
    "data.sources.1.name = 'python_stdlib'": lambda: run(data=DataConfig(sources=(SourceConfig(), SourceConfig()))),
    "data.sources.0.path = ''": lambda: run(data=DataConfig(sources=(SourceConfig(name="web"),))),
    "data.tokenizer = 'bpe:8193'": lambda: run(data=DataConfig(tokenizer="bpe:8193")),
    "data.tokenizer = 'bpe:299'": lambda: run(data=DataConfig(tokenizer="bpe:299")),
    "data.tokenizer = 'bpe:many'": lambda: run(data=DataConfig(tokenizer="bpe:many")),
    "data.tokenizer = 'byte'": lambda: run(data=DataConfig(tokenizer="byte")),
    "data.tokenizer = 'bytes'": lambda: run(model=model(vocab_size=261), data=DataConfig(tokenizer="bytes")),
    "data.held_out_fraction = 1.0": lambda: run(data=DataConfig(held_out_fraction=1.0)),
    "data.sequence_length = 3": lambda: run(model=model(mtp=MTPConfig(depth=2)), data=DataConfig(sequence_length=3)),
    "optimizer.learning_rate = 0.0": lambda: run(optimizer=OptimizerConfig(learning_rate=0.0)),
    "optimizer.warmup_steps = 1001": lambda: run(optimizer=OptimizerConfig(warmup_steps=1001)),
    "optimizer.warmup_steps = 100": lambda: run(train=TrainConfig(steps=0, total_tokens=8 * 512 * 99)),
    "optimizer.final_fraction = 1.5": lambda: run(optimizer=OptimizerConfig(final_fraction=1.5)),
    "optimizer.beta2 = 1.0": lambda: run(optimizer=OptimizerConfig(beta2=1.0)),
    "optimizer.beta2 = 0.99999999": lambda: run(optimizer=OptimizerConfig(beta2=0.99999999)),
    "optimizer.muon_momentum = 0.99999998": lambda: run(optimizer=OptimizerConfig(muon_momentum=0.99999998)),
    "model.context_length = 4096": lambda: run(model=model(context_length=4096), data=DataConfig(sequence_length=8192)),
    "optimizer.schedule = 'phases'": lambda: run(optimizer=OptimizerConfig(schedule="phases")),
    "optimizer.phases.0.tokens = 0": lambda: run(optimizer=OptimizerConfig(phases=PHASES[1:] + PHASES[:1])),
    "optimizer.phases.0.to = -0.5": lambda: run(optimizer=OptimizerConfig(phases=(Phase("constant", -0.5),))),
    "train.steps = 0": lambda: run(train=TrainConfig(steps=0)),
    "train.steps = 1000": lambda: run(train=TrainConfig(total_tokens=10)),
    "train.batch_size = 0": lambda: run(train=TrainConfig(batch_size=0)),
    "train.batch_size = 9": lambda: run(train=TrainConfig(batch_size=9, accumulation_steps=2)),
    "train.batch_size = 8": lambda: run(parallel=ParallelConfig(data=13, fsdp=1)),
    "train.batch_ramp.0.batch_size = 3": lambda: run(
        train=TrainConfig(batch_ramp=(RampStage(3, 10_000),), accumulation_steps=2)
    ),
    "train.batch_ramp.0.batch_size = 4": lambda: run(train=TrainConfig(batch_ramp=(RampStage(4, 10_000, 3),))),
    "train.batch_ramp.0.accumulation_steps = -1": lambda: run(
        train=TrainConfig(batch_ramp=(RampStage(4, 10_000, -1),))
    ),
    "train.working_memory_gb = -1.0": lambda: run(train=TrainConfig(working_memory_gb=-1.0)),
    "train.batch_ramp.0.tokens = 0": lambda: run(train=TrainConfig(batch_ramp=(RampStage(4, 0),))),
    "train.log_every = 0": lambda: run(train=TrainConfig(log_every=0)),
    "train.sample_prompts = ()": lambda: run(train=TrainConfig(sample_every=1, sample_prompts=())),
    "evaluation.batches = 0": lambda: run(evaluation=EvaluationConfig(batches=0)),
    "checkpoint.local_every = 5": lambda: run(checkpoint=CheckpointConfig(local_every=5)),
    "checkpoint.keep_best = 1": lambda: run(checkpoint=CheckpointConfig(keep_best=1)),
    "faults.drill = 'fire@3'": lambda: run(faults=FaultsConfig(drill=("fire@3",))),
    "faults.drill = 'sigkill@0'": lambda: run(faults=FaultsConfig(drill=("sigkill@0",))),
    "faults.spike_zscore = 0.0": lambda: run(faults=FaultsConfig(spike_zscore=0.0)),
    "faults.max_rollbacks = 0": lambda: run(faults=FaultsConfig(max_rollbacks=0)),
    "faults.hang_seconds = -1.0": lambda: run(faults=FaultsConfig(hang_seconds=-1.0)),
    "faults.replay_every = 2": lambda: run(
        faults=FaultsConfig(replay_every=2), parallel=ParallelConfig(stage=2), model=ModelConfig(num_layers=4)
    ),
    "checkpoint.every = -1": lambda: run(checkpoint=CheckpointConfig(every=-1)),
    "parallel.data = -1": lambda: run(parallel=ParallelConfig(data=-1)),
    "parallel.fsdp = 0": lambda: run(parallel=ParallelConfig(fsdp=0)),
    "parallel.expert = 2": lambda: run(parallel=ParallelConfig(expert=2)),
    "parallel.stage = 8": lambda: run(parallel=ParallelConfig(stage=8)),
    "parallel.stage_chunks = 0": lambda: run(parallel=ParallelConfig(stage_chunks=0)),
    "data.sequence_length = 36": lambda: run(
        data=DataConfig(sequence_length=36), parallel=ParallelConfig(context=4, tensor=2)
    ),
    "model.attention.num_heads = 8": lambda: run(parallel=ParallelConfig(tensor=3)),
}


@pytest.mark.parametrize("expected", CONTRADICTIONS)
def test_a_contradiction_names_its_field_and_value(expected):
    with pytest.raises(ConfigError) as error:
        CONTRADICTIONS[expected]()
    assert re.search(rf"(^|\n  ){re.escape(expected)}: ", str(error.value)), str(error.value)


@pytest.mark.parametrize(
    "expected, make",
    [
        ("model.hidden_size = '64': must be a whole number.", lambda: model(hidden_size="64")),
        ("model.hidden_size = 64.0: must be a whole number, not float", lambda: model(hidden_size=64.0)),
        ("model.num_layers = True: must be a whole number, not bool", lambda: model(num_layers=True)),
        ("model.tie_embeddings = 1: must be True or False", lambda: model(tie_embeddings=1)),
        ("model.dtype = 'int8': must be one of 'float32', 'bfloat16'", lambda: model(dtype="int8")),
        ("model.moe.scoring = 'relu': must be one of", lambda: moe(scoring="relu")),
        ("model.moe = {}: must be a MoEConfig, not dict", lambda: model(moe={})),
        ("model.remat.names = ['q_latent']: must be a tuple", lambda: model(remat=RematConfig(names=["q_latent"]))),
        ("model.remat.names.0 = 3: must be text", lambda: model(remat=RematConfig(names=(3,)))),
        ("optimizer.beta1 = nan: must be a finite number", lambda: run(optimizer=OptimizerConfig(beta1=math.nan))),
        ("seed = None: must be a whole number", lambda: run(seed=None)),
        ("data.sources.0 = 'web': must be a SourceConfig", lambda: run(data=DataConfig(sources=("web",)))),
    ],
)
def test_a_python_recipe_with_a_value_of_the_wrong_type_is_refused(expected, make):
    with pytest.raises(ConfigError, match=re.escape(expected)):
        make()


def test_a_whole_number_is_a_number():
    assert run(optimizer=OptimizerConfig(learning_rate=1, warmup_steps=0)).optimizer.learning_rate == 1


def test_all_problems_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        RunConfig(seed=-1, train=TrainConfig(batch_size=0), optimizer=OptimizerConfig(beta1=2.0))
    message = str(error.value)
    assert message.startswith("3 settings cannot work:")
    assert all(field in message for field in ("seed = -1", "train.batch_size = 0", "optimizer.beta1 = 2.0"))


def test_the_rule_comes_with_a_cure():
    with pytest.raises(ConfigError, match=r"cannot exceed the 8 experts .* Choose fewer experts per token"):
        CONTRADICTIONS["model.moe.experts_per_token = 9"]()


def test_deferred_checks_let_fields_change_together_and_come_back_afterwards():
    with deferred():
        impossible = RunConfig(model=ModelConfig(num_layers=0))
    with pytest.raises(ConfigError, match="model.num_layers = 0"):
        check_run(impossible)
    with pytest.raises(ConfigError):
        ModelConfig(num_layers=0)


@settings(deadline=None)
@given(
    groups=st.integers(1, 6),
    group_size=st.integers(1, 6),
    kept=st.integers(1, 6),
    chosen=st.integers(1, 36),
    score=st.sampled_from(["top2_sum", "max"]),
)
def test_routing_sizes_are_accepted_exactly_when_every_token_finds_its_experts(groups, group_size, kept, chosen, score):
    routing = MoEConfig(
        num_experts=groups * group_size,
        num_groups=groups,
        groups_per_token=kept,
        experts_per_token=chosen,
        group_score=score,
    )
    possible = kept <= groups and chosen <= kept * group_size
    possible = possible and (score == "max" or groups == 1 or group_size >= 2)
    try:
        ModelConfig(moe=routing)
    except ConfigError:
        assert not possible
    else:
        assert possible


@settings(deadline=None)
@given(data=st.integers(1, 4), rows=st.integers(1, 48), micro=st.integers(1, 4), devices=st.integers(1, 16))
def test_devices_are_accepted_exactly_when_the_mesh_divides_them_and_at_most_a_third_of_the_rows_is_padding(
    data, rows, micro, devices
):
    with deferred():
        config = RunConfig(
            train=TrainConfig(batch_size=rows * micro, accumulation_steps=micro), parallel=ParallelConfig(data=data)
        )
    try:
        check_devices(config, devices)
    except ConfigError:
        assert devices % data or -(-rows // devices) * devices > 1.5 * rows
    else:
        assert devices % data == 0 and -(-rows // devices) * devices <= 1.5 * rows


def test_a_fixed_mesh_must_take_all_devices():
    config = RunConfig(parallel=ParallelConfig(data=2, fsdp=2))
    check_devices(config, 4)
    with pytest.raises(ConfigError, match=r"data 2 x fsdp 2: the mesh takes 4 devices, and 8 are found.*fsdp=-1"):
        check_devices(config, 8)


def test_every_number_of_the_schema_is_guarded_against_a_senseless_value():
    """A number of -2 is refused everywhere: a new field without a rule fails here."""
    unguarded = [name for name, config in _with_each_number_negative(RunConfig()) if _accepts(config)]
    assert unguarded == []


def _accepts(config: RunConfig) -> bool:
    try:
        check_run(config)
    except ConfigError:
        return False
    return True


def _with_each_number_negative(base: RunConfig):
    """Yields (field, config with -2 there) for each number that is used when all parts of the model are."""
    for kind in ("mla", "gqa"):
        with deferred():
            used = dataclasses.replace(
                base,
                model=ModelConfig(attention=AttentionConfig(kind=kind), moe=MoEConfig(num_experts=16)),
                train=TrainConfig(batch_ramp=(RampStage(8, 10_000),)),
                optimizer=OptimizerConfig(schedule="phases", phases=PHASES),
            )
        check_run(used)
        other = (
            ("num_kv_heads", "head_dim")
            if kind == "mla"
            else ("lora_rank", "nope_head_dim", "rope_head_dim", "v_head", "latent_norm")
        )
        for name, config in _negative(used):
            assert len(diff(used, config)) == 1
            if not any(part in name and "attention" in name for part in other):
                yield name, config


def _negative(config, name=""):
    for field in dataclasses.fields(config):
        value, dotted = getattr(config, field.name), f"{name}.{field.name}".lstrip(".")
        if dataclasses.is_dataclass(value):
            changed = _negative(value, dotted)
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            changed = ((inner, (element, *value[1:])) for inner, element in _negative(value[0], f"{dotted}.0"))
        elif (kind := field_types(config)[field.name]) in (int, float):  # without its limit
            changed = [(dotted, kind(-2))]
        else:
            changed = []
        for inner, new in changed:
            with deferred():
                config_with_new = dataclasses.replace(config, **{field.name: new})
            yield inner, config_with_new
