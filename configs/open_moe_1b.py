"""moe_1b on the open corpora, in four phases: a main mixture, an anneal on the best text, rows of 32K and of 128K.

Paper:     sizes as in moe_1b; the order of lengths as in DeepSeek-V3 (arXiv:2412.19437, section 4.3), which goes from
           4K to 32K and 128K; an anneal on less and better text as in OLMo 3 (arXiv:2512.13961).
Text:      configs/corpora: FineWeb-Edu's sample of 100B tokens, three of DCLM-baseline's hundred shards, OpenWebMath,
           Wikipedia, and The Stack v2's Python. `prepare` reads all of it and keeps two bytes a token.
           Needs pip install 'opendeep-jax[remote]', network, and The Stack v2's terms accepted.
Command:   opendeep data prepare --config=open_moe_1b
           opendeep train --config=open_moe_1b --workdir=runs/open_moe_1b
Hardware:  as moe_1b: one node, 8 GPUs.
Time:      not measured yet.
Expected:  not measured yet.

Weights are shares of tokens. Documents are divided between the lengths in proportion to the tokens that each takes, so
none is met twice; only Wikipedia may be repeated. Rows are packed by best fit: no document that fits one is cut. RoPE's
base is that of long contexts from the start, instead of YaRN later, so the model is one throughout.
"""

import dataclasses

from opendeep_jax.config.load import load_recipe
from opendeep_jax.config.schema import DataConfig, DataPhase, RopeConfig, RunConfig, SourceConfig, TrainConfig

BILLION = 1_000_000_000
# What is taken of each, where it is not all, and how often it may be repeated.
PART = {
    "fineweb_edu": {"path": "hf://datasets/HuggingFaceFW/fineweb-edu/sample/100BT/*.parquet"},
    "dclm_baseline": {
        "path": "hf://datasets/mlfoundations/dclm-baseline-1.0/global-shard_01_of_10/local-shard_[0-2]_of_10/*.jsonl.zst"
    },
    "the_stack_v2": {"path": "hf://datasets/bigcode/the-stack-v2-dedup/data/Python/*.parquet"},
    "wikipedia": {"epochs": 2.0},
}
CORPORA = ("fineweb_edu", "dclm_baseline", "open_web_math", "wikipedia", "the_stack_v2")


def get_config() -> RunConfig:
    """100B tokens: 80B of the main mixture, 12B of the anneal, 5B in rows of 32K, 3B in rows of 128K."""
    base = load_recipe("moe_1b")
    attention = dataclasses.replace(base.model.attention, rope=RopeConfig(theta=1_000_000.0))
    return dataclasses.replace(
        base,
        name="open_moe_1b",
        model=dataclasses.replace(base.model, attention=attention),
        data=DataConfig(
            sources=sources(),
            tokenizer="bpe:32768",
            sequence_length=4096,
            packing="best_fit",
            phases=(
                DataPhase("main", 80 * BILLION, (0.45, 0.35, 0.05, 0.02, 0.13)),
                DataPhase("anneal", 12 * BILLION, (0.45, 0.05, 0.20, 0.10, 0.20)),
                DataPhase("long_32k", 5 * BILLION, (0.40, 0.20, 0.10, 0.05, 0.25), 32_768, batch_size=64),
                DataPhase("long_128k", 0, (0.40, 0.20, 0.10, 0.05, 0.25), 131_072, batch_size=32),
            ),
            held_out_fraction=0.0005,
            fim_rate=0.1,
        ),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=6e-4, decay_fraction=0.2),
        train=TrainConfig(steps=0, total_tokens=100 * BILLION, batch_size=512, accumulation_steps=4),
    )


def sources() -> tuple[SourceConfig, ...]:
    """The corpora, in order of the weights above."""
    found = [source for name in CORPORA for source in load_recipe(f"corpora/{name}").data.sources]
    return tuple(dataclasses.replace(source, **PART.get(source.name, {})) for source in found)
