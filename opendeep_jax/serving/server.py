"""The HTTP server: OpenAI's completions and chat, health, metrics and a chat page, on Starlette."""

import asyncio
import contextlib
import dataclasses
import hmac
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import prometheus_client
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opendeep_jax.generation.answers import Piece
from opendeep_jax.serving import requests, responses
from opendeep_jax.serving.errors import CLIENT_GONE, FORESEEN, ApiError, as_api_error, error_response
from opendeep_jax.serving.metrics import Metrics
from opendeep_jax.serving.page import page_response
from opendeep_jax.serving.requests import ApiRequest
from opendeep_jax.serving.schemas import ChatRequest, CompletionRequest
from opendeep_jax.serving.service import EngineService, ServiceJob, Unavailable
from opendeep_jax.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

KNOWN_PATHS = (
    "/",
    "/health",
    "/ready",
    "/metrics",
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
)


TEMPLATE_THREADS = 4


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Settings of the server."""

    api_key: str = ""
    """Key that /v1 requires as `Authorization: Bearer KEY`; none if empty."""
    hosts: tuple[str, ...] = ()
    """Names by which /v1 may be called, without ports; any if empty. A web page whose own name was made to point at
    this machine still calls the server by that name."""
    origins: tuple[str, ...] = ()
    """Origins of web pages that browsers may let call /v1; `*` for any."""
    max_body_bytes: int = 2 << 20
    """Longest body of a request."""
    body_seconds: float = 30.0
    """A body takes at most this long to arrive."""
    request_seconds: float = 600.0
    """An answer takes at most this long, its wait included."""


@dataclasses.dataclass(frozen=True)
class Served:
    """One served model, and all that the routes need."""

    name: str
    service: EngineService
    tokenizer: Tokenizer
    config: ServerConfig
    metrics: Metrics
    since: int
    defaults: Mapping[str, float]
    """The model's own sampling."""
    templates: ThreadPoolExecutor
    """Threads that chat templates run in: however long they take, other requests are read elsewhere."""


def make_app(
    name: str,
    service: EngineService,
    tokenizer: Tokenizer,
    config: ServerConfig | None = None,
    defaults: Mapping[str, float] = requests.NONE,
) -> Starlette:
    """Return the ASGI application of one model. It starts the service with itself; whoever runs it drains the service.

    Args:
        name: What clients call the model; only ever compared.
        service: The engine's service, not started.
        tokenizer: Text to the model's tokens and back.
        defaults: The model's own sampling, for what a request leaves open.
    """
    templates = ThreadPoolExecutor(TEMPLATE_THREADS, "template")
    config = config or ServerConfig()
    served = Served(name, service, tokenizer, config, Metrics(service), int(time.time()), defaults, templates)

    @contextlib.asynccontextmanager
    async def lifespan(_) -> AsyncIterator[None]:
        service.start()
        yield
        await service.drain(0)
        templates.shutdown(wait=False, cancel_futures=True)

    v1 = [
        Route("/models", _models),
        Route("/models/{model:path}", _model),
        Route("/completions", _completions, methods=["POST"]),
        Route("/chat/completions", _chat, methods=["POST"]),
        Route("/responses", _respond, methods=["POST"]),
    ]
    app = Starlette(
        routes=[
            Route("/", page_response),
            Route("/health", _health),
            Route("/ready", _ready),
            Route("/metrics", _metrics),
            Mount("/v1", routes=v1, middleware=[Middleware(_Guard, config=config)]),
        ],
        middleware=[Middleware(_RequestCounter, metrics=served.metrics), *_cors(config)],
        exception_handlers={kind: error_response for kind in (*FORESEEN, Exception)},
        lifespan=lifespan,
    )
    app.state.served = served
    return app


def _cors(config: ServerConfig) -> list[Middleware]:
    """Return the middleware for pages of other origins. It answers preflight requests before the key is checked, and is
    outermost, so that such pages can read errors, too.
    """
    if not config.origins:
        return []
    more = {"allow_methods": ["GET", "POST"], "allow_headers": ["*"], "max_age": 600}
    return [Middleware(CORSMiddleware, allow_origins=list(config.origins), **more)]


async def _health(request: Request) -> Response:
    """Report whether the process and its engine work; a supervisor restarts the process if not."""
    failure = _served(request).service.failure
    body = {"status": "failed", "reason": failure} if failure else {"status": "ok"}
    return JSONResponse(body, 503 if failure else 200)


async def _ready(request: Request) -> Response:
    """Report whether to send requests: not while the model is read or programs are compiled, though requests between
    these are accepted, and not once the server drains.
    """
    service = _served(request).service
    ready = service.ready and not service.preparing
    status = "ready" if ready else "draining" if service.draining else "starting"
    body = {"status": status} | ({"progress": service.preparing} if status == "starting" and service.preparing else {})
    return JSONResponse(body, 200 if ready else 503)


async def _metrics(request: Request) -> Response:
    registry = _served(request).metrics.registry
    return Response(
        prometheus_client.generate_latest(registry), media_type=prometheus_client.exposition.CONTENT_TYPE_PLAIN_0_0_4
    )


async def _models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_described(_served(request))]})


async def _model(request: Request) -> Response:
    served = _served(request)
    _check_model(served, request.path_params["model"])
    return JSONResponse(_described(served))


async def _completions(request: Request) -> Response:
    return await _answer(request, partial(_read, CompletionRequest.model_validate_json, requests.completion))


async def _chat(request: Request) -> Response:
    served = _served(request)
    read = partial(requests.chat, seconds=served.config.request_seconds)
    return await _answer(request, partial(_read, ChatRequest.model_validate_json, read), served.templates)


async def _respond(request: Request) -> Response:
    served = _served(request)
    read = partial(responses.response, seconds=served.config.request_seconds)
    return await _answer(request, partial(_read, responses.read, read), served.templates)


def _read(parse: Callable[[bytes], Any], prepare: Callable[..., ApiRequest], served: Served, body: bytes) -> ApiRequest:
    """Return what a body asks of the engine."""
    if served.service.limits is None:
        raise Unavailable("The model is still being made ready. Ask again in a few seconds.")
    found = parse(body)
    _check_model(served, found.model or served.name)
    return prepare(found, served.tokenizer, served.service.limits, served.name, served.defaults)


async def _answer(
    request: Request, read: Callable[[Served, bytes], ApiRequest], pool: ThreadPoolExecutor | None = None
) -> Response:
    """Answer a request, whole or as a stream; the time that it may take begins as its body is there.

    Args:
        read: makes of a body what is asked of the engine.
        pool: where that is done; by default where the event loop does such things.
    """
    served = _served(request)
    body = await _body(request, served.config)
    until = asyncio.get_running_loop().time() + served.config.request_seconds
    async with asyncio.timeout_at(until):  # a body of megabytes takes a while to be read and tokenized
        asked = await asyncio.get_running_loop().run_in_executor(pool, read, served, body)
    job = served.service.submit(asked.requests)
    if asked.stream:
        return _EventStream(job, _events(served, asked, job, until))
    return JSONResponse(await _while_connected(request, _complete(served, asked, job, until)))


async def _complete(served: Served, asked: ApiRequest, job: ServiceJob, until: float) -> dict[str, Any]:
    async with job, asyncio.timeout_at(until):
        scores = None
        if asked.scores_prompts >= 0:
            scores = await served.service.score(asked.prompts, [1] * len(asked.prompts), asked.scores_prompts)
        async for _ in _pieces(served, asked, job):
            pass
    return asked.complete(scores)


async def _events(served: Served, asked: ApiRequest, job: ServiceJob, until: float) -> AsyncIterator[str]:
    """Yield the server-sent events of a stream. An error that comes late is the last one."""
    try:
        async with asyncio.timeout_at(until):
            for event in asked.begin():
                yield _event(event)
            async for index, piece in _pieces(served, asked, job):
                for event in asked.add(index, piece):
                    yield _event(event)
        for event in asked.end():
            yield _event(event)
    except Exception as error:
        if not isinstance(error, FORESEEN):
            log.exception("a stream failed")
        yield _event(asked.failed(as_api_error(error).body))


async def _pieces(served: Served, asked: ApiRequest, job: ServiceJob) -> AsyncIterator[tuple[int, Piece]]:
    """Yield each new piece with the index of its choice."""
    async for index, progress in job:
        answer = asked.answers[index]
        piece = answer.push(progress)
        if piece.finish:
            job.abort(index)  # a stop string is nothing that the engine knows of
            served.metrics.answered(answer.submitted, answer.first, answer.last, answer.tokens)
        if piece:
            yield index, piece


def _event(data: dict[str, Any] | str) -> str:
    """Return a server-sent event; of a response's, which have types, by its name too."""
    if isinstance(data, str):
        return f"data: {data}\n\n"
    name = f"event: {data['type']}\n" if "type" in data else ""
    return f"{name}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'), allow_nan=False)}\n\n"


class _EventStream(StreamingResponse):
    """Server-sent events of a job, which ends with the response however that ends."""

    media_type = "text/event-stream"

    def __init__(self, job: ServiceJob, events: AsyncIterator[str]):
        # Proxies that gather a response before they pass it on are told not to.
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._job:
            await super().__call__(scope, receive, send)


async def _while_connected(request: Request, work: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """Return the result of `work`, which is canceled when the client goes. Raises ClientDisconnect then."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ClientDisconnect
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _body(request: Request, config: ServerConfig) -> bytes:
    """The body, counted as it comes: what Content-Length says is a claim. Raises ApiError for what is too long."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "The body must be JSON: send the header Content-Type: application/json.")
    most, size, parts = config.max_body_bytes, 0, []
    claimed = request.headers.get("content-length", "0")
    too_long = ApiError(
        413, f"The body is longer than the {most:,} bytes that this server takes.", code="body_too_long"
    )
    if claimed.isdecimal() and len(claimed) < 20 and int(claimed) > most:
        raise too_long
    try:
        async with asyncio.timeout(config.body_seconds), contextlib.aclosing(request.stream()) as stream:
            async for part in stream:
                size += len(part)
                if size > most:
                    raise too_long
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"The body did not arrive within {config.body_seconds:g} seconds.") from None
    return b"".join(parts)


def _served(request: Request) -> Served:
    return request.app.state.served


def _described(served: Served) -> dict[str, Any]:
    limits = served.service.limits
    about = {"id": served.name, "object": "model", "created": served.since, "owned_by": "opendeep"}
    return about | ({"max_model_len": limits.max_length} if limits else {})


def _check_model(served: Served, name: str) -> None:
    if name != served.name:
        shown = name if len(name) <= 100 else name[:100] + "…"
        raise ApiError(404, f"There is no model {shown!r} here; this is {served.name!r}.", "model", "model_not_found")


class _Guard:
    """Middleware that admits requests for one of our hosts with the API key, if a key is set."""

    def __init__(self, app: ASGIApp, config: ServerConfig):
        self._app, self._key, self._hosts = app, config.api_key.encode(), config.hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        host = re.sub(r":\d*$", "", headers.get(b"host", b"").decode("latin-1")).lower()
        if self._hosts and host not in self._hosts:
            raise ApiError(421, f"This server answers to {' and '.join(self._hosts)} alone, not to {host[:100]!r}.")
        if self._key:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            # All of both is compared whatever they begin with, so that no time tells of it.
            if not (hmac.compare_digest(given.strip(), self._key) and kind.lower() == b"bearer"):
                raise ApiError(
                    401,
                    "The API key is missing or wrong: send the header Authorization: Bearer KEY.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        await self._app(scope, receive, send)


class _RequestCounter:
    """Middleware that counts answered requests by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = CLIENT_GONE

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            path = scope["path"] if scope["path"] in KNOWN_PATHS else "other"
            self._metrics.requests.labels(path, str(status)).inc()
