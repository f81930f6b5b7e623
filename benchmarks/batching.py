"""Continuous batching against one request after the other, on a real model.

    python benchmarks/batching.py --model=FILE.gguf [--requests=200] [--slots=8] [--dtype=float32]

Requests of mixed lengths, temperatures and seeds arrive at random; each must get token for token what it gets alone.
Prints how many did, and tokens per second of both, and of the same requests one after the other in an engine of one
slot, which is the quickest way to serve them singly. The last line is JSON.
"""

import argparse
import json
import random
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()

    from opendeep_jax.generation.engine import Engine, EngineConfig
    from opendeep_jax.generation.requests import SamplingParams
    from opendeep_jax.pretrained.sources import open_model

    model, tokenizer, _ = open_model(options.model, options.dtype)
    order = random.Random(0)
    vocab = min(tokenizer.vocab_size, model.config.vocab_size)
    requests = [
        (
            [order.randrange(100, vocab) for _ in range(order.randint(1, 120))],
            SamplingParams(
                max_tokens=order.randint(1, 64),
                temperature=order.choice([0.0, 0.7, 1.0]),
                top_p=order.choice([1.0, 0.9]),
                seed=order.randrange(2**32),
                end_ids=tokenizer.end_ids,
            ),
        )
        for _ in range(options.requests)
    ]
    engines = {slots: Engine(model, EngineConfig(slots=slots, max_length=256)) for slots in (options.slots, 1)}

    def one_by_one(engine: Engine) -> tuple[list[list[int]], float]:
        begun = time.perf_counter()
        outputs = [engine.generate([prompt], params)[0].tokens for prompt, params in requests]
        return outputs, time.perf_counter() - begun

    def together(engine: Engine) -> tuple[list[list[int]], float]:
        begun, waiting, sent = time.perf_counter(), list(requests), []
        while waiting or engine.busy:
            for _ in range(min(order.randint(0, 4), len(waiting))):
                sent.append(engine.submit(*waiting.pop(0)))
            engine.step()
        return [request.tokens for request in sent], time.perf_counter() - begun

    together(engines[options.slots])  # compiles
    engines[1].generate([[1] * 100], SamplingParams(max_tokens=60))
    outputs, seconds = together(engines[options.slots])
    alone, alone_seconds = one_by_one(engines[options.slots])
    _, single_seconds = one_by_one(engines[1])
    tokens = sum(map(len, outputs))
    same = sum(one == other for one, other in zip(outputs, alone, strict=True))
    print(f"{same} of {len(requests)} outputs are token for token what each gives alone")
    rows = {
        f"together, {options.slots} slots": seconds,
        f"one by one, {options.slots} slots": alone_seconds,
        "one by one, 1 slot": single_seconds,
    }
    for name, took in rows.items():
        print(f"{name:<24}{took:>8.1f} s{tokens / took:>10.1f} tokens/s{took / seconds:>8.2f} times as long")
    print(json.dumps({"same": same, "requests": len(requests), "tokens": tokens, "seconds": rows}))


if __name__ == "__main__":
    main()
