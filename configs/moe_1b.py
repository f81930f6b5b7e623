"""A mixture of experts with about 1B parameters, a quarter of them active, for one node with eight GPUs.

Paper:     the mechanisms of DeepSeek-V3 (arXiv:2412.19437); the sizes are our own.
Text:      yours: jsonl files with a field `text` under corpus/ (--data.sources.0.path=... says otherwise).
Command:   opendeep train --config=moe_1b --workdir=runs/moe_1b
Hardware:  one node, 8 GPUs, which share weights and optimizer state (parallel.fsdp=8).
Time:      not measured yet.
Expected:  not measured yet.
"""

from opendeep_jax.config.schema import (
    AttentionConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    OptimizerConfig,
    ParallelConfig,
    RematConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)


def get_config() -> RunConfig:
    """20B tokens in rows of 2048, a million tokens to a step."""
    return RunConfig(
        name="moe_1b",
        model=ModelConfig(
            vocab_size=32_768,
            hidden_size=1024,
            num_layers=18,
            num_dense_layers=1,
            mlp_size=4096,
            attention=AttentionConfig(
                num_heads=16,
                q_lora_rank=512,
                kv_lora_rank=256,
                qk_nope_head_dim=64,
                qk_rope_head_dim=32,
                v_head_dim=64,
            ),
            moe=MoEConfig(
                num_experts=64,
                experts_per_token=8,
                num_shared_experts=1,
                expert_size=256,
                num_groups=8,
                groups_per_token=4,
                routed_scaling_factor=2.5,
            ),
            mtp=MTPConfig(depth=1),
            remat=RematConfig(dense="named", moe="named"),
        ),
        data=DataConfig(
            sources=(SourceConfig(name="corpus", path="corpus/**/*.jsonl", license="as each document says"),),
            tokenizer="bpe:32768",
            sequence_length=2048,
            held_out_fraction=0.001,
        ),
        optimizer=OptimizerConfig(learning_rate=6e-4, schedule="wsd", warmup_steps=1000, final_fraction=0.0),
        parallel=ParallelConfig(fsdp=8),
        train=TrainConfig(steps=0, total_tokens=20_000_000_000, batch_size=512, accumulation_steps=4),
        evaluation=EvaluationConfig(every=500, batches=8, final_batches=64, batch_size=128),
        checkpoint=CheckpointConfig(every=1000),
    )
