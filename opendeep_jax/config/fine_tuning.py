"""The run that the recipes of released families share: a cautious start for fine-tuning."""

from opendeep_jax.config.model import DType, ModelConfig
from opendeep_jax.config.schema import DataConfig, OptimizerConfig, ParallelConfig, RunConfig, SourceConfig, TrainConfig

OWN_TEXT = SourceConfig(name="corpus", path="corpus/**/*.jsonl", license="as each document says")
"""Default path of the user's text for fine-tuning."""


def fine_tuning(
    name: str,
    model: ModelConfig,
    *,
    parallel: ParallelConfig = ParallelConfig(),  # noqa: B008 - frozen
    moments: DType = "float32",
) -> RunConfig:
    """1000 steps of 64 rows over jsonl files under corpus/, at a rate of 1e-5 with a short warm-up.

    Args:
        name: of the run, such as "llama3-8b".
        model: whose weights `opendeep import` brings.
        parallel: how devices share the work; the default divides weights over all of them.
        moments: what the optimizer keeps its two moments in: 8 bytes for each parameter, or 4 in bfloat16.
    """
    return RunConfig(
        name=name,
        model=model,
        data=DataConfig(
            sources=(OWN_TEXT,),
            tokenizer="corpus/tokenizer.json",
            sequence_length=4096,
            held_out_fraction=0.01,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-5, warmup_steps=50, first_moment_dtype=moments, second_moment_dtype=moments
        ),
        parallel=parallel,
        train=TrainConfig(steps=1000, batch_size=64, rows_per_device=1),
    )
