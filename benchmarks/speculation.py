"""What drafts of the MTP module are worth, on a trained run.

    python benchmarks/speculation.py --workdir=runs/quickstart [--drafts=1,2,3] [--tokens=128] [--slots=1]

Continues prompts by the same seeds with and without drafts, alternately, greedily and at temperature 0.8. Prints how
many outputs are token for token the same, the share of drafts that stood, steps of the model per token, and how many
times as fast that was. The last line is JSON.
"""

import argparse
import json
import statistics
import time

PROMPTS = (
    "import ",
    "def main(",
    "class Node:\n    def __init__(self",
    "for i in range(",
    "    return ",
    "if __name__",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/quickstart")
    parser.add_argument("--drafts", default="1,2,3")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    from opendeep_jax.generation.engine import Engine, EngineConfig
    from opendeep_jax.generation.requests import SamplingParams
    from opendeep_jax.pretrained.sources import open_model

    model, tokenizer, _ = open_model(options.workdir)
    prompts = [tokenizer.encode_prompt(prompt) for prompt in PROMPTS]
    counts = [0, *map(int, options.drafts.split(","))]
    vocab = min(tokenizer.vocab_size, model.config.vocab_size)
    sizes = {"slots": options.slots, "max_length": min(512, model.config.max_length), "vocab_size": vocab}
    engines = {count: Engine(model, EngineConfig(**sizes, speculate=count)) for count in counts}
    results = []
    print(f"{'':<18}{'drafts':>8}{'same text':>12}{'stood':>8}{'steps/token':>13}{'tokens/s':>10}{'times as fast':>15}")
    for temperature in (0.0, 0.8):
        params = [
            SamplingParams(max_tokens=options.tokens, temperature=temperature, seed=seed)
            for seed in range(len(prompts))
        ]
        speeds, outputs, stats = {count: [] for count in counts}, {}, {}
        for turn in range(options.rounds + 1):  # the first one compiles
            for count, engine in engines.items():
                before, begun = engine.stats, time.perf_counter()
                outputs[count] = [one.tokens for one in engine.generate(prompts, params)]
                seconds, after = time.perf_counter() - begun, engine.stats
                stats[count] = {name: getattr(after, name) - getattr(before, name) for name in after._fields}
                if turn:
                    speeds[count].append(stats[count]["generated_tokens"] / seconds)
        plain = statistics.median(speeds[0])
        for count in counts:
            same = sum(one == other for one, other in zip(outputs[count], outputs[0], strict=True))
            drafted, accepted = stats[count]["drafted_tokens"], stats[count]["accepted_tokens"]
            speed = statistics.median(speeds[count])
            steps = stats[count]["steps"] / max(stats[count]["generated_tokens"], 1)
            name = "greedy" if temperature == 0 else f"temperature {temperature}"
            stood = f"{accepted / drafted:.0%}" if drafted else ""
            text = f"{same} of {len(prompts)}"
            print(f"{name:<18}{count:>8}{text:>12}{stood:>8}{steps:>13.2f}{speed:>10.1f}{speed / plain:>15.2f}")
            results.append(
                {
                    "temperature": temperature,
                    "drafts": count,
                    "same": same,
                    "of": len(prompts),
                    "acceptance": accepted / drafted if drafted else None,
                    "steps_per_token": steps,
                    "times_as_fast": speed / plain,
                }
            )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
