"""`opendeep serve --model=SOURCE [--port=8000 ...]`"""

import importlib.util
import logging
import math
import os
import sys
from collections.abc import Sequence

from opendeep_jax.cli.flags import make_flags, parse
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.serving.sources import check_choice, source_kind

PURPOSE = """Serves a model over HTTP as OpenAI's API has it: completions, chat, streaming; and a chat page at /.

SIGTERM or Ctrl-C lets running answers finish; a second one ends at once."""
USAGE = "--model=SOURCE|--workdir=RUN [--port=8000] [--name=value ...]"
LOCAL = ("127.0.0.1", "localhost", "::1", "[::1]")


def main(argv: Sequence[str]) -> None:
    """Serves until it is told to end. Raises ConfigError for a source that is none and settings that can't be."""
    flags = make_flags(
        model=("", "A run's work directory, a Hugging Face directory, or a .gguf file."),
        workdir=("", "The same as --model, for a run."),
        step=(-1, "Step of a run's checkpoint; -1 takes the newest."),
        name=("", "What clients call the model; by default the run's, the directory's or the file's name."),
        host=("127.0.0.1", "Address to listen on; 0.0.0.0 is reached from other machines."),
        port=(8000, "Port to listen on; 0 takes a free one."),
        api_key=("", "Key that clients must bring; the environment's OPENDEEP_API_KEY does the same, unseen by ps."),
        dtype=("", "float32 or bfloat16; by default what suits the machine."),
        slots=(8, "Answers that are written at once."),
        max_length=(0, "Longest prompt and answer together, in tokens; 0 takes the model's context, at most 4096."),
        cache_tokens=(0, "Tokens that the cache holds, of all slots together; 0 takes slots times max_length."),
        speculate=(0, "Tokens to guess ahead with a multi-token prediction module."),
        max_waiting=(256, "Prompts that may wait for a slot; more are told to come back."),
        max_body=(2 << 20, "Longest body of a request, in bytes."),
        timeout=(600.0, "An answer takes at most so many seconds, its wait included."),
        drain_seconds=(30.0, "At the end, running answers may take so long to finish."),
    )
    values = parse(flags, argv, "opendeep serve", PURPOSE, USAGE)
    if values.model and values.workdir:
        raise ConfigError("--model and --workdir are both given, and mean the same. Leave one out.")
    source, step = values.model or values.workdir, None if values.step < 0 else values.step
    least = {"slots": 1, "step": -1, "port": 0, "max_length": 0, "cache_tokens": 0, "speculate": 0, "max_waiting": 0}
    for name, smallest in (least | {"max_body": 1, "timeout": 1e-3, "drain_seconds": 0.0}).items():
        value = values[name].value
        if not (math.isfinite(value) and value >= smallest):
            raise ConfigError(f"--{name}={value}: must be at least {smallest:g}.")
    if values.port > 65535:
        raise ConfigError(f"--port={values.port}: must be at most 65535.")
    check_choice(source_kind(source), source, values.dtype, step)
    missing = [name for name in ("starlette", "uvicorn", "prometheus_client") if not importlib.util.find_spec(name)]
    if missing:
        raise ConfigError(f"the server needs {', '.join(missing)}: pip install 'opendeep-jax[serve]'")

    from opendeep_jax.serving.run import listen, run
    from opendeep_jax.serving.server import ServerConfig, make_app
    from opendeep_jax.serving.service import EngineService
    from opendeep_jax.serving.sources import open_codec, open_weights

    listening = listen(values.host, values.port)  # a port that is taken is said before the model is read
    codec, name = open_codec(source)
    key = values.api_key or os.environ.get("OPENDEEP_API_KEY", "")

    def make_engine():
        # Weights are read again where an engine has to be made again: a second copy is not kept for that day.
        from opendeep_jax.generation.engine import Engine, EngineConfig

        model = open_weights(source, values.dtype, step)
        config = EngineConfig(
            vocab_size=min(codec.vocab_size, model.config.vocab_size),
            slots=values.slots,
            max_length=values.max_length,
            cache_tokens=values.cache_tokens,
            speculate=values.speculate,
        )
        return Engine(model, config, consume=True)

    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    service = EngineService(make_engine, values.max_waiting)
    hosts = LOCAL if values.host in LOCAL and not key else ()
    config = ServerConfig(api_key=key, hosts=hosts, max_body_bytes=values.max_body, request_seconds=values.timeout)
    app = make_app(values.name or name, service, codec, config)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    if values.host not in LOCAL and not key:
        print("opendeep serve: whoever reaches this address can use the model: no --api_key is set.", file=sys.stderr)

    def started(_) -> None:
        print(f"{values.name or name} answers at http://{shown}:{port} (API: http://{shown}:{port}/v1)", flush=True)

    run(app, service, listening, values.drain_seconds, started)
