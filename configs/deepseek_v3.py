"""DeepSeek-V3: 671B parameters, 37.6B of them active, and a multi-token prediction module. The report's pretraining.

Paper:     DeepSeek-V3 (arXiv:2412.19437), sections 2.1, 2.2 and 4.2.
Command:   opendeep train --config=deepseek_v3 --workdir=runs/deepseek_v3
Hardware:  the report used 2048 H800 with 16 pipeline stages (configs/layouts/pipeline_expert.flags). Here experts are
           divided over 8 devices and all weights over the rest: 512 v5p, for instance.
Time:      the report says 2.664M H800 hours; not measured here.
Expected:  not measured yet.

Where this departs from the report:
 - The corpus is not public: put your own under corpus/ with its tokenizer (129,280 rows).
 - Attention stays inside a document; the report lets it cross (--data.segment_mask=False).
 - The report says that the batch rises from 3072 to 15,360 rows over the first 469B tokens, not in which stages: here
   they are four of equal length.
 - Fill-in-the-middle is cut between tokens, not between characters, and bfloat16 is where the report multiplies in FP8.
YaRN is off: it belongs to the long-context phases that follow.
"""

from opendeep_jax.config.schema import (
    AttentionConfig,
    DataConfig,
    EvaluationConfig,
    ExecutionConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    OptimizerConfig,
    ParallelConfig,
    Phase,
    RampStage,
    RematConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)

BILLION = 1_000_000_000
TRILLION = 1000 * BILLION
SEQUENCE_LENGTH = 4096
WARMUP_STEPS = 2000
WARMUP_TOKENS = WARMUP_STEPS * 3072 * SEQUENCE_LENGTH  # ends within the ramp's first stage
MICRO_BATCH = 1024  # 2 rows for each of 512 chips
RAMP_TOKENS = 469 * BILLION


def get_config() -> RunConfig:
    """14.8T tokens in rows of 4096."""
    return RunConfig(
        name="deepseek_v3",
        model=ModelConfig(
            vocab_size=129_280,
            hidden_size=7168,
            num_layers=61,
            num_dense_layers=3,
            mlp_size=18_432,
            init_std=0.006,
            attention=AttentionConfig(
                num_heads=128,
                q_lora_rank=1536,
                kv_lora_rank=512,
                qk_nope_head_dim=128,
                qk_rope_head_dim=64,
                v_head_dim=128,
            ),
            moe=MoEConfig(
                num_experts=256,
                experts_per_token=8,
                num_shared_experts=1,
                expert_size=2048,
                num_groups=8,
                groups_per_token=4,
                routed_scaling_factor=2.5,
                bias_update_speed=0.001,
                bias_update_until_tokens=14_300 * BILLION,
                balance_loss_weight=1e-4,
            ),
            mtp=MTPConfig(depth=1, loss_weight=0.3, final_loss_weight=0.1, final_from_tokens=10 * TRILLION),
            # Between a block's halves it keeps the residual stream, 235 MB for 4 rows, which saves an output
            # projection: no other activation saves more work for its size.
            remat=RematConfig(names=("residual", "routing")),
            execution=ExecutionConfig(batch_parts=2, exchange_buffer=1.125),
        ),
        data=DataConfig(
            sources=(SourceConfig(name="corpus", path="corpus/**/*.jsonl", license="as each document says"),),
            tokenizer="corpus/tokenizer.json",
            sequence_length=SEQUENCE_LENGTH,
            held_out_fraction=0.0001,
            fim_rate=0.1,
        ),
        optimizer=OptimizerConfig(
            learning_rate=2.2e-4,
            schedule="phases",
            warmup_steps=WARMUP_STEPS,
            phases=(
                Phase("constant", 1.0, 10 * TRILLION - WARMUP_TOKENS),
                Phase("cosine", 0.1, 4300 * BILLION),
                Phase("constant", 0.1, 333 * BILLION),
                Phase("constant", 7.3e-6 / 2.2e-4),  # the last 167B
            ),
            beta1=0.9,
            beta2=0.95,
            weight_decay=0.1,
            clip_norm=1.0,
            first_moment_dtype="bfloat16",
            second_moment_dtype="bfloat16",
        ),
        # A group of experts to each device of a torus axis (or a node), all weights over the rest.
        parallel=ParallelConfig(fsdp=-1, expert=8),
        train=TrainConfig(
            steps=0,
            total_tokens=14_800 * BILLION,
            batch_size=15_360,
            accumulation_steps=15_360 // MICRO_BATCH,
            loss_chunk=2048,
            working_memory_gb=47,  # enough to hide every exchange of two rows a chip
            batch_ramp=tuple(
                RampStage(rows, RAMP_TOKENS // 4, rows // MICRO_BATCH) for rows in (3072, 6144, 9216, 12_288)
            ),
        ),
        evaluation=EvaluationConfig(every=1000, batches=2, final_batches=16, batch_size=3072),
    )
