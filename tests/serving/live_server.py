"""A real server on a free port, in a thread of its own, with a fake engine or whatever else a test gives it."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator, Mapping

import httpx
from fake_engine import EchoEngine

from opendeep_jax.serving.run import DrainingServer, listen, run
from opendeep_jax.serving.server import ServerConfig, make_app
from opendeep_jax.serving.service import EngineService
from opendeep_jax.text.files import byte_tokenizer
from opendeep_jax.text.tokenizer import Tokenizer

TEMPLATE = """{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}\
{% if add_generation_prompt %}<assistant>{% endif %}"""


@dataclasses.dataclass
class Live:
    """A server that runs."""

    address: str
    client: httpx.Client
    service: EngineService
    server: DrainingServer
    thread: threading.Thread

    def post(self, path: str, body=None, **more) -> httpx.Response:
        """Posts JSON, or `content=` as it is."""
        if body is not None:
            more["json"] = body
        return self.client.post(path, **more)

    def end(self) -> None:
        """As SIGTERM."""
        self.server.handle_exit(signal.SIGTERM, None)


def chat_tokenizer(template: str | None = TEMPLATE) -> Tokenizer:
    """Bytes as tokens, and a small chat template."""
    return dataclasses.replace(byte_tokenizer(), chat_template=template)


@contextlib.contextmanager
def live(
    make_engine: Callable[[], EchoEngine] = EchoEngine,
    tokenizer: Tokenizer | None = None,
    config: ServerConfig | None = None,
    drain_seconds: float = 5.0,
    name: str = "echo",
    max_waiting: int = 256,
    defaults: Mapping[str, float] | None = None,
) -> Iterator[Live]:
    """A server with this engine; ended, and its thread joined, on leaving."""
    service = EngineService(make_engine, max_waiting)
    app = make_app(name, service, tokenizer or chat_tokenizer(), config, defaults or {})
    listening, started = listen("127.0.0.1", 0), threading.Event()
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    found: list[DrainingServer] = []

    def serve() -> None:
        run(app, service, listening, drain_seconds, lambda server: (found.append(server), started.set()))

    thread = threading.Thread(target=serve)
    thread.start()
    assert started.wait(60)
    try:
        with httpx.Client(base_url=address, timeout=30) as client:
            yield Live(address, client, service, found[0], thread)
    finally:
        if thread.is_alive() and not service.draining:
            found[0].handle_exit(signal.SIGTERM, None)
        thread.join(60)
        assert not thread.is_alive()
