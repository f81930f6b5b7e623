"""A small corpus on disk, and configurations that read it."""

from pathlib import Path

import pytest
from small_corpus import write_corpus

from opendeep_jax.config.schema import DataConfig, OptimizerConfig, RunConfig, SourceConfig, TrainConfig


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A directory of 30 documents."""
    return write_corpus(tmp_path / "corpus", 30)


@pytest.fixture
def configure(tmp_path, corpus):
    """A function that makes a RunConfig over `corpus`; its other arguments replace fields of data."""

    def make(batch_size: int = 4, ramp: tuple = (), steps: int = 1000, **data) -> RunConfig:
        settings = {
            "sources": (SourceConfig("corpus", str(corpus), license="CC0-1.0", epochs=1000.0),),
            "tokenizer": "bytes",
            "directory": str(tmp_path / "prepared"),
            "sequence_length": 32,
            "held_out_fraction": 0.2,
        }
        train = TrainConfig(steps=steps, batch_size=batch_size, batch_ramp=ramp)
        return RunConfig(data=DataConfig(**settings | data), train=train, optimizer=OptimizerConfig(warmup_steps=0))

    return make
