"""Server process: uvicorn around the application, with draining at SIGTERM."""

import asyncio
import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.serving.service import EngineService

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 2048
"""Connections beyond these are turned away, so that idle ones cannot take every file descriptor."""


class DrainingServer(uvicorn.Server):
    """Server that drains at the first SIGTERM or Ctrl-C (no new work, /ready fails) and ends at the second."""

    def __init__(self, config: uvicorn.Config, service: EngineService, drain_seconds: float):
        super().__init__(config)
        self._service, self._drain_seconds = service, drain_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as uvicorn does; keep the event loop, which signals are handed to."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Replace uvicorn's handler, which raises the signal again after a clean end, so the exit status is not 0."""
        if self._service.draining or self._loop is None:
            self.should_exit = self.force_exit = True
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what is cut off now is no failure
        else:
            self._service.draining = True
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        log.info("told to end: %d prompts may still finish", self._service.open_prompts)

        async def drain() -> None:
            await self._service.drain(self._drain_seconds)
            self.should_exit = True

        self._draining = asyncio.ensure_future(drain())


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens there; port 0 takes a free one. Raises ConfigError where that is not possible."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigError(
            f"--host={host} --port={port}: cannot listen there ({error}). Give an address of this machine, and a port "
            "that no other program has; --port=0 takes a free one."
        ) from error


def run(
    app: Starlette,
    service: EngineService,
    listening: socket.socket,
    drain_seconds: float,
    started: Callable[[DrainingServer], None],
) -> bool:
    """Serve until SIGTERM or Ctrl-C and then drain; return whether every answer was completed.

    Args:
        service: The application's.
        drain_seconds: Running answers may take so long to finish.
        started: Called, with the server, once the engine is there and requests are answered.
    Raises:
        ConfigError: the engine cannot be made as it is asked for.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=5,
        server_header=False,
        ws="none",
    )
    server = DrainingServer(config, service, drain_seconds)

    async def serve() -> None:
        serving = asyncio.ensure_future(server.serve([listening]))
        waiting = asyncio.ensure_future(service.wait_started())
        await asyncio.wait([serving, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if service.ready:
            started(server)
        elif service.refusal is not None:
            server.should_exit = True
        await serving

    asyncio.run(serve())
    if service.refusal is not None:
        raise service.refusal
    return not server.force_exit
