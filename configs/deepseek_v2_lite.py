"""DeepSeek-V2-Lite: 15.7B parameters, 2.66B of them active (2.45B without the input embedding).

Paper:     DeepSeek-V2 (arXiv:2405.04434), appendix B: MLA without q compression, softmax routing without groups or
           normalization, balanced by an expert-level loss; the rate falls in two steps at 80 % and 90 % of the tokens.
Command:   opendeep train --config=deepseek_v2_lite --workdir=runs/deepseek_v2_lite
Hardware:  a number of accelerators that divides 4608, the rows of a batch.
Time:      not measured yet.
Expected:  not measured yet.

Where this departs from the report:
 - The corpus and its mixture are not public: put your own under corpus/ with its tokenizer (102,400 rows).
 - Attention stays inside a document (--data.segment_mask=False lets it cross).
 - Moments are kept in bfloat16, as V3's are: the weights, moments and gradients then fit 8 devices of 32 GB.
YaRN is off, as it was in pretraining: the released model's factor of 40 came with the extension to long contexts
(--model.attention.rope.yarn_factor=40, its mscale of 0.707 is set below).
"""

from opendeep_jax.config.schema import (
    AttentionConfig,
    DataConfig,
    EvaluationConfig,
    ExecutionConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    Phase,
    RematConfig,
    RopeConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)

TOTAL_TOKENS = 5_700_000_000_000
SEQUENCE_LENGTH = 4096
BATCH_SIZE = 4608
WARMUP_STEPS = 2000
WARMUP_TOKENS = WARMUP_STEPS * BATCH_SIZE * SEQUENCE_LENGTH


def get_config() -> RunConfig:
    """The pretraining run of V2-Lite."""
    return RunConfig(
        name="deepseek_v2_lite",
        model=ModelConfig(
            vocab_size=102_400,
            hidden_size=2048,
            num_layers=27,
            num_dense_layers=1,
            mlp_size=10_944,
            init_std=0.006,
            attention=AttentionConfig(
                num_heads=16,
                q_lora_rank=0,
                kv_lora_rank=512,
                qk_nope_head_dim=128,
                qk_rope_head_dim=64,
                v_head_dim=128,
                rope=RopeConfig(yarn_mscale=0.707, yarn_mscale_all_dim=0.707),
            ),
            moe=MoEConfig(
                num_experts=64,
                experts_per_token=6,
                num_shared_experts=2,
                expert_size=1408,
                scoring="softmax",
                normalize_weights=False,
                routed_scaling_factor=1.0,
                group_score="max",
                use_router_bias=False,
                balance_loss_weight=0.001,
            ),
            remat=RematConfig(names=("residual", "routing")),
            execution=ExecutionConfig(dense_weights_over_experts=True, batch_parts=2, exchange_buffer=1.125),
        ),
        data=DataConfig(
            sources=(SourceConfig(name="corpus", path="corpus/**/*.jsonl", license="as each document says"),),
            tokenizer="corpus/tokenizer.json",
            sequence_length=SEQUENCE_LENGTH,
            held_out_fraction=0.0001,
        ),
        optimizer=OptimizerConfig(
            learning_rate=4.2e-4,
            schedule="phases",
            warmup_steps=WARMUP_STEPS,
            phases=(
                Phase("constant", 1.0, TOTAL_TOKENS * 8 // 10 - WARMUP_TOKENS),
                Phase("constant", 0.316, TOTAL_TOKENS // 10),
                Phase("constant", 0.316 * 0.316),
            ),
            first_moment_dtype="bfloat16",
            second_moment_dtype="bfloat16",
        ),
        parallel=ParallelConfig(fsdp=-1, expert=8),
        train=TrainConfig(steps=0, total_tokens=TOTAL_TOKENS, batch_size=BATCH_SIZE),
        evaluation=EvaluationConfig(every=1000, batches=2, final_batches=16, batch_size=1536),
    )
