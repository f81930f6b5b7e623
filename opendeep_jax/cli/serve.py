"""`opendeep serve --model=SOURCE [--port=8000 ...]`"""

import importlib.util
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from opendeep_jax.cli.engine_flags import read_flags
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.exits import INTERRUPTED, OK

if TYPE_CHECKING:
    from opendeep_jax.generation.engine import Engine

PURPOSE = """Serves a model over HTTP as OpenAI's API has it: completions, chat, streaming; and a chat page at /.

SIGTERM or Ctrl-C lets running answers finish; a second one ends at once."""
USAGE = "--model=SOURCE|--workdir=RUN [--port=8000] [--name=value ...]"
LOCAL = ("127.0.0.1", "localhost", "::1", "[::1]")
FLAGS = {
    "name": ("", "What clients call the model; by default the run's, the directory's or the file's name."),
    "host": ("127.0.0.1", "Address to listen on; 0.0.0.0 is reached from other machines."),
    "port": (8000, "Port to listen on; 0 takes a free one."),
    "api_key": ("", "Key that clients must bring; the environment's OPENDEEP_API_KEY does the same, unseen by ps."),
    "slots": (8, "Answers that are written at once."),
    "max_length": (
        0,
        "Longest prompt and answer together, in tokens; 0 takes the model's context, as far as memory holds it.",
    ),
    "cache_tokens": (0, "Tokens that the cache holds, of all slots together; 0 takes slots times max_length."),
    "speculate": (0, "Tokens to guess ahead with a multi-token prediction module."),
    "warm_up": (512, "Between requests, compiles what those of up to so many tokens need; 0 leaves it to them."),
    "cors_origins": ("", "Web pages that may call /v1 from a browser, such as https://chat.example; * for any."),
    "max_waiting": (256, "Prompts that may wait for a slot; more are told to come back."),
    "max_body": (2 << 20, "Longest body of a request, in bytes."),
    "timeout": (600.0, "An answer takes at most so many seconds, its wait included."),
    "drain_seconds": (30.0, "At the end, running answers may take so long to finish."),
}
LEAST = {"slots": 1, "port": 0, "max_body": 1, "timeout": 1e-3, "drain_seconds": 0.0} | dict.fromkeys(
    ("max_length", "cache_tokens", "speculate", "warm_up", "max_waiting"), 0
)


def main(argv: Sequence[str]) -> int:
    """Serve until SIGTERM or Ctrl-C; return the exit status, 130 where a second signal cut answers off.

    Raises ConfigError for a source that is none and settings that can't be.
    """
    values, choice = read_flags(FLAGS, argv, "opendeep serve", PURPOSE, USAGE, LEAST)
    if values.port > 65535:
        raise ConfigError(f"--port={values.port}: must be at most 65535.")
    missing = [name for name in ("starlette", "uvicorn", "prometheus_client") if not importlib.util.find_spec(name)]
    if missing:
        raise ConfigError(f"the server needs {', '.join(missing)}: pip install 'opendeep-jax[serve]'")

    from opendeep_jax.pretrained.engines import open_engine
    from opendeep_jax.pretrained.sources import open_tokenizer, sampling_defaults
    from opendeep_jax.serving.run import listen, run
    from opendeep_jax.serving.server import ServerConfig, make_app
    from opendeep_jax.serving.service import EngineService, no_warm_up

    listening = listen(values.host, values.port)  # a port that is taken is said before the model is read
    tokenizer, name = open_tokenizer(choice.source)
    name, key = values.name or name, values.api_key or os.environ.get("OPENDEEP_API_KEY", "")

    def make_engine() -> "Engine":
        # Weights are read again where an engine has to be made again: a second copy is not kept for that day.
        from opendeep_jax.generation.requests import EngineConfig

        settings = {name: values[name].value for name in ("slots", "max_length", "cache_tokens", "speculate")}
        return open_engine(choice, tokenizer, EngineConfig(**settings))

    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    warm_up = partial(compiling, longest=values.warm_up) if values.warm_up else no_warm_up
    service = EngineService(make_engine, values.max_waiting, warm_up)
    hosts = LOCAL if values.host in LOCAL and not key else ()
    config = ServerConfig(
        api_key=key,
        hosts=hosts,
        max_body_bytes=values.max_body,
        request_seconds=values.timeout,
        origins=_origins(values.cors_origins),
    )
    defaults = sampling_defaults(tokenizer)
    app = make_app(name, service, tokenizer, config, defaults)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    if values.host not in LOCAL and not key:
        print("opendeep serve: whoever reaches this address can use the model: no --api_key is set.", file=sys.stderr)

    def started(_) -> None:
        print(f"{name} answers at http://{shown}:{port} (API: http://{shown}:{port}/v1)")
        engine = service.engine
        of = "" if engine.capacity == engine.model.max_length else f" of the model's {engine.model.max_length:,}"
        print(f"context: {engine.capacity:,} tokens{of}, for each of {engine.slots} answers at once")
        if defaults:
            said = ", ".join(f"{name} {value:g}" for name, value in defaults.items())
            print(f"sampling by generation_config.json where a request says nothing: {said}")
        sys.stdout.flush()

    status = OK if run(app, service, listening, values.drain_seconds, started) else INTERRUPTED
    if service.alive:  # the interpreter's own end would tear the thread out of a running program, and abort
        sys.stdout.flush()
        os._exit(status)
    return status


def _origins(given: str) -> tuple[str, ...]:
    """Return the origins that --cors_origins names. Raises ConfigError for one that no browser would send."""
    origins = tuple(filter(None, (origin.strip() for origin in given.split(","))))
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            raise ConfigError(
                f"--cors_origins={origin}: must be * or scheme://host[:port], without a path, as browsers send it: "
                "https://chat.example,http://localhost:3000."
            )
    return origins


def compiling(engine: "Engine", longest: int) -> Iterator[str]:
    """Compile what requests of up to so many tokens need, a program with each step of this iterator, which says what
    comes next. Standard error says it too.
    """
    from opendeep_jax.generation.warm_up import warm_up

    begun = time.perf_counter()
    for done, total in warm_up(engine, longest):
        seconds = time.perf_counter() - begun
        said = f"compiling {done + 1} of {total} programs, {seconds:.0f} s"
        if done == total:
            said = f"compiled {total} programs in {seconds:.0f} s"
        if sys.stderr.isatty():  # one line that is written over
            print(f"\r{said:<60}", end="\n" * (done == total), file=sys.stderr, flush=True)
        elif done == total:
            print(said, file=sys.stderr, flush=True)
        if done < total:
            yield said
