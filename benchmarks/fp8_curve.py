"""Loss curves of one recipe in bfloat16 and in DeepSeek-V3's FP8, on the same batches from the same weights.

    python benchmarks/fp8_curve.py [--steps=300] [--batch_size=16] [--dtype=bfloat16] [--directory=runs/fp8_curve]

Trains the quickstart model twice, with `model.precision` `default` and `fp8` (emulated where the chip has no FP8
units), prints the main model's loss of both as they go, and at the end their relative difference, of the mean over the
last 20 steps. The bar is 0.5 %; the report's own figure is below 0.25 % (section 3.3).
"""

import argparse
import json
from pathlib import Path

from opendeep_jax.cli.large_pages import restart_with_large_pages

LAST = 20
BAR = 0.005


def curve(precision: str, directory: Path, steps: int, batch_size: int, dtype: str) -> list[float]:
    """The main model's loss at every step, in nats per token."""
    from opendeep_jax.config.overrides import resolve
    from opendeep_jax.record.metrics import read_jsonl
    from opendeep_jax.train.loop import train

    overrides = {
        "model.dtype": dtype,
        "model.precision": precision,
        "train.steps": steps,
        "train.batch_size": batch_size,
        "train.log_every": 1,
        "train.sample_every": 0,
        "evaluation.every": 0,
        "evaluation.final_batches": 1,
        "checkpoint.every": 0,
    }
    config, _ = resolve(["--config=quickstart", *(f"--{name}={value}" for name, value in overrides.items())])
    train(config, directory / precision)
    return [record["lm_loss"] for record in read_jsonl(directory / precision / "metrics.jsonl")]


def difference(losses: dict[str, list[float]]) -> float:
    """FP8's loss over the default's, less one, of the means over the last steps."""
    default, fp8 = (sum(losses[precision][-LAST:]) for precision in ("default", "fp8"))
    return fp8 / default - 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="at least 20, the recipe's warm-up")
    parser.add_argument("--batch_size", type=int, default=16, help="rows of 256 tokens")
    parser.add_argument("--dtype", default="bfloat16", help="compute dtype of both runs")
    parser.add_argument("--directory", type=Path, default=Path("runs/fp8_curve"), help="for the two runs")
    arguments = vars(parser.parse_args())
    restart_with_large_pages()  # as `opendeep train` does
    losses = {precision: curve(precision, **arguments) for precision in ("default", "fp8")}
    for step in range(0, arguments["steps"], 10):
        print(json.dumps({"step": step + 1} | {precision: values[step] for precision, values in losses.items()}))
    print(json.dumps({"steps": arguments["steps"], "difference": difference(losses), "bar": BAR}))
