"""Many clients against `opendeep serve`: throughput, latencies, errors, and whether memory grows or pages are lost.

    python benchmarks/serving.py --model=MODEL [--clients=64] [--seconds=60] [--slots=16] [--dtype=float32]
    python benchmarks/serving.py --address=http://127.0.0.1:8000 [--pid=PID] ...

Starts the server (or takes one that runs), and lets each client ask one request after the other: prompts of 4 to 200
words, answers of 1 to 128 tokens, streamed or not; one in sixteen goes away in the middle of its answer. A first round
that is not counted compiles what is needed. Memory is the server's resident set, one third into the run and at its end.
The exit status is 1 where a request failed, a page was not given back, or memory grew by more than a twentieth.
"""

import argparse
import asyncio
import contextlib
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx

WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have from or had an".split()
LEAVES = 16
"""One in so many requests is given up in the middle."""
MOST_GROWTH = 1.05


class Answered(NamedTuple):
    """One request that was answered: seconds to the first token (of streams), seconds in all, tokens."""

    first: float | None
    whole: float
    tokens: int


def resident(pid: int) -> int:
    """Resident memory of a process, in bytes."""
    fields = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in fields if line.startswith("VmRSS"))


@contextlib.contextmanager
def started(arguments: list[str]) -> Iterator[tuple[str, int]]:
    """A server of its own: its address and process id; told to end, and waited for, on leaving."""
    command = [sys.executable, "-m", "opendeep_jax", "serve", "--port=0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        if " answers at " not in line:
            sys.exit(f"the server did not start: {line}")
        yield line.split(" answers at ")[1].split()[0], process.pid
    finally:
        process.terminate()
        if process.wait(60) != 0:
            sys.exit("the server did not end well")


async def ask(http: httpx.AsyncClient, draw: random.Random) -> Answered | None:
    """One request; None where this client left in the middle. Raises for what is no good answer."""
    most = draw.randint(1, 128)
    body = {
        "prompt": " ".join(draw.choices(WORDS, k=draw.randint(4, 200))),
        "max_tokens": most,
        "ignore_eos": True,
        "seed": draw.getrandbits(32),
    }
    begun = time.perf_counter()
    if draw.random() < 0.5:
        answer = await http.post("/v1/completions", json=body)
        answer.raise_for_status()
        tokens = answer.json()["usage"]["completion_tokens"]
        assert tokens == most, f"{tokens} tokens instead of {most}"
        return Answered(None, time.perf_counter() - begun, tokens)
    leaves, first, last = draw.randrange(LEAVES // 2) == 0, 0.0, ""
    async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            first = first or time.perf_counter()
            last = line or last
            if leaves:
                return None
    assert last == "data: [DONE]", last
    return Answered(first - begun, time.perf_counter() - begun, most)


class Load(NamedTuple):
    """What came of a load."""

    answered: list[Answered]
    errors: list[str]
    memory: list[int]
    """Bytes one third in and at the end, where the process is known."""
    seconds: float
    """Until the last answer was there."""


async def load(address: str, clients: int, seconds: float, pid: int | None) -> Load:
    """All clients for so long; none begins another request after that."""
    answered, errors, memory = [], [], []
    begun = time.monotonic()
    until = begun + seconds

    async def client(number: int) -> None:
        draw = random.Random(number)
        async with httpx.AsyncClient(base_url=address, timeout=300) as http:
            while time.monotonic() < until:
                try:
                    if (one := await ask(http, draw)) is not None:
                        answered.append(one)
                except (httpx.HTTPError, AssertionError, KeyError) as error:
                    errors.append(f"{type(error).__name__}: {error}")
                    await asyncio.sleep(0.1)

    async def measure() -> None:
        await asyncio.sleep(seconds / 3)
        memory.append(resident(pid))

    await asyncio.gather(*(client(number) for number in range(clients)), *([measure()] if pid else []))
    if pid:
        memory.append(resident(pid))
    return Load(answered, errors, memory, time.monotonic() - begun)


def pages(address: str) -> tuple[float, float]:
    """Free pages of the cache, and all, once the server is idle."""
    for _ in range(100):
        lines = httpx.get(f"{address}/metrics").text.splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        if float(values["opendeep_running"]) == 0 == float(values["opendeep_waiting"]):
            break
        time.sleep(0.05)
    return float(values["opendeep_free_pages"]), float(values["opendeep_total_pages"])


def percentile(values: list[float], share: float) -> float:
    """The value that this share of all lies below."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else float("nan")


def main(argv: list[str] | None = None) -> int:
    """Runs the load and prints what came of it; 1 where something is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--address")
    parser.add_argument("--pid", type=int)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        address, pid = given.address, given.pid
        if not address:
            sizes = [f"--slots={given.slots}", "--max_length=1024"]
            address, pid = stack.enter_context(started([f"--model={given.model}", f"--dtype={given.dtype}", *sizes]))
        asyncio.run(load(address, given.clients, min(given.seconds / 3, 20.0), None))
        answered, errors, memory, elapsed = asyncio.run(load(address, given.clients, given.seconds, pid))
        free, total = pages(address)
    tokens = sum(one.tokens for one in answered)
    print(f"{given.clients} clients, {elapsed:.1f} s: {len(answered)} answers, {len(errors)} errors")
    print(f"throughput          {tokens / elapsed:10.1f} tokens/s, {len(answered) / elapsed:.1f} answers/s")
    firsts = [one.first for one in answered if one.first is not None]
    wholes = [one.whole for one in answered]
    for name, values in (("first token", firsts), ("whole answer", wholes)):
        print(f"{name:<20}{percentile(values, 0.5):10.3f} s median, {percentile(values, 0.95):.3f} s 95th percentile")
    if memory:
        print(f"memory              {memory[0] / 2**20:10.1f} MiB one third in, {memory[1] / 2**20:.1f} MiB at the end")
    print(f"cache               {free:10.0f} of {total:.0f} pages free at the end")
    for error in sorted(set(errors))[:5]:
        print(f"  {error}")
    grew = bool(memory) and memory[1] > MOST_GROWTH * memory[0]
    return int(bool(errors) or not answered or free != total or grew)


if __name__ == "__main__":
    sys.exit(main())
