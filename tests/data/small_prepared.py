"""`Data` over stores in memory, as `open_data` would make it."""

from memory_store import MemoryStore

from opendeep_jax.config.schema import DataConfig, OptimizerConfig, RunConfig, SourceConfig, TrainConfig
from opendeep_jax.data.fim import NO_FIM
from opendeep_jax.data.order import Order
from opendeep_jax.data.pipeline import Data
from opendeep_jax.data.plan import PlanKind, make_plan
from opendeep_jax.text.files import byte_tokenizer


def run_of(weights, batch_size=4, steps=20, ramp=(), epochs=1e6, seed=0, **data) -> RunConfig:
    """A RunConfig of one source for each weight, named s0, s1, …"""
    sources = tuple(SourceConfig(f"s{i}", "nowhere", weight, epochs=epochs) for i, weight in enumerate(weights))
    settings = {"sources": sources, "tokenizer": "bytes", "sequence_length": 8, "held_out_fraction": 0.0}
    train = TrainConfig(steps=steps, batch_size=batch_size, batch_ramp=tuple(ramp))
    warm = OptimizerConfig(warmup_steps=0)
    return RunConfig(seed=seed, data=DataConfig(**settings | data), train=train, optimizer=warm)


def prepared_of(config: RunConfig, lengths: list[list[int]], root, fim=NO_FIM) -> Data:
    """What `config` trains on, over one MemoryStore for each list of document lengths."""
    stores = [MemoryStore(sizes, f"s{i}") for i, sizes in enumerate(lengths)]
    order, fraction = Order(config), config.data.held_out_fraction
    plans = {(i, kind): make_plan(root, stores[i], kind, (config.seed, i), fraction, fim) for i, kind in order.demand}
    held = PlanKind("held_out", config.data.sequence_length, "concatenate")
    held_out = [make_plan(root, store, held, (config.seed, i), fraction, fim) for i, store in enumerate(stores)]
    order.supply({key: plan.rows for key, plan in plans.items()})
    return Data(config, byte_tokenizer(), stores, plans, held_out, order, fim)
