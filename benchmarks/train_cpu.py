"""Training throughput on a CPU, float32, of the model that transformers and MaxText were measured on.

    python benchmarks/train_cpu.py [--steps=12] [--reference]

Prints one JSON line: tokens/s (median after warm-up), seconds from process start to the end of the first step, peak
memory, and beside them what a plain matmul of this machine reaches, measured before and after. `--reference` measures
transformers + torch on the same model in this environment instead (needs both installed).
"""

import argparse
import json
import resource
import statistics
import time

BEGUN = time.perf_counter()
BATCH, LENGTH, VOCAB, PARAMETERS = 8, 512, 8192, 15_825_920


def config():
    """The benchmark's model: 15,825,920 parameters, about a third of them active."""
    from opendeep_jax.config.schema import (
        AttentionConfig,
        DataConfig,
        ModelConfig,
        MoEConfig,
        OptimizerConfig,
        RunConfig,
        TrainConfig,
    )

    attention = AttentionConfig(
        num_heads=8, q_lora_rank=128, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
    )
    moe = MoEConfig(num_experts=16, experts_per_token=4, num_shared_experts=1, expert_size=256)
    model = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        num_layers=4,
        num_dense_layers=1,
        mlp_size=1024,
        init_std=0.02,
        dtype="float32",
        attention=attention,
        moe=moe,
    )
    return RunConfig(
        model=model,
        data=DataConfig(sequence_length=LENGTH),
        optimizer=OptimizerConfig(schedule="constant"),
        train=TrainConfig(batch_size=BATCH),
    )


def measure_opendeep(steps: int) -> dict:
    """Trains on random tokens and times each step."""
    import jax
    import numpy as np

    from opendeep_jax.data.batch import Batch
    from opendeep_jax.models.accounting import count_parameters, flops_per_token
    from opendeep_jax.parallel.mesh import make_mesh, put_batch
    from opendeep_jax.train.cpu_peak import measured_matmul

    run = config()
    assert count_parameters(run.model).total == PARAMETERS
    tokens = np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH + 1), np.int32)
    ones = np.ones((BATCH, LENGTH), np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ones.shape)
    batch = Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_mask=ones.astype(bool),
        segment_ids=ones,
        positions=positions,
    )
    mesh = make_mesh(run.parallel)
    with jax.set_mesh(mesh):
        setup = assemble(run, mesh)
        state, step = setup.first_state(), setup.programs.of(BATCH, LENGTH)
        batch = put_batch(batch, mesh)
        state, output = jax.block_until_ready(step(state, batch))
        first = time.perf_counter() - BEGUN
        before = measured_matmul()
        seconds = []
        for _ in range(steps):
            begun = time.perf_counter()
            state, output = jax.block_until_ready(step(state, batch))
            seconds.append(time.perf_counter() - begun)
    matmul = max(before, measured_matmul())
    flops = flops_per_token(run.model, LENGTH).total
    return result("opendeep", seconds, first) | {
        "achieved_gflops": BATCH * LENGTH * flops / statistics.median(seconds[2:]) / 1e9,
        "matmul_gflops": matmul / 1e9,
        "loss": float(output.metrics["loss"]),
    }


def measure_transformers(steps: int) -> dict:
    """The same model, batch and optimizer in Hugging Face transformers."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=VOCAB,
            hidden_size=256,
            intermediate_size=1024,
            moe_intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=8,
            n_shared_experts=1,
            n_routed_experts=16,
            num_experts_per_tok=4,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            q_lora_rank=128,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            max_position_embeddings=LENGTH,
            routed_scaling_factor=1.0,
            norm_topk_prob=True,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH))
    seconds, first = [], None
    for _ in range(steps + 1):
        begun = time.perf_counter()
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        if first is None:
            first = time.perf_counter() - BEGUN
        else:
            seconds.append(time.perf_counter() - begun)
    return result("transformers", seconds, first) | {"loss": loss.item()}


def result(system: str, seconds: list[float], first: float) -> dict:
    """The figures that both systems report; the first two steps after the first are warm-up."""
    return {
        "system": system,
        "tokens_per_second": BATCH * LENGTH / statistics.median(seconds[2:]),
        "seconds_to_first_step": first,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="timed steps, at least 3")
    parser.add_argument("--reference", action="store_true", help="measure transformers + torch instead")
    arguments = parser.parse_args()
    if not arguments.reference:
        from opendeep_jax.cli.large_pages import restart_with_large_pages

        restart_with_large_pages()  # as `opendeep train` does
    measure = measure_transformers if arguments.reference else measure_opendeep
    print(json.dumps(measure(max(arguments.steps, 3))))
