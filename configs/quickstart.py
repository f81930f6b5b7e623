"""A DeepSeek-V3 of about 10M parameters that learns Python in minutes on a laptop, every mechanism switched on.

Paper:     DeepSeek-V3 (arXiv:2412.19437): MLA with q and kv compression, sigmoid routing with group limits and a bias
           instead of an auxiliary loss, a shared expert, multi-token prediction.
Text:      the Python sources of the interpreter's own standard library, so nothing is downloaded.
Command:   opendeep train --config=quickstart --workdir=runs/quickstart
Hardware:  a laptop; two CPU cores are enough.
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
    RunConfig,
    TrainConfig,
)


def get_config() -> RunConfig:
    """The quickstart run."""
    return RunConfig(
        name="quickstart",
        model=ModelConfig(
            vocab_size=4096,
            hidden_size=192,
            num_layers=4,
            num_dense_layers=1,
            mlp_size=512,
            init_std=0.02,
            dtype="float32",
            attention=AttentionConfig(
                num_heads=6,
                q_lora_rank=96,
                kv_lora_rank=64,
                qk_nope_head_dim=32,
                qk_rope_head_dim=16,
                v_head_dim=32,
            ),
            moe=MoEConfig(
                num_experts=32,
                experts_per_token=4,
                num_shared_experts=1,
                expert_size=96,
                num_groups=4,
                groups_per_token=2,
                routed_scaling_factor=2.5,
            ),
            mtp=MTPConfig(depth=1),
        ),
        data=DataConfig(tokenizer="bpe:4096", sequence_length=256),
        optimizer=OptimizerConfig(kind="muon", learning_rate=1e-2, schedule="cosine", warmup_steps=20),
        train=TrainConfig(steps=140, batch_size=16, log_every=5, sample_every=70),
        evaluation=EvaluationConfig(every=28, batches=6),
        checkpoint=CheckpointConfig(every=70),
    )
